"""The command line of an experiment."""

from collections.abc import Callable
import os
from typing import Any

from absl import flags

from dpo_jax import command_line
from experiments.sweep.cost import print_estimate
from experiments.sweep.execution import compile_once, compile_soon, execute
from experiments.sweep.report import print_report
from experiments.sweep.runs import SCALES, Row, Settings, choose

Table = Callable[[list[Row]], list[Row]]


def main(experiment: Any, table: Table | None = None) -> None:
  """Gives an experiment its command line.

  Args:
    experiment: module with `runs`, `collect` and `plot`.
    table: rows -> rows of the printed table; the rows themselves if None.
  """
  name = experiment.__spec__.name.rpartition(".")[2]
  define_flags(name)
  flags.DEFINE_string("policy", "", "folder of a Hugging Face model")
  flags.DEFINE_string("reviews", "", "JSONL file of real reviews, or tfds")

  def run() -> None:
    if flags.FLAGS.scale == "tiny":
      compile_soon()
    options = flags.FLAGS
    settings = Settings(
      options.workdir, options.scale, options.policy, options.reviews
    )
    raise SystemExit(run_command(experiment, table, name, settings))

  command_line.run(run)


def define_flags(name: str) -> None:
  """Defines the flags of every sweep.

  Args:
    name: name of the experiment.
  """
  flags.DEFINE_string("workdir", f"runs/{name}", "folder of the sweep")
  flags.DEFINE_enum("scale", "tiny", SCALES, "size; hardware of --dry_run")
  flags.DEFINE_bool("dry_run", False, "only print the runs and their cost")
  flags.DEFINE_list("only", [], "names of runs to do; all if empty")
  flags.DEFINE_string("shard", "0/1", "i/n: this is worker i of n, from 0")
  flags.DEFINE_bool("plot", False, "only collect and plot finished runs")


def run_command(
  experiment: Any, table: Table | None, name: str, settings: Settings
) -> int:
  """Runs and reports a sweep.

  Args:
    experiment: has `runs`, `collect` and `plot`.
    table: see `main`.
    name: name of the experiment, of its figure and its table.
    settings: choices of the command line.

  Returns:
    1 where a run failed, and 0 otherwise.
  """
  options = flags.FLAGS
  failures: dict[str, str] = {}
  if not options.plot:
    runs = experiment.runs(settings)
    mine = choose(runs, only=options.only, shard=options.shard)
    if options.dry_run:
      print_estimate(mine, options.scale)
      return 0
    compile_once(options.workdir)
    failures = execute(runs, mine, options.workdir)
  found = experiment.collect(options.workdir)
  print_report(found, table)
  if found.rows:
    files = experiment.plot(found.rows, os.path.join(options.workdir, name))
    print("written:", ", ".join(files) or "nothing, as no run was evaluated")
  for run_name, message in failures.items():
    print(f"FAILED {run_name}: {message}")
  return 1 if failures else 0
