"""Policies of posts, judged on news that they never saw, DPO paper's table 1.

  python -m experiments.ood_summaries --workdir=runs/win_rates

DPO, PPO and SFT are trained on posts. Their summaries of news, at temperatures
0 and 0.25, are compared with those of the news's own data (Rafailov et al.
2023, arXiv:2305.18290, sec. 6.3). At `tiny` the news tell facts of the same
kinds in other words, and name a second person; the judge is the truth. At
`paper` they are those of CNN and the Daily Mail. Flags of `paper` are those of
tldr_temperature.
"""

import functools
import sys

import matplotlib.pyplot as plt

from experiments import sweep
from experiments.sweep import Row, Run, Settings
from experiments.win_rates import figures
from experiments.win_rates.runs import Builder

TEMPERATURES = (0.0, 0.25)
DOMAINS = ("posts", "news")


def runs(settings: Settings) -> list[Run]:
  """Returns the runs that train policies and measure them on both domains.

  DPO and PPO are measured for every seed, SFT for seed 0. The runs that these
  need are among them.
  """
  builder = Builder(settings)
  for domain in DOMAINS:
    for seed in builder.seeds:
      for method in ("dpo", "ppo"):
        builder.add_temperatures(
          "ood", "posts", method, seed, TEMPERATURES, domain=domain
        )
    builder.add_temperatures(
      "ood", "posts", "sft", 0, TEMPERATURES, domain=domain
    )
  return list(builder.runs.values())


collect = functools.partial(sweep.collect, name="ood_summaries")


def _with_bars(rows: list[Row]) -> list[Row]:
  return [
    row | {"bar": f"{row['domain']}\nT {row['temperature']:g}"}
    for row in figures.measured(rows)
  ]


def table(rows: list[Row]) -> list[Row]:
  """Returns the win rate of each method on each domain by temperature.

  Returns:
    "domain", "method", "T 0" and "T 0.25"; see `figures.pivot`.
  """
  by = ("domain", "method")
  rows = figures.measured(rows)
  return figures.pivot(rows, by, "temperature", "T {:g}".format)


def plot(rows: list[Row], path: str) -> list[str]:
  """Plots the win rates as bars, grouped by domain and temperature."""
  figure, axis = plt.subplots(figsize=(6.5, 4.2), layout="constrained")
  figures.draw_bars(axis, _with_bars(rows), "bar")
  return sweep.save_figure(figure, rows, path)


if __name__ == "__main__":
  sweep.main(sys.modules[__name__], table, has_judge=True)
