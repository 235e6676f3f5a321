"""The command line of an experiment."""

from collections.abc import Callable, Sequence
import os
from typing import Any

from absl import flags
from ml_collections import config_flags

from dpo_jax import command_line
from dpo_jax.config import default_config
from experiments.sweep.cost import print_estimate
from experiments.sweep.execution import compile_once, compile_soon, execute
from experiments.sweep.report import print_report
from experiments.sweep.runs import SCALES, Row, Settings, choose

Table = Callable[[list[Row]], list[Row]]


def main(
  experiment: Any, table: Table | None = None, *, has_judge: bool = False
) -> None:
  """Gives an experiment its command line.

  Args:
    experiment: module with `runs`, `collect` and `plot`.
    table: rows -> rows of the printed table; the rows themselves if None.
    has_judge: whether --config.eval.* names a judge on a server.
  """
  name = experiment.__spec__.name.rpartition(".")[2]

  def define() -> None:
    define_flags(name)
    flags.DEFINE_string("policy", "", "folder of a Hugging Face model")
    flags.DEFINE_string("reviews", "", "JSONL file of real reviews, or tfds")
    if has_judge:
      define_judge_flags()

  def run() -> None:
    if flags.FLAGS.scale == "tiny":
      compile_soon()
    options = flags.FLAGS
    settings = Settings(
      options.workdir,
      options.scale,
      options.policy,
      options.reviews,
      read_judge_flags() if has_judge else {},
    )
    raise SystemExit(run_command(experiment, table, name, settings))

  command_line.run(run, define)


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


def define_judge_flags() -> None:
  """Defines --config.eval.KEY, as `dpo_jax.evaluate` has it."""
  config_flags.DEFINE_config_dict(
    "config", default_config(), "eval.judge, and eval.api.* of its server"
  )


def read_judge_flags() -> dict[str, Any]:
  """Returns the values that `--config.KEY=` flags set, by key.

  Keys are without "config.", as in {"eval.judge": "api:MODEL"}. The flags of
  `define_judge_flags` must be parsed.
  """
  return config_flags.get_override_values(flags.FLAGS["config"])


def run_command(
  experiment: Any, table: Table | None, name: str, settings: Settings
) -> int:
  """Runs and reports a sweep; with --dry_run only prints what it costs.

  Args:
    experiment: has `runs`, `collect` and `plot`.
    table: see `main`.
    name: name of the experiment, of its figure and its table.
    settings: choices of the command line.

  Returns:
    1 where a run failed, and 0 otherwise.
  """
  options = flags.FLAGS
  if options.dry_run:
    runs = experiment.runs(settings)
    mine = choose(runs, only=options.only, shard=options.shard)
    print_estimate(mine, options.scale)
    return 0
  if not options.plot:
    compile_once(options.workdir)
  failures = run_sweep(
    experiment,
    table,
    name,
    settings,
    only=options.only,
    shard=options.shard,
    is_finished=options.plot,
  )
  for run_name, message in failures.items():
    print(f"FAILED {run_name}: {message}")
  return 1 if failures else 0


def run_sweep(
  experiment: Any,
  table: Table | None,
  name: str,
  settings: Settings,
  *,
  only: Sequence[str] = (),
  shard: str = "0/1",
  is_finished: bool = False,
) -> dict[str, str]:
  """Executes a sweep, prints its table and writes its figure.

  Args:
    experiment: has `runs`, `collect` and `plot`.
    table: see `main`.
    name: name of the experiment, of its figure and its table.
    settings: choices of the command line.
    only: see `choose`.
    shard: see `choose`.
    is_finished: whether nothing is executed.

  Returns:
    Messages of failed runs by name.
  """
  failures: dict[str, str] = {}
  if not is_finished:
    runs = experiment.runs(settings)
    mine = choose(runs, only=only, shard=shard)
    failures = execute(runs, mine, settings.workdir, name=name)
  found = experiment.collect(settings.workdir)
  print_report(found, table)
  if found.rows:
    path = os.path.join(settings.workdir, name)
    files = experiment.plot(found.rows, path)
    print("written:", ", ".join(files) or "nothing, as no run was evaluated")
  return failures
