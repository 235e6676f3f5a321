"""Executes runs: each once, under a lock, resumed where it stopped."""

from collections.abc import Iterator, Mapping, Sequence
import contextlib
import fcntl
import json
import os
import pathlib
import time
import traceback
from typing import Any

import jax

from dpo_jax.records import resume
from dpo_jax.system.files import write_json
from dpo_jax.train import Preempted, train
from experiments.sweep.runs import Run, in_order

_POLL_S = 2.0
# Differences of configs that an error lists.
_MOST_LISTED = 20


class Locked(RuntimeError):
  """Raised when another worker holds a run."""


def execute(
  runs: Sequence[Run], mine: Sequence[Run], workdir: str, *, name: str = ""
) -> dict[str, str]:
  """Executes runs one after the other, and skips those that are finished.

  Args:
    runs: the whole sweep, written to WORKDIR/sweep.json for `collect`.
    mine: the part that this worker does, in order.
    workdir: folder of the sweep.
    name: name of the experiment. Its runs are also written to NAME.runs.json,
      for experiments that share a workdir and its runs.

  Returns:
    Messages of failed runs by name. A failure does not stop the other runs,
    except those that start from the failed one.

  Raises:
    ValueError: the workdir holds runs of the same names with another config.
      The message lists the differences; nothing was executed.
    Locked: another worker holds one of these runs.
    Preempted: a signal came, and the run has saved.
  """
  root = pathlib.Path(workdir)
  _check_unchanged(runs, root)
  root.mkdir(parents=True, exist_ok=True)
  listed = [{"name": r.name, "labels": dict(r.labels)} for r in in_order(runs)]
  for file in ("sweep.json", f"{name}.runs.json")[: 2 if name else 1]:
    write_json(root / file, listed)
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
      _execute_one(run, folder)
    except (Preempted, Locked, KeyboardInterrupt):
      raise
    except Exception as error:
      traceback.print_exc()
      failures[run.name] = f"{type(error).__name__}: {error}"
      write_json(folder / "failed.json", {"error": failures[run.name]})
  return failures


def _execute_one(run: Run, folder: pathlib.Path) -> None:
  """Executes a run under its lock, unless result.json is there.

  Deletes failed.json and writes spec.json at the start, and at the end
  result.json: "rows", and "last_seconds", the seconds that this call took.

  Raises:
    Locked: another worker holds the run; this does not wait for it.
  """
  with _lock(folder):
    # Another worker may have finished it since the caller looked.
    if (folder / "result.json").exists():
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


def _with_defaults(spec: Mapping[str, Any]) -> dict[str, Any]:
  """Adds to a spec the defaults of config keys that are newer than it."""
  prefix = "config."
  config = {
    key.removeprefix(prefix): value
    for key, value in spec.items()
    if key.startswith(prefix)
  }
  if not config:
    return dict(spec)
  known = {f"{prefix}{k}": v for k, v in resume.with_defaults(config).items()}
  return {**known, **spec}


def _check_unchanged(runs: Sequence[Run], root: pathlib.Path) -> None:
  """Raises ValueError where a started run had another spec."""
  faults = []
  for run in runs:
    path = root / run.name / "spec.json"
    if not path.exists():
      continue
    before, now = _with_defaults(json.loads(path.read_text())), run.spec()
    faults += [
      f"  {run.name}: {key} was {before.get(key)!r} and is {now.get(key)!r}"
      for key in sorted(before.keys() | now.keys())
      if before.get(key) != now.get(key)
      and resume.decides_result(key.removeprefix("config."))
    ]
  if faults:
    num_left = len(faults) - _MOST_LISTED
    more = f"\n  and {num_left} more" if num_left > 0 else ""
    raise ValueError(
      f"{root} holds runs of this sweep with another config:\n"
      + "\n".join(faults[:_MOST_LISTED])
      + more
      + "\nChoose another workdir, delete the folders of these runs, or use the"
      " config that they began with"
    )


@contextlib.contextmanager
def _lock(folder: pathlib.Path) -> Iterator[None]:
  """Holds the lock on a run's folder; the system frees it if the process dies.

  The processes of one job share the run, so only the first takes the lock.

  Raises:
    Locked: another worker holds it.
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


def _wait_for(names: Sequence[str], root: pathlib.Path, waiting: str) -> None:
  """Waits until other workers have finished runs that `waiting` needs.

  Raises:
    RuntimeError: one of them failed.
  """
  is_announced = False
  for name in names:
    while not (root / name / "result.json").exists():
      path = root / name / "failed.json"
      if path.exists():
        message = json.loads(path.read_text())["error"]
        raise RuntimeError(
          f"{waiting} starts from {name}, which failed: {message}"
        )
      if not is_announced:
        print(f"{waiting} waits for {name}, of another shard", flush=True)
        is_announced = True
      time.sleep(_POLL_S)


def compile_once(workdir: str) -> None:
  """Keeps compiled programs in the workdir: runs of one shape share them."""
  for name, value in {
    "jax_compilation_cache_dir": os.path.abspath(f"{workdir}/compiled"),
    "jax_persistent_cache_min_compile_time_secs": 0,
    "jax_persistent_cache_min_entry_size_bytes": -1,
  }.items():
    jax.config.update(name, value)


def compile_soon() -> None:
  """Lowers XLA's backend optimization level, unless XLA_FLAGS sets it.

  The program of a small policy takes longer to compile than to run. Call this
  before JAX looks for devices.
  """
  flag = "--xla_backend_optimization_level"
  given = os.environ.get("XLA_FLAGS", "")
  if flag not in given:
    os.environ["XLA_FLAGS"] = f"{given} {flag}=1".strip()
