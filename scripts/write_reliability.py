"""Writes the table of faults in docs/reliability.md from the marks of tests.

  python scripts/write_reliability.py

A test that provokes a fault is marked `@pytest.mark.fault(NUMBER, ...)`; the
numbers are those of tests/damage/faults_table.py. A test keeps the page
current: run this after a mark or the table has changed.
"""

import ast
import pathlib
import sys

sys.path.insert(0, str(pathlib.Path(__file__).parents[1]))

from tests.damage.faults_table import FAULTS, NOT_APPLICABLE, NOT_YET

ROOT = pathlib.Path(__file__).parents[1]
PAGE = ROOT / "docs" / "reliability.md"
_BEGIN, _END = "<!-- faults -->\n", "<!-- end of faults -->\n"


def _numbers(function: ast.FunctionDef) -> list[int]:
  """Returns the faults that a test is marked with."""
  return [
    argument.value
    for mark in function.decorator_list
    if isinstance(mark, ast.Call)
    and ast.unparse(mark.func) == "pytest.mark.fault"
    for argument in mark.args
    if isinstance(argument, ast.Constant)
  ]


def marked(folder: pathlib.Path = ROOT / "tests") -> dict[int, list[str]]:
  """Returns the tests of each fault, as files below `folder`.

  Args:
    folder: folder of tests.

  Returns:
    Fault -> "path::test", by path.
  """
  found: dict[int, list[str]] = {}
  for path in sorted(folder.rglob("test_*.py")):
    for node in ast.walk(ast.parse(path.read_text())):
      if isinstance(node, ast.FunctionDef):
        name = f"{path.relative_to(folder).as_posix()}::{node.name}"
        for number in _numbers(node):
          found.setdefault(number, []).append(name)
  return found


def complaints(tests: dict[int, list[str]]) -> list[str]:
  """Returns what is wrong with the table or the marks, a message each."""
  numbers = [fault.number for fault in FAULTS]
  found = [
    f"fault {n} is listed twice" for n in set(numbers) if numbers.count(n) > 1
  ]
  found += [
    f"{tests[n]}: there is no fault {n}" for n in tests.keys() - numbers
  ]
  exempt = NOT_APPLICABLE | NOT_YET
  found += [
    f"fault {n} has no test" for n in numbers if n not in tests.keys() | exempt
  ]
  found += [
    f"fault {n} has a test: take it off NOT_YET" for n in NOT_YET & tests.keys()
  ]
  return sorted(found)


def table() -> str:
  """Returns the table: fault, outcome and the file of its first test."""
  tests = marked()
  lines = [
    "| | fault | what happens | test, under `tests/` |",
    "|---|---|---|---|",
  ]
  for number, fault, outcome in FAULTS:
    if number in NOT_APPLICABLE:
      test = "not applicable"
    elif number in NOT_YET:
      outcome, test = f"not yet: {outcome}", ""
    else:
      first = next(iter(tests.get(number, [])), "")
      test = f"`{first.partition('::')[0]}`"
    lines.append(f"| {number} | {fault} | {outcome} | {test} |")
  return "\n".join(lines) + "\n"


def render() -> str:
  """Returns the text of docs/reliability.md with the current table."""
  before, _, rest = PAGE.read_text().partition(_BEGIN)
  _, _, after = rest.partition(_END)
  return f"{before}{_BEGIN}\n{table()}\n{_END}{after}"


if __name__ == "__main__":
  PAGE.write_text(render())
  for complaint in complaints(marked()):
    print(complaint)
