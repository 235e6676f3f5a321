"""DPO by what it starts from, and by what it is held near.

  python -m experiments.reference_ablation --workdir=runs/reference_ablation

On the exact task, whose pairs the fine-tuned policy draws (SFT). DPO starts
from it; from an untrained policy; or from one that was first trained on the
chosen responses of the pairs, as the DPO paper does where there is no SFT
policy (sec. 4). Each is its own reference. TR-DPO (Gorbatovski et al. 2024,
arXiv:2404.09656) moves the reference towards the policy, in part or wholly.
Without a reference DPO compares log-probs; on responses of one length that is
SimPO without its margin. The KL of all is to the fine-tuned policy. Hardware:
two CPU cores.
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
  """Plots reward against KL with the frontier, and share by method and beta."""
  figure, axes = plt.subplots(1, 2, figsize=(12, 4.4), layout="constrained")
  means = [row for row in exact_sweep.mean_rows(rows) if row["beta"]]
  names = list(dict.fromkeys(row["method"] for row in means))
  betas = sorted({row["beta"] for row in means})
  exact_sweep.draw_frontier(axes[0], rows)
  sweep.draw(axes[0], means, "kl", "reward")
  axes[0].set(xlabel="KL to the fine-tuned policy (nats)", ylabel="E[r]")
  largest = max((row["kl"] for row in means), default=1.0)
  axes[0].set(xlim=(0, 1.5 * largest), ylim=(0, None))
  axes[0].legend(fontsize=8)
  width = 0.8 / max(len(betas), 1)
  for number, beta in enumerate(betas):
    mine = [row for row in means if row["beta"] == beta]
    axes[1].barh(
      [names.index(row["method"]) + number * width for row in mine],
      [row["share"] for row in mine],
      xerr=[row["share_spread"] for row in mine],
      height=width,
      color=sweep.colour(len(names) + number),
      label=f"beta {beta:g}",
    )
  axes[1].set_yticks([i + 0.4 - width / 2 for i in range(len(names))], names)
  axes[1].invert_yaxis()
  axes[1].set(xlabel="share of the frontier's E[r] at that KL")
  axes[1].set(xlim=(0, 1.1))
  axes[1].grid(alpha=0.3, axis="x")
  axes[1].legend(loc="right")
  return sweep.save_figure(figure, rows, path)


if __name__ == "__main__":
  sweep.main(sys.modules[__name__], exact_sweep.table)
