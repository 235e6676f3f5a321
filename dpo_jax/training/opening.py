"""Opens the workdir of a run: locks it, compares, recovers and records."""

from collections.abc import Iterator
import contextlib
import dataclasses
import logging
import sys

from dpo_jax.config import parse_allowed
from dpo_jax.records import resume, tracker
from dpo_jax.records.arrays import check_fits
from dpo_jax.records.checkpoint import Checkpoints, open_checkpoints
from dpo_jax.records.lock import RunLock
from dpo_jax.records.metrics import MetricsWriter
from dpo_jax.system.files import write_json
from dpo_jax.system.version import code_version
from dpo_jax.training import optimizer
from dpo_jax.training.setup import Run

_LOG = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Opened:
  """The open files of a run.

  Attributes:
    lock: lock of the workdir, which the run holds.
    checkpoints: checkpoints, the latest of which is verified.
    writer: writer of the metrics.
    is_over: whether no step is left to be trained; then the record of the run
      stays as it is.
  """

  lock: RunLock
  checkpoints: Checkpoints
  writer: MetricsWriter
  is_over: bool


@contextlib.contextmanager
def open_workdir(run: Run) -> Iterator[Opened]:
  """Opens the workdir of a run, and closes it after a complete last save.

  Args:
    run: run to begin or to resume; nothing was written before.

  Raises:
    ValueError: the workdir holds another run, or has lost its checkpoints.
      Its record is as it was.
    WorkdirInUse: another process trains the run.
    LockLost: another process took the workdir over while this one was frozen.
  """
  config, workdir = run.config, run.workdir
  with RunLock(workdir, timeout_s=config.workdir.lock_timeout_s) as lock:
    accepted = resume.check_same(
      config, run.data.identity(), workdir, optimizer.build_schedule
    )
    step = resume.go_back_to(config, accepted, workdir)
    target, _ = run.program.abstract_state()
    checkpoints = open_checkpoints(
      workdir,
      config,
      go_back_to=step,
      may_restart="restart" in parse_allowed(config.resume.allow),
      check=lambda folder: check_fits(folder, target),
    )
    done = max(checkpoints.steps, default=0)
    # A run that was stopped in its last evaluation makes up for it.
    is_over = done > config.total_steps or (
      done == config.total_steps and workdir.finished.exists()
    )
    if is_over and accepted:
      _LOG.warning("nothing is left to train: resume.allow changes nothing")
    if run.is_writer and not is_over:
      description = run.data.description()
      resume.record(config, description, accepted, workdir, step=step)
      write_json(workdir.model, dataclasses.asdict(run.program.policy.config))
      workdir.record_version(code_version())
      workdir.record_command(sys.orig_argv[1:])
    sinks = tracker.open_sinks(config.log, workdir) if run.is_writer else []
    writer = MetricsWriter(workdir, is_writer=run.is_writer, sinks=sinks)
    try:
      yield Opened(lock, checkpoints, writer, is_over)
    finally:
      if not lock.lost:  # metrics.jsonl is another process's now
        writer.close()
      checkpoints.close()
