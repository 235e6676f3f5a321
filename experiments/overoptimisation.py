"""True reward and objective over training: where they turn, by beta and data.

  python -m experiments.overoptimisation --workdir=runs/overoptimisation

On the exact task, few pairs over many epochs, a quarter of their labels
flipped. Rafailov et al. 2024 (arXiv:2406.02900) find that the quality of DPO,
IPO and SLiC's hinge rises and then falls with the KL, sooner at a smaller beta.
Here the reward is the truth, and checkpoints of each run are measured by
enumeration. Regret is that of the objective E[r] - beta KL. IPO has tau = beta
/ 4. Single seeds are noisy, so there are more of them than elsewhere. Hardware:
two CPU cores.
"""

import dataclasses
import functools
import sys
from typing import Any

import matplotlib.pyplot as plt

from experiments import exact_measure, exact_sweep, sweep
from experiments.exact_sweep import Builder
from experiments.exact_task import Task
from experiments.sweep import Row, Run, Settings

BETAS = {"tiny": (0.05, 0.5), "paper": (0.05, 0.1, 0.25, 0.5, 1.0)}
# Pairs; the losses are compared on the fewest.
NUM_PAIRS = (200, 2000)
LOSSES = ("DPO", "IPO", "hinge")
# Labels that are flipped after they were drawn by Bradley-Terry.
FLIPS = 0.25
_SEEDS = {"tiny": 8, "paper": 10}
_STEPS = {"tiny": 420, "paper": 4200}
_BATCH = 32
_POINTS = 7
_BY = ("method", "beta", "knob")
_METRICS = ("reward", "kl", "regret")


def _loss(method: str, beta: float) -> dict[str, Any]:
  if method == "IPO":
    return exact_sweep.ipo(beta)
  return dict(name=method.lower(), beta=beta)


def add_run(
  builder: Builder, method: str, beta: float, num: int, seed: int
) -> str:
  """Adds a run on `num` pairs, measured at evenly spaced checkpoints.

  The run that writes the pairs is added too, unless it exists.

  Returns:
    The run's name.
  """

  def write(task: Task, path: str) -> None:
    task.write_pairs(path, num, label="bradley_terry", flips=FLIPS, seed=seed)

  data = builder.add_data(
    f"pairs_{num}_s{seed}",
    write,
    exact_sweep.make_labels("pairs", seed, flips=FLIPS),
    pairs=num,
  )
  name = builder.add(
    method,
    _loss(method, beta),
    seed=seed,
    beta=beta,
    knob=f"{num} pairs",
    data=data,
    changes={
      # A decay would hide where a longer run turns.
      "optimizer.schedule": "constant",
      "checkpoint.every_steps": builder.steps // _POINTS,
      "checkpoint.keep": _POINTS,
      "reference.kind": "frozen",
    },
  )
  measure = functools.partial(
    exact_measure.measure_steps,
    reference=f"{builder.root}/reference",
    space=builder.space,
    beta=beta,
  )
  builder.runs[name] = dataclasses.replace(builder.runs[name], measure=measure)
  return name


def runs(settings: Settings) -> list[Run]:
  """Returns losses by beta on few pairs, and DPO on more of them."""
  builder = Builder(
    settings, steps=_STEPS[settings.scale], batch_size=_BATCH, num_slots=2
  )
  for seed in range(_SEEDS[settings.scale]):
    for beta in BETAS[settings.scale]:
      for method in LOSSES:
        add_run(builder, method, beta, NUM_PAIRS[0], seed)
      for num in NUM_PAIRS[1:]:
        add_run(builder, "DPO", beta, num, seed)
  return list(builder.runs.values())


collect = exact_sweep.collect


def curves(rows: list[Row]) -> list[Row]:
  """Averages seeds, by method, beta, pairs and step.

  Every curve gets a step 0, the reference, whose reward and KL are 0, and whose
  regret is the objective of the optimum. Rows without a step are left out.

  Returns:
    Rows of `sweep.mean_and_spread`, with the curve's name as `data`.
  """
  rows = [row for row in rows if "step" in row]
  starts = {tuple(row[name] for name in _BY): row for row in rows}.values()
  rows = [*map(_start, starts), *rows]
  means = sweep.mean_and_spread(rows, (*_BY, "step"), _METRICS)
  for row in means:
    row["data"] = f"{row['method']} {row['beta']:g}, {row['knob']}"
  return means


def _start(row: Row) -> Row:
  """Returns the row of the reference, of which J = E[r] - beta KL is 0."""
  best = row["regret"] + row["reward"] - row["beta"] * row["kl"]
  return {**row, "step": 0, "reward": 0.0, "kl": 0.0, "regret": best}


def table(rows: list[Row]) -> list[Row]:
  """Returns where the mean regret of each curve is least, and its end.

  Returns:
    "run", the curve's name; and "step", "KL", "E[r]", "regret" and the spreads
    "+-E[r]" and "+-regret", after "best " at the least regret and after "last "
    at the last step.
  """
  found: dict[str, list[Row]] = {}
  for row in curves(rows):
    found.setdefault(row["data"], []).append(row)
  out = []
  for name, points in found.items():
    best = min(points, key=lambda row: row["regret"])
    last = max(points, key=lambda row: row["step"])
    line: Row = {"run": name}
    for prefix, row in (("best", best), ("last", last)):
      line |= {f"{prefix} step": row["step"], f"{prefix} KL": row["kl"]}
      for column, metric in (("E[r]", "reward"), ("regret", "regret")):
        line[f"{prefix} {column}"] = row[metric]
        line[f"{prefix} +-{column}"] = row[f"{metric}_spread"]
    out.append(line)
  return out


def plot(rows: list[Row], path: str) -> list[str]:
  """Plots true reward against KL by loss, and DPO's regret by step and data.

  The losses have a panel for the smallest and one for the largest beta.
  """
  figure, axes = plt.subplots(1, 3, figsize=(15, 4.2), layout="constrained")
  means = curves(rows)
  betas = sorted({row["beta"] for row in means})
  for axis, beta in zip(axes, betas[:1] + betas[-1:], strict=False):
    few = f"{NUM_PAIRS[0]} pairs"
    mine = [r for r in means if (r["beta"], r["knob"]) == (beta, few)]
    sweep.draw(axis, mine, "kl", "reward", order="step")
    axis.set(xlabel="KL to the reference (nats)", ylabel="true reward, E[r]")
    axis.set(title=f"beta {beta:g}, {few}")
  dpo = [row for row in means if row["method"] == "DPO"]
  sweep.draw(axes[2], dpo, "step", "regret", by="data")
  axes[2].set(xlabel="step", ylabel="regret at that beta", title="DPO, by data")
  for axis in axes:
    sweep.label_curves(axis)
  return sweep.save_figure(figure, rows, path)


if __name__ == "__main__":
  sweep.main(sys.modules[__name__], table)
