"""Runs on the task of `exact_task.py`, that several experiments are made of.

A sweep is a reference, pairs that it gives, and methods; every trained policy
is measured by enumeration.
"""

from collections.abc import Sequence
import functools
import os
from typing import Any

import matplotlib
import numpy as np

from dpo_jax import judges
from dpo_jax.config import default_config, loss_config
from experiments import exact_task, harness, trained
from experiments.exact_task import Task
from experiments.harness import Row, Run, Settings

TASK_SEED = 0
SIZES: dict[str, dict[str, int]] = {
  "tiny": dict(seeds=3, pairs=50_000, steps=500, sft_steps=400),
  "paper": dict(seeds=5, pairs=200_000, steps=2500, sft_steps=2000),
}
_BATCH = 128
_NUM_TEXTS = 25_600
# What rows are averaged over seeds by, and what is averaged.
BY = ("method", "beta", "knob", "label", "flips")
FIGURES = ("reward", "kl", "share", "regret", "total_variation", "accuracy")


def _labels(method: str, seed: int, **others: Any) -> Row:
  rest = {"beta": None, "knob": "", "label": "bradley_terry", "flips": 0.0}
  return {"method": method, "seed": seed, **rest, **others}


def collect(workdir: str, best_of: Sequence[int] = ()) -> harness.Collected:
  """Returns rows of trained runs; of Best-of-N and the frontier by formula."""
  found = harness.collect(workdir)
  folder = os.path.join(workdir, "reference")
  if not os.path.exists(os.path.join(folder, "task.npz")):
    return found
  task = Task.read(folder)
  rows = [
    _labels("Best-of-N", 0, knob=f"N={num}")
    | task.figures(task.best_of(num), None)
    for num in best_of
  ]
  kls, rewards = task.frontier()
  rows += [
    _labels("frontier", 0) | {"reward": reward, "kl": kl, "share": 1.0}
    for kl, reward in zip(kls.tolist(), rewards.tolist(), strict=True)
  ]
  return harness.Collected(found.rows + rows, found.missing)


def _measure(folder: str, *, reference: str, beta: float | None) -> list[Row]:
  logps = exact_task.all_logps(*trained.load(folder))
  return [Task.read(reference).figures(logps, beta)]


def _measure_reward_model(folder: str, *, reference: str) -> list[Row]:
  """How often it is right on pairs, held against Bayes."""
  texts = [exact_task.to_text(ids) for ids in exact_task.completions()]
  judge = judges.get_judge(f"reward:{folder}")
  scores = [
    judges.ask(judge, [prompt] * len(texts), texts)
    for prompt in exact_task.PROMPTS
  ]
  accuracy, bayes = Task.read(reference).pair_accuracy(np.array(scores))
  return [{"accuracy": accuracy, "bayes_accuracy": bayes}]


class Sweep:
  """Collects the runs of an experiment."""

  def __init__(
    self, settings: Settings, *, steps: int = 0, batch_size: int = _BATCH
  ):
    """Begins with the reference.

    Args:
      settings: settings of the command line.
      steps: steps of every method; 0: those of the scale.
      batch_size: pairs a step, of every method.
    """
    self.settings = settings
    self.size = SIZES[settings.scale]
    self.steps = steps or self.size["steps"]
    self.batch_size = batch_size
    self.root = settings.workdir
    self.truth = f"table:{self.root}/reference/table.jsonl"
    self.runs: dict[str, Run] = {}
    self._add_reference()

  def use_every_pair_once(self) -> None:
    """Draws as many pairs as the steps take: as many labels as on policy."""
    self.size = self.size | {"pairs": self.steps * self.batch_size}

  @property
  def seeds(self) -> range:
    return range(self.size["seeds"])

  def _config(self, steps: int, seed: int) -> Any:
    config = default_config()
    config.seed = seed
    config.policy.preset = "tiny"
    config.policy.remat = "none"
    config.policy.init = f"run:{self.root}/reference"
    config.data.tokenizer = f"letters:{exact_task.NUM_LETTERS}"
    config.data.max_tokens = 2 + exact_task.LENGTH
    config.data.max_prompt_tokens = 2
    # Six groups a row: short rows attend all at once, and compile sooner.
    config.data.row_tokens = 60
    # Of four prompts none is held out: all is known.
    config.data.eval_fraction = 0.0
    config.data.cache_dir = f"{self.root}/cache"
    # Runs on the same pairs share the reference's log-probs.
    config.reference.cache_dir = f"{self.root}/reference_logps"
    config.batch_size = _BATCH
    config.total_steps = steps
    config.optimizer.name = "adamw"
    config.optimizer.b2 = 0.99
    config.optimizer.learning_rate = 1e-3
    config.optimizer.schedule = "linear"
    config.optimizer.warmup_steps = 20
    config.optimizer.max_grad_norm = 1.0
    config.eval.every_steps = 0
    config.checkpoint.every_steps = 0
    config.log.every_steps = 50
    config.log.progress = False
    return config

  def _add_reference(self) -> None:
    config = self._config(self.size["sft_steps"], TASK_SEED)
    config.policy.init = "random"
    config.data.source = f"jsonl:{self.root}/reference/texts.jsonl"
    config.loss = loss_config("sft")
    config.optimizer.learning_rate = 3e-3

    def work(folder: str) -> None:
      exact_task.write_demonstrations(
        f"{folder}/texts.jsonl", _NUM_TEXTS, TASK_SEED
      )

    def measure(folder: str) -> list[Row]:
      logps = exact_task.all_logps(*trained.load(folder))
      task = Task.make(logps, TASK_SEED)
      task.write(folder)
      return [task.figures(logps, None)]

    self.runs["reference"] = Run(
      "reference",
      _labels("reference", 0),
      config,
      work=work,
      measure=measure,
      inputs={"texts": _NUM_TEXTS, "task": TASK_SEED},
      tokens_per_group=6,
    )

  def _pairs(self, label: str, flips: float, seed: int) -> str:
    """The name of a run that draws pairs, added where it is new."""
    name = f"pairs_{label}_{flips:g}_s{seed}"
    num = self.size["pairs"]

    def work(folder: str) -> None:
      Task.read(f"{self.root}/reference").write_pairs(
        f"{folder}/pairs.jsonl", num, label=label, flips=flips, seed=seed
      )

    self.runs.setdefault(
      name,
      Run(
        name,
        _labels("pairs", seed, label=label, flips=flips),
        after=("reference",),
        work=work,
        measure=lambda folder: [],
        inputs={"pairs": num},
      ),
    )
    return name

  def add(
    self,
    method: str,
    loss: dict[str, Any],
    *,
    seed: int,
    beta: float | None = None,
    knob: str = "",
    label: str = "bradley_terry",
    flips: float = 0.0,
    online: dict[str, Any] | None = None,
    learning_rate: float = 1e-3,
    after: tuple[str, ...] = (),
  ) -> str:
    """Adds a trained run, measured by enumeration at its end.

    Args:
      method: its name in tables.
      loss: name and knobs.
      seed: seed of data, order and samples.
      beta: beta of the optimum that it is compared with.
      knob: other value that distinguishes runs of the method.
      label: rule that labels the pairs.
      flips: fraction of their labels that is wrong.
      online: keys of `config.online`, where it samples.
      learning_rate: peak.
      after: other runs that it needs.

    Returns:
      The run's name.
    """
    pairs = self._pairs(label, flips, seed)
    config = self._config(self.steps, seed)
    config.data.source = f"jsonl:{self.root}/{pairs}/pairs.jsonl"
    config.loss = loss_config(loss["name"])
    config.loss.update(loss)
    config.batch_size = self.batch_size
    config.optimizer.learning_rate = learning_rate
    if online is not None:
      config.online.update(online)
      config.online.max_response_tokens = exact_task.LENGTH
    parts = [method, beta, knob, label if label == "argmax" else ""]
    parts += [f"flips {flips:g}" if flips else "", f"s{seed}"]
    words = " ".join(str(part) for part in parts if part not in (None, ""))
    name = "_".join(
      "".join(c if c.isalnum() or c in ".-" else " " for c in words).split()
    ).lower()
    reference = f"{self.root}/reference"
    measure = functools.partial(_measure, reference=reference, beta=beta)
    if loss["name"] == "reward_model":
      measure = functools.partial(_measure_reward_model, reference=reference)
    assert name not in self.runs, name
    self.runs[name] = Run(
      name,
      _labels(method, seed, beta=beta, knob=knob, label=label, flips=flips),
      config,
      after=("reference", pairs, *after),
      measure=measure,
      inputs={"task": TASK_SEED},
      tokens_per_group=10,
    )
    return name

  def add_dpo(self, seed: int, beta: float, **others: Any) -> str:
    loss = dict(name="dpo", beta=beta)
    return self.add("DPO", loss, seed=seed, beta=beta, **others)

  def add_on_policy_dpo(
    self, seed: int, beta: float, *, rounds: int, **others: Any
  ) -> str:
    """As many labels as offline DPO sees, but of the policy's own samples."""
    online = dict(
      kind="pairs",
      every_steps=-(-self.steps // rounds),
      label="bradley_terry",
      judge=self.truth,
    )
    loss = dict(name="dpo", beta=beta)
    return self.add(
      "on-policy DPO", loss, seed=seed, beta=beta, online=online, **others
    )

  def add_noisy(self, seed: int, beta: float, flips: float) -> None:
    """DPO, and the two losses that are told how many labels are wrong."""
    smoothed = dict(beta=beta, label_smoothing=flips)
    self.add_dpo(seed, beta, flips=flips)
    for method, name in (("cDPO", "cdpo"), ("robust DPO", "robust_dpo")):
      loss = dict(name=name, **smoothed)
      self.add(method, loss, seed=seed, beta=beta, flips=flips)


def ipo(beta: float) -> dict[str, Any]:
  """IPO that reaches about the KL of DPO at that beta.

  Its optimum is pi_ref exp(E[p(y > y')] / tau) / Z, and the slope of that
  probability in the reward is 1/4 at most.
  """
  return dict(name="ipo", tau=beta / 4)


def table(rows: Sequence[Row]) -> list[Row]:
  """Means over the seeds, and the spread of what is compared."""
  shown = [row for row in rows if row["method"] not in ("frontier", "pairs")]
  out = []
  for row in harness.mean_and_spread(shown, BY, FIGURES):
    line = {
      "method": row["method"],
      "beta": "-" if row["beta"] is None else f"{row['beta']:g}",
      "knob": row["knob"] or "-",
      "labels": row["label"],
      "flips": f"{row['flips']:g}",
      "seeds": row["seeds"],
    }
    for name in FIGURES:
      line[name] = row[name]
      if name in ("reward", "share", "regret"):
        line[f"+-{name}"] = row[f"{name}_spread"]
    out.append(line)
  return out


def colour(number: int) -> Any:
  """Returns the colour of a figure's line; the first twenty differ."""
  # The ten strong colours of tab20, then their ten pale ones.
  strong, pale = range(0, 20, 2), range(1, 20, 2)
  return matplotlib.colormaps["tab20"]([*strong, *pale][number % 20])


def draw(
  axis: Any,
  rows: Sequence[Row],
  x: str,
  y: str,
  *,
  by: str = "method",
) -> None:
  """A line for each method: means with the spread over seeds as bars."""
  for number, name in enumerate(dict.fromkeys(row[by] for row in rows)):
    mine = sorted((r for r in rows if r[by] == name), key=lambda r: r[x])
    axis.errorbar(
      [r[x] for r in mine],
      [r[y] for r in mine],
      yerr=[r.get(f"{y}_spread", 0.0) for r in mine],
      xerr=[r.get(f"{x}_spread", 0.0) for r in mine],
      marker="os^Dv"[number % 5],
      color=colour(number),
      linestyle=":" if number < 10 else "-.",
      markersize=5,
      capsize=2,
      label=str(name),
    )
  axis.grid(alpha=0.3)


def draw_frontier(axis: Any, rows: Sequence[Row]) -> None:
  """The line that no policy can cross."""
  points = sorted(
    (r["kl"], r["reward"]) for r in rows if r["method"] == "frontier"
  )
  if points:
    axis.plot(*zip(*points, strict=True), "k-", label="exact frontier")
