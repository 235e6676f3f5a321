"""Best-of-N: win rate against N at several temperatures, DPO paper's fig. 4.

  python -m experiments.best_of_n --workdir=runs/win_rates

A reward model chooses the best of N samples of the reference, for summaries and
for dialogue (Rafailov et al. 2023, arXiv:2305.18290, app. D). At `tiny` the
truth chooses too: the difference is the reward model's part in the saturation.
Data, judges and the flags of `paper` are those of tldr_temperature.
"""

import functools
import sys

import matplotlib.pyplot as plt

from experiments import sweep
from experiments.sweep import Row, Run, Settings
from experiments.win_rates import figures
from experiments.win_rates.runs import Builder

TEMPERATURES = (0.5, 1.0)
TASKS = ("posts", "questions")


def runs(settings: Settings) -> list[Run]:
  """Returns the policies, and the win rates of the best of 1, 2, 4, ..."""
  builder = Builder(settings)
  for task in TASKS:
    most = builder.plan(task).size["most_samples"]
    counts = [n for n in (1, 2, 4, 8, 16, 32, 64, 128) if n <= most]
    for seed in builder.seeds:
      builder.add_best_of(
        "best_of_n", task, seed, TEMPERATURES, counts, by_truth=True
      )
  return list(builder.runs.values())


collect = functools.partial(sweep.collect, name="best_of_n")


def _with_curves(rows: list[Row]) -> list[Row]:
  return [
    row | {"curve": f"{row['chosen_by']}, T {row['temperature']:g}"}
    for row in figures.measured(rows)
  ]


def table(rows: list[Row]) -> list[Row]:
  """Returns the win rate of each task, chooser and temperature by N.

  Returns:
    "task", "chosen_by", "temperature", and for each N "N 1" and so on; see
    `figures.pivot`.
  """
  by = ("task", "chosen_by", "temperature")
  return figures.pivot(figures.measured(rows), by, "count", "N {}".format)


def plot(rows: list[Row], path: str) -> list[str]:
  """Plots the win rate against N, a panel for each task."""
  figure, axes = plt.subplots(1, 2, figsize=(11, 4.4), layout="constrained")
  for axis, task in zip(axes, TASKS, strict=True):
    mine = [row for row in _with_curves(rows) if row["task"] == task]
    figures.draw(axis, mine, "count", by="curve", title=task, xlabel="N")
    axis.set_xscale("log", base=2)
    axis.set_xlim(0.8, 8 * max((row["count"] for row in mine), default=1))
  return sweep.save_figure(figure, rows, path)


if __name__ == "__main__":
  sweep.main(sys.modules[__name__], table, has_judge=True)
