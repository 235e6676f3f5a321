"""Every loss of the catalogue, each tuned with the same small budget.

  python -m experiments.loss_ablation --workdir=runs/loss_ablation

On the exact task, every loss that learns from pairs gets up to three trials.
The knob that sets its strength takes a first value with two learning rates,
and a second value with the larger of them. The best trial by
J = E[r] - 0.5 KL counts. An ordering of losses that were not tuned says more
about defaults than about losses (SimPO, arXiv:2405.14734). `share` compares
each loss with the frontier at the KL that it reaches. Hardware: two CPU cores.
"""

import sys

import matplotlib.pyplot as plt

from dpo_jax.losses import CATALOGUE
from experiments import exact_sweep, sweep
from experiments.exact_sweep import Builder
from experiments.sweep import Row, Run, Settings

# Learning rates of the first and of the second strength.
LEARNING_RATES = ((1e-3, 3e-3), (3e-3,))
# J is computed at this beta for all losses.
BETA = 0.5
_STEPS = {"tiny": 120, "paper": 2500}
_BATCH = {"tiny": 64, "paper": 128}
# Knob that sets the strength of a loss, and its two values.
_STRENGTH: dict[str, tuple[str, tuple[float, float]]] = {
  "ipo": ("tau", (0.06, 0.25)),
  "slic": ("sft_weight", (0.1, 1.0)),
  "orpo": ("odds_ratio_weight", (0.1, 1.0)),
  "cpo": ("beta", (0.1, 0.5)),
  "simpo": ("beta", (2.0, 10.0)),
  "alphapo": ("beta", (2.0, 10.0)),
  "length_normalized_dpo": ("beta", (1.0, 4.0)),
  "unlikelihood": ("alpha", (0.1, 0.5)),
  "sft": ("", (0.0,)),
  "preferred_ft": ("", (0.0,)),
  "simper": ("", (0.0,)),
}
_DEFAULT_STRENGTH = ("beta", (0.25, 1.0))


def names() -> list[str]:
  """Returns the losses that train a policy on pairs, or on parts of pairs."""
  # A reward model is not a policy, samples belong to another experiment, and
  # the pairs have an order but no scores.
  return [
    name
    for name, loss in CATALOGUE.items()
    if loss.group != "samples"
    and loss.reward != "values"
    and loss.link_row.gap_weight is None
  ]


def runs(settings: Settings) -> list[Run]:
  """Returns up to three trials of every loss, with one seed."""
  builder = Builder(
    settings,
    steps=_STEPS[settings.scale],
    batch_size=_BATCH[settings.scale],
  )
  for name in names():
    knob, values = _STRENGTH.get(name, _DEFAULT_STRENGTH)
    for value, rates in zip(values, LEARNING_RATES, strict=False):
      for rate in rates:
        loss = {"name": name, **({knob: value} if knob else {})}
        tried = f"{knob}={value:g} " if knob else ""
        builder.add(
          name,
          loss,
          seed=0,
          beta=BETA,
          knob=f"{tried}lr={rate:g}",
          learning_rate=rate,
        )
  return list(builder.runs.values())


collect = exact_sweep.collect


def best(rows: list[Row]) -> list[Row]:
  """Returns the best trial of every loss, best loss first.

  They are rows of the runs, with `J`, reward - BETA kl, by which trials are
  compared, and `trials`, the number of trials of the loss.
  """
  found: dict[str, Row] = {}
  trials: dict[str, int] = {}
  for row in rows:
    if row["method"] not in CATALOGUE:
      continue
    row = row | {"J": row["reward"] - BETA * row["kl"]}
    trials[row["method"]] = trials.get(row["method"], 0) + 1
    before = found.setdefault(row["method"], row)
    if row["J"] > before["J"]:
      found[row["method"]] = row
  ordered = sorted(found.values(), key=lambda row: -row["J"])
  return [row | {"trials": trials[row["method"]]} for row in ordered]


def table(rows: list[Row]) -> list[Row]:
  """Returns the best trial of every loss, as rows of the printed table.

  Returns:
    "method", "knob", "trials", "J", "reward", "kl" and "share".
  """
  columns = ("method", "knob", "trials", "J", "reward", "kl", "share")
  return [{name: row[name] for name in columns} for row in best(rows)]


def plot(rows: list[Row], path: str) -> list[str]:
  """Plots J of the best trials, and reward against KL of all trials."""
  figure, axes = plt.subplots(1, 2, figsize=(12, 7.5), layout="constrained")
  winners = best(rows)[::-1]
  axes[0].barh(
    [row["method"] for row in winners], [row["J"] for row in winners]
  )
  axes[0].set(xlabel=f"E[r] - {BETA:g} KL of the best trial")
  axes[0].tick_params(labelsize=7)
  exact_sweep.draw_frontier(axes[1], rows)
  trials = [row for row in rows if row["method"] in CATALOGUE]
  axes[1].plot(
    [row["kl"] for row in trials],
    [row["reward"] for row in trials],
    "o",
    color="tab:gray",
    markersize=3,
    label="a trial",
  )
  axes[1].plot(
    [row["kl"] for row in winners],
    [row["reward"] for row in winners],
    "o",
    markersize=4,
    label="the best of a loss",
  )
  axes[1].set(xlabel="KL to the reference (nats)", ylabel="E[r]")
  axes[1].legend()
  for axis in axes:
    axis.grid(alpha=0.3)
  return sweep.save_figure(figure, rows, path)


if __name__ == "__main__":
  sweep.main(sys.modules[__name__], table)
