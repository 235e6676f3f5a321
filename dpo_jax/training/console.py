"""The console of a run: its header, a line for each measurement, its end.

Lines are INFO logs of process 0; `config.log.progress` adds a bar, on a
terminal. Every metric is in metrics.jsonl: the console shows the main ones.
"""

import collections
from collections.abc import Generator, Iterator, Mapping
import contextlib
import logging
import math
import time
from typing import Any

import jax
from tqdm import tqdm

from dpo_jax import config as config_lib
from dpo_jax.records.metrics import Clock, format_table, read_metrics
from dpo_jax.system.progress import format_seconds
from dpo_jax.training import header
from dpo_jax.training.header import format_rows, join, split_label
from dpo_jax.training.setup import Run

_LOG = logging.getLogger(__name__)

# Programs whose compilation is announced, by the function that is compiled.
_PROGRAMS = {
  "train_step": "the training step",
  "eval_step": "the evaluation step",
  "score_logps": "the scoring step",
  "_sample": "the sampling loop",
}
_TRACED = "/jax/core/compile/jaxpr_trace_duration"
_COMPILED = "/jax/core/compile/backend_compile_duration"

# Columns of a training step: metric, heading, width, digits.
_COLUMNS = (
  ("loss", "loss", 8, 4),
  ("reward/accuracy", "accuracy", 8, 3),
  ("reward/margin", "margin", 8, 3),
  ("grad_norm", "grad norm", 9, 3),
  ("learning_rate", "rate", 8, None),
  ("groups_per_second", "groups/s", 8, 1),
  ("tokens_per_second", "tokens/s", 8, 0),
)
_ROWS_A_HEADING = 20

# Main metrics of an evaluation: label and digits.
_MAIN = {
  "loss": ("loss", 4),
  "reward/accuracy": ("accuracy", 3),
  "reward/margin": ("margin", 3),
  "kl": ("KL", 3),
  "sample/reward": ("reward", 3),
  "sample/win_rate": ("win rate", 3),
}


def format_number(value: float, digits: int | None = 3) -> str:
  """Formats a number for a reader.

  Args:
    value: may be NaN.
    digits: digits after the point, none from 1000 on; a value below them is
      written as a power of ten. None: three significant digits.
  """
  if digits is None:
    return f"{value:.3g}"
  if value and abs(value) < 10.0**-digits:
    return f"{value:.1e}"
  return f"{value:,.{digits if abs(value) < 1000 else 0}f}"


def format_metric(
  name: str, metrics: Mapping[str, float], digits: int = 3
) -> str:
  """Formats a metric with its interval, or its standard error, if known."""
  text = format_number(metrics[name], digits)
  bounds = [metrics.get(f"{name}_{end}") for end in ("low", "high")]
  error = metrics.get(f"{name}_error")
  if None not in bounds:
    low, high = map(format_number, bounds)
    return f"{text} ({low} to {high})"
  return text if error is None else f"{text} +- {format_number(error)}"


def main_metrics(metrics: Mapping[str, float | None]) -> dict[str, str]:
  """Formats the main metrics of an evaluation by the name they are shown as."""
  known = {k: math.nan if v is None else v for k, v in metrics.items()}
  return {
    label: format_metric(name, known, digits)
    for name, (label, digits) in _MAIN.items()
    if name in known
  }


def standing(done: int, total: int) -> tuple[str, str]:
  """Describes the progress of a workdir: a label and a text.

  Args:
    done: steps that the workdir holds, above 0.
    total: `total_steps`.
  """
  if done < total:
    left = total - done
    return (
      "resumed",
      f"from step {done:,}: {left:,} of {total:,} steps to train",
    )
  if done == total:
    return "finished", (
      f"before: the workdir holds all {total:,} steps, so nothing is trained;"
      " a larger total_steps trains on"
    )
  return "finished", (
    f"before: the workdir holds step {done:,}, beyond total_steps={total}, so"
    " nothing is trained"
  )


def format_step(
  step: int, total: int, metrics: Mapping[str, float], left: str
) -> tuple[str, str]:
  """Formats a step of training as a row of a table.

  Args:
    step: steps taken.
    total: steps of the run.
    metrics: metrics by name; columns of absent ones are left out.
    left: time to the end.

  Returns:
    The heading and the row.
  """
  width = max(len("step"), 2 * len(f"{total:,}") + 1)
  cells = [("step", f"{step:,}/{total:,}", width)]
  cells += [
    (heading, format_number(metrics[name], digits), width)
    for name, heading, width, digits in _COLUMNS
    if name in metrics
  ]
  cells.append(("time left", left, 10))
  heading = "  ".join(name.rjust(width) for name, _, width in cells)
  return heading, "  ".join(cell.rjust(width) for _, cell, width in cells)


def format_history(
  split: str, by_step: Mapping[int, Mapping[str, Any]], best: int | None
) -> list[str]:
  """Formats the first, best and last evaluation as a table.

  Args:
    split: "eval" or "eval/NAME".
    by_step: metrics by name, by step; at least one step.
    best: step of the best checkpoint; without metrics, or None, it is left out.
  """
  steps = sorted(by_step)
  names = {steps[0]: f"step {steps[0]:,}"}
  if best in by_step:
    names[best] = f"step {best:,} (best saved)"
  names.setdefault(steps[-1], f"step {steps[-1]:,}")
  shown = {step: main_metrics(by_step[step]) for step in sorted(names)}
  rows = [
    {split_label(split): label}
    | {names[step]: cells.get(label, "") for step, cells in shown.items()}
    for label in shown[steps[-1]]
  ]
  return format_table(rows).splitlines()


class Console:
  """Shows a run on process 0; as a context it also announces compilations."""

  def __init__(self, run: Run):
    self._run, self._config = run, run.config
    self._has_bar = run.config.log.progress and run.is_writer
    self._bar = tqdm(disable=True)
    self._clock = Clock()
    self._start: int | None = None
    self._began, self._compiling = time.monotonic(), 0.0
    self._told: set[str] = set()
    # Seconds of a program that is being traced, lowered and compiled.
    self._spent: collections.Counter[str] = collections.Counter()
    self._heading, self._rows = "", 0
    # Held-out metrics: split -> step -> name -> value.
    self._history: dict[str, dict[int, dict[str, Any]]] = {}

  def __enter__(self) -> "Console":
    jax.monitoring.register_event_duration_secs_listener(self._on_event)
    return self

  def __exit__(self, *error: Any) -> None:
    jax.monitoring.unregister_event_duration_listener(self._on_event)

  def label(self, work: str) -> str:
    """Names a loop for `progress.track`; "" where none is to be shown."""
    return work if self._config.log.progress else ""

  def begin(self, done: int) -> None:
    """Shows the progress of a resumed run, and the header of one that trains.

    Args:
      done: steps that the workdir holds, 0 for a fresh run.
    """
    if not self._run.is_writer:
      return
    workdir = self._run.workdir
    if done and workdir.metrics.exists():
      for split in header.held_out(self._run.data):
        rows = read_metrics(workdir, split)
        self._history[split] = {
          row["step"]: row for row in rows if row["step"] <= done
        }
    if done:
      self._say(*standing(done, self._config.total_steps))
    if done < self._config.total_steps:
      for line in format_rows(header.describe(self._run)):
        _LOG.info("%s", line)

  def watch(self, batches: Generator[Any], start: int) -> Generator[Any]:
    """Yields the batches of the steps, timed, and moves the bar.

    Args:
      batches: batches of the steps from `start` on; closed with this generator.
      start: steps taken before.
    """
    self._clock, self._start = Clock(), start
    self._began, self._compiling = time.monotonic(), 0.0
    with (
      contextlib.closing(batches),
      tqdm(
        total=self._config.total_steps,
        initial=start,
        desc=self._run.program.objective.name,
        unit="step",
        disable=None if self._has_bar else True,
        leave=False,
        dynamic_ncols=True,
        mininterval=0.5,
        smoothing=0.1,
      ) as self._bar,
    ):
      for batch in self._clock.waiting(batches):
        yield batch
        self._bar.update()

  @contextlib.contextmanager
  def pause(self) -> Iterator[None]:
    """Leaves the time inside the context out of the rates."""
    self._clock.pause()
    yield
    self._clock.resume()
    self._bar.unpause()

  def count(
    self, metrics: Mapping[str, Any], counts: Mapping[str, float]
  ) -> None:
    """Counts num_groups and num_tokens; shows loss and accuracy at the bar."""
    self._clock.count(counts)
    shown = {"loss": format_number(float(metrics["loss"]), 4)}
    if "reward/accuracy" in metrics:
      shown["accuracy"] = format_number(float(metrics["reward/accuracy"]))
    self._bar.set_postfix(shown, refresh=False)

  def rates(self) -> dict[str, float]:
    """Returns groups and tokens a second since the last call.

    With the share of that time that steps waited for data; see `Clock.rates`.
    """
    return self._clock.rates()

  def show(self, step: int, split: str, metrics: Mapping[str, Any]) -> None:
    """Shows a line of metrics.jsonl: its main metrics.

    Args:
      step: steps taken.
      split: "train", "online", "eval" or "eval/NAME".
      metrics: metrics by name.
    """
    if not self._run.is_writer:
      return
    metrics = {name: float(value) for name, value in metrics.items()}
    if split == "train":
      self._show_step(step, metrics)
    elif split == "online":
      shown = [
        f"{name.replace('_', ' ')} {format_number(value)}"
        for name, value in metrics.items()
      ]
      self._say("samples", f"step {step:,}: {join(shown)}")
    else:
      self._show_evaluation(step, split, metrics)

  def _show_step(self, step: int, metrics: Mapping[str, float]) -> None:
    total = self._config.total_steps
    done = step - self._start
    seconds = time.monotonic() - self._began - self._compiling
    left = format_seconds(seconds / done * (total - step))
    heading, row = format_step(step, total, metrics, left)
    if heading != self._heading or self._rows % _ROWS_A_HEADING == 0:
      _LOG.info("%s", heading)
      self._heading, self._rows = heading, 0
    _LOG.info("%s", row)
    self._rows += 1

  def _show_evaluation(
    self, step: int, split: str, metrics: dict[str, float]
  ) -> None:
    self._history.setdefault(split, {})[step] = metrics
    shown = [f"{k} {v}" for k, v in main_metrics(metrics).items()]
    text = f"step {step:,}: {join(shown)}{self._best(split, step)}"
    self._say(split_label(split), text)

  def _best(self, split: str, now: int) -> str:
    """Describes the best step of a split so far, by `checkpoint.best_metric`.

    Returns:
      Text to append to a line; "" if the metric is of another split, or fewer
      than two steps have it.
    """
    metric = self._config.checkpoint.best_metric
    set_name = split.partition("/")[2]
    name = metric.removeprefix(config_lib.metric_prefix(set_name))
    sign = -1.0 if self._config.checkpoint.best_is_lower else 1.0
    found = {
      step: sign * row[name]
      for step, row in self._history[split].items()
      if row.get(name) is not None and not math.isnan(row[name])
    }
    if name == metric or len(found) < 2:
      return ""
    best = max(found, key=lambda step: (found[step], step))
    label, digits = _MAIN.get(name, (name, 3))
    if best == now:
      return f"; {join([f'the best {label} so far'])}"
    value = format_number(sign * found[best], digits)
    return f"; {join([f'best so far: {label} {value} at step {best:,}'])}"

  def end(self, best_step: int) -> None:
    """Shows the results of the run, and its files.

    Args:
      best_step: step of the best checkpoint.
    """
    if not self._run.is_writer:
      return
    if self._start is not None:
      steps = self._config.total_steps - self._start
      seconds = format_seconds(time.monotonic() - self._began)
      self._say("finished", f"{steps:,} steps in {seconds}")
    for split, by_step in self._history.items():
      if not by_step:
        continue
      for line in format_history(split, by_step, best_step):
        _LOG.info("%s", line)
    workdir, metric = self._run.workdir, self._config.checkpoint.best_metric
    by = f", by {metric}" if metric else ", the latest"
    self._say("best", f"checkpoint of step {best_step:,}{by}")
    samples = ", samples.jsonl" if self._config.eval.num_samples else ""
    files = f"metrics.jsonl (every metric){samples}, checkpoints/"
    self._say("files", f"{workdir}: {files}")
    self._say(
      "export", f"python -m dpo_jax.export --workdir={workdir} --out=FOLDER"
    )

  def _say(self, label: str, text: str) -> None:
    for line in format_rows([(label, text)]):
      _LOG.info("%s", line)

  def _on_event(self, event: str, seconds: float, **about: Any) -> None:
    """Shows when JAX compiles one of `_PROGRAMS`, and how long it took.

    JAX calls it. Compiling the training step is left out of the clock.
    """
    name = str(about.get("fun_name", ""))
    name = name.removeprefix("jit(").removesuffix(")")
    work = _PROGRAMS.get(name)
    if work is None or not event.startswith("/jax/core/compile/"):
      return
    self._spent[name] += seconds
    if name == "train_step":
      self._clock.leave_out(seconds)
      self._compiling += seconds
    if event == _TRACED and name not in self._told:
      self._say("compiling", work)
    elif event == _COMPILED:
      other = " for another shape of batch" if name in self._told else ""
      took = format_seconds(self._spent.pop(name))
      self._say("compiled", f"{work}{other} in {took}")
      self._told.add(name)
      self._bar.unpause()
