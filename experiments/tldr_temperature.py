"""Summaries: win rate against sampling temperature, DPO paper's fig. 2 right.

  python -m experiments.tldr_temperature --workdir=runs/win_rates
  python -m experiments.tldr_temperature --scale=paper --workdir=gs://... \
      --config.eval.judge=api:MODEL --config.eval.api.url=URL

A policy's summary wins if the judge prefers it to the reference summary of the
data (Rafailov et al. 2023, arXiv:2305.18290, sec. 6.2). At `tiny` posts and
summaries are drawn from a grammar, and the judge is the truth; at `paper` they
are Reddit's, the policy is GPT-J, and a model on a server judges. PPO and
Best-of-N use a reward model of the pairs that DPO learns from. The experiments
hh_dialogue, best_of_n and ood_summaries share the policies of one workdir.
"""

import functools
import sys

import matplotlib.pyplot as plt

from experiments import sweep
from experiments.sweep import Row, Run, Settings
from experiments.win_rates import figures
from experiments.win_rates.runs import Builder

TEMPERATURES = (0.0, 0.25, 0.5, 0.75, 1.0)
_TASK = "posts"


def runs(settings: Settings) -> list[Run]:
  """Returns the policies, and their win rates at each temperature."""
  builder = Builder(settings)
  best_of = builder.plan(_TASK).size["best_of"]
  for seed in builder.seeds:
    for method in ("dpo", "ppo", "preferred_ft"):
      builder.add_temperatures("tldr", _TASK, method, seed, TEMPERATURES)
    builder.add_best_of("tldr", _TASK, seed, TEMPERATURES[1:], (best_of,))
  builder.add_temperatures("tldr", _TASK, "sft", 0, TEMPERATURES)
  return list(builder.runs.values())


collect = functools.partial(sweep.collect, name="tldr_temperature")


def table(rows: list[Row]) -> list[Row]:
  """Returns the win rate of each method at each temperature.

  Returns:
    "method", and for each temperature "T 0.25" and so on; see `figures.pivot`.
  """
  rows = figures.measured(rows)
  return figures.pivot(rows, ("method",), "temperature", "T {:g}".format)


def plot(rows: list[Row], path: str) -> list[str]:
  """Plots the win rate against the temperature."""
  figure, axis = plt.subplots(figsize=(6.5, 4.4), layout="constrained")
  figures.draw(
    axis,
    figures.measured(rows),
    "temperature",
    xlabel="sampling temperature",
    ylabel="win rate against reference summaries",
    xticks=TEMPERATURES,
    xlim=(-0.05, 1.3),
  )
  return sweep.save_figure(figure, rows, path)


if __name__ == "__main__":
  sweep.main(sys.modules[__name__], table, has_judge=True)
