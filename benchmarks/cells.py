"""Runs one contender after the other within a budget of time.

A cell is a contender that may fail: too little memory, or a package that is not
there. Its row then says why, and the next cell runs. Rows are printed and
written as they end, so that a run that is stopped keeps what it has measured.
"""

import argparse
from collections.abc import Callable, Mapping, Sequence
import dataclasses
import pathlib
import re
import sys
import tempfile
import threading
import time
from typing import IO, Any

from benchmarks import interleave, results

_LIBRARIES = ("jax", "torch")
# Exit code of a check that found a kernel to be wrong.
DISAGREES = 3
# A cell starts only while this share of the budget is left.
_LEAST_SHARE = 0.1


@dataclasses.dataclass(frozen=True)
class Cell:
  """A contender and its part of a table.

  Attributes:
    name: name of the row.
    command: command line of a process, see `interleave.serve`.
    env: variables to add to its environment.
    workload: rows with the same one are compared with the first of them.
    executed: FLOPs of a turn that it executes, "shared_flops" if it computes
      each prompt once and "useful_flops" if once for each response.
    is_trainer: whether it takes steps; otherwise its first answer is the row.
  """

  name: str
  command: Sequence[str]
  env: Mapping[str, str] = dataclasses.field(default_factory=dict)
  workload: str = ""
  executed: str = "useful_flops"
  is_trainer: bool = True


def module(name: str, *arguments: str) -> list[str]:
  """Returns the command line of a module of benchmarks."""
  return [sys.executable, "-m", f"benchmarks.{name}", *arguments]


def add_options(parser: argparse.ArgumentParser, *, budget_s: float) -> None:
  """Adds options for time, output and the matmul rate."""
  interleave.add_options(parser, num_turns=4, steps_a_turn=4)
  parser.add_argument(
    "--budget_s",
    type=float,
    default=budget_s,
    help="seconds after which the cells that are left are skipped",
  )
  parser.add_argument(
    "--only", default="", help="words, comma-separated: rows with one of them"
  )
  parser.add_argument(
    "--out", default="", help="folder of the table; empty: benchmarks/results"
  )
  parser.add_argument(
    "--matmul_tflops",
    default="",
    help="measured rates, as in jax:690,torch:780; empty: measure them",
  )


def run(
  cells: Sequence[Cell],
  options: argparse.Namespace,
  *,
  began: float,
  report: Callable[[dict[str, Any]], None],
) -> list[dict[str, Any]]:
  """Runs cells in order, and reports the row of each as it ends.

  Args:
    cells: in order of worth.
    options: parsed options of `add_options`.
    began: `time.monotonic()` at which the budget started.
    report: called with each row.

  Returns:
    One row for each cell. Of those that failed or were skipped, `error` says
    why.
  """
  rows: list[dict[str, Any]] = []
  for cell in cells:
    left_s = began + options.budget_s - time.monotonic()
    if left_s <= _LEAST_SHARE * options.budget_s:
      spent_s = options.budget_s - max(left_s, 0.0)
      error = (
        f"skipped: {spent_s:.0f} s of a budget of {options.budget_s:.0f} s are"
        " spent"
      )
      row: dict[str, Any] = {"name": cell.name, "error": error}
    else:
      row = _measure(cell, options, left_s)
    row["workload"] = cell.workload
    times = ratio(row, rows)
    if times is not None:
      row["dpo_jax_times"] = times
    rows.append(row)
    report(row)
  return rows


def ratio(
  row: Mapping[str, Any], rows: Sequence[Mapping[str, Any]]
) -> float | None:
  """Returns how many times as fast the first row of a row's workload is.

  The ratio is that of `pairs_per_second`; None where one of them has none.

  Args:
    row: row of a cell.
    rows: earlier rows.
  """
  same = (r for r in rows if r["workload"] == row["workload"])
  first = next(same, {})
  if "pairs_per_second" not in (row.keys() & first.keys()):
    return None
  return first["pairs_per_second"] / row["pairs_per_second"]


def _measure(
  cell: Cell, options: argparse.Namespace, limit_s: float
) -> dict[str, Any]:
  """Runs a cell for at most `limit_s` seconds, and returns its row.

  Returns:
    Of a trainer, the row of `interleave.summarize`, with
    `executed_gflops_per_second`, and `spread`, the quartiles' distance over the
    median. Of another cell, "name" and its first answer. Of one that failed or
    was stopped, "name" and "error".
  """
  with tempfile.TemporaryFile("w+") as log:
    contender = interleave.Contender(
      cell.name, cell.command, env=cell.env, stderr=log
    )
    began = time.monotonic()
    clock = threading.Timer(limit_s, contender.kill)
    clock.start()
    try:
      if not cell.is_trainer:
        return {"name": cell.name} | contender.ask("start")
      [row] = interleave.measure([contender], options)
    except RuntimeError as error:
      if time.monotonic() - began >= limit_s:
        error_text = f"stopped after {limit_s:.0f} s"
      else:
        error_text = f"failed: {_reason(log) or error}"
      return {"name": cell.name, "error": error_text}
    finally:
      contender.close()
      clock.cancel()
  executed = cell.executed.replace("flops", "gflops_per_second")
  low, high = row["tokens_per_second_quartiles"]
  return row | {
    "executed_gflops_per_second": row[executed],
    "spread": (high - low) / row["tokens_per_second"],
  }


def _reason(log: IO[str]) -> str:
  """Finds the last error in what a process wrote; "" if there is none."""
  log.seek(0)
  lines = [
    line.strip()
    for line in log
    if re.match(r"[\w.]*(Error|Exception|Interrupt)\b", line)
  ]
  return lines[-1][:200] if lines else ""


def matmul_rates(options: argparse.Namespace) -> list[dict[str, Any]]:
  """Returns the rates of the bfloat16 matmul of JAX and torch, fastest first.

  Measures them unless `--matmul_tflops` gives them; a library that fails is
  printed and left out.

  Returns:
    Rows with "matmul_tflops" and "version", and if measured "device".
  """
  if options.matmul_tflops:
    parts = (part.split(":") for part in options.matmul_tflops.split(","))
    rows = [
      {"version": library, "matmul_tflops": float(tflops)}
      for library, tflops in parts
    ]
  else:
    rows = [
      _measure(_matmul_cell(library), options, options.budget_s)
      for library in _LIBRARIES
    ]
    print("\n".join(map(line, rows)), flush=True)
  found = [row for row in rows if "matmul_tflops" in row]
  return sorted(found, key=lambda row: -row["matmul_tflops"])


def rates_option(matmuls: Sequence[Mapping[str, Any]]) -> str:
  """Returns rates as `--matmul_tflops` takes them; "" if there are none."""
  return ",".join(f"{x['version']}:{x['matmul_tflops']:.4g}" for x in matmuls)


def _matmul_cell(library: str) -> Cell:
  command = module("matmul_worker", f"--library={library}")
  return Cell(f"matmul, {library}", command, is_trainer=False)


def add_shares(
  row: dict[str, Any], matmuls: Sequence[Mapping[str, Any]]
) -> None:
  """Adds shares of the fastest matmul to a trainer's row, in place.

  They are `useful_of_matmul` and `executed_of_matmul`, fractions. A row without
  FLOPs stays as it is.

  Args:
    row: row of a cell.
    matmuls: from `matmul_rates`.
  """
  if matmuls and "executed_gflops_per_second" in row:
    rate = matmuls[0]["matmul_tflops"] * 1e3
    for kind in ("useful", "executed"):
      row[f"{kind}_of_matmul"] = row[f"{kind}_gflops_per_second"] / rate


def _matmul_remark(matmuls: Sequence[Mapping[str, Any]]) -> str:
  """Says how fast the matmuls are, and on which device."""
  if not matmuls:
    return "bfloat16 matmul: not measured."
  speeds = [f"{x['version']} {x['matmul_tflops']:.0f}" for x in matmuls]
  device = matmuls[0].get("device", "device not asked")
  return (
    f"{device}; bfloat16 matmul of 8192, TFLOP/s: {', '.join(speeds)}; shares"
    f" are of {matmuls[0]['version']}'s."
  )


# Columns of a table of trainers: key of a row, header, factor.
_COLUMNS = (
  ("pairs_per_second", "pairs/s", 1.0),
  ("useful_gflops_per_second", "useful TFLOP/s", 1e-3),
  ("useful_of_matmul", "of matmul %", 100.0),
  ("executed_gflops_per_second", "executed TFLOP/s", 1e-3),
  ("executed_of_matmul", "of matmul %", 100.0),
  ("dpo_jax_times", "dpo_jax is times", 1.0),
  ("peak_device_gib", "GiB", 1.0),
  ("padding", "padding %", 100.0),
  ("spread", "spread %", 100.0),
  ("matmul_tflops", "TFLOP/s", 1.0),
  ("forward_tflops", "forward TFLOP/s", 1.0),
  ("both_tflops", "both TFLOP/s", 1.0),
)


def line(row: Mapping[str, Any]) -> str:
  """Returns a row as a line of text, for the reader who waits."""
  if "error" in row:
    return f"{row['name']}: {row['error']}"
  cells = [
    f"{header} {row[key] * factor:.4g}"
    for key, header, factor in _COLUMNS
    if key in row
  ]
  return f"{row['name']}: {', '.join(cells)}"


def table(rows: Sequence[Mapping[str, Any]]) -> str:
  """Returns rows as a table in Markdown; a failure is below it."""
  columns = [c for c in _COLUMNS if any(c[0] in row for row in rows)]
  lines = [
    "| " + " | ".join(["name", *(header for _, header, _ in columns)]) + " |",
    "|" + "---|" * (1 + len(columns)),
  ]
  for row in rows:
    cells = [
      f"{row[key] * factor:.4g}" if key in row else ""
      for key, _, factor in columns
    ]
    lines.append("| " + " | ".join([row["name"], *cells]) + " |")
  failures = [line(row) for row in rows if "error" in row]
  return "\n".join([*lines, "", *failures])


def run_table(
  name: str,
  cells: Sequence[Cell],
  options: argparse.Namespace,
  *,
  title: str,
  notes: Sequence[str],
) -> list[dict[str, Any]]:
  """Runs cells, and prints and writes their table.

  Args:
    name: name of the JSON file.
    cells: in order of worth; those that `--only` leaves are run.
    options: parsed options of `add_options`.
    title: title of the table.
    notes: remarks below it.

  Returns:
    The rows, see `run`.
  """
  began = time.monotonic()
  matmuls = matmul_rates(options)
  done: list[dict[str, Any]] = []
  remarks = [*notes, _matmul_remark(matmuls)]

  def report(row: dict[str, Any]) -> None:
    add_shares(row, matmuls)
    done.append(row)
    print(line(row), flush=True)
    results.write(
      name,
      title=title,
      command=results.command(name, sys.argv[1:]),
      rows=done,
      notes=remarks,
      extra={
        "seconds": time.monotonic() - began,
        "matmul_tflops": rates_option(matmuls),
      },
      folder=pathlib.Path(options.out) if options.out else None,
    )

  words = options.only.split(",")
  chosen = [cell for cell in cells if any(word in cell.name for word in words)]
  rows = run(chosen, options, began=began, report=report)
  print(f"\n{title}\n\n{table(rows)}\n" + "\n".join(remarks), flush=True)
  return rows
