"""Builds the runs of experiments on the task of `exact_task.py`.

An experiment trains a reference, draws pairs from it, and trains methods on
them; every trained policy is measured by enumeration.
"""

from collections.abc import Sequence
import functools
import os
from typing import Any

import numpy as np

from dpo_jax import judges
from dpo_jax.config import default_config, loss_config
from experiments import exact_task, sweep, trained
from experiments.exact_task import Task
from experiments.sweep import Row, Run, Settings

TASK_SEED = 0
SIZES: dict[str, dict[str, int]] = {
  "tiny": dict(seeds=3, pairs=50_000, steps=500, sft_steps=400),
  "paper": dict(seeds=5, pairs=200_000, steps=2500, sft_steps=2000),
}
_BATCH = 128
_NUM_TEXTS = 25_600
# Labels that rows of several seeds share, and the metrics that are averaged.
BY = ("method", "beta", "knob", "label", "flips")
METRICS = ("reward", "kl", "share", "regret", "total_variation", "accuracy")


def make_labels(method: str, seed: int, **others: Any) -> Row:
  """Returns the labels of a run, with defaults for those not given."""
  rest = {"beta": None, "knob": "", "label": "bradley_terry", "flips": 0.0}
  return {"method": method, "seed": seed, **rest, **others}


def collect(workdir: str, best_of: Sequence[int] = ()) -> sweep.Collected:
  """Collects trained runs, and adds rows that need no training.

  Args:
    workdir: folder of the sweep.
    best_of: numbers of samples N for which Best-of-N gets a row.

  Returns:
    Rows of the runs, of Best-of-N and of the exact frontier.
  """
  found = sweep.collect(workdir)
  folder = os.path.join(workdir, "reference")
  if not os.path.exists(os.path.join(folder, "task.npz")):
    return found
  task = Task.read(folder)
  rows = [
    make_labels("Best-of-N", 0, knob=f"N={num}")
    | task.metrics(task.best_of(num), None)
    for num in best_of
  ]
  kls, rewards = task.frontier()
  rows += [
    make_labels("frontier", 0) | {"reward": reward, "kl": kl, "share": 1.0}
    for kl, reward in zip(kls.tolist(), rewards.tolist(), strict=True)
  ]
  return sweep.Collected(found.rows + rows, found.missing)


def _measure(folder: str, *, reference: str, beta: float | None) -> list[Row]:
  logps = exact_task.all_logps(*trained.load(folder))
  return [Task.read(reference).metrics(logps, beta)]


def _measure_reward_model(folder: str, *, reference: str) -> list[Row]:
  """Measures a reward model's accuracy on pairs, and the best possible."""
  texts = [exact_task.to_text(ids) for ids in exact_task.completions()]
  judge = judges.get_judge(f"reward:{folder}")
  scores = [
    judges.ask(judge, [prompt] * len(texts), texts)
    for prompt in exact_task.PROMPTS
  ]
  accuracy, bayes = Task.read(reference).pair_accuracy(np.array(scores))
  return [{"accuracy": accuracy, "bayes_accuracy": bayes}]


class Builder:
  """Builds the runs of an experiment."""

  def __init__(
    self, settings: Settings, *, steps: int = 0, batch_size: int = _BATCH
  ):
    """Adds the reference.

    Args:
      settings: choices of the command line.
      steps: training steps of every method; 0: those of the scale.
      batch_size: pairs a step of every method.
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
    """Draws as many pairs as the steps take, so that each is seen once.

    On-policy methods see as many labels.
    """
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
    # Six groups a row: short rows use dense attention, and compile sooner.
    config.data.row_tokens = 60
    # No prompt is held out: metrics are exact sums over all four.
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
      return [task.metrics(logps, None)]

    self.runs["reference"] = Run(
      "reference",
      make_labels("reference", 0),
      config,
      work=work,
      measure=measure,
      inputs={"texts": _NUM_TEXTS, "task": TASK_SEED},
      tokens_per_group=6,
    )

  def _pairs(
    self,
    label: str,
    flips: float,
    seed: int,
    beginnings: int = exact_task.NUM_LETTERS,
  ) -> str:
    """Adds a run that draws pairs, unless it exists; returns its name."""
    is_partial = beginnings < exact_task.NUM_LETTERS
    part = f"_begin{beginnings}" if is_partial else ""
    name = f"pairs_{label}_{flips:g}{part}_s{seed}"
    num = self.size["pairs"]

    def work(folder: str) -> None:
      Task.read(f"{self.root}/reference").write_pairs(
        f"{folder}/pairs.jsonl",
        num,
        label=label,
        flips=flips,
        seed=seed,
        beginnings=beginnings,
      )

    self.runs.setdefault(
      name,
      Run(
        name,
        make_labels("pairs", seed, label=label, flips=flips),
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
    beginnings: int = exact_task.NUM_LETTERS,
  ) -> str:
    """Adds a trained run, measured by enumeration at its end.

    Args:
      method: name in tables.
      loss: name of the loss, and knobs.
      seed: seed of data, order and samples.
      beta: beta of the optimum that it is compared with, or None.
      knob: text that distinguishes runs of the same method and beta.
      label: "bradley_terry" or "argmax"; see `Task.write_pairs`.
      flips: fraction of flipped labels.
      online: keys of `config.online`, for methods that sample.
      learning_rate: peak learning rate.
      after: further runs that it starts from.
      beginnings: first letters in the pairs; see `Task.write_pairs`.

    Returns:
      The run's name.
    """
    pairs = self._pairs(label, flips, seed, beginnings)
    config = self._config(self.steps, seed)
    config.data.source = f"jsonl:{self.root}/{pairs}/pairs.jsonl"
    config.loss = loss_config(loss["name"])
    config.loss.update(loss)
    config.batch_size = self.batch_size
    config.optimizer.learning_rate = learning_rate
    if online is not None:
      config.online.update(online)
      config.online.max_response_tokens = exact_task.LENGTH
    name = _run_name(method, beta, knob, label, flips, seed)
    reference = f"{self.root}/reference"
    measure = functools.partial(_measure, reference=reference, beta=beta)
    if loss["name"] == "reward_model":
      measure = functools.partial(_measure_reward_model, reference=reference)
    assert name not in self.runs, name
    self.runs[name] = Run(
      name,
      make_labels(method, seed, beta=beta, knob=knob, label=label, flips=flips),
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
    """Adds DPO on the policy's own samples, with as many labels as offline."""
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
    """Adds DPO, and the two losses that are told how many labels are wrong."""
    smoothed = dict(beta=beta, label_smoothing=flips)
    self.add_dpo(seed, beta, flips=flips)
    for method, name in (("cDPO", "cdpo"), ("robust DPO", "robust_dpo")):
      loss = dict(name=name, **smoothed)
      self.add(method, loss, seed=seed, beta=beta, flips=flips)


def _run_name(
  method: str,
  beta: float | None,
  knob: str,
  label: str,
  flips: float,
  seed: int,
) -> str:
  """Returns a folder name that differs wherever an argument does."""
  parts = [method, beta, knob, label if label == "argmax" else ""]
  parts += [f"flips {flips:g}" if flips else "", f"s{seed}"]
  words = " ".join(str(part) for part in parts if part not in (None, ""))
  return "_".join(
    "".join(c if c.isalnum() or c in ".-" else " " for c in words).split()
  ).lower()


def ipo(beta: float) -> dict[str, Any]:
  """Returns an IPO loss that reaches about the KL of DPO at that beta.

  IPO's optimum is pi_ref exp(E[p(y > y')] / tau) / Z, and the slope of that
  probability in the reward is 1/4 at most.
  """
  return dict(name="ipo", tau=beta / 4)


def mean_rows(rows: Sequence[Row]) -> list[Row]:
  """Averages the metrics of rows over seeds; see `sweep.mean_and_spread`."""
  return sweep.mean_and_spread(rows, BY, METRICS)


def table(rows: Sequence[Row]) -> list[Row]:
  """Returns means over seeds, with the spread of reward, share and regret."""
  shown = [row for row in rows if row["method"] not in ("frontier", "pairs")]
  out = []
  for row in mean_rows(shown):
    line = {
      "method": row["method"],
      "beta": "-" if row["beta"] is None else f"{row['beta']:g}",
      "knob": row["knob"] or "-",
      "labels": row["label"],
      "flips": f"{row['flips']:g}",
      "seeds": row["seeds"],
    }
    for name in METRICS:
      line[name] = row[name]
      if name in ("reward", "share", "regret"):
        line[f"+-{name}"] = row[f"{name}_spread"]
    out.append(line)
  return out


def draw_frontier(axis: Any, rows: Sequence[Row]) -> None:
  """Draws the best reward that any policy reaches at each KL."""
  points = sorted(
    (r["kl"], r["reward"]) for r in rows if r["method"] == "frontier"
  )
  if points:
    axis.plot(*zip(*points, strict=True), "k-", label="exact frontier")
