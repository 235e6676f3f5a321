"""Page of results: durations, and each experiment's table and figure."""

from collections.abc import Callable, Sequence
import json
import math
import os
import pathlib
import platform
import shutil

import jax

from dpo_jax.system.files import write_atomically
from dpo_jax.system.version import code_version
from experiments.registry import Experiment
from experiments.sweep import Row, Settings


def write_page(
  chosen: Sequence[Experiment], whole: Settings, failures: dict[str, str]
) -> str:
  """Writes WORKDIR/all.md: what `render_page` returns.

  Returns:
    Its path.
  """

  def link(experiment: Experiment) -> str:
    return os.path.relpath(_figure(experiment, whole), whole.workdir)

  path = os.path.join(whole.workdir, "all.md")
  os.makedirs(whole.workdir, exist_ok=True)
  write_atomically(path, render_page(chosen, whole, failures, link))
  return path


def publish(
  chosen: Sequence[Experiment], whole: Settings, folder: str
) -> str | None:
  """Writes FOLDER/RESULTS.md, with copies of its figures in FOLDER/figures.

  Returns:
    Its path; None, and nothing is written, while runs are missing.
  """
  if any(_missing(experiment, whole) for experiment in chosen):
    return None
  figures = pathlib.Path(folder) / "figures"
  path = os.path.join(folder, "RESULTS.md")
  # Rendered first: copied figures would change the checkout that it names.
  text = render_page(
    chosen, whole, {}, lambda e: f"{figures.name}/{e.name}.png"
  )
  figures.mkdir(parents=True, exist_ok=True)
  for experiment in chosen:
    source = _figure(experiment, whole)
    shutil.copyfile(source, figures / f"{experiment.name}.png")
  write_atomically(path, text)
  return path


def _figure(experiment: Experiment, whole: Settings) -> str:
  workdir = experiment.settings(whole).workdir
  return os.path.join(workdir, f"{experiment.name}.png")


def _missing(experiment: Experiment, whole: Settings) -> bool:
  """Returns whether a run or the figure of an experiment is missing."""
  try:
    found = experiment.module.collect(experiment.settings(whole).workdir)
  except FileNotFoundError:
    return True
  return bool(found.missing) or not os.path.exists(_figure(experiment, whole))


def render_page(
  chosen: Sequence[Experiment],
  whole: Settings,
  failures: dict[str, str],
  link: Callable[[Experiment], str],
) -> str:
  """Returns a page: what runs took, and the results of each experiment.

  Failed experiments, and unfinished runs, are named.

  Args:
    chosen: experiments, in order.
    whole: settings of all.
    failures: messages of those that failed, by name.
    link: returns the link to an experiment's figure.
  """
  parts = [
    f"# Results at --scale={whole.scale}\n\n",
    "This page was written by `python -m experiments.all`, with dpo_jax at\n"
    f"{code_version()}, Python {platform.python_version()} and jax"
    f" {jax.__version__}.\nMinutes are those of one worker; a run that was"
    " interrupted counts from its last start.\n\n",
    _markdown(durations(chosen, whole)),
  ]
  for experiment in chosen:
    parts.append(f"\n## {experiment.name}\n\n{experiment.sentence}\n")
    if experiment.name in failures:
      parts.append(f"\n**Failed.** {failures[experiment.name]}\n")
    try:
      found = experiment.module.collect(experiment.settings(whole).workdir)
    except FileNotFoundError:
      parts.append("\nNo run has begun.\n")
      continue
    if found.rows and os.path.exists(_figure(experiment, whole)):
      parts.append(f"\n![{experiment.name}]({link(experiment)})\n")
    if found.rows:
      parts.append(f"\n{_markdown(experiment.table(found.rows))}")
    if found.missing:
      parts.append(f"\nUnfinished runs: {len(found.missing)}.\n")
  return "".join(parts)


def durations(chosen: Sequence[Experiment], whole: Settings) -> list[Row]:
  """Sums the time of finished runs.

  A run that several experiments share counts in the first of them alone, and
  one that was interrupted only from its last start.

  Returns:
    A row for each experiment and one for all: "experiment", "runs", and
    "minutes" of one worker.
  """
  counted: set[str] = set()
  rows: list[Row] = []
  for experiment in chosen:
    settings = experiment.settings(whole)
    listed = pathlib.Path(settings.workdir, f"{experiment.name}.runs.json")
    names = json.loads(listed.read_text()) if listed.exists() else []
    seconds = []
    for entry in names:
      result = pathlib.Path(settings.workdir, entry["name"], "result.json")
      if str(result) not in counted and result.exists():
        counted.add(str(result))
        seconds.append(json.loads(result.read_text())["last_seconds"])
    rows.append(
      {
        "experiment": experiment.name,
        "runs": len(seconds),
        "minutes": sum(seconds) / 60.0,
      }
    )
  total = {key: sum(row[key] for row in rows) for key in ("runs", "minutes")}
  return [*rows, {"experiment": "all", **total}]


def _markdown(rows: Sequence[Row]) -> str:
  """Formats rows as a table of Markdown, numbers with three decimals.

  A value that is NaN is left empty, with its spread, and so is a column without
  any value.
  """
  names = list(dict.fromkeys(name for row in rows for name in row))
  cells = [[_cell(row, name) for name in names] for row in rows]
  kept = [i for i in range(len(names)) if any(line[i] for line in cells)]
  lines = [names, *cells]
  table = [f"| {' | '.join(line[i] for i in kept)} |\n" for line in lines]
  return "".join([table[0], f"|{'---|' * len(kept)}\n", *table[1:]])


def _cell(row: Row, name: str) -> str:
  value = row.get(name, "")
  measured = row.get(name.removeprefix("+-"), value)
  if any(isinstance(v, float) and math.isnan(v) for v in (value, measured)):
    return ""
  # Rounding may leave -0.0, and 0.0 is added to it.
  return (
    f"{round(value, 3) + 0.0:.3f}" if isinstance(value, float) else str(value)
  )
