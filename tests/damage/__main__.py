"""Provokes faults at random, and counts what happens.

  python -m tests.damage --kind=checkpoints --trials=500 --seed=0 --workers=2

A trial damages a copy of something sound, or kills a run, and compares what
comes back with what should. It depends on the seed and on its own index alone:
--first=17 --trials=1 repeats the 18th. Memory and time of a trial are limited.
The table at the end counts the outcomes; the exit code is 1 if one of them
begins with "wrong".
"""

import argparse
import collections
from concurrent import futures
import json
import multiprocessing
import os
import pathlib
import sys
import tempfile
import time

from tests import (
  conftest,  # noqa: F401  sets the environment of JAX
  faults,
)
from tests.damage.trials import CONTROL, KINDS, Result, limit, run_trial

_HERE = pathlib.Path(__file__).parent


def table(results: list[Result]) -> str:
  """Returns the outcomes of each kind with their counts, aligned."""
  counts = collections.Counter((r.kind, r.outcome) for r in results)
  rows = [("kind", "outcome", "trials")]
  rows += [(*key, str(n)) for key, n in sorted(counts.items())]
  widths = [max(len(row[i]) for row in rows) for i in range(3)]
  return "\n".join(
    f"{kind:<{widths[0]}}  {outcome:<{widths[1]}}  {count:>{widths[2]}}"
    for kind, outcome, count in rows
  )


def _parser() -> argparse.ArgumentParser:
  known = "\n".join(f"  {name:<16}{k.meaning}" for name, k in KINDS.items())
  parser = argparse.ArgumentParser(
    prog="python -m tests.damage",
    description=f"{__doc__}\nkinds:\n{known}",
    formatter_class=argparse.RawDescriptionHelpFormatter,
  )
  which = parser.add_mutually_exclusive_group(required=True)
  which.add_argument("--kind", choices=KINDS, help="what is damaged")
  which.add_argument("--all", action="store_true", help="every kind in turn")
  parser.add_argument(
    "--trials", default="small", help="number for each kind; small: as in CI"
  )
  parser.add_argument("--first", type=int, default=0, help="index of the first")
  parser.add_argument("--seed", type=int, default=0, help="seed of all trials")
  parser.add_argument("--workers", type=int, default=1, help="processes")
  parser.add_argument("--out", help="JSONL file of outcomes; lines are added")
  return parser


def _plan(options: argparse.Namespace) -> list[tuple[str, int]]:
  """Returns kind and index of each trial."""
  planned = []
  for kind in KINDS if options.all else (options.kind,):
    small = KINDS[kind].small
    count = small if options.trials == "small" else int(options.trials)
    if options.all and not (_HERE / f"{kind}.py").exists():
      continue
    planned += [(kind, options.first + i) for i in range(count)]
    has_control = "\ndef control(" in (_HERE / f"{kind}.py").read_text()
    planned += [(kind, CONTROL)] * (has_control and count > 0)
  return planned


def main() -> int:
  options = _parser().parse_args()
  planned = _plan(options)
  # Workers and their children inherit the tests' flags and caches.
  os.environ.update(faults.environment())
  results, begin = [], time.monotonic()
  with (
    tempfile.TemporaryDirectory(prefix="dpo_jax_damage_") as folder,
    futures.ProcessPoolExecutor(
      options.workers, multiprocessing.get_context("spawn"), limit, (folder,)
    ) as pool,
  ):
    waiting = [
      pool.submit(run_trial, kind, options.seed, index)
      for kind, index in planned
    ]
    for future in futures.as_completed(waiting):
      result = future.result()
      results.append(result)
      line = json.dumps(result._asdict())
      if result.outcome.startswith("wrong"):
        print(line, flush=True)
      if options.out:
        with open(options.out, "a", encoding="utf-8") as file:
          file.write(line + "\n")
  print(table(results))
  seconds = time.monotonic() - begin
  print(f"{len(results)} trials of seed {options.seed} in {seconds:.0f} s")
  return any(r.outcome.startswith("wrong") for r in results)


if __name__ == "__main__":
  sys.exit(main())
