"""DPO and IPO at many betas, compared with the optimum of each beta.

  python -m experiments.beta_ablation --workdir=runs/beta_ablation

On the exact task: reward and KL at every beta, and the distance of the trained
policy from pi* of that beta. IPO has a finite target and stops there, whereas
DPO continues. The paper's betas for sentiment are .05, .1, 1 and 5 (Rafailov
et al. 2023, arXiv:2305.18290, fig. 2). Hardware: two CPU cores.
"""

import sys

import matplotlib.pyplot as plt

from experiments import exact_sweep, sweep
from experiments.exact_sweep import Builder
from experiments.sweep import Row, Run, Settings

BETAS = (0.05, 0.1, 0.25, 0.5, 1.0, 2.0, 5.0)


def runs(settings: Settings) -> list[Run]:
  """Returns DPO at every beta, and IPO at every other one."""
  builder = Builder(settings)
  for seed in builder.seeds:
    for beta in BETAS:
      builder.add_dpo(seed, beta)
    for beta in BETAS[1::2]:
      builder.add("IPO", exact_sweep.ipo(beta), seed=seed, beta=beta)
  return list(builder.runs.values())


collect = exact_sweep.collect


def plot(rows: list[Row], path: str) -> list[str]:
  """Plots reward against KL, and regret and distance against beta."""
  figure, axes = plt.subplots(1, 3, figsize=(14, 4.4), layout="constrained")
  means = exact_sweep.mean_rows(rows)
  means = [row for row in means if row["beta"] is not None]
  exact_sweep.draw_frontier(axes[0], rows)
  sweep.draw(axes[0], means, "kl", "reward")
  sweep.draw(axes[1], means, "beta", "regret")
  sweep.draw(axes[2], means, "beta", "total_variation")
  axes[0].set(xlabel="KL to the reference (nats)", ylabel="E[r]")
  axes[1].set(xlabel="beta", ylabel="J(pi*) - J(pi)", xscale="log")
  axes[2].set(xlabel="beta", ylabel="total variation from pi*", xscale="log")
  axes[0].legend()
  return sweep.save_figure(figure, rows, path)


if __name__ == "__main__":
  sweep.main(sys.modules[__name__], exact_sweep.table)
