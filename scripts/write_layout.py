"""Writes docs/layout.md: each module with the first sentence of its docstring.

  python scripts/write_layout.py

The order of the package is that of `ROOMS` in tests/test_architecture.py. A
test keeps the page current: run this after a module is added, moved or
described differently.
"""

import ast
from collections.abc import Iterator
import pathlib
import sys
import textwrap

sys.path.insert(0, str(pathlib.Path(__file__).parents[1]))

from tests.test_architecture import ROOMS

ROOT = pathlib.Path(__file__).parents[1]
PAGE = ROOT / "docs" / "layout.md"
_WIDTH = 100
_COLUMN = 26  # where descriptions begin
_INTRODUCTION = """# Package layout

A module imports only modules listed above it; `tests/test_architecture.py`
enforces that. `python scripts/write_layout.py` writes this page from the
docstrings of the modules; do not edit it.
"""
_FOLDERS = ("configs", "examples", "experiments", "benchmarks", "scripts")
_OTHERS = {
  "tests/": "Mirror dpo_jax/; laws that hold for all of it are at the top.",
  "docs/": "Data, models, losses, sampling, TPUs, numbers, design and style.",
}


def first_sentence(path: pathlib.Path) -> str:
  """Returns the first paragraph of a module's docstring, on one line."""
  docstring = ast.get_docstring(ast.parse(path.read_text())) or ""
  return " ".join(docstring.split("\n\n")[0].split())


def line(name: str, depth: int, description: str) -> str:
  """Returns the text of one entry: its name, indented, and its description.

  The description has a column of its own, in which it is wrapped.
  """
  start = f"{'  ' * depth}{name}"
  # A long name keeps one space to its description.
  text = f"{start:<{_COLUMN - 1}} {description}".rstrip()
  return textwrap.fill(
    text,
    _WIDTH,
    subsequent_indent=" " * _COLUMN,
    break_on_hyphens=False,
    break_long_words=False,
    drop_whitespace=True,
    replace_whitespace=False,
  )


def package() -> Iterator[str]:
  """Yields the lines of dpo_jax/, in the order of imports."""
  folder = ROOT / "dpo_jax"
  for room, modules in ROOMS.items():
    if not modules:
      path = folder / f"{room}.py"
      yield line(path.name, 1, first_sentence(path))
      continue
    yield line(f"{room}/", 1, first_sentence(folder / room / "__init__.py"))
    inner = ""
    for module in modules:
      path = folder / room / f"{module}.py"
      parent = str(pathlib.PurePath(module).parent)
      if parent not in (inner, "."):
        inner = parent
        exports = folder / room / inner / "__init__.py"
        yield line(f"{inner}/", 2, first_sentence(exports))
      if path.is_file():
        yield line(path.name, 2 + module.count("/"), first_sentence(path))


def render() -> str:
  """Returns the text of docs/layout.md."""
  lines = ["dpo_jax/", *package()]
  for name in _FOLDERS:
    lines.append(f"{name}/")
    for path in sorted((ROOT / name).glob("*.py")):
      if path.name != "__init__.py":
        lines.append(line(path.name, 1, first_sentence(path)))
  lines += [line(name, 0, text) for name, text in _OTHERS.items()]
  return "\n".join([_INTRODUCTION, "```", *lines, "```", ""])


if __name__ == "__main__":
  PAGE.write_text(render())
