"""Sweep of the runs of a figure: what to train, its rows, its plot.

An experiment is a module with three functions:

  runs(settings) -> list[Run]      what to train; which run starts from which
  collect(workdir) -> Collected    rows of what is finished; what is missing
  plot(rows, path) -> list[str]    a pure function of the rows; files written

and `main` gives it a command line:

  python -m experiments.NAME --workdir=W --scale=tiny|paper [--dry_run]
      [--only=ID,...] [--shard=i/n] [--plot]

A run has a folder of its own, WORKDIR/NAME, on a disk that all workers see (a
mounted bucket will do; the locks are flock's). Finished runs are skipped and an
interrupted one resumes, so the same command is given until all is done.
`--shard=i/n` is the i-th (from 0) of n workers on one workdir; a worker waits
for a run that it starts from and another one trains.
"""

from collections.abc import Callable, Mapping, Sequence
import contextlib
import csv
import dataclasses
import fcntl
import json
import logging
import math
import os
import pathlib
import time
import traceback
from typing import Any

from absl import flags
import jax
import matplotlib
import numpy as np

from dpo_jax import command_line, model_sources
from dpo_jax import config as config_lib
from dpo_jax.records import resume
from dpo_jax.records.metrics import format_table, read_metrics
from dpo_jax.records.workdir import Workdir
from dpo_jax.system.files import write_json
from dpo_jax.train import Preempted, train

matplotlib.use("Agg")

_LOG = logging.getLogger("dpo_jax.experiments")
SCALES = ("tiny", "paper")
# Assumptions of `--dry_run`: FLOP/s that training reaches, and further
# seconds that a run takes to start, compile, evaluate and save.
SPEEDS = {
  "tiny": ("2 CPU cores", 3e10, 8.0),
  "paper": ("8 TPU v5e chips at 40 % of their 197 TFLOP/s", 6.3e14, 60.0),
}
_POLL_S = 2.0

Row = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Settings:
  """Choices of a command line.

  Attributes:
    workdir: folder of the sweep.
    scale: "tiny" or "paper".
    policy: folder of a Hugging Face model, or "" for the experiment's own.
    reviews: JSONL file of real reviews, or "".
  """

  workdir: str
  scale: str
  policy: str = ""
  reviews: str = ""


@dataclasses.dataclass(frozen=True)
class Run:
  """One thing to be done once, in a folder of its own.

  Attributes:
    name: name of its folder; unique in the sweep.
    labels: columns that its rows begin with, such as method, beta and seed.
    config: config that `dpo_jax.train` trains, or None.
    after: names of runs that must be finished before it starts.
    work: (folder) -> None, done before the training: makes files.
    measure: (folder) -> rows, done after the training.
    inputs: other values that `work` and `measure` depend on; as with the
      config, a change is refused.
    num_params: for the estimate, where the policy's folder is not here.
    tokens_per_group: for the estimate; 0: data.max_tokens for each response.
  """

  name: str
  labels: Mapping[str, Any]
  config: Any = None
  after: tuple[str, ...] = ()
  work: Callable[[str], None] | None = None
  measure: Callable[[str], list[Row]] | None = None
  inputs: Mapping[str, Any] = dataclasses.field(default_factory=dict)
  num_params: int = 0
  tokens_per_group: float = 0.0

  def spec(self) -> dict[str, Any]:
    """Returns all that decides its result, as plain JSON."""
    flat = dict(config_lib.flatten(self.config)) if self.config else {}
    keys = {
      f"config.{k}": v for k, v in flat.items() if resume.decides_result(k)
    }
    keys |= {f"inputs.{k}": v for k, v in self.inputs.items()}
    keys |= {f"labels.{k}": v for k, v in self.labels.items()}
    keys["after"] = list(self.after)
    return json.loads(json.dumps(keys, default=str))


@dataclasses.dataclass(frozen=True)
class Collected:
  """Contents of a workdir.

  Attributes:
    rows: labels and figures of finished runs.
    missing: one line for each run that is not finished: how far it is.
  """

  rows: list[Row]
  missing: list[str]


class Locked(RuntimeError):
  """Another worker is at this run."""


def in_order(runs: Sequence[Run]) -> list[Run]:
  """Returns the runs in order, each after those that it starts from.

  Raises:
    ValueError: a name twice, one that is missing, or a circle.
  """
  by_name = {run.name: run for run in runs}
  if len(by_name) != len(runs):
    names = [run.name for run in runs]
    twice = sorted({name for name in names if names.count(name) > 1})
    raise ValueError(f"the sweep names a run twice: {', '.join(twice)}")
  done: dict[str, Run] = {}
  waiting = list(runs)
  while waiting:
    ready = [r for r in waiting if all(name in done for name in r.after)]
    if not ready:
      lines = [f"{r.name} after {', '.join(r.after)}" for r in waiting]
      raise ValueError(
        "these runs wait for each other, or for one that the sweep does not"
        " have:\n  " + "\n  ".join(lines[:10])
      )
    done |= {run.name: run for run in ready}
    waiting = [run for run in waiting if run.name not in done]
  return list(done.values())


def choose(
  runs: Sequence[Run], *, only: Sequence[str] = (), shard: str = "0/1"
) -> list[Run]:
  """The part of a sweep that this worker does, in order.

  Args:
    runs: the whole sweep.
    only: names of runs; those that they start from are taken too.
    shard: "i/n", the i-th from 0 of n workers.

  Returns:
    Its runs.

  Raises:
    ValueError: an unknown name, or a shard that is none.
  """
  ordered = in_order(runs)
  by_name = {run.name: run for run in ordered}
  unknown = sorted(set(only) - by_name.keys())
  if unknown:
    raise ValueError(
      f"--only={','.join(unknown)}: no such run. This sweep has:"
      f" {', '.join(by_name)}"
    )
  wanted = set(only) or by_name.keys()
  for run in reversed(ordered):
    if run.name in wanted:
      wanted = wanted | set(run.after)
  index, _, count = shard.partition("/")
  if not (index.isdecimal() and count.isdecimal() and int(index) < int(count)):
    raise ValueError(
      f"--shard={shard!r} must be i/n with 0 <= i < n, such as 0/4"
    )
  chosen = [run for run in ordered if run.name in wanted]
  return chosen[int(index) :: int(count)]


def execute(
  runs: Sequence[Run], mine: Sequence[Run], workdir: str
) -> dict[str, str]:
  """Does runs one after the other; what is finished is not done again.

  Args:
    runs: the whole sweep, written to WORKDIR/sweep.json for `collect`.
    mine: the part that this worker does, in order.
    workdir: folder of the sweep.

  Returns:
    What went wrong: name -> message. The other runs are done all the same,
    but for those that start from a failed one.

  Raises:
    ValueError: the workdir holds runs of the same names with another config;
      shows the difference, before anything is done.
    Locked: another worker is at one of these runs.
    Preempted: SIGTERM; the run has saved.
  """
  root = pathlib.Path(workdir)
  _check_unchanged(runs, root)
  root.mkdir(parents=True, exist_ok=True)
  write_json(
    root / "sweep.json",
    [{"name": r.name, "labels": dict(r.labels)} for r in in_order(runs)],
  )
  failures: dict[str, str] = {}
  names = {run.name for run in mine}
  for number, run in enumerate(mine, 1):
    folder = root / run.name
    if (folder / "result.json").exists():
      continue
    failed = [name for name in run.after if name in failures]
    if failed:
      failures[run.name] = f"it starts from {failed[0]}, which failed"
      continue
    print(f"[{number}/{len(mine)}] {run.name}", flush=True)
    try:
      _wait_for([n for n in run.after if n not in names], root, run.name)
      _do(run, folder)
    except (Preempted, Locked, KeyboardInterrupt):
      raise
    except Exception as error:
      traceback.print_exc()
      failures[run.name] = f"{type(error).__name__}: {error}"
      write_json(folder / "failed.json", {"error": failures[run.name]})
  return failures


def _do(run: Run, folder: pathlib.Path) -> None:
  with _lock(folder):
    if (folder / "result.json").exists():  # by another worker, meanwhile
      return
    (folder / "failed.json").unlink(missing_ok=True)
    write_json(folder / "spec.json", run.spec())
    began = time.monotonic()
    if run.work is not None:
      run.work(str(folder))
    if run.config is not None:
      train(run.config.copy_and_resolve_references(), str(folder))
    rows = run.measure(str(folder)) if run.measure is not None else [{}]
    seconds = time.monotonic() - began
    if jax.process_index() == 0:
      write_json(
        folder / "result.json", {"rows": rows, "last_seconds": seconds}
      )


def _check_unchanged(runs: Sequence[Run], root: pathlib.Path) -> None:
  faults = []
  for run in runs:
    path = root / run.name / "spec.json"
    if not path.exists():
      continue
    before, now = json.loads(path.read_text()), run.spec()
    faults += [
      f"  {run.name}: {key} was {before.get(key)!r} and is {now.get(key)!r}"
      for key in sorted(before.keys() | now.keys())
      if before.get(key) != now.get(key)
      and resume.decides_result(key.removeprefix("config."))
    ]
  if faults:
    more = f"\n  and {len(faults) - 20} more" if len(faults) > 20 else ""
    raise ValueError(
      f"{root} holds runs of this sweep with another config:\n"
      + "\n".join(faults[:20])
      + more
      + "\nChoose another workdir, delete these runs' folders, or go back to"
      " the config that they began with"
    )


@contextlib.contextmanager
def _lock(folder: pathlib.Path):
  """Holds a run's folder; a process that dies lets go of it.

  The processes of one job share the run, so its first one speaks for all.
  """
  folder.mkdir(parents=True, exist_ok=True)
  if jax.process_index():
    yield
    return
  with (folder / "lock").open("a+") as file:
    try:
      fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
      file.seek(0)
      raise Locked(
        f"{folder} is being worked on by {file.read().strip()}: two workers on"
        " one run would spoil it. Give every worker its own --shard=i/n, or"
        " wait"
      ) from error
    file.truncate(0)
    file.write(f"process {os.getpid()} on {os.uname().nodename}\n")
    file.flush()
    yield


def _wait_for(names: Sequence[str], root: pathlib.Path, who: str) -> None:
  """Waits for runs that other workers do."""
  told = False
  for name in names:
    while not (root / name / "result.json").exists():
      path = root / name / "failed.json"
      if path.exists():
        message = json.loads(path.read_text())["error"]
        raise RuntimeError(f"{who} starts from {name}, which failed: {message}")
      if not told:
        print(f"{who} waits for {name}, another shard's", flush=True)
        told = True
      time.sleep(_POLL_S)


def collect(workdir: str) -> Collected:
  """Rows of the finished runs; what there is of the others.

  Raises:
    FileNotFoundError: the folder of no sweep.
  """
  root = pathlib.Path(workdir)
  path = root / "sweep.json"
  if not path.exists():
    raise FileNotFoundError(
      f"{path} does not exist: {workdir} holds no sweep. Start one without"
      " --plot"
    )
  rows, missing = [], []
  for entry in json.loads(path.read_text()):
    folder = root / entry["name"]
    if (folder / "result.json").exists():
      found = json.loads((folder / "result.json").read_text())["rows"]
      rows += [
        {"run": entry["name"], **entry["labels"], **row} for row in found
      ]
    else:
      missing.append(f"{entry['name']}: {_how_far(folder)}")
  return Collected(rows, missing)


def _how_far(folder: pathlib.Path) -> str:
  if not (folder / "spec.json").exists():
    return "not started"
  if (folder / "failed.json").exists():
    return (
      f"failed: {json.loads((folder / 'failed.json').read_text())['error']}"
    )
  workdir = Workdir.at(folder)
  if not workdir.metrics.exists():
    return "started, no step done"
  rows = read_metrics(folder, "train") or [{"step": 0}]
  total = workdir.read_config()["total_steps"]
  return f"half-finished: step {rows[-1]['step']} of {total}"


def estimate(runs: Sequence[Run], scale: str) -> list[Row]:
  """Estimates the cost of a sweep: 6 N FLOPs a token of a policy of N.

  Sampling and the reference add 2 N a token each where a run has them.

  Args:
    runs: the sweep, or a part.
    scale: key of SPEEDS.

  Returns:
    A row for each run: FLOPs and hours.
  """
  _, speed, seconds = SPEEDS[scale]
  rows = []
  for run in runs:
    flops = 0.0
    if run.config is not None:
      config = config_lib.resolve(run.config)
      num_slots = max(2, config.online.num_samples or 0)
      tokens = run.tokens_per_group or config.data.max_tokens * num_slots
      passes = 6.0 + (2.0 if config.reference.kind != "none" else 0.0)
      passes += 2.0 if config.online.kind != "none" else 0.0
      flops = passes * (run.num_params or _num_params(config))
      flops *= tokens * config.batch_size * config.total_steps
    rows.append(
      {
        "run": run.name,
        "after": ", ".join(run.after) or "-",
        "FLOPs": f"{flops:.2e}",
        "hours": (flops / speed + seconds) / 3600.0,
      }
    )
  return rows


def _num_params(config: Any) -> int:
  """Counts a policy's parameters; the preset's if its start is not trained."""
  init = config.policy.init
  source = model_sources.parse("random" if init.startswith("run:") else init)
  settings = source.tokenizer_settings(config.data)
  vocab_size = model_sources.open_tokenizer(settings).vocab_size
  return source.policy(config.policy, vocab_size=vocab_size).config.num_params()


def mean_and_spread(
  rows: Sequence[Row], by: Sequence[str], figures: Sequence[str]
) -> list[Row]:
  """Mean and standard deviation over what `by` does not name: the seeds.

  Args:
    rows: one for each run, or each point of a run.
    by: labels that make a group; the order of the first row of each stays.
    figures: columns of numbers; None where there is none.

  Returns:
    A row a group: the labels, `seeds`, and for every figure its mean and
    `FIGURE_spread`, 0 of a single seed, NaN where no row has it.
  """
  groups: dict[tuple, list[Row]] = {}
  for row in rows:
    groups.setdefault(tuple(row.get(name) for name in by), []).append(row)
  out = []
  for key, members in groups.items():
    line: Row = dict(zip(by, key, strict=True)) | {"seeds": len(members)}
    for name in figures:
      found = [r[name] for r in members if r.get(name) is not None]
      line[name] = float(np.mean(found)) if found else math.nan
      line[f"{name}_spread"] = (
        float(np.std(found, ddof=1)) if len(found) > 1 else 0.0
      )
    out.append(line)
  return out


def write_csv(rows: Sequence[Row], path: str) -> None:
  """All columns of all rows, empty where a row has none."""
  names = list(dict.fromkeys(name for row in rows for name in row))
  with open(path, "w", newline="", encoding="utf-8") as file:
    writer = csv.DictWriter(file, names)
    writer.writeheader()
    writer.writerows(rows)


def save_figure(figure: Any, rows: Sequence[Row], path: str) -> list[str]:
  """Writes PATH.png, PATH.pdf and the rows as PATH.csv.

  Args:
    figure: matplotlib's.
    rows: rows that it shows.
    path: without an ending.

  Returns:
    The three paths.
  """
  os.makedirs(os.path.dirname(os.path.abspath(path)), exist_ok=True)
  figure.savefig(f"{path}.png", dpi=90)
  # Without the date the same rows give the same file.
  figure.savefig(f"{path}.pdf", metadata={"CreationDate": None})
  write_csv(rows, f"{path}.csv")
  return [f"{path}.{ending}" for ending in ("png", "pdf", "csv")]


def compile_once(workdir: str) -> None:
  """Keeps compiled programs in the workdir: runs of one shape share them."""
  for name, value in {
    "jax_compilation_cache_dir": os.path.abspath(f"{workdir}/compiled"),
    "jax_persistent_cache_min_compile_time_secs": 0,
    "jax_persistent_cache_min_entry_size_bytes": -1,
  }.items():
    jax.config.update(name, value)


def compile_soon() -> None:
  """Has XLA's backend optimize less: a small policy's program takes longer to
  compile than to run. To be called before JAX has looked for devices."""
  flag = "--xla_backend_optimization_level"
  given = os.environ.get("XLA_FLAGS", "")
  if flag not in given:
    os.environ["XLA_FLAGS"] = f"{given} {flag}=1".strip()


def main(
  experiment: Any, table: Callable[[list[Row]], list[Row]] | None = None
) -> None:
  """Gives an experiment its command line.

  Args:
    experiment: a module with `runs`, `collect` and `plot`.
    table: rows -> the table that is printed; the rows themselves if None.
  """
  name = experiment.__spec__.name.rpartition(".")[2]
  flags.DEFINE_string("workdir", f"runs/{name}", "folder of the sweep")
  flags.DEFINE_enum("scale", "tiny", SCALES, "what to run")
  flags.DEFINE_bool("dry_run", False, "print the runs and what they cost")
  flags.DEFINE_list("only", [], "names of runs")
  flags.DEFINE_string("shard", "0/1", "i/n: the i-th of n workers, from 0")
  flags.DEFINE_bool("plot", False, "only collect and plot what is there")
  flags.DEFINE_string("policy", "", "folder of a Hugging Face model")
  flags.DEFINE_string("reviews", "", "JSONL of real reviews")

  def run() -> None:
    if flags.FLAGS.scale == "tiny":
      compile_soon()
    raise SystemExit(_command(experiment, table, name, flags.FLAGS))

  command_line.run(run)


def _command(experiment: Any, table: Any, name: str, options: Any) -> int:
  failures: dict[str, str] = {}
  if not options.plot:
    settings = Settings(
      options.workdir, options.scale, options.policy, options.reviews
    )
    runs = experiment.runs(settings)
    mine = choose(runs, only=options.only, shard=options.shard)
    if options.dry_run:
      _print_estimate(mine, options.scale)
      return 0
    compile_once(options.workdir)
    failures = execute(runs, mine, options.workdir)
  found = experiment.collect(options.workdir)
  report(found, table)
  if found.rows:
    files = experiment.plot(found.rows, os.path.join(options.workdir, name))
    print("written:", ", ".join(files))
  for run_name, message in failures.items():
    print(f"FAILED {run_name}: {message}")
  return 1 if failures else 0


def _print_estimate(runs: Sequence[Run], scale: str) -> None:
  rows = estimate(runs, scale)
  print(format_table(rows))
  where, _, _ = SPEEDS[scale]
  hours = sum(row["hours"] for row in rows)
  flops = sum(float(row["FLOPs"]) for row in rows)
  print(
    f"\n{len(rows)} runs, {flops:.2e} FLOPs, about {hours:.2f} hours on {where}"
  )


def report(found: Collected, table: Any = None) -> None:
  """Prints the table, and what it lacks."""
  rows = table(found.rows) if table and found.rows else found.rows
  print(format_table(rows))
  if found.missing:
    print(f"\nnot in the table, {len(found.missing)} runs:")
    print("\n".join(f"  {line}" for line in found.missing))
