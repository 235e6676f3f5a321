"""True reward against KL over training: where it turns, by beta, loss and data.

  python -m experiments.overoptimisation --workdir=runs/overoptimisation

On the exact task, few pairs over many epochs, a quarter of their labels
flipped. Rafailov et al. 2024 (arXiv:2406.02900) find that the quality of DPO,
IPO and SLiC's hinge rises and then falls with the KL, sooner at a smaller beta.
Here the reward is the truth, and checkpoints of each run are measured by
enumeration. IPO has tau = beta / 4. Hardware: two CPU cores.
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
_STEPS = {"tiny": 420, "paper": 4200}
_BATCH = 32
_POINTS = 7
_BY = ("method", "beta", "knob")


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
  for seed in builder.seeds:
    for beta in BETAS[settings.scale]:
      for method in LOSSES:
        add_run(builder, method, beta, NUM_PAIRS[0], seed)
      for num in NUM_PAIRS[1:]:
        add_run(builder, "DPO", beta, num, seed)
  return list(builder.runs.values())


collect = exact_sweep.collect


def curves(rows: list[Row]) -> list[Row]:
  """Averages seeds, by method, beta, pairs and step.

  Every curve gets a step 0, the reference, whose reward and KL are 0. Rows
  without a step are left out.

  Returns:
    Rows of `sweep.mean_and_spread`, with the curve's name as `data`.
  """
  rows = [row for row in rows if "step" in row]
  starts = {tuple(row[name] for name in _BY): row for row in rows}.values()
  start = dict(step=0, reward=0.0, kl=0.0)
  rows = [*({**row, **start} for row in starts), *rows]
  means = sweep.mean_and_spread(rows, (*_BY, "step"), ("reward", "kl"))
  for row in means:
    row["data"] = f"{row['method']} {row['beta']:g}, {row['knob']}"
  return means


def table(rows: list[Row]) -> list[Row]:
  """Returns where the mean true reward of each curve is largest, and its end.

  Returns:
    "run", the curve's name; and "step", "KL", "E[r]" and the spread "+-", after
    "top " at the largest reward and after "last " at the last step.
  """
  found: dict[str, list[Row]] = {}
  for row in curves(rows):
    found.setdefault(row["data"], []).append(row)
  out = []
  for name, points in found.items():
    top = max(points, key=lambda row: row["reward"])
    last = max(points, key=lambda row: row["step"])
    line: Row = {"run": name}
    for prefix, row in (("top", top), ("last", last)):
      line |= {f"{prefix} step": row["step"], f"{prefix} KL": row["kl"]}
      line |= {f"{prefix} E[r]": row["reward"]}
      line |= {f"{prefix} +-": row["reward_spread"]}
    out.append(line)
  return out


def plot(rows: list[Row], path: str) -> list[str]:
  """Plots true reward against KL by loss, and against steps by data.

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
  sweep.draw(axes[2], dpo, "step", "reward", by="data")
  axes[2].set(xlabel="step", ylabel="true reward, E[r]", title="DPO, by data")
  for axis in axes:
    sweep.label_curves(axis)
  return sweep.save_figure(figure, rows, path)


if __name__ == "__main__":
  sweep.main(sys.modules[__name__], table)
