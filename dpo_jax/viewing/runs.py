"""Runs side by side: their configs, metrics, samples and curves."""

from collections.abc import Mapping, Sequence
import dataclasses
import os
from typing import Any

from etils import epath
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
import numpy as np
from rich.console import Console
from rich.table import Table
from rich.text import Text

from dpo_jax import config as config_lib
from dpo_jax.names import did_you_mean
from dpo_jax.records.metrics import format_table, read_metrics, read_samples
from dpo_jax.records.workdir import Workdir
from dpo_jax.system.files import read_json
from dpo_jax.viewing.terminal import visible

# Plotted where the runs have them and --metrics names none.
_PLOTTED = ("loss", "reward/accuracy", "reward/margin", "logps/chosen")
_COLORS = ("#1b6ca8", "#d95f02", "#1b9e77", "#e7298a", "#7570b3", "#666666")
_NOT_METRICS = ("step", "split")


@dataclasses.dataclass(frozen=True)
class RunRecord:
  """Record of a run, finished or not: its files, read once.

  Attributes:
    name: its path without what all compared paths begin with.
    config: key -> value.
    splits: split -> lines of metrics.jsonl.
    samples: lines of samples.jsonl.
    facts: other things that may differ: digests of the data, commit of the
      code.
    is_finished: whether it has taken all its steps.
  """

  name: str
  config: Mapping[str, Any]
  splits: Mapping[str, list[dict[str, Any]]]
  samples: list[dict[str, Any]]
  facts: Mapping[str, str]
  is_finished: bool

  @property
  def step(self) -> int:
    """Last step that it has metrics of; 0 without any."""
    return max((r[-1]["step"] for r in self.splits.values() if r), default=0)


def read_runs(workdirs: Sequence[str]) -> list[RunRecord]:
  """Reads runs, without their locks.

  Args:
    workdirs: run directories.

  Raises:
    FileNotFoundError: no run in one of them.
    ValueError: fewer than two, the same one twice, or a damaged file.
  """
  paths = [w if "://" in w else os.path.abspath(w) for w in workdirs]
  if len(set(paths)) < 2 or len(set(paths)) < len(paths):
    raise ValueError(
      "name two or more different workdirs; given:"
      f" {' '.join(workdirs) or 'none'}"
    )
  has_common = not any("://" in path for path in paths)
  common = os.path.commonpath(paths) if has_common else ""
  names = [path[len(common) :].strip("/") or path for path in paths]
  return [_read(n, p) for n, p in zip(names, paths, strict=True)]


def _read(name: str, path: str) -> RunRecord:
  workdir = Workdir.of_run(path)
  config = workdir.read_config()
  data = read_json(workdir.data) if workdir.data.exists() else {}
  facts = {
    f"data of {split}": str(entry["content"])[:12]
    for split, entry in data.items()
    if isinstance(entry, dict) and "content" in entry
  }
  facts["code"] = next(reversed(workdir.read_lines(workdir.git)), "unknown")
  held_out = config_lib.eval_sets(
    {"eval_sources": "", "eval_source": "", **config["data"]}
  )
  names = ["train", *(config_lib.split_name(n) for n in held_out), "online"]
  has_metrics = workdir.metrics.exists()
  splits = {n: read_metrics(workdir, n) if has_metrics else [] for n in names}
  samples = read_samples(workdir) if workdir.samples.exists() else []
  return RunRecord(
    name,
    dict(config_lib.flatten(config)),
    {split: rows for split, rows in splits.items() if rows},
    samples,
    facts,
    workdir.finished.exists(),
  )


def config_differences(runs: Sequence[RunRecord]) -> list[dict[str, str]]:
  """Returns a row for each config key, or other fact, that differs.

  Returns:
    "key"; and by each run's name the value as text, its middle cut out if it is
    long, "-" where the run does not have the key.
  """
  rows = []
  for fields in ("config", "facts"):
    values = [getattr(run, fields) for run in runs]
    keys = dict.fromkeys(key for its in values for key in its)
    for key in keys:
      texts = [str(its[key]) if key in its else "-" for its in values]
      if len(set(texts)) > 1:
        names = [run.name for run in runs]
        shown = map(_shorten, texts)
        rows.append({"key": key} | dict(zip(names, shown, strict=True)))
  return rows


def last_metrics(runs: Sequence[RunRecord]) -> list[dict[str, Any]]:
  """Returns a table of the last value that each run has of each metric.

  Returns:
    For each split but "train" a row for its step and for each metric: "metric"
    has the split and the name, and each run's name has the value as text, or
    "-".
  """
  splits = dict.fromkeys(
    split for run in runs for split in run.splits if split != "train"
  )
  rows: list[dict[str, Any]] = []
  for split in splits:
    # Samples may be rarer than evaluations: each metric has its own last line.
    last = [_last_values(run.splits.get(split, [])) for run in runs]
    metrics = dict.fromkeys(
      m for row in last for m in row if m not in _NOT_METRICS
    )
    for metric in ("step", *metrics):
      values = [row.get(metric) for row in last]
      cells = {
        run.name: "-" if value is None else _number(value)
        for run, value in zip(runs, values, strict=True)
      }
      rows.append({"metric": f"{split}: {metric}", **cells})
  return rows


def _last_values(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
  """Returns the last value of each metric, and the last step."""
  values: dict[str, Any] = {}
  for row in rows:
    values |= row
  return values


def plot(runs: Sequence[RunRecord], metrics: Sequence[str]) -> Figure:
  """Plots metrics of the runs over their steps, below each other.

  Args:
    runs: two or more.
    metrics: metrics to plot, of held-out sets where they have them; none for
      those of `_PLOTTED` that the runs have.

  Raises:
    ValueError: a metric that no run has; or none is named, and no run has one
      of `_PLOTTED`.
  """
  known = dict.fromkeys(
    metric
    for run in runs
    for rows in run.splits.values()
    for metric in _last_values(rows)
    if metric not in _NOT_METRICS
  )
  for metric in metrics:
    if metric not in known:
      raise ValueError(
        f"--metrics={metric}: no run has it.{did_you_mean(metric, known)}"
        f" Known: {', '.join(known)}"
      )
  chosen = list(metrics) or [m for m in _PLOTTED if m in known]
  if not chosen:
    raise ValueError("the runs have no metrics yet: compare them later")
  figure = Figure(figsize=(8, 2.6 * len(chosen)), layout="constrained")
  axes = figure.subplots(len(chosen), 1, sharex=True, squeeze=False)[:, 0]
  for axis, metric in zip(axes, chosen, strict=True):
    split = _split_of(runs, metric)
    for i, run in enumerate(runs):
      rows = run.splits.get(split, [])
      points = [
        (r["step"], r[metric]) for r in rows if r.get(metric) is not None
      ]
      if points:
        steps, values = np.array(points).T
        color = _COLORS[i % len(_COLORS)]
        marker = "o" if len(steps) < 30 else None
        axis.plot(steps, values, color=color, marker=marker, markersize=3)
        axis.annotate(
          f" {run.name}", (steps[-1], values[-1]), color=color, va="center"
        )
    axis.set_title(f"{metric} ({split})", loc="left", fontsize=10)
    axis.spines[["top", "right"]].set_visible(False)
    axis.margins(x=0.12)
  axes[-1].set_xlabel("step")
  return figure


def _split_of(runs: Sequence[RunRecord], metric: str) -> str:
  """Chooses the split in which runs have a metric, a held-out one if any."""
  splits = dict.fromkeys(split for run in runs for split in run.splits)
  ordered = sorted(splits, key=lambda split: not split.startswith("eval"))
  return next(
    split
    for split in ordered
    if any(metric in r for run in runs for r in run.splits.get(split, []))
  )


def show(console: Console, runs: Sequence[RunRecord], num_samples: int) -> None:
  """Prints what differs, the last metrics, and samples of the same prompts.

  Args:
    console: console to print on.
    runs: two or more.
    num_samples: prompts to print samples of.
  """
  state = [
    {
      "run": run.name,
      "step": f"{run.step:,} of {run.config['total_steps']:,}",
      "state": "finished" if run.is_finished else "not finished",
    }
    for run in runs
  ]
  _print(console, format_table(state))
  differences = config_differences(runs)
  _print(console, format_table(differences) or "the configs are the same")
  _print(console, format_table(last_metrics(runs)) or "no evaluation yet")
  _show_samples(console, runs, num_samples)


def _print(console: Console, text: str) -> None:
  console.print(f"{text}\n", soft_wrap=True)


def _show_samples(
  console: Console, runs: Sequence[RunRecord], num_samples: int
) -> None:
  """Prints the last samples of prompts that all runs have, in columns."""
  by_prompt = [{row["prompt"]: row for row in run.samples} for run in runs]
  shared = [p for p in by_prompt[0] if all(p in rows for rows in by_prompt)]
  for prompt in shared[:num_samples]:
    table = Table(
      title=Text(visible(f"prompt: {prompt}")),
      title_justify="left",
      expand=True,
    )
    for run in runs:
      table.add_column(Text(run.name), ratio=1, overflow="fold")
    table.add_row(*(_sample_text(rows[prompt]) for rows in by_prompt))
    console.print(table)


def _sample_text(row: Mapping[str, Any]) -> Text:
  reward = f", reward {row['reward']:.3f}" if "reward" in row else ""
  return Text(visible(f"{row['response']}\n(step {row['step']}{reward})"))


def write_figure(figure: Figure, path: epath.PathLike) -> None:
  """Writes a figure as PNG."""
  with epath.Path(path).open("wb") as file:
    FigureCanvasAgg(figure).print_png(file)


def _number(value: float) -> str:
  return f"{value:,.4g}" if abs(value) < 1e6 else f"{value:.3e}"


def _shorten(text: str) -> str:
  """Cuts the middle out of a long text: paths differ at their ends."""
  return text if len(text) <= 60 else f"{text[:20]}...{text[-37:]}"
