"""Collects the rows of a sweep, averages them and writes them as CSV."""

from collections.abc import Callable, Sequence
import csv
import dataclasses
import json
import math
import pathlib

import numpy as np

from dpo_jax.records.metrics import format_table, read_metrics
from dpo_jax.records.workdir import Workdir
from experiments.sweep.runs import Row


@dataclasses.dataclass(frozen=True)
class Collected:
  """Contents of a sweep's workdir.

  Attributes:
    rows: labels and metrics of finished runs.
    missing: one line for each unfinished run: its name and progress.
  """

  rows: list[Row]
  missing: list[str]


def collect(workdir: str, name: str = "") -> Collected:
  """Reads the rows of finished runs, and the progress of the others.

  Args:
    workdir: folder of the sweep.
    name: experiment whose runs are read, of those that share the workdir; "":
      the one that was started last.

  Raises:
    FileNotFoundError: the folder does not hold a sweep.
  """
  root = pathlib.Path(workdir)
  path = root / (f"{name}.runs.json" if name else "sweep.json")
  if not path.exists():
    raise FileNotFoundError(
      f"{path} does not exist: {workdir} holds no sweep. Start one without"
      " --plot"
    )
  rows, missing = [], []
  for entry in json.loads(path.read_text()):
    folder = root / entry["name"]
    if (folder / "result.json").exists():
      found = json.loads((folder / "result.json").read_text())["rows"]
      rows += [
        {"run": entry["name"], **entry["labels"], **row} for row in found
      ]
    else:
      missing.append(f"{entry['name']}: {_progress(folder)}")
  return Collected(rows, missing)


def _progress(folder: pathlib.Path) -> str:
  """Describes the progress of an unfinished run."""
  if not (folder / "spec.json").exists():
    return "not started"
  if (folder / "failed.json").exists():
    return (
      f"failed: {json.loads((folder / 'failed.json').read_text())['error']}"
    )
  workdir = Workdir.at(folder)
  if not workdir.metrics.exists():
    return "started, no step done"
  rows = read_metrics(folder, "train") or [{"step": 0}]
  total = workdir.read_config()["total_steps"]
  return f"half-finished: step {rows[-1]['step']} of {total}"


def mean_and_spread(
  rows: Sequence[Row], by: Sequence[str], metrics: Sequence[str]
) -> list[Row]:
  """Averages rows that agree in the labels `by`, such as those of all seeds.

  Args:
    rows: one for each run, or for each point of a run.
    by: labels that define a group; groups keep the order of their first rows.
    metrics: columns of numbers; None where a row has no value.

  Returns:
    One row for each group: the labels, `seeds` (its number of rows), and the
    mean of each metric, NaN where no row has it. `METRIC_spread` is the
    standard deviation, 0 for a single value.
  """
  groups: dict[tuple, list[Row]] = {}
  for row in rows:
    groups.setdefault(tuple(row.get(name) for name in by), []).append(row)
  out = []
  for key, members in groups.items():
    line: Row = dict(zip(by, key, strict=True)) | {"seeds": len(members)}
    for name in metrics:
      found = [r[name] for r in members if r.get(name) is not None]
      line[name] = float(np.mean(found)) if found else math.nan
      line[f"{name}_spread"] = (
        float(np.std(found, ddof=1)) if len(found) > 1 else 0.0
      )
    out.append(line)
  return out


def write_csv(rows: Sequence[Row], path: str) -> None:
  """Writes all columns of all rows, empty where a row has no value."""
  names = list(dict.fromkeys(name for row in rows for name in row))
  with open(path, "w", newline="", encoding="utf-8") as file:
    writer = csv.DictWriter(file, names)
    writer.writeheader()
    writer.writerows(rows)


def print_report(
  found: Collected, table: Callable[[list[Row]], list[Row]] | None = None
) -> None:
  """Prints the table, and the runs that it lacks.

  Args:
    found: rows and missing runs.
    table: rows -> rows of the table; the rows themselves if None.
  """
  rows = table(found.rows) if table and found.rows else found.rows
  print(format_table(rows))
  if found.missing:
    print(f"\nnot in the table, {len(found.missing)} runs:")
    print("\n".join(f"  {line}" for line in found.missing))
