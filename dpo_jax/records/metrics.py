"""Metrics: their files, rates while a run trains, and tables."""

from collections.abc import Iterator, Mapping, Sequence
import json
import logging
import math
import time
from typing import Any

from etils import epath
import numpy as np

from dpo_jax.config import eval_sets, metric_prefix, split_name
from dpo_jax.records.lines import GrowingFile, cut_lines_after, read_rows
from dpo_jax.records.sinks import Sink
from dpo_jax.records.workdir import Workdir
from dpo_jax.system.files import size

_LOG = logging.getLogger(__name__)
_RESUMED = "resumed"  # split of a line that says where a run resumed
_SAMPLES = "samples"  # split of samples, which metrics.jsonl does not hold


class MetricsWriter:
  """Appends a JSON object a line: {"step", "split", then metrics}.

  Only process 0 writes. A metric that is not finite is written as null, so
  every line is JSON. Samples are lines of another file. The sinks receive both,
  but not the steps that the files held before: a run that resumes trains some
  steps again, with the same metrics.
  """

  def __init__(
    self,
    workdir: epath.PathLike | Workdir,
    *,
    is_writer: bool,
    sinks: Sequence[Sink] = (),
  ):
    """Opens the files for appending.

    Args:
      workdir: run directory.
      is_writer: whether this process writes.
      sinks: open sinks; `close` closes them.
    """
    self._file = None
    if not is_writer:
      return
    self._workdir = workdir = Workdir.at(workdir)
    workdir.path.mkdir(parents=True, exist_ok=True)
    path = workdir.metrics
    self._is_old = path.exists() and size(path) > 0
    self._sinks = sinks
    self._sent = _recorded_steps(workdir) if sinks else set()
    self._file = GrowingFile(workdir.metrics)

  def write(self, step: int, split: str, metrics: dict[str, Any]) -> None:
    """Writes the metrics of a step.

    Args:
      step: steps taken.
      split: "train", "eval", "eval/NAME" or "online".
      metrics: metrics by name.
    """
    if self._file is None:
      return
    line = {"step": step, "split": split, **as_numbers(metrics)}
    self._file.append(json.dumps(line) + "\n")
    numbers = {name: float(np.asarray(v)) for name, v in metrics.items()}
    if (split, step) not in self._sent:
      for sink in self._sinks:
        sink.write(step, split, numbers)

  def write_samples(self, step: int, rows: Sequence[Mapping[str, Any]]) -> None:
    """Writes the samples of a step in place of its own and of later lines.

    Later lines are from before the run resumed. Sinks get no step again.

    Args:
      step: steps taken.
      rows: JSON objects, each of a prompt and its response.
    """
    if self._file is None:
      return
    cut_lines_after(self._workdir.samples, step - 1)
    file = GrowingFile(self._workdir.samples)
    for row in rows:
      file.append(json.dumps({"step": step, **row}) + "\n")
    file.close()
    if (_SAMPLES, step) not in self._sent:
      for sink in self._sinks:
        sink.write_samples(step, rows)

  def write_resumed(self, step: int) -> None:
    """Records where a run resumes: lines above it of later steps are void.

    Writes nothing if this writer has begun metrics.jsonl; warns if it should
    not have.
    """
    if self._file is None:
      return
    if self._is_old:
      line = {"step": step, "split": _RESUMED}
      self._file.append(json.dumps(line) + "\n")
    elif step:
      _LOG.warning(
        "%s holds no line: the metrics up to step %d are lost",
        self._workdir.metrics,
        step,
      )

  def close(self) -> None:
    """Closes the files, and the sinks, which get the workdir's plots before."""
    if self._file is None:
      return
    self._file.close()
    plots = sorted(self._workdir.path.glob("*.png")) if self._sinks else []
    for sink in self._sinks:
      for path in plots:
        sink.write_plot(path)
      sink.close()


def _recorded_steps(workdir: Workdir) -> set[tuple[str, int]]:
  """Returns the (split, step) pairs in metrics.jsonl and samples.jsonl."""
  found = set()
  if workdir.metrics.exists():
    rows = read_rows(workdir.metrics, ("step", "split"))
    found |= {(row["split"], row["step"]) for row in rows}
  if workdir.samples.exists():
    rows = read_rows(workdir.samples, ("step", "prompt", "response"))
    found |= {(_SAMPLES, row["step"]) for row in rows}
  return found


def as_numbers(metrics: Mapping[str, Any]) -> dict[str, float | None]:
  """Returns metrics as JSON has them: None for one that is not finite."""
  numbers = {name: float(np.asarray(v)) for name, v in metrics.items()}
  return {k: x if math.isfinite(x) else None for k, x in numbers.items()}


def read_metrics(
  workdir: epath.PathLike | Workdir, split: str
) -> list[dict[str, Any]]:
  """Reads the lines of a split from metrics.jsonl, one for each step.

  A run that resumes at a step says so in a line, and trains the steps after it
  again: lines of these steps that stand above it do not count.

  Returns:
    A dict for each step, ascending: "step", "split" and the metrics by name,
    None for one that is not finite.

  Raises:
    FileNotFoundError: no metrics.jsonl.
    ValueError: a damaged line; names file and line.
  """
  path = Workdir.at(workdir).metrics
  by_step: dict[int, dict[str, Any]] = {}
  for row in read_rows(path, ("step", "split")):
    if row["split"] == _RESUMED:
      by_step = {k: v for k, v in by_step.items() if k <= row["step"]}
    elif row["split"] == split:
      by_step[row["step"]] = row
  return [by_step[step] for step in sorted(by_step)]


def read_samples(workdir: epath.PathLike | Workdir) -> list[dict[str, Any]]:
  """Reads samples.jsonl: "step", "prompt", "response" and any "reward".

  Raises:
    FileNotFoundError: no samples.jsonl.
    ValueError: a damaged line; names file and line.
  """
  return list(read_rows(Workdir.at(workdir).samples, ("prompt", "response")))


def check_lines(workdir: Workdir) -> None:
  """Checks the lines of metrics.jsonl and samples.jsonl, if they are there.

  Raises:
    ValueError: a damaged line; names file and line.
  """
  _recorded_steps(workdir)


def read_evaluation(
  workdir: epath.PathLike | Workdir,
  data: Mapping[str, Any],
  *,
  step: int | None = None,
) -> dict[str, float]:
  """Reads the metrics of an evaluation of each held-out set.

  Args:
    workdir: run directory.
    data: `config.data` of the run.
    step: step that was evaluated; None for the last of each set.

  Returns:
    Metrics named as `checkpoint.best_metric` names them; NaN where a set has
    none. Empty without an evaluation.

  Raises:
    FileNotFoundError: no metrics.jsonl.
    ValueError: a damaged line of it.
  """
  found = {}
  for name in eval_sets({"eval_sources": "", "eval_source": "", **data}):
    rows = read_metrics(workdir, split_name(name))
    if step is not None:
      rows = [row for row in rows if row["step"] == step]
    for metric, value in (rows[-1] if rows else {}).items():
      if metric not in ("step", "split"):
        key = f"{metric_prefix(name)}{metric}"
        found[key] = math.nan if value is None else value
  return found


class Clock:
  """Measures groups and tokens a second, and the wait for batches."""

  def __init__(self):
    self._reset()

  def _reset(self) -> None:
    self._totals = {"num_groups": 0.0, "num_tokens": 0.0}
    self._seconds = self._waited = 0.0
    self._since = time.monotonic()

  def count(self, counts: Mapping[str, float]) -> None:
    for name in self._totals:
      self._totals[name] += counts[name]

  def waiting(self, batches: Iterator[Any]) -> Iterator[Any]:
    """Yields the batches and counts the wait for each of them."""
    while True:
      asked = time.monotonic()
      batch = next(batches, None)
      self._waited += time.monotonic() - asked
      if batch is None:
        return
      yield batch

  def leave_out(self, seconds: float) -> None:
    """Leaves seconds, spent compiling, out of the next rates."""
    self._seconds -= seconds

  def pause(self) -> None:
    self._seconds += time.monotonic() - self._since

  def resume(self) -> None:
    self._since = time.monotonic()

  def rates(self) -> dict[str, float]:
    """Returns the rates since the last call, and starts again.

    Returns:
      "groups_per_second", "tokens_per_second", and "host_wait_fraction", the
      share of the time that steps waited for data.
    """
    self.pause()
    seconds = max(self._seconds, 1e-9)
    rates = {
      "groups_per_second": self._totals["num_groups"] / seconds,
      "tokens_per_second": self._totals["num_tokens"] / seconds,
      "host_wait_fraction": self._waited / seconds,
    }
    self._reset()
    return rates


def format_table(rows: list[dict[str, Any]]) -> str:
  """Formats rows with the same keys as an aligned table; "" without rows."""
  if not rows:
    return ""
  names = list(rows[0])
  cells = [names] + [[_cell(row[name]) for name in names] for row in rows]
  widths = [max(len(line[i]) for line in cells) for i in range(len(names))]
  is_text = [isinstance(rows[0][name], str) for name in names]

  def align(line):
    return "  ".join(
      cell.ljust(width) if text else cell.rjust(width)
      for cell, width, text in zip(line, widths, is_text, strict=True)
    ).rstrip()

  rule = "  ".join("-" * width for width in widths)
  return "\n".join([align(cells[0]), rule, *map(align, cells[1:])])


def _cell(value: Any) -> str:
  if isinstance(value, float):
    if 0 < abs(value) < 5e-4:  # a learning rate
      return f"{value:.3g}"
    return f"{value:.3f}" if abs(value) < 1000 else f"{value:,.0f}"
  return str(value)
