"""Offline, hybrid and on-policy pairs, where the data cover the task or half.

  python -m experiments.coverage --workdir=runs/coverage

On the exact task. Good coverage: pairs of completions that the reference draws.
Poor coverage: only completions that begin with one of the first four of the
eight letters. Offline DPO and chi-PO (Huang et al. 2024, arXiv:2407.13399) read
all pairs from the file; hybrid DPO reads half of each batch and labels samples
of its own for the rest; on-policy DPO labels samples only. Hybrid DPO is also
run with a KL on its own samples added to the loss (Song et al. 2024,
arXiv:2406.01462). All have the same number of labels and steps. Hardware: two
CPU cores.
"""

import sys
from typing import Any

import matplotlib.pyplot as plt
import numpy as np

from dpo_jax.losses import functions
from experiments import exact_sweep, sweep
from experiments.exact_sweep import Builder
from experiments.sweep import Row, Run, Settings

BETA = 0.5
# First letters of the data's completions, by the name of the coverage.
COVERAGES = {"good": 8, "poor": 4}
_STEPS = {"tiny": 200, "paper": 2500}
_BATCH = 64
_LEARNING_RATE = 2e-3
_ROUNDS = 10
_KL_WEIGHT = 0.01
# The beta of DPO; the clip leaves room for margins of true rewards.
_CHI_PO = dict(name="chi_po", beta=BETA, clip=2.0)


def runs(settings: Settings) -> list[Run]:
  """Returns every method on data of good and of poor coverage.

  On-policy DPO reads only prompts, which both have, and is run once.
  """
  steps = _STEPS[settings.scale]
  builder = Builder(settings, steps=steps, batch_size=_BATCH)
  builder.use_every_pair_once()
  online = dict(
    kind="pairs",
    every_steps=steps // _ROUNDS,
    label="bradley_terry",
    judge=builder.truth,
  )
  hybrid = online | dict(offline_fraction=0.5)
  dpo = dict(name="dpo", beta=BETA)
  methods: dict[str, tuple[dict[str, Any], dict[str, Any] | None]] = {
    "offline DPO": (dpo, None),
    "offline chi-PO": (_CHI_PO, None),
    "hybrid DPO": (dpo, hybrid),
    "hybrid DPO + KL": (dpo, hybrid | dict(kl_weight=_KL_WEIGHT)),
    "on-policy DPO": (dpo, online),
  }
  for seed in builder.seeds:
    for method, (loss, sampled) in methods.items():
      for coverage, beginnings in COVERAGES.items():
        if sampled and "offline_fraction" not in sampled and coverage == "poor":
          continue
        builder.add(
          method,
          loss,
          seed=seed,
          beta=BETA,
          knob=coverage,
          online=sampled,
          learning_rate=_LEARNING_RATE,
          beginnings=beginnings,
        )
  return list(builder.runs.values())


collect = exact_sweep.collect


def plot(rows: list[Row], path: str) -> list[str]:
  """Plots regret and KL by method and coverage."""
  figure, axes = plt.subplots(1, 2, figsize=(10, 3.6), layout="constrained")
  means = [row for row in exact_sweep.mean_rows(rows) if row["beta"]]
  methods = list(dict.fromkeys(row["method"] for row in means))[::-1]
  for number, coverage in enumerate(COVERAGES):
    mine = [row for row in means if row["knob"] == coverage]
    height = [methods.index(row["method"]) - 0.35 * number for row in mine]
    for axis, name in zip(axes, ("regret", "kl"), strict=True):
      axis.barh(
        height,
        [row[name] for row in mine],
        xerr=[row[f"{name}_spread"] for row in mine],
        height=0.33,
        color=sweep.colour(number),
        label=f"{coverage} coverage",
      )
  for axis in axes:
    axis.set_yticks(np.arange(len(methods)) - 0.17, methods)
    axis.grid(alpha=0.3, axis="x")
  axes[0].set(xlabel=f"regret at beta {BETA:g}")
  axes[1].set(xlabel="KL to the reference (nats)")
  axes[0].legend()
  return sweep.save_figure(figure, rows, path)


def three_answers() -> list[Row]:
  """Compares two policies on three answers, of which the data have two.

  Xu et al. 2024 (arXiv:2404.10719), sec. 4.2: with one pair of answers 1 and 2
  the DPO loss is the same for a policy that gives answer 1, and for one that
  gives answer 3 and has the same ratio of 1 to 2. Rewards are 1, 0 and -1.

  Returns:
    A row for each loss, and for the KL: "loss", its name; "answers_1" and
    "answers_3", its value for the policy that mostly gives that answer, nats.
  """
  ref = np.log(np.array([0.45, 0.45, 0.1], np.float32))
  rewards = np.array([1.0, 0.0, -1.0])
  policies = [np.array([0.98, 0.01, 0.01]), np.array([0.098, 0.001, 0.901])]
  pairs = [(i, j) for i in range(3) for j in range(3)]
  names = ("answers_1", "answers_3")
  columns: dict[str, list[float]] = {}
  for policy in policies:
    logps = np.log(policy).astype(np.float32)

    def loss(function, chosen, rejected, logps=logps, **knobs):
      parts = (logps[chosen], logps[rejected], ref[chosen], ref[rejected])
      return np.asarray(function(*(np.array([x]) for x in parts), **knobs))[0]

    def on_policy(policy=policy, loss=loss):
      wins = 1.0 / (1.0 + np.exp(rewards[None] - rewards[:, None]))
      return sum(
        2.0
        * policy[i]
        * policy[j]
        * wins[i, j]
        * loss(functions.dpo_loss, i, j, beta=BETA)
        for i, j in pairs
        if i != j
      ) / (1.0 - (policy**2).sum())

    found = {
      "offline DPO": loss(functions.dpo_loss, 0, 1, beta=BETA),
      "offline chi-PO": loss(functions.chi_po_loss, 0, 1, beta=BETA, clip=5.0),
      "on-policy DPO": on_policy(),
      "KL to the reference": (policy * (logps - ref)).sum(),
    }
    for name, value in found.items():
      columns.setdefault(name, []).append(float(value))
  return [
    {"loss": name, **dict(zip(names, values, strict=True))}
    for name, values in columns.items()
  ]


if __name__ == "__main__":
  sweep.main(sys.modules[__name__], exact_sweep.table)
