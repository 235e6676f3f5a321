"""DPO, cDPO, robust DPO and IPO on wrong labels.

  python -m experiments.label_noise --workdir=runs/label_noise

On the exact task, with 0 to 40 % of the labels flipped. cDPO (Mitchell 2023)
and robust DPO (Ray Chowdhury et al. 2024, arXiv:2403.00409) are told the rate.
Robust DPO's expected loss is that of clean labels, so its optimum is pi* of
the nominal beta. cDPO's optimum has a smaller KL, and DPO's is between them.
The first panel compares with the nominal optimum; the second compares methods
at the KL that each has reached. Hardware: two CPU cores.
"""

import sys

import matplotlib.pyplot as plt

from experiments import exact_sweep, sweep
from experiments.exact_sweep import Builder
from experiments.sweep import Row, Run, Settings

FLIPS = (0.0, 0.1, 0.2, 0.4)
BETA = 0.5


def runs(settings: Settings) -> list[Run]:
  """Returns the losses at every rate of flips.

  Without flips DPO, cDPO and robust DPO are the same, and DPO is run once.
  """
  builder = Builder(settings)
  for seed in builder.seeds:
    for flips in FLIPS:
      if flips:
        builder.add_noisy(seed, BETA, flips)
      else:
        builder.add_dpo(seed, BETA)
      builder.add(
        "IPO", exact_sweep.ipo(BETA), seed=seed, beta=BETA, flips=flips
      )
  return list(builder.runs.values())


collect = exact_sweep.collect


def plot(rows: list[Row], path: str) -> list[str]:
  """Plots regret, share of the frontier and KL against the rate of flips."""
  figure, axes = plt.subplots(1, 3, figsize=(13, 4.2), layout="constrained")
  means = exact_sweep.mean_rows(rows)
  means = [row for row in means if row["beta"] is not None]
  # Without flips cDPO and robust DPO equal DPO.
  clean = [row for row in means if row["method"] == "DPO" and not row["flips"]]
  means += [
    row | {"method": method}
    for row in clean
    for method in ("cDPO", "robust DPO")
  ]
  for axis, name, label in (
    (axes[0], "regret", f"regret at beta {BETA:g}"),
    (axes[1], "share", "share of the frontier's E[r] at its KL"),
    (axes[2], "kl", "KL to the reference (nats)"),
  ):
    sweep.draw(axis, means, "flips", name)
    axis.set(xlabel="labels flipped", ylabel=label)
  if means:
    axes[0].legend()
  return sweep.save_figure(figure, rows, path)


if __name__ == "__main__":
  sweep.main(sys.modules[__name__], exact_sweep.table)
