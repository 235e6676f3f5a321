"""Writes tables: one JSON file each, and RESULTS.md from all of them."""

from collections.abc import Iterable, Mapping, Sequence
import datetime
import importlib.metadata
import json
import os
import pathlib
import platform
from typing import Any

_FOLDER = pathlib.Path(__file__).parent
_JSON = _FOLDER / "results"


def machine() -> dict[str, Any]:
  """Returns the processor, its load, and versions of packages."""
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
) -> None:
  """Writes a table's JSON, and RESULTS.md from every table's.

  Args:
    table: name of the JSON file.
    title: title of the table in RESULTS.md.
    command: command that made it.
    rows: rows of the table; values that are lists stay in the JSON.
    notes: remarks below the table, one line each.
    extra: further values for the JSON, such as versions.
  """
  _JSON.mkdir(exist_ok=True)
  content = {
    "title": title,
    "command": command,
    "date": datetime.date.today().isoformat(),
    "machine": machine(),
    "notes": list(notes),
    "rows": [dict(row) for row in rows],
    "extra": dict(extra or {}),
  }
  path = _JSON / f"{table}.json"
  path.write_text(json.dumps(content, indent=1) + "\n")
  tables = [json.loads(p.read_text()) for p in sorted(_JSON.glob("*.json"))]
  text = ["# Measurements", "", "Written by the commands below."]
  for content in tables:
    text += ["", *_markdown(content)]
  (_FOLDER / "RESULTS.md").write_text("\n".join(text) + "\n")


def _markdown(content: Mapping[str, Any]) -> list[str]:
  rows = content["rows"]
  cells = {name: cell for row in rows for name, cell in row.items()}
  columns = [name for name, cell in cells.items() if not isinstance(cell, list)]
  machine_line = ", ".join(
    f"{name} {value}" for name, value in content["machine"].items()
  )
  return [
    f"## {content['title']}",
    "",
    f"`{content['command']}`, {content['date']}; {machine_line}.",
    "",
    "| " + " | ".join(name.replace("_", " ") for name in columns) + " |",
    "|" + "---|" * len(columns),
    *(
      "| " + " | ".join(_cell(row.get(name)) for name in columns) + " |"
      for row in rows
    ),
    "",
    *(f"- {note}" for note in content["notes"]),
  ]


def _cell(value: Any) -> str:
  if isinstance(value, float):
    return f"{value:.4g}" if abs(value) < 1000 else f"{value:,.0f}"
  return "" if value is None else str(value)
