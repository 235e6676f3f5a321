"""Writes tables: one JSON file each, and RESULTS.md from all of them."""

import argparse
from collections.abc import Iterable, Mapping, Sequence
import datetime
import importlib.metadata
import json
import os
import pathlib
import platform
import re
import textwrap
from typing import Any

_FOLDER = pathlib.Path(__file__).parent
_JSON = _FOLDER / "results"
_WIDTH = 100
# The ratio that the first table of RESULTS.md collects from all others.
_RATIO = "dpo_jax_is_faster_by"
_INTRODUCTION = """# Measurements

dpo_jax against its peers on two CPU cores. The first table collects the ratios
of tokens a second from the tables below it. No GPU or TPU was measured.
[performance.md](../docs/performance.md) says what changes the ratios.
`python -m benchmarks.results` writes this page from JSON; do not edit it."""


def machine() -> dict[str, Any]:
  """Returns facts of this machine, for the JSON of a table.

  Returns:
    "processor", "cores", "load" (three averages), "python", and versions of
    packages by name.
  """
  packages = ("jax", "jaxlib", "flax", "optax", "numpy")
  processor = platform.processor()
  cpuinfo = pathlib.Path("/proc/cpuinfo")
  if cpuinfo.exists():
    for line in cpuinfo.read_text().splitlines():
      if line.startswith("model name"):
        processor = line.split(":")[1].strip()
        break
  return {
    "processor": processor,
    "cores": os.cpu_count(),
    "load": [round(x, 1) for x in os.getloadavg()],
    "python": platform.python_version(),
    **{name: importlib.metadata.version(name) for name in packages},
  }


def command(name: str, arguments: Iterable[str]) -> str:
  """Returns the command line of a benchmark."""
  return " ".join([f"python -m benchmarks.{name}", *arguments])


def write(
  table: str,
  *,
  title: str,
  command: str,
  rows: Sequence[Mapping[str, Any]],
  notes: Sequence[str],
  extra: Mapping[str, Any] | None = None,
  folder: pathlib.Path | None = None,
) -> None:
  """Writes a table's JSON, and RESULTS.md from every table's.

  Args:
    table: name of the JSON file.
    title: title of the table in RESULTS.md.
    command: command that made it.
    rows: rows of the table; values that are lists stay in the JSON.
    notes: remarks below the table, one line each.
    extra: further values for the JSON, such as versions.
    folder: folder for the JSON, and no RESULTS.md; None: results/.
  """
  target = folder or _JSON
  target.mkdir(exist_ok=True, parents=True)
  content = {
    "title": title,
    "command": command,
    "date": datetime.date.today().isoformat(),
    "machine": machine(),
    "notes": list(notes),
    "rows": [dict(row) for row in rows],
    "extra": dict(extra or {}),
  }
  path = target / f"{table}.json"
  path.write_text(json.dumps(content, indent=1) + "\n")
  if folder is None:
    (_FOLDER / "RESULTS.md").write_text(render())


def render() -> str:
  """Returns RESULTS.md, from the JSON of every table."""
  tables = [json.loads(p.read_text()) for p in sorted(_JSON.glob("*.json"))]
  text = [_INTRODUCTION, "", *_summary(tables)]
  for content in tables:
    text += ["", *_section(content)]
  return "\n".join(text) + "\n"


def _summary(tables: Sequence[Mapping[str, Any]]) -> list[str]:
  """Returns the lines of the first table: speed of dpo_jax over each peer."""
  rows = []
  for content in tables:
    lengths = " + ".join(re.findall(r"of (\d+)", content["title"]))
    processor = re.sub(r"\(R\)| Processor", "", content["machine"]["processor"])
    rows += [
      (row["name"], lengths or "mixed", processor, _cell(row[_RATIO]))
      for row in content["rows"]
      if row.get(_RATIO, 1.0) != 1.0
    ]
  header = ("peer", "prompt + response", "processor", "dpo_jax is faster by")
  return _table(header, rows)


def _section(content: Mapping[str, Any]) -> list[str]:
  rows = content["rows"]
  cells = {name: cell for row in rows for name, cell in row.items()}
  columns = [name for name, cell in cells.items() if not isinstance(cell, list)]
  key, *columns = columns
  machine_line = ", ".join(
    f"{name} {value}" for name, value in content["machine"].items()
  )
  text = [f"## {content['title']}", ""]
  for table in _tables(key, columns, rows):
    text += [*table, ""]
  notes = (*content["notes"], f"{content['date']}; {machine_line}.")
  for note in notes:
    text += textwrap.wrap(f"- {note}", _WIDTH, subsequent_indent="  ")
  # Words of the command stay whole; lines end as a shell continues them.
  command = textwrap.wrap(
    content["command"], _WIDTH - 2, subsequent_indent="    ", **_WHOLE
  )
  return [*text, "", "```bash", " \\\n".join(command), "```"]


_WHOLE = dict(break_long_words=False, break_on_hyphens=False)


def _tables(
  key: str, columns: Sequence[str], rows: Sequence[Mapping[str, Any]]
) -> list[list[str]]:
  """Lays rows out in tables of at most _WIDTH characters.

  Few rows with many columns are transposed; other tables are split by columns.

  Args:
    key: column that names the rows.
    columns: other columns.
    rows: cells by column.

  Returns:
    The lines of each table.
  """
  names = _without_common_parts([str(row[key]) for row in rows])
  transposed = _table(
    (key, *names),
    [
      (column.replace("_", " "), *(_cell(row.get(column)) for row in rows))
      for column in columns
    ],
  )
  if len(rows) < len(columns) and _fits(transposed):
    return [transposed]
  tables, first = [], 0
  while first < len(columns):
    last = first + 1
    while last < len(columns) and _fits(
      _by_rows(key, names, columns[first : last + 1], rows)
    ):
      last += 1
    tables.append(_by_rows(key, names, columns[first:last], rows))
    first = last
  return tables


def _by_rows(
  key: str,
  names: Sequence[str],
  columns: Sequence[str],
  rows: Sequence[Mapping[str, Any]],
) -> list[str]:
  return _table(
    (key, *(column.replace("_", " ") for column in columns)),
    [
      (name, *(_cell(row.get(column)) for column in columns))
      for name, row in zip(names, rows, strict=True)
    ],
  )


def _without_common_parts(names: Sequence[str]) -> list[str]:
  """Drops the parts between commas that all names share: the title has them."""
  parts = [name.split(", ") for name in names]
  common = set.intersection(*map(set, parts))
  short = [", ".join(p for p in name if p not in common) for name in parts]
  return short if all(short) else list(names)


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
  return [
    "| " + " | ".join(header) + " |",
    "|" + "---|" * len(header),
    *("| " + " | ".join(row) + " |" for row in rows),
  ]


def _fits(table: Sequence[str]) -> bool:
  return max(map(len, table)) <= _WIDTH


def _cell(value: Any) -> str:
  if isinstance(value, float):
    return f"{value:.4g}" if abs(value) < 1000 else f"{value:,.0f}"
  return "" if value is None else str(value)


if __name__ == "__main__":
  argparse.ArgumentParser(description=__doc__).parse_args()
  (_FOLDER / "RESULTS.md").write_text(render())
