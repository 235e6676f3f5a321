"""On-policy DPO with one change at a time, and with several.

  python -m experiments.on_policy_ablation --workdir=runs/on_policy_ablation

On the exact task. Every run has the same number of Bradley-Terry labels, 64,000
at `tiny`. `before` is on-policy DPO as in `exact_frontier.py`; each change is
made to it alone. The recipe makes several, and is measured at every beta.

Three controls show what limits it. `known features` is the limit that so many
labels set: the maximum likelihood of a reward whose features are known and
whose weights are not, on pairs of the reference. At the largest beta the recipe
is also run with four times the labels, and the same model is trained for as
many steps on samples of the optimum itself. `share` is of the frontier at the
KL that a policy has reached. Hardware: two CPU cores.
"""

import functools
import sys
from typing import Any

import matplotlib.pyplot as plt
import numpy as np

from experiments import exact_sweep, exact_task, sweep
from experiments.exact_sweep import Builder
from experiments.exact_task import LENGTH, NUM_LETTERS, Task
from experiments.sweep import Row, Run, Settings

BETAS = (0.25, 0.5, 1.0)
# Beta of the single changes.
BETA = 0.5
_ROUNDS = 4
# Of the data only the prompts are read, and there are four.
_PAIRS = 1000
_LIMIT = "known features"
_MORE_LABELS = "recipe, 4 times the labels"
_OPTIMUM = "samples of the optimum"


def changes(steps: int) -> dict[str, dict[str, Any]]:
  """Returns the keys of the config that each change sets, by its name.

  Args:
    steps: optimizer steps of `before`.
  """
  every = -(-steps // _ROUNDS)
  fourfold = {"total_steps": 4 * steps, "online.every_steps": 4 * every}
  more_rounds = {"online.every_steps": -(-steps // 16)}
  muon = {"optimizer.name": "muon", "optimizer.learning_rate": 3e-3}
  passes = fourfold | {"online.epochs": 4}
  return {
    "before": {},
    "16 rounds": more_rounds,
    "batch 32": fourfold | {"batch_size": 32},
    "Muon, rate 3e-3": muon,
    "4 passes": passes,
    "all labels so far": {"online.replay": True},
    "temperature 1.5": {"online.temperature": 1.5},
    "labels by argmax": {"online.label": "argmax"},
    "IPO": {f"loss.{k}": v for k, v in exact_sweep.ipo(BETA).items()}
    | {"loss.beta": None},
    "recipe": passes
    | muon
    | {"online.replay": True, "online.every_steps": 4 * steps // 10},
  }


def runs(settings: Settings) -> list[Run]:
  """Returns the limit, each change, and the controls.

  `before` and the recipe are run at all BETAS, other changes at BETA alone.
  """
  builder = Builder(settings)
  num_labels = builder.steps * builder.batch_size
  builder.size = builder.size | {"pairs": _PAIRS}
  for seed in builder.seeds:
    _add_limit(builder, num_labels, seed)
    for name, keys in changes(builder.steps).items():
      betas = BETAS if name in ("before", "recipe") else (BETA,)
      for beta in betas:
        run = builder.add_on_policy_dpo(seed, beta, rounds=_ROUNDS, knob=name)
        builder.runs[run].config.update_from_flattened_dict(keys)
    _add_controls(builder, seed)
  return list(builder.runs.values())


def _add_controls(builder: Builder, seed: int) -> None:
  """Adds two controls at the largest beta.

  They are the recipe with four times the labels, and SFT on samples of pi*.
  """
  beta, recipe = BETAS[-1], changes(builder.steps)["recipe"]
  run = builder.add_on_policy_dpo(seed, beta, rounds=1, knob=_MORE_LABELS)
  fresh = {"online.epochs": 1, "online.every_steps": builder.steps // 5}
  builder.runs[run].config.update_from_flattened_dict(recipe | fresh)
  num = recipe["total_steps"] * builder.batch_size

  def write(task: Task, path: str) -> None:
    rng = np.random.default_rng((seed, 6))
    prompts = rng.integers(0, len(task.space.prompts), num)
    best = Task(task.optimum(beta), task.rewards)
    drawn = best.draw(prompts, 1, rng)[:, 0]
    exact_task.write_lines(
      path,
      (
        {"prompt": task.space.prompts[p], "completion": task.space.texts[i]}
        for p, i in zip(prompts, drawn, strict=True)
      ),
    )

  data = builder.add_data(
    f"optimum_samples_s{seed}",
    write,
    exact_sweep.make_labels("samples", seed),
    samples=num,
    beta=beta,
  )
  kept = ("total_steps", "optimizer.name", "optimizer.learning_rate")
  builder.add(
    "SFT",
    dict(name="sft"),
    seed=seed,
    beta=beta,
    knob=_OPTIMUM,
    data=data,
    changes={key: recipe[key] for key in kept},
  )


def _add_limit(builder: Builder, num_labels: int, seed: int) -> None:
  """Adds the limit that the labels set: a fit that is not trained."""
  name = f"limit_s{seed}"
  builder.runs[name] = Run(
    name,
    exact_sweep.make_labels(_LIMIT, seed, knob=_LIMIT),
    after=("reference",),
    measure=functools.partial(
      _measure_limit, f"{builder.root}/reference", num_labels, seed
    ),
    inputs={"labels": num_labels},
  )


def _measure_limit(
  reference: str, num_labels: int, seed: int, folder: str
) -> list[Row]:
  """Fits the reward of each prompt, and measures the optima that it gives.

  Returns:
    A row for each of BETAS: `beta` and `Task.metrics`.
  """
  del folder
  task, rng = Task.read(reference), np.random.default_rng((seed, 4))
  fitted = np.empty_like(task.rewards)
  for row, logps, rewards in zip(
    fitted, task.ref_logps, task.rewards, strict=True
  ):
    cumulative = np.exp(logps).cumsum()
    uniform = rng.random((num_labels // len(fitted), 2)) * cumulative[-1]
    pairs = np.searchsorted(cumulative, uniform)
    gap = rewards[pairs[:, 0]] - rewards[pairs[:, 1]]
    wins = rng.random(len(gap)) < 1.0 / (1.0 + np.exp(-gap))
    row[:] = fit_rewards(
      reward_features(), np.where(wins[:, None], pairs, pairs[:, ::-1])
    )
  found = Task(task.ref_logps, fitted)
  return [
    {"beta": beta} | task.metrics(found.optimum(beta), beta) for beta in BETAS
  ]


def reward_features() -> np.ndarray:
  """Returns the counts whose weighted sum is the reward: f64 [4096, 136]."""
  ids = exact_task.completions()
  letters, bigrams = np.eye(NUM_LETTERS), np.eye(NUM_LETTERS**2)
  unigrams = sum(letters[ids[:, i]] for i in range(LENGTH))
  neighbours = sum(
    bigrams[NUM_LETTERS * ids[:, i] + ids[:, i + 1]] for i in range(LENGTH - 1)
  )
  ends = bigrams[NUM_LETTERS * ids[:, 0] + ids[:, -1]]
  return np.concatenate([unigrams, neighbours, ends], 1)


def fit_rewards(features: np.ndarray, pairs: np.ndarray) -> np.ndarray:
  """Fits a Bradley-Terry reward that is linear in its features.

  Args:
    features: f64 [N, F].
    pairs: i64 [n, 2], chosen and rejected completions.

  Returns:
    f64 [N], rewards of the maximum likelihood, by Newton's method. A small
    ridge settles the weights that no pair decides.
  """
  differences = features[pairs[:, 0]] - features[pairs[:, 1]]
  ridge = 1e-3 * np.eye(features.shape[1])
  weights = np.zeros(features.shape[1])
  for _ in range(12):
    wins = 1.0 / (1.0 + np.exp(-differences @ weights))
    gradient = differences.T @ (wins - 1.0) + ridge @ weights
    scaled = differences * (wins * (1.0 - wins))[:, None]
    weights -= np.linalg.solve(scaled.T @ differences + ridge, gradient)
  return features @ weights


collect = exact_sweep.collect


def plot(rows: list[Row], path: str) -> list[str]:
  """Plots the share of the frontier by change, and reward against KL."""
  figure, axes = plt.subplots(
    1, 2, figsize=(10.5, 4), layout="constrained", sharex=False
  )
  means = [
    row | {"change": row["knob"]}
    for row in exact_sweep.mean_rows(rows)
    if row["beta"] is not None
  ]
  single = [row for row in means if row["beta"] == BETA][::-1]
  axes[0].barh(
    [row["change"] for row in single],
    [row["share"] for row in single],
    xerr=[row["share_spread"] for row in single],
    color=[sweep.colour(_colour_of(row["change"])) for row in single],
  )
  axes[0].set(
    xlim=(0.8, 1.0), xlabel=f"share of the frontier's E[r], beta {BETA:g}"
  )
  axes[0].axvline(0.98, color="k", linewidth=0.8)
  axes[0].grid(alpha=0.3, axis="x")
  exact_sweep.draw_frontier(axes[1], rows)
  for name in ("before", "recipe"):
    mine = [row for row in means if row["change"] == name]
    for row in mine[:1]:
      axes[1].annotate(name, (row["kl"], row["reward"]))
    axes[1].errorbar(
      [row["kl"] for row in mine],
      [row["reward"] for row in mine],
      xerr=[row["kl_spread"] for row in mine],
      yerr=[row["reward_spread"] for row in mine],
      fmt="o",
      color=sweep.colour(_colour_of(name)),
    )
  axes[1].set(xlabel="KL to the reference (nats)", ylabel="E[r]")
  return sweep.save_figure(figure, rows, path)


def _colour_of(change: str) -> int:
  return {"before": 1, "recipe": 2, _LIMIT: 3}.get(change, 0)


if __name__ == "__main__":
  sweep.main(sys.modules[__name__], exact_sweep.table)
