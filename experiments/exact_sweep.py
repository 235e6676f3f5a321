"""Builds the runs of experiments on the task of `exact_task.py`.

An experiment trains a reference, draws pairs from it, and trains methods on
them; every trained policy is measured by enumeration.
"""

from collections.abc import Callable, Mapping, Sequence
import functools
import os
from typing import Any

from dpo_jax.config import default_config, loss_config
from experiments import exact_measure, exact_task, sweep, trained
from experiments.exact_space import FIXED, Space
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
  """Returns labels of a run: method, seed, beta, knob, label, flips, others."""
  rest = {"beta": None, "knob": "", "label": "bradley_terry", "flips": 0.0}
  return {"method": method, "seed": seed, **rest, **others}


def collect(workdir: str, best_of: Sequence[int] = ()) -> sweep.Collected:
  """Collects rows of finished runs and, once there is a task, its frontier.

  Args:
    workdir: folder of the sweep.
    best_of: numbers of samples N for which Best-of-N gets a row.
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


class Builder:
  """Builds the runs of an experiment."""

  def __init__(
    self,
    settings: Settings,
    *,
    steps: int = 0,
    batch_size: int = _BATCH,
    space: Space = FIXED,
    num_slots: int = 0,
  ):
    """Adds the reference.

    Args:
      settings: choices of the command line.
      steps: training steps of every method; 0: those of the scale.
      batch_size: pairs a step of every method.
      space: prompts and completions.
      num_slots: responses of a group, each group in a row of its own, which
        short runs plan sooner; 0: rows of six pairs.
    """
    self.settings, self.space, self.num_slots = settings, space, num_slots
    self.size = SIZES[settings.scale]
    self.steps = steps or self.size["steps"]
    self.batch_size = batch_size
    self.root = settings.workdir
    self.truth = f"table:{self.root}/reference/table.jsonl"
    self.runs: dict[str, Run] = {}
    self._add_reference()

  def use_every_pair_once(self) -> None:
    """Sets the number of pairs to what the steps take, so each is seen once."""
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
    config.data.tokenizer = f"letters:{self.space.vocab_size}"
    config.data.eos_token = self.space.end_token
    config.data.max_tokens = 2 + self.space.length
    config.data.max_prompt_tokens = 2
    # Six groups a row: short rows use dense attention, and compile sooner.
    config.data.row_tokens = 6 * (2 + 2 * self.space.length)
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
        f"{folder}/texts.jsonl", _NUM_TEXTS, TASK_SEED, self.space
      )

    def make_task(folder: str) -> list[Row]:
      logps = exact_task.all_logps(*trained.load(folder), self.space)
      task = Task.make(logps, TASK_SEED, self.space)
      task.write(folder)
      return [task.metrics(logps, None)]

    self.runs["reference"] = Run(
      "reference",
      make_labels("reference", 0),
      config,
      work=work,
      measure=make_task,
      inputs={"texts": _NUM_TEXTS, "task": TASK_SEED},
      tokens_per_group=2 + self.space.length,
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
    num = self.size["pairs"]

    def write(task: Task, path: str) -> None:
      task.write_pairs(
        path,
        num,
        label=label,
        flips=flips,
        seed=seed,
        beginnings=beginnings,
      )

    return self.add_data(
      f"pairs_{label}_{flips:g}{part}_s{seed}",
      write,
      make_labels("pairs", seed, label=label, flips=flips),
      pairs=num,
    )

  def add_data(
    self,
    name: str,
    write: Callable[[Task, str], None],
    labels: Row,
    **inputs: Any,
  ) -> str:
    """Adds a run that writes data, unless it exists.

    Args:
      name: name of the run.
      write: (task, path) -> None, writes a JSONL file.
      labels: labels of the run.
      **inputs: values that decide what it writes.

    Returns:
      The name, for `add`.
    """

    def work(folder: str) -> None:
      task = Task.read(f"{self.root}/reference", self.space)
      write(task, f"{folder}/pairs.jsonl")

    self.runs.setdefault(
      name,
      Run(
        name,
        labels,
        after=("reference",),
        work=work,
        measure=lambda folder: [],
        inputs=inputs,
      ),
    )
    return name

  def _method_config(
    self,
    loss: Mapping[str, Any],
    data: str,
    seed: int,
    changes: Mapping[str, Any],
  ) -> Any:
    """Returns the config of a method; see `add`."""
    config = self._config(self.steps, seed)
    config.data.source = f"jsonl:{self.root}/{data}/pairs.jsonl"
    config.loss = loss_config(loss["name"])
    config.loss.update(loss)
    config.batch_size = self.batch_size
    if self.num_slots:
      config.data.layout = "padded"
      config.data.row_tokens = self.num_slots * (2 + self.space.length)
    config.update_from_flattened_dict(changes)
    return config

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
    data: str = "",
    extra: exact_measure.Measure | None = None,
    changes: Mapping[str, Any] | None = None,
    beginnings: int = exact_task.NUM_LETTERS,
  ) -> str:
    """Adds a trained run, measured by enumeration.

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
      data: run that writes its data; "": pairs by label and flips.
      extra: further metrics.
      changes: values of other keys of the config by path.
      beginnings: first letters in the pairs; see `Task.write_pairs`.

    Returns:
      The run's name.
    """
    data = data or self._pairs(label, flips, seed, beginnings)
    values = {"optimizer.learning_rate": learning_rate}
    if online is not None:
      online = online | {"max_response_tokens": self.space.length}
      values |= {f"online.{key}": value for key, value in online.items()}
    config = self._method_config(loss, data, seed, values | dict(changes or {}))
    name = _run_name(method, beta, knob, label, flips, seed)
    reference = f"{self.root}/reference"
    of_run = functools.partial(
      exact_measure.measure,
      reference=reference,
      space=self.space,
      beta=beta,
      extra=extra,
    )
    if loss["name"] == "reward_model":
      of_run = functools.partial(
        exact_measure.measure_reward_model, reference=reference
      )
    assert name not in self.runs, name
    self.runs[name] = Run(
      name,
      make_labels(method, seed, beta=beta, knob=knob, label=label, flips=flips),
      config,
      after=("reference", data, *after),
      measure=of_run,
      inputs={"task": TASK_SEED},
      tokens_per_group=2 + 2 * self.space.length,
    )
    return name

  def add_dpo(self, seed: int, beta: float, **others: Any) -> str:
    loss = dict(name="dpo", beta=beta)
    return self.add("DPO", loss, seed=seed, beta=beta, **others)

  def add_on_policy_dpo(
    self, seed: int, beta: float, *, rounds: int, **others: Any
  ) -> str:
    """Adds DPO on pairs sampled from the policy `rounds` times; see `add`."""
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
  """Returns BY and mean METRICS by group, with spreads such as "+-reward"."""
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
