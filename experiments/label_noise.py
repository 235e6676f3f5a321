"""Labels that are wrong: DPO, cDPO, robust DPO and IPO.

  python -m experiments.label_noise --workdir=runs/label_noise

On the exact task, 0 to 40 % of the labels turned round. cDPO (Mitchell 2023)
and robust DPO (Ray Chowdhury et al. 2024, arXiv:2403.00409) are told the rate.
Robust DPO's expected loss is that of clean labels, so it aims at pi* of the
nominal beta; cDPO aims lower, DPO at something between. Whether that is better
is another matter: the second panel compares at the KL that each has reached.
Two CPU cores.
"""

import sys

import matplotlib.pyplot as plt

from experiments import exact_sweep, harness
from experiments.exact_sweep import Sweep
from experiments.harness import Row, Run, Settings

FLIPS = (0.0, 0.1, 0.2, 0.4)
BETA = 0.5


def runs(settings: Settings) -> list[Run]:
  """The losses at every rate; without flips the first three are one."""
  sweep = Sweep(settings)
  for seed in sweep.seeds:
    for flips in FLIPS:
      if flips:
        sweep.add_noisy(seed, BETA, flips)
      else:
        sweep.add_dpo(seed, BETA)
      sweep.add("IPO", exact_sweep.ipo(BETA), seed=seed, beta=BETA, flips=flips)
  return list(sweep.runs.values())


def collect(workdir: str) -> harness.Collected:
  return exact_sweep.collect(workdir)


def plot(rows: list[Row], path: str) -> list[str]:
  """Regret, share of the frontier, and KL against the rate of flips."""
  figure, axes = plt.subplots(1, 3, figsize=(13, 4.2), layout="constrained")
  means = harness.mean_and_spread(rows, exact_sweep.BY, exact_sweep.FIGURES)
  means = [row for row in means if row["beta"] is not None]
  # At a rate of 0 both are DPO.
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
    exact_sweep.draw(axis, means, "flips", name)
    axis.set(xlabel="labels flipped", ylabel=label)
  if means:
    axes[0].legend()
  written = harness.save_figure(figure, rows, path)
  plt.close(figure)
  return written


if __name__ == "__main__":
  harness.main(sys.modules[__name__], exact_sweep.table)
