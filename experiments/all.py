"""Runs every experiment, draws its figures, and writes one page of results.

  python -m experiments.all --scale=tiny --workdir=W [--only=NAME,...]
      [--shard=i/n] [--dry_run]

First prints what the experiments cost. Finished runs are skipped and an
interrupted one resumes, so the same command is given until all is done. With
shards each worker does its part of every experiment. An experiment that fails
does not stop the others: it is named at the end, and the exit code is 1.
W/all.md has the first sentence, the table and the figure of each.
"""

from collections.abc import Sequence
import dataclasses
import inspect
import os
import traceback
from types import ModuleType
from typing import Any

from absl import flags

from dpo_jax import command_line
from dpo_jax.names import did_you_mean
from dpo_jax.records.metrics import format_table
from dpo_jax.system.files import write_atomically
from dpo_jax.train import Preempted
from experiments import (
  best_of_n,
  beta_ablation,
  coverage,
  displacement,
  exact_frontier,
  exact_sweep,
  hh_dialogue,
  imdb_sentiment,
  judges,
  label_noise,
  length_bias,
  loss_ablation,
  on_policy_ablation,
  online_vs_offline,
  ood_summaries,
  overoptimisation,
  reference_ablation,
  sweep,
  tldr_temperature,
)
from experiments.sweep import Row, Settings, command

# Workdir of experiments that share their policies.
_SHARED = "win_rates"


@dataclasses.dataclass(frozen=True)
class Experiment:
  """An experiment of the registry.

  Attributes:
    module: module with `runs`, `collect` and `plot`.
    table: rows -> rows of the printed table.
    folder: its folder in the workdir; "" is its name.
    has_judge: whether it takes --config.eval.*.
  """

  module: ModuleType
  table: command.Table
  folder: str = ""
  has_judge: bool = False

  @property
  def name(self) -> str:
    return self.module.__name__.rpartition(".")[2]

  @property
  def sentence(self) -> str:
    """First line of the module's docstring."""
    return (inspect.getdoc(self.module) or "").splitlines()[0]

  def settings(self, whole: Settings) -> Settings:
    """Returns the settings of this experiment, from those of all."""
    return dataclasses.replace(
      whole,
      workdir=os.path.join(whole.workdir, self.folder or self.name),
      evaluation=whole.evaluation if self.has_judge else {},
    )


EXPERIMENTS = (
  Experiment(exact_frontier, exact_sweep.table),
  Experiment(online_vs_offline, exact_sweep.table),
  Experiment(label_noise, exact_sweep.table),
  Experiment(beta_ablation, exact_sweep.table),
  Experiment(loss_ablation, loss_ablation.table),
  Experiment(coverage, exact_sweep.table),
  Experiment(displacement, displacement.table),
  Experiment(length_bias, length_bias.table),
  Experiment(judges, judges.table),
  Experiment(overoptimisation, overoptimisation.table),
  Experiment(reference_ablation, exact_sweep.table),
  Experiment(on_policy_ablation, exact_sweep.table),
  Experiment(imdb_sentiment, imdb_sentiment.table),
  Experiment(tldr_temperature, tldr_temperature.table, _SHARED, True),
  Experiment(hh_dialogue, hh_dialogue.table, _SHARED, True),
  Experiment(best_of_n, best_of_n.table, _SHARED, True),
  Experiment(ood_summaries, ood_summaries.table, _SHARED, True),
)


def choose(names: Sequence[str]) -> list[Experiment]:
  """Chooses experiments by name, in the order of the registry.

  Args:
    names: names; all if empty.

  Raises:
    ValueError: an unknown name.
  """
  known = [experiment.name for experiment in EXPERIMENTS]
  for name in names:
    if name not in known:
      raise ValueError(
        f"--only={name}: no such experiment.{did_you_mean(name, known)} There"
        f" are {', '.join(known)}"
      )
  return [e for e in EXPERIMENTS if not names or e.name in names]


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
    Preempted: SIGTERM or Ctrl-C came, and the run has saved.
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


def write_page(
  chosen: Sequence[Experiment], whole: Settings, failures: dict[str, str]
) -> str:
  """Writes WORKDIR/all.md: a sentence, table and figure of each experiment.

  Failed experiments, and unfinished runs, are named.

  Returns:
    Its path.
  """
  parts = [f"# Results at --scale={whole.scale}\n"]
  for experiment in chosen:
    parts.append(f"\n## {experiment.name}\n\n{experiment.sentence}\n")
    if experiment.name in failures:
      parts.append(f"\n**Failed.** {failures[experiment.name]}\n")
    workdir = experiment.settings(whole).workdir
    try:
      found = experiment.module.collect(workdir)
    except FileNotFoundError:
      parts.append("\nNo run has begun.\n")
      continue
    if found.rows:
      path = os.path.join(workdir, f"{experiment.name}.png")
      figure = os.path.relpath(path, whole.workdir)
      parts.append(f"\n![{experiment.name}]({figure})\n\n")
      parts.append(_markdown(experiment.table(found.rows)))
    if found.missing:
      parts.append(f"\nUnfinished runs: {len(found.missing)}.\n")
  path = os.path.join(whole.workdir, "all.md")
  os.makedirs(whole.workdir, exist_ok=True)
  write_atomically(path, "".join(parts))
  return path


def _markdown(rows: Sequence[Row]) -> str:
  """Formats rows as a table of Markdown, numbers with three decimals."""

  def line(values: Sequence[Any]) -> str:
    cells = (f"{v:.3f}" if isinstance(v, float) else str(v) for v in values)
    return f"| {' | '.join(cells)} |\n"

  names = list(dict.fromkeys(name for row in rows for name in row))
  lines = [line([row.get(name, "") for name in names]) for row in rows]
  return "".join([line(names), line(["---"] * len(names)), *lines])


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


def run(chosen: Sequence[Experiment], whole: Settings, shard: str) -> int:
  """Runs, draws and reports experiments.

  Returns:
    Exit code: 1 where an experiment failed.
  """
  if whole.scale == "tiny":
    sweep.compile_soon()
  sweep.compile_once(whole.workdir)
  failures = run_all(chosen, whole, shard)
  print("\nwritten:", write_page(chosen, whole, failures))
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
  chosen = choose(options.only)
  print_estimate(chosen, whole)
  if not options.dry_run:
    raise SystemExit(run(chosen, whole, options.shard))


def define_flags() -> None:
  flags.DEFINE_string("workdir", "runs/all", "folder of all experiments")
  flags.DEFINE_enum("scale", "tiny", sweep.SCALES, "size of every experiment")
  flags.DEFINE_bool("dry_run", False, "only print what they cost")
  flags.DEFINE_list("only", [], "names of experiments; all if empty")
  flags.DEFINE_string("shard", "0/1", "i/n: this is worker i of n, from 0")
  flags.DEFINE_string("policy", "", "folder of imdb_sentiment's policy")
  flags.DEFINE_string("reviews", "", "imdb_sentiment's reviews, or tfds")
  command.define_judge_flags()


if __name__ == "__main__":
  command_line.run(main, define_flags)
