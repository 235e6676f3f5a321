"""Reward against KL where the optimum is known exactly.

  python -m experiments.exact_frontier --workdir=runs/exact_frontier

Every baseline and the main losses, through the one training loop, on the task
of `exact_task.py`: E[r], the KL and pi* = pi_ref exp(r / beta) / Z are sums
over all completions. The frontier is the line that no policy can cross; a
method is held against it at its own KL (`share`), and against the optimum of
its beta (`regret`, `total_variation`). Two CPU cores.
"""

import sys

import matplotlib.pyplot as plt

from experiments import exact_sweep, harness
from experiments.exact_sweep import Sweep
from experiments.harness import Row, Run, Settings

FLIPS = (0.1, 0.2, 0.4)
BEST_OF = (2, 4, 8, 16, 64)
# Betas of DPO, of the other losses, and of the baselines.
_BETAS = {
  "tiny": ((0.25, 0.5, 1.0), (0.5,), (0.5, 1.0)),
  "paper": ((0.1, 0.25, 0.5, 1.0, 2.0),) * 3,
}
# How often on-policy DPO samples afresh.
_ROUNDS = 4


def _add_offline(
  sweep: Sweep, seed: int, dpo: tuple[float, ...], others: tuple[float, ...]
) -> None:
  """Losses on the pairs that were drawn from the reference."""
  for beta in dpo:
    sweep.add_dpo(seed, beta)
  for beta in others:
    sweep.add("IPO", exact_sweep.ipo(beta), seed=seed, beta=beta)
    for method, name in (("hinge", "hinge"), ("KTO", "kto")):
      sweep.add(method, dict(name=name, beta=beta), seed=seed, beta=beta)
  for gamma in (0.0, 0.5):
    loss = dict(name="simpo", beta=2.0, gamma_over_beta=gamma)
    sweep.add("SimPO", loss, seed=seed, knob=f"gamma={gamma:g}")
  for alpha in (0.1, 0.5, 0.9):
    loss = dict(name="unlikelihood", alpha=alpha)
    sweep.add("Unlikelihood", loss, seed=seed, knob=f"alpha={alpha:g}")
  sweep.add("Preferred-FT", dict(name="preferred_ft"), seed=seed)
  sweep.add_dpo(seed, 0.5, label="argmax")


def _add_on_policy(sweep: Sweep, seed: int, betas: tuple[float, ...]) -> None:
  """A reward model, and what learns from samples of the policy."""
  model = sweep.add("reward model", dict(name="reward_model"), seed=seed)
  ppo = dict(name="ppo", value_weight=0.5)
  for beta in betas:
    rollouts = dict(kind="rollouts", kl_weight=beta, judge=sweep.truth)
    own = dict(seed=seed, beta=beta)
    step = rollouts | dict(every_steps=4, num_samples=1)
    sweep.add("PPO on the truth", ppo, online=step, **own)
    learned = step | dict(judge=f"reward:{sweep.root}/{model}")
    sweep.add("RM + PPO", ppo, online=learned, after=(model,), **own)
    sweep.add(
      "RLOO on the truth", dict(name="reinforce"), online=rollouts, **own
    )
    sweep.add_on_policy_dpo(seed, beta, rounds=_ROUNDS)


def runs(settings: Settings) -> list[Run]:
  """The reference, pairs by label and flips, and every method's runs."""
  sweep = Sweep(settings)
  dpo, others, on_policy = _BETAS[settings.scale]
  for seed in sweep.seeds:
    _add_offline(sweep, seed, dpo, others)
    for flips in FLIPS:
      sweep.add_noisy(seed, 0.5, flips)
    _add_on_policy(sweep, seed, on_policy)
  return list(sweep.runs.values())


def collect(workdir: str) -> harness.Collected:
  """Returns rows of trained runs, of Best-of-N and of the frontier."""
  return exact_sweep.collect(workdir, BEST_OF)


def plot(rows: list[Row], path: str) -> list[str]:
  """Reward against KL, share of the frontier, and what flips do."""
  figure, axes = plt.subplots(1, 3, figsize=(15, 4.8), layout="constrained")
  means = harness.mean_and_spread(rows, exact_sweep.BY, exact_sweep.FIGURES)
  means = [row for row in means if row["label"] == "bradley_terry"]
  aside = ("frontier", "reference")
  clean = [
    row
    for row in means
    # A reward model is not a policy, and has no KL.
    if not row["flips"]
    and row["kl"] == row["kl"]
    and row["method"] not in aside
  ]
  exact_sweep.draw_frontier(axes[0], rows)
  exact_sweep.draw(axes[0], clean, "kl", "reward")
  exact_sweep.draw(axes[1], clean, "kl", "share")
  noisy = [
    row
    for row in means
    if row["beta"] == 0.5 and row["method"] in ("DPO", "cDPO", "robust DPO")
  ]
  exact_sweep.draw(axes[2], noisy, "flips", "regret")
  kl = "KL to the reference (nats)"
  axes[0].set(xlabel=kl, ylabel="E[r]", xlim=(0, None))
  axes[1].set(xlabel=kl, ylabel="share of the frontier's E[r] at that KL")
  axes[2].set(xlabel="labels flipped", ylabel="regret at beta 0.5")
  axes[0].legend(fontsize=7)
  if noisy:
    axes[2].legend()
  written = harness.save_figure(figure, rows, path)
  plt.close(figure)
  return written


if __name__ == "__main__":
  harness.main(sys.modules[__name__], exact_sweep.table)
