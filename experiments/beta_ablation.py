"""Effect of beta on DPO and IPO, against the optimum of each beta.

  python -m experiments.beta_ablation --workdir=runs/beta_ablation

On the exact task. Reward and KL of every beta, how far the trained policy is
from pi* of that beta, and where IPO, which has a finite target, stops although
DPO continues. The paper's betas for sentiment are .05, .1, 1 and 5 (Rafailov et
al. 2023, arXiv:2305.18290, fig. 2). Two CPU cores.
"""

import sys

import matplotlib.pyplot as plt

from experiments import exact_sweep, harness
from experiments.exact_sweep import Sweep
from experiments.harness import Row, Run, Settings

BETAS = (0.05, 0.1, 0.25, 0.5, 1.0, 2.0, 5.0)


def runs(settings: Settings) -> list[Run]:
  """DPO and IPO over the betas."""
  sweep = Sweep(settings)
  for seed in sweep.seeds:
    for beta in BETAS:
      sweep.add_dpo(seed, beta)
    for beta in BETAS[1::2]:
      sweep.add("IPO", exact_sweep.ipo(beta), seed=seed, beta=beta)
  return list(sweep.runs.values())


def collect(workdir: str) -> harness.Collected:
  return exact_sweep.collect(workdir)


def plot(rows: list[Row], path: str) -> list[str]:
  """Reward against KL; regret and distance against beta."""
  figure, axes = plt.subplots(1, 3, figsize=(14, 4.4), layout="constrained")
  means = harness.mean_and_spread(rows, exact_sweep.BY, exact_sweep.FIGURES)
  means = [row for row in means if row["beta"] is not None]
  exact_sweep.draw_frontier(axes[0], rows)
  exact_sweep.draw(axes[0], means, "kl", "reward")
  exact_sweep.draw(axes[1], means, "beta", "regret")
  exact_sweep.draw(axes[2], means, "beta", "total_variation")
  axes[0].set(xlabel="KL to the reference (nats)", ylabel="E[r]")
  axes[1].set(xlabel="beta", ylabel="J(pi*) - J(pi)", xscale="log")
  axes[2].set(xlabel="beta", ylabel="total variation from pi*", xscale="log")
  axes[0].legend()
  written = harness.save_figure(figure, rows, path)
  plt.close(figure)
  return written


if __name__ == "__main__":
  harness.main(sys.modules[__name__], exact_sweep.table)
