"""What DPO starts from, and what it is held near.

  python -m experiments.reference_ablation --workdir=runs/reference_ablation

On the exact task, whose pairs the fine-tuned policy draws (SFT). DPO starts
from it; from an untrained policy; or from one that was first trained on the
chosen responses of the pairs, as the DPO paper does where there is no SFT
policy (sec. 4). Each is its own reference. TR-DPO (Gorbatovski et al. 2024,
arXiv:2404.09656) moves the reference towards the policy, in part or wholly.
Without a reference DPO compares log-probs, and SimPO their means. The KL of all
is to the fine-tuned policy. Hardware: two CPU cores.
"""

import sys
from typing import Any

import matplotlib.pyplot as plt

from experiments import exact_sweep, sweep
from experiments.exact_sweep import Builder
from experiments.sweep import Row, Run, Settings

BETAS = {"tiny": (0.25, 1.0), "paper": (0.1, 0.25, 0.5, 1.0, 2.0)}
_STEPS = {"tiny": 240, "paper": 2500}
_BATCH = 64
# Times that TR-DPO moves its reference.
_UPDATES = 8
_UNTRAINED = {"policy.init": "random"}


def _tr_dpo(steps: int, alpha: float) -> dict[str, Any]:
  return {
    "reference.kind": "ema",
    "reference.alpha": alpha,
    "reference.every_steps": steps // _UPDATES,
  }


def methods(
  beta: float, steps: int, chosen: str
) -> dict[str, tuple[dict[str, Any], dict[str, Any]]]:
  """Returns the loss, and further keys of the config, of each method.

  Args:
    beta: beta of the loss.
    steps: training steps.
    chosen: folder of the policy that was trained on the chosen responses.
  """
  dpo = dict(name="dpo", beta=beta)
  return {
    "SFT, then DPO": (dpo, {}),
    "DPO without SFT": (dpo, _UNTRAINED),
    "chosen, then DPO": (dpo, {"policy.init": f"run:{chosen}"}),
    "TR-DPO, alpha 0.6": (dpo, _tr_dpo(steps, 0.6)),
    "TR-DPO, alpha 1": (dpo, _tr_dpo(steps, 1.0)),
    "no reference": (dpo | dict(reward="logps"), {}),
    # Means over four letters, so four times the scale of sums.
    "SimPO": (dict(name="simpo", beta=4 * beta, gamma_over_beta=0.0), {}),
  }


def runs(settings: Settings) -> list[Run]:
  """Returns every method at every beta, and what they start from."""
  scale = settings.scale
  builder = Builder(settings, steps=_STEPS[scale], batch_size=_BATCH)
  builder.use_every_pair_once()
  for seed in builder.seeds:
    chosen = builder.add(
      "chosen only",
      dict(name="preferred_ft"),
      seed=seed,
      learning_rate=3e-3,
      changes=_UNTRAINED,
    )
    folder = f"{builder.root}/{chosen}"
    for beta in BETAS[scale]:
      found = methods(beta, builder.steps, folder)
      for method, (loss, changes) in found.items():
        builder.add(
          method,
          loss,
          seed=seed,
          beta=beta,
          learning_rate=2e-3,
          after=(chosen,) if method == "chosen, then DPO" else (),
          changes=changes,
        )
  return list(builder.runs.values())


collect = exact_sweep.collect


def plot(rows: list[Row], path: str) -> list[str]:
  """Plots reward against KL beside the frontier, and regret by beta."""
  figure, axes = plt.subplots(1, 2, figsize=(12, 4.4), layout="constrained")
  means = exact_sweep.mean_rows(rows)
  found = [
    row for row in means if row["beta"] or row["method"] == "chosen only"
  ]
  exact_sweep.draw_frontier(axes[0], rows)
  sweep.draw(axes[0], found, "kl", "reward")
  sweep.draw(axes[1], [r for r in found if r["beta"]], "beta", "regret")
  axes[0].set(xlabel="KL to the fine-tuned policy (nats)", ylabel="E[r]")
  axes[1].set(xlabel="beta", ylabel="regret at that beta", xscale="log")
  for axis in axes:
    sweep.label_curves(axis)
  return sweep.save_figure(figure, rows, path)


if __name__ == "__main__":
  sweep.main(sys.modules[__name__], exact_sweep.table)
