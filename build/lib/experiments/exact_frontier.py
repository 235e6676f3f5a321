"""Reward against KL where the optimum is known exactly.

  python -m experiments.exact_frontier --workdir=runs/exact_frontier

Every baseline and the main losses, through the one training loop, on the task
of `exact_task.py`: E[r], the KL and pi* = pi_ref exp(r / beta) / Z are sums
over all completions. The frontier is the largest reward at each KL. A method
is compared with it at the KL that it reaches (`share`), and with the optimum
of its beta (`regret`, `total_variation`). Hardware: two CPU cores.
"""

import math
import sys

import matplotlib.pyplot as plt

from experiments import exact_sweep, sweep
from experiments.exact_sweep import Builder
from experiments.sweep import Row, Run, Settings

FLIPS = (0.1, 0.2, 0.4)
BEST_OF = (2, 4, 8, 16, 64)
# Betas of DPO, of the other losses on pairs, and of on-policy methods.
_BETAS = {
  "tiny": ((0.25, 0.5, 1.0), (0.5,), (0.5, 1.0)),
  "paper": ((0.1, 0.25, 0.5, 1.0, 2.0),) * 3,
}
# Times that on-policy DPO draws samples.
_ROUNDS = 4


def _add_offline(
  builder: Builder, seed: int, dpo: tuple[float, ...], others: tuple[float, ...]
) -> None:
  """Adds runs on pairs that the reference drew.

  SimPO, unlikelihood and Preferred-FT have fixed settings. So has a last run of
  DPO, whose labels are those of the larger reward.

  Args:
    builder: receives the runs.
    seed: seed of the runs.
    dpo: betas of DPO.
    others: betas of IPO, hinge and KTO.
  """
  for beta in dpo:
    builder.add_dpo(seed, beta)
  for beta in others:
    builder.add("IPO", exact_sweep.ipo(beta), seed=seed, beta=beta)
    for method, name in (("hinge", "hinge"), ("KTO", "kto")):
      builder.add(method, dict(name=name, beta=beta), seed=seed, beta=beta)
  for gamma in (0.0, 0.5):
    loss = dict(name="simpo", beta=2.0, gamma_over_beta=gamma)
    builder.add("SimPO", loss, seed=seed, knob=f"gamma={gamma:g}")
  for alpha in (0.1, 0.5, 0.9):
    loss = dict(name="unlikelihood", alpha=alpha)
    builder.add("Unlikelihood", loss, seed=seed, knob=f"alpha={alpha:g}")
  builder.add("Preferred-FT", dict(name="preferred_ft"), seed=seed)
  builder.add_dpo(seed, 0.5, label="argmax")


def _add_on_policy(
  builder: Builder, seed: int, betas: tuple[float, ...]
) -> None:
  """Adds a reward model, and methods that learn from the policy's samples."""
  model = builder.add("reward model", dict(name="reward_model"), seed=seed)
  ppo = dict(name="ppo", value_weight=0.5)
  for beta in betas:
    rollouts = dict(kind="rollouts", kl_weight=beta, judge=builder.truth)
    own = dict(seed=seed, beta=beta)
    step = rollouts | dict(every_steps=4, num_samples=1)
    builder.add("PPO on the truth", ppo, online=step, **own)
    learned = step | dict(judge=f"reward:{builder.root}/{model}")
    builder.add("RM + PPO", ppo, online=learned, after=(model,), **own)
    builder.add(
      "RLOO on the truth", dict(name="reinforce"), online=rollouts, **own
    )
    builder.add_on_policy_dpo(seed, beta, rounds=_ROUNDS)


def runs(settings: Settings) -> list[Run]:
  """Returns the reference, pairs by label and flips, and every method."""
  builder = Builder(settings)
  dpo, others, on_policy = _BETAS[settings.scale]
  for seed in builder.seeds:
    _add_offline(builder, seed, dpo, others)
    for flips in FLIPS:
      builder.add_noisy(seed, 0.5, flips)
    _add_on_policy(builder, seed, on_policy)
  return list(builder.runs.values())


def collect(workdir: str) -> sweep.Collected:
  """Collects trained runs, Best-of-N and the frontier."""
  return exact_sweep.collect(workdir, BEST_OF)


def plot(rows: list[Row], path: str) -> list[str]:
  """Plots reward and share against KL, and regret against flips."""
  figure, axes = plt.subplots(1, 3, figsize=(15, 4.8), layout="constrained")
  means = exact_sweep.mean_rows(rows)
  means = [row for row in means if row["label"] == "bradley_terry"]
  clean = [
    row
    for row in means
    if not row["flips"]
    # A reward model is not a policy: its KL is NaN.
    and not math.isnan(row["kl"])
    and row["method"] not in ("frontier", "reference")
  ]
  exact_sweep.draw_frontier(axes[0], rows)
  sweep.draw(axes[0], clean, "kl", "reward")
  sweep.draw(axes[1], clean, "kl", "share")
  noisy = [
    row
    for row in means
    if row["beta"] == 0.5 and row["method"] in ("DPO", "cDPO", "robust DPO")
  ]
  sweep.draw(axes[2], noisy, "flips", "regret")
  kl = "KL to the reference (nats)"
  axes[0].set(xlabel=kl, ylabel="E[r]", xlim=(0, None))
  axes[1].set(xlabel=kl, ylabel="share of the frontier's E[r] at that KL")
  axes[2].set(xlabel="labels flipped", ylabel="regret at beta 0.5")
  axes[0].legend(fontsize=7)
  if noisy:
    axes[2].legend()
  return sweep.save_figure(figure, rows, path)


if __name__ == "__main__":
  sweep.main(sys.modules[__name__], exact_sweep.table)
