"""Measures how many small faults the tests find: mutation testing.

  python -m tests.mutation --num=200 --seed=0 --workers=2

A mutant is one change to one expression of the losses, the packing or the
step: an operator, a comparison, a number, a condition, a function such as
min. It is killed if the tests of its module fail, and survives if they pass.
Works in copies of the tree, one for each worker. Prints each survivor and the
share of killed mutants with its 95 % interval (Wilson).
"""

import argparse
import ast
from collections.abc import Iterator
from concurrent import futures
import dataclasses
import os
import pathlib
import random
import shutil
import subprocess
import sys
import tempfile

from dpo_jax.intervals import wilson_interval

ROOT = pathlib.Path(__file__).parents[1]
# Modules, and the tests that are to find their faults.
TARGETS: dict[str, tuple[str, ...]] = {
  "dpo_jax/losses/policy_gradient.py": (
    "tests/losses/test_policy_gradient.py",
    "tests/losses/test_catalogue.py",
  ),
  # Defaults and ranges of knobs are in the document that a test compares.
  "dpo_jax/losses": (
    "tests/losses",
    "tests/test_experiments.py::test_losses_md_is_current",
  ),
  "dpo_jax/data/packing.py": (
    "tests/data/test_packing.py",
    "tests/data/test_loader.py",
    "tests/test_layouts.py",
  ),
  "dpo_jax/training/step.py": ("tests/training/test_step.py",),
  "dpo_jax/training/gradients.py": ("tests/training/test_step.py",),
}
# Generated from the others.
_SKIPPED = ("functions.py", "__init__.py")
_TIMEOUT_S = 900

_OPERATORS = {
  ast.Add: ast.Sub,
  ast.Sub: ast.Add,
  ast.Mult: ast.Div,
  ast.Div: ast.Mult,
  ast.FloorDiv: ast.Mult,
  ast.Mod: ast.Mult,
  ast.Pow: ast.Mult,
  ast.BitAnd: ast.BitOr,
  ast.BitOr: ast.BitAnd,
}
_COMPARISONS = {
  ast.Lt: ast.LtE,
  ast.LtE: ast.Lt,
  ast.Gt: ast.GtE,
  ast.GtE: ast.Gt,
  ast.Eq: ast.NotEq,
  ast.NotEq: ast.Eq,
  ast.In: ast.NotIn,
  ast.NotIn: ast.In,
  ast.Is: ast.IsNot,
  ast.IsNot: ast.Is,
}
_NAMES = {
  "minimum": "maximum",
  "maximum": "minimum",
  "min": "max",
  "max": "min",
  "log1p": "expm1",
  "expm1": "log1p",
  "sum": "mean",
  "mean": "sum",
  "any": "all",
  "all": "any",
  "exp": "log1p",
  "log_sigmoid": "sigmoid",
  "cumsum": "cumprod",
}


@dataclasses.dataclass(frozen=True)
class Mutant:
  """One change to one file.

  Attributes:
    path: file, relative to the root.
    line: line of the change.
    change: description of the change.
    text: whole file with the change.
    tests: test files that should find it.
  """

  path: str
  line: int
  change: str
  text: str
  tests: tuple[str, ...]


def _replacements(node: ast.AST) -> Iterator[tuple[ast.AST, str]]:
  """Yields mutated copies of a node, and a description of each."""
  if isinstance(node, ast.BinOp) and type(node.op) in _OPERATORS:
    other = _OPERATORS[type(node.op)]()
    yield ast.BinOp(node.left, other, node.right), "operator"
  elif isinstance(node, ast.Compare) and type(node.ops[0]) in _COMPARISONS:
    other = _COMPARISONS[type(node.ops[0])]()
    yield ast.Compare(node.left, [other, *node.ops[1:]], node.comparators), "<>"
  elif isinstance(node, ast.UnaryOp) and isinstance(
    node.op, ast.USub | ast.Not
  ):
    yield node.operand, "sign"
  elif isinstance(node, ast.BoolOp):
    other = ast.Or() if isinstance(node.op, ast.And) else ast.And()
    yield ast.BoolOp(other, node.values), "and, or"
  elif isinstance(node, ast.IfExp):
    yield ast.IfExp(node.test, node.orelse, node.body), "branches"
  elif isinstance(node, ast.Constant) and type(node.value) in (int, float):
    yield ast.Constant(node.value + 1), "number"
  elif isinstance(node, ast.Constant) and isinstance(node.value, bool):
    yield ast.Constant(not node.value), "bool"
  elif isinstance(node, ast.Attribute) and node.attr in _NAMES:
    yield ast.Attribute(node.value, _NAMES[node.attr], node.ctx), "function"


class _Swap(ast.NodeTransformer):
  def __init__(self, target: ast.AST, replacement: ast.AST):
    self._target, self._replacement = target, replacement

  def visit(self, node: ast.AST) -> ast.AST:
    if node is self._target:
      return ast.copy_location(self._replacement, node)
    return self.generic_visit(node)


def _annotations(tree: ast.AST) -> set[int]:
  """Ids of the nodes that never run: annotations."""
  roots = []
  for node in ast.walk(tree):
    roots.append(getattr(node, "annotation", None))
    roots.append(getattr(node, "returns", None))
  return {id(x) for root in roots if root for x in ast.walk(root)}


def mutants_of(path: pathlib.Path, tests: tuple[str, ...]) -> list[Mutant]:
  """Returns every mutant of a module."""
  source = path.read_text()
  tree = ast.parse(source)
  unused = _annotations(tree)
  found = []
  for node in ast.walk(tree):
    if id(node) in unused:
      continue
    for replacement, kind in _replacements(node):
      before = ast.unparse(node)
      changed = ast.fix_missing_locations(_Swap(node, replacement).visit(tree))
      text = ast.unparse(changed)
      tree_again = _Swap(replacement, node).visit(changed)
      assert ast.unparse(tree_again) == ast.unparse(ast.parse(source)), before
      after = ast.unparse(replacement)
      change = f"{kind}: {before[:60]} -> {after[:60]}"
      name = path.relative_to(ROOT).as_posix()
      found.append(Mutant(name, node.lineno, change, text, tests))
  return found


def all_mutants() -> list[Mutant]:
  """Returns every mutant of the targets, the most specific target first."""
  found: dict[str, list[Mutant]] = {}
  for target, tests in TARGETS.items():
    root = ROOT / target
    paths = [root] if root.is_file() else sorted(root.rglob("*.py"))
    for path in paths:
      if path.name not in _SKIPPED and str(path) not in found:
        found[str(path)] = mutants_of(path, tests)
  return [mutant for mutants in found.values() for mutant in mutants]


def is_killed(mutant: Mutant, tree: pathlib.Path) -> bool:
  """Runs the tests of a mutant in a copy of the tree."""
  path = tree / mutant.path
  original = path.read_text()
  path.write_text(mutant.text)
  command = [sys.executable, "-m", "pytest", "-q", "-x", "-n", "0"]
  try:
    done = subprocess.run(
      [*command, "-p", "no:cacheprovider", *mutant.tests],
      cwd=tree,
      capture_output=True,
      timeout=_TIMEOUT_S,
      check=False,
    )
    return done.returncode != 0
  except subprocess.TimeoutExpired:
    return True
  finally:
    path.write_text(original)


def _work(mutants: list[Mutant], number: int) -> list[tuple[Mutant, bool]]:
  """Runs a share of the mutants in one copy of the tree."""
  with tempfile.TemporaryDirectory() as folder:
    tree = pathlib.Path(folder) / "tree"
    ignored = shutil.ignore_patterns(".git", "__pycache__", "runs", ".*_cache")
    shutil.copytree(ROOT, tree, ignore=ignored)
    results = []
    for mutant in mutants:
      killed = is_killed(mutant, tree)
      results.append((mutant, killed))
      verdict = "killed" if killed else "SURVIVED"
      text = f"{verdict} {mutant.path}:{mutant.line} {mutant.change}"
      print(f"[{number}: {len(results)}/{len(mutants)}] {text}", flush=True)
    return results


def main() -> None:
  parser = argparse.ArgumentParser(description="Mutation testing.")
  parser.add_argument("--num", type=int, default=200, help="mutants to draw")
  parser.add_argument("--seed", type=int, default=0, help="seed of the draw")
  parser.add_argument("--workers", type=int, default=os.cpu_count())
  options = parser.parse_args()
  mutants = all_mutants()
  count = min(options.num, len(mutants))
  chosen = random.Random(options.seed).sample(mutants, count)
  shares = [chosen[i :: options.workers] for i in range(options.workers)]
  with futures.ThreadPoolExecutor(options.workers) as pool:
    results = [
      result
      for share in pool.map(_work, shares, range(options.workers))
      for result in share
    ]
  killed = sum(is_dead for _, is_dead in results)
  low, high = wilson_interval(killed / count, count)
  print(f"{killed} of {count} mutants killed, of {len(mutants)} there are:")
  print(f"{killed / count:.1%}, 95 % interval {low:.1%} to {high:.1%}")


if __name__ == "__main__":
  main()
