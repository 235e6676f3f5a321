"""Dialogue: win rate by temperature and over training, DPO paper's fig. 3.

  python -m experiments.hh_dialogue --workdir=runs/win_rates

A policy's answer wins if the judge prefers it to that of the data (Rafailov et
al. 2023, arXiv:2305.18290, sec. 6.2). DPO starts from Preferred-FT, as in the
paper. At `tiny` questions and answers are drawn from a grammar, and the judge
is the truth; there SFT learns from all answers, and takes the place of the
paper's prompted base model. At `paper` the policy is Pythia-2.8B on Anthropic's
dialogues, without that base model, and the answer of the data is the chosen
one; its flags are those of tldr_temperature.
"""

import functools
import sys

import matplotlib.pyplot as plt

from experiments import sweep
from experiments.sweep import Row, Run, Settings
from experiments.win_rates import figures
from experiments.win_rates.runs import Builder

TEMPERATURES = (0.25, 0.7, 1.0)
OVER_TRAINING = (0.7, 1.0)
_TASK = "questions"


def runs(settings: Settings) -> list[Run]:
  """Returns the policies, and their win rates by temperature and by step."""
  builder = Builder(settings)
  best_of = builder.plan(_TASK).size["best_of"]
  for seed in builder.seeds:
    for method in ("dpo", "preferred_ft"):
      builder.add_temperatures("hh", _TASK, method, seed, TEMPERATURES)
    builder.add_temperatures(
      "hh_steps", _TASK, "dpo", seed, OVER_TRAINING, all_steps=True
    )
    builder.add_best_of("hh", _TASK, seed, TEMPERATURES, (best_of,))
  if settings.scale == "tiny":
    builder.add_temperatures("hh", _TASK, "sft", 0, TEMPERATURES)
  return list(builder.runs.values())


collect = functools.partial(sweep.collect, name="hh_dialogue")


def _split(rows: list[Row]) -> tuple[list[Row], list[Row]]:
  """Returns the rows of last checkpoints, and those over training.

  DPO begins as Preferred-FT, at step 0.
  """
  rows = figures.measured(rows)
  over_steps = [r for r in rows if r["run"].startswith("hh_steps")]
  last = [r for r in rows if not r["run"].startswith("hh_steps")]
  begin = [
    row | {"step": 0}
    for row in last
    if row["method"] == "Preferred-FT" and row["temperature"] in OVER_TRAINING
  ]
  return last, [
    row | {"curve": f"DPO, T {row['temperature']:g}"}
    for row in begin + over_steps
  ]


def table(rows: list[Row]) -> list[Row]:
  """Returns the win rate of each method at each temperature, then by step.

  Returns:
    "method", such as "DPO, step 15", and for each temperature "T 0.7" and so
    on; see `figures.pivot`.
  """
  last, over_steps = _split(rows)
  by_step = [row | {"method": f"DPO, step {row['step']}"} for row in over_steps]
  return figures.pivot(
    last + by_step, ("method",), "temperature", "T {:g}".format
  )


def plot(rows: list[Row], path: str) -> list[str]:
  """Plots the win rate against the temperature, and against DPO's steps."""
  figure, axes = plt.subplots(1, 2, figsize=(11, 4.4), layout="constrained")
  last, over_steps = _split(rows)
  figures.draw(
    axes[0],
    last,
    "temperature",
    xlabel="sampling temperature",
    ylabel="win rate against answers of the data",
    xticks=TEMPERATURES,
    xlim=(0.2, 1.3),
  )
  figures.draw(axes[1], over_steps, "step", by="curve", xlabel="step of DPO")
  axes[1].margins(x=0.2)
  return sweep.save_figure(figure, rows, path)


if __name__ == "__main__":
  sweep.main(sys.modules[__name__], table, has_judge=True)
