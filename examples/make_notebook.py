"""Writes dpo_from_scratch.ipynb from dpo_from_scratch.py.

  python -m examples.make_notebook

`# %% text` starts a cell of the script. The text becomes a Markdown cell of
the notebook, and the code below it a code cell. A test keeps the notebook
current.
"""

import json
import pathlib
import re
from typing import Any

SCRIPT = pathlib.Path(__file__).with_name("dpo_from_scratch.py")
NOTEBOOK = SCRIPT.with_suffix(".ipynb")
_SETUP = """It runs on a CPU, one small GPU or a TPU. On a GPU or TPU, install \
JAX for it first: `pip install "jax[cuda12]"` or `pip install "jax[tpu]"`. The \
next cell installs `dpo_jax` from the clone that this notebook is in."""


def render(script: str) -> str:
  """Returns the text of the notebook for a script."""
  first, *parts = re.split(r"^# %% ", script, flags=re.MULTILINE)
  _, title, imports = first.split('"""')
  cells = [
    _cell("markdown", "# " + re.sub(r"^  ", "    ", title, flags=re.M)),
    _cell("markdown", _SETUP),
    _cell("code", "%pip install -q .."),
    _cell("code", imports),
  ]
  for part in parts:
    text, _, code = part.partition("\n")
    cells += [_cell("markdown", text), _cell("code", code)]
  for number, cell in enumerate(cells):
    cell["id"] = f"cell-{number}"
  notebook = {
    "cells": cells,
    "metadata": {
      "kernelspec": {
        "display_name": "Python 3",
        "language": "python",
        "name": "python3",
      },
      "language_info": {"name": "python"},
    },
    "nbformat": 4,
    "nbformat_minor": 5,
  }
  return json.dumps(notebook, indent=1) + "\n"


def _cell(kind: str, text: str) -> dict[str, Any]:
  lines = text.strip().splitlines(keepends=True)
  cell = {"cell_type": kind, "metadata": {}, "source": lines}
  if kind == "code":
    cell |= {"execution_count": None, "outputs": []}
  return cell


if __name__ == "__main__":
  NOTEBOOK.write_text(render(SCRIPT.read_text(encoding="utf-8")))
  print(NOTEBOOK)
