"""Losses that correct for length, on labels that prefer long responses.

  python -m experiments.length_bias --workdir=runs/length_bias

On an exact task with responses of 1 to 4 tokens, the end token included. The
true reward does not depend on length: its mean under the reference is 0 at
every length. The labels are drawn by Bradley-Terry from the true reward plus 1
a token. Park et al. 2024 (R-DPO, arXiv:2403.19159) find that DPO lengthens
beyond its data. R-DPO with alpha = 1 takes exactly this bias out: its optimum
is pi* of the true reward. The rest are LD-DPO (2409.06411), SAMPO (2406.10957),
SimPO (2405.14734) and length-normalised DPO (2411.15124). Hardware: two CPU
cores.
"""

import dataclasses
import sys

import matplotlib.pyplot as plt
import numpy as np

from experiments import exact_sweep, sweep
from experiments.exact_space import Space
from experiments.exact_sweep import Builder
from experiments.exact_task import Task
from experiments.sweep import Row, Run, Settings

SPACE = Space(7, 4, has_end=True, prompts=("ab", "cd", "ef", "ga"))
BETA = 0.5
# Reward of a token in the labels.
BIAS = 1.0
_UNBIASED = "DPO, labels without bias"
# Mean log-ratios are smaller than sums by the mean number of tokens, about 3.
LOSSES = {
  _UNBIASED: dict(name="dpo", beta=BETA),
  "DPO": dict(name="dpo", beta=BETA),
  "R-DPO": dict(name="r_dpo", beta=BETA, alpha=BIAS),
  "LD-DPO": dict(name="ld_dpo", beta=BETA, alpha=0.5),
  "SAMPO": dict(name="sampo", beta=BETA),
  "length-normalised DPO": dict(name="length_normalized_dpo", beta=3 * BETA),
  "SimPO": dict(name="simpo", beta=2.0, gamma_over_beta=0.5),
}
_STEPS = {"tiny": 200, "paper": 2500}
_PAIRS = {"tiny": 6400, "paper": 200_000}
_BATCH = 32
METRICS = ("tokens", "slope", "reward", "kl", "share", "regret")


def lengths(task: Task, logps: np.ndarray) -> Row:
  """Computes how a policy's responses depend on length.

  Returns:
    `tokens`, the mean number in a response; and `slope`, the slope of the
    log-ratio on it, by least squares under the reference: nats a token.
  """
  num_tokens = task.space.num_tokens
  ref = np.exp(task.ref_logps)
  away = num_tokens - (ref @ num_tokens)[:, None]
  log_ratios = logps - task.ref_logps
  slope = (ref * away * log_ratios).sum(-1) / (ref * away**2).sum(-1)
  return {
    "tokens": float((np.exp(logps) @ num_tokens).mean()),
    "slope": float(slope.mean()),
  }


def add_run(builder: Builder, method: str, num: int, seed: int) -> str:
  """Adds a run of LOSSES[method] on `num` pairs, and one that writes them.

  The labels have the bias, except for the control, _UNBIASED.

  Returns:
    The run's name.
  """
  bias = 0.0 if method == _UNBIASED else BIAS

  def write(task: Task, path: str) -> None:
    rewards = task.rewards + bias * task.space.num_tokens
    dataclasses.replace(task, rewards=rewards).write_pairs(
      path, num, label="bradley_terry", flips=0.0, seed=seed
    )

  data = builder.add_data(
    f"pairs_{bias:g}_s{seed}",
    write,
    exact_sweep.make_labels("pairs", seed),
    pairs=num,
    bias=bias,
  )
  return builder.add(
    method, LOSSES[method], seed=seed, beta=BETA, data=data, extra=lengths
  )


def runs(settings: Settings) -> list[Run]:
  """Returns DPO without the bias, and every loss with it."""
  scale = settings.scale
  builder = Builder(
    settings,
    steps=_STEPS[scale],
    batch_size=_BATCH,
    space=SPACE,
    num_slots=2,
  )
  for seed in builder.seeds:
    for method in LOSSES:
      add_run(builder, method, _PAIRS[scale], seed)
  return list(builder.runs.values())


collect = exact_sweep.collect


def means(rows: list[Row]) -> list[Row]:
  """Averages METRICS over seeds, by loss; see `sweep.mean_and_spread`.

  Methods that are not in LOSSES are left out.
  """
  rows = [row for row in rows if row["method"] in LOSSES]
  return sweep.mean_and_spread(rows, ("method",), METRICS)


def table(rows: list[Row]) -> list[Row]:
  """Returns a row for each loss: "loss" and METRICS, means over seeds.

  "+-tokens", "+-slope" and "+-reward" are spreads.
  """
  out = []
  for row in means(rows):
    line: Row = {"loss": row["method"]}
    for name in METRICS:
      line[name] = row[name]
      if name in ("tokens", "slope", "reward"):
        line[f"+-{name}"] = row[f"{name}_spread"]
    out.append(line)
  return out


def plot(rows: list[Row], path: str) -> list[str]:
  """Plots true reward against mean length, and the slopes on length."""
  figure, axes = plt.subplots(1, 2, figsize=(12, 4.4), layout="constrained")
  found = means(rows)
  sweep.draw(axes[0], found, "tokens", "reward")
  axes[0].set(xlabel="tokens of a response", ylabel="true reward, E[r]")
  sweep.label_curves(axes[0])
  names = [row["method"] for row in found]
  axes[1].barh(
    names,
    [row["slope"] for row in found],
    xerr=[row["slope_spread"] for row in found],
    color=[sweep.colour(number) for number in range(len(found))],
  )
  axes[1].invert_yaxis()
  axes[1].axvline(BIAS / BETA, color="k", linestyle=":")
  axes[1].set(
    xlabel="slope of the log-ratio on length (nats a token)\n"
    "dotted: the optimum of the biased labels"
  )
  axes[1].grid(alpha=0.3, axis="x")
  return sweep.save_figure(figure, rows, path)


if __name__ == "__main__":
  sweep.main(sys.modules[__name__], table)
