"""Runs every experiment, draws its figures, and writes one page of results.

  python -m experiments.all --scale=tiny --workdir=W [--only=NAME,...]
      [--shard=i/n] [--dry_run] [--publish=FOLDER]

First prints what the experiments cost. Finished runs are skipped and an
interrupted one resumes, so the same command is given until all is done. With
shards each worker does its part of every experiment. An experiment that fails
does not stop the others: it is named at the end, and the exit code is 1.
W/all.md says how long the runs took, and has the first sentence, the table and
the figure of each. When all runs of all experiments are finished, --publish
writes the page to FOLDER/RESULTS.md too, and its figures to FOLDER/figures.
"""

from collections.abc import Sequence
import os
import traceback

from absl import flags

from dpo_jax import command_line
from dpo_jax.records.metrics import format_table
from dpo_jax.train import Preempted
from experiments import sweep
from experiments.page import publish, write_page
from experiments.registry import Experiment, choose
from experiments.sweep import Row, Settings, command


def estimate(
  chosen: Sequence[Experiment], whole: Settings
) -> tuple[list[Row], dict[str, str]]:
  """Estimates each experiment: runs, those still to do, and minutes of these.

  A run that several experiments share is to do in the first of them alone.

  Returns:
    A row for each experiment that can run: "experiment", "runs", "to do",
    "minutes" and "dollars", the last three without finished runs. And the
    messages of those that refuse the settings, by name.
  """
  rows: list[Row] = []
  refusals: dict[str, str] = {}
  counted: set[str] = set()
  for experiment in chosen:
    settings = experiment.settings(whole)
    try:
      runs = experiment.module.runs(settings)
    except ValueError as error:
      refusals[experiment.name] = str(error)
      continue
    to_do = []
    for run in runs:
      folder = f"{settings.workdir}/{run.name}"
      if folder not in counted and not os.path.exists(f"{folder}/result.json"):
        to_do.append(run)
      counted.add(folder)
    hours = sum(row["hours"] for row in sweep.estimate(to_do, whole.scale))
    rows.append(
      {
        "experiment": experiment.name,
        "runs": len(runs),
        "to do": len(to_do),
        "minutes": 60.0 * hours,
        "dollars": sum(run.dollars for run in to_do),
      }
    )
  return rows, refusals


def run_all(
  chosen: Sequence[Experiment], whole: Settings, shard: str
) -> dict[str, str]:
  """Runs experiments one after the other, and draws each.

  Returns:
    Messages of the experiments that failed, by name.

  Raises:
    Preempted: a signal came, and the run has saved.
    sweep.Locked: another worker holds a run.
  """
  failures = {}
  for number, experiment in enumerate(chosen, 1):
    print(f"\n== {experiment.name} ({number}/{len(chosen)})", flush=True)
    try:
      failed = command.run_sweep(
        experiment.module,
        experiment.table,
        experiment.name,
        experiment.settings(whole),
        shard=shard,
      )
    except (Preempted, sweep.Locked):
      raise
    except Exception as error:
      traceback.print_exc()
      failures[experiment.name] = f"{type(error).__name__}: {error}"
    else:
      if failed:
        runs = "; ".join(f"{run}: {text}" for run, text in failed.items())
        failures[experiment.name] = runs
  return failures


def print_estimate(chosen: Sequence[Experiment], whole: Settings) -> None:
  """Prints what each experiment and all together cost."""
  rows, refusals = estimate(chosen, whole)
  print(format_table(rows))
  minutes, dollars = (
    sum(row[name] for row in rows) for name in ("minutes", "dollars")
  )
  where = sweep.hardware(whole.scale)
  print(f"\nabout {minutes:.0f} minutes on {where}, ${dollars:,.2f} of judges")
  for name, message in refusals.items():
    print(f"{name} cannot run: {message}")


def run(
  chosen: Sequence[Experiment],
  whole: Settings,
  shard: str,
  published: str = "",
) -> int:
  """Runs, draws and reports experiments.

  Args:
    chosen: experiments, in order.
    whole: settings of all.
    shard: "i/n", the part of each that this worker runs.
    published: folder of a copy of the page; "" writes none.

  Returns:
    Exit code: 1 where an experiment failed.
  """
  if whole.scale == "tiny":
    sweep.compile_soon()
  sweep.compile_once(whole.workdir)
  failures = run_all(chosen, whole, shard)
  print("\nwritten:", write_page(chosen, whole, failures))
  if published:
    path = None if failures else publish(chosen, whole, published)
    print("published:", path or "nothing, because runs are missing")
  for name, message in failures.items():
    print(f"FAILED {name}: {message}")
  return 1 if failures else 0


def main() -> None:
  options = flags.FLAGS
  whole = Settings(
    options.workdir,
    options.scale,
    options.policy,
    options.reviews,
    command.read_judge_flags(),
  )
  if options.only and options.publish:
    raise ValueError("--publish writes a page of all experiments: unset --only")
  chosen = choose(options.only)
  print_estimate(chosen, whole)
  if not options.dry_run:
    raise SystemExit(run(chosen, whole, options.shard, options.publish))


def define_flags() -> None:
  flags.DEFINE_string("workdir", "runs/all", "folder of all experiments")
  flags.DEFINE_enum("scale", "tiny", sweep.SCALES, "size of every experiment")
  flags.DEFINE_string("publish", "", "folder of a copy of the page")
  flags.DEFINE_bool("dry_run", False, "only print what they cost")
  flags.DEFINE_list("only", [], "names of experiments; all if empty")
  flags.DEFINE_string("shard", "0/1", "i/n: this is worker i of n, from 0")
  flags.DEFINE_string("policy", "", "folder of imdb_sentiment's policy")
  flags.DEFINE_string("reviews", "", "imdb_sentiment's reviews, or tfds")
  command.define_judge_flags()


if __name__ == "__main__":
  command_line.run(main, define_flags)
