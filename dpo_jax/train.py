"""The training loop: train(config, workdir).

  python -m dpo_jax.train --config=configs/hh.py --workdir=runs/hh

training/setup.py checks the config and builds the run; this module restores,
steps, evaluates and saves. It is the only module that knows all rooms.
"""

from collections.abc import Generator, Mapping
import logging
import math
import sys
from typing import Any, NoReturn

from dpo_jax.system import signals

if __name__ == "__main__":
  signals.end_with_preempted()  # before imports that take seconds

from absl import app, flags
from ml_collections import config_flags

from dpo_jax import command_line

if __name__ == "__main__":
  command_line.define_flags()
  config_flags.DEFINE_config_file(
    "config",
    None,
    "path of a config file, such as configs/hh.py; it is executed as Python",
  )
  flags.DEFINE_string("workdir", None, "run directory, local or gs://")
  flags.DEFINE_string(
    "coordinator_address", None, "HOST:PORT of process 0; a TPU pod needs none"
  )
  flags.DEFINE_integer("num_processes", None, "processes over all hosts")
  flags.DEFINE_integer("process_id", None, "index of this process, from 0")
  flags.mark_flags_as_required(["config", "workdir"])
  # Answered before JAX is imported, which takes seconds.
  if {"--help", "-help", "--helpshort", "-h"} & set(sys.argv[1:]):
    app.usage(shorthelp=True, writeto_stdout=True, exitcode=0)

from etils import epath
import jax

from dpo_jax import config as config_lib
from dpo_jax import online, trees
from dpo_jax.data import loader as loader_lib
from dpo_jax.parallel import hosts, peers
from dpo_jax.parallel.stop_signal import Preempted, StopSignal
from dpo_jax.records.metrics import read_evaluation
from dpo_jax.records.profile import ProfileWindow
from dpo_jax.records.workdir import Workdir
from dpo_jax.system.cache import use_compilation_cache
from dpo_jax.training import initial_state, nonfinite
from dpo_jax.training.console import Console
from dpo_jax.training.evaluator import Evaluator
from dpo_jax.training.opening import Opened, open_workdir
from dpo_jax.training.setup import Run, build_run
from dpo_jax.training.stops import NonFiniteError
from dpo_jax.types import TrainState

_LOG = logging.getLogger(__name__)


def train(config: Any, workdir: epath.PathLike) -> dict[str, float]:
  """Trains the run of a workdir, or resumes it.

  Args:
    config: complete, see `dpo_jax.config.default_config`.
    workdir: run directory, local or gs://; `records.workdir` lists its files.

  Returns:
    Metrics of the last evaluation, named as `checkpoint.best_metric` names
    them.

  Raises:
    ValueError: a mistake in the config, the data or the workdir.
    LockLost: another process took the workdir over while this one was frozen.
    NonFiniteError: a loss or gradient that is not finite, or a log-ratio that
      is too large; the last good checkpoint is kept.
    Preempted: SIGTERM, SIGHUP or Ctrl-C came; the run has saved, and resumes
      when it is started again. It is a SystemExit.
    RuntimeError: a judge does not answer, `online.max_kl` is passed, or another
      host has failed.
  """
  workdir = Workdir.at(workdir)
  workdir.check_format()
  use_compilation_cache(config.compilation_cache_dir)
  hosts.check_same(
    {k: v for k, v in config_lib.flatten(config) if "cache_dir" not in k},
    "config",
  )
  with StopSignal() as stop:
    run = hosts.together(lambda: build_run(config, workdir))
    hosts.check_same(run.data.identity(), "data")
    with open_workdir(run) as opened, Console(run) as console:
      metrics = _Loop(run, opened, stop, console).run_all()
      opened.lock.check()
      if run.is_writer and not opened.is_over:
        workdir.write_finished(run.config.total_steps)
  return metrics


class _Loop:
  """The steps of a run, from its latest checkpoint on."""

  def __init__(
    self, run: Run, opened: Opened, stop: StopSignal, console: Console
  ):
    self._run, self._config = run, run.config
    self._placement = run.program.placement
    self._lock, self._writer = opened.lock, opened.writer
    self._checkpoints, self._is_over = opened.checkpoints, opened.is_over
    self._stop, self._console = stop, console
    # The last step and its counts, until its metrics have been looked at.
    self._pending: tuple[nonfinite.Step, dict[str, float]] | None = None

  def run_all(self) -> dict[str, float]:
    """Takes the steps that are left, and returns the last evaluation."""
    run, config = self._run, self._config
    done = max(self._checkpoints.steps, default=0)
    self._console.begin(done)
    peers.tell_saved(done)
    if self._is_over:
      self._console.end(self._checkpoints.best_step)
      return read_evaluation(run.workdir, config.data)
    state = initial_state.load_state(run, self._checkpoints)
    start = int(state.step)
    if run.is_writer:  # a finished run may be given more steps
      run.workdir.finished.unlink(missing_ok=True)
    self._writer.write_resumed(start)
    self._loader, eval_loaders = online.open_loaders(
      run, state, label=self._console.label("reference")
    )
    self._evaluator = Evaluator(
      run,
      eval_loaders,
      self._record,
      self._writer.write_samples,
      label=self._console.label("sampling"),
    )
    self._state = self._placement.place_state(state)
    if start == 0:
      self._begin_batches(0)
      initial_state.check_first_loss(run, state, self._loader.batch(0))
    self._evaluator.sample_reference(state)
    metrics = {}
    if start == 0:
      metrics = self._evaluator.evaluate(0, state, with_samples=True)
      self._check_evaluation(0, metrics)
    elif self._is_due(start, config.eval):
      made_up = self._evaluator.make_up(start, state)
      self._check_evaluation(start, made_up)
      metrics = read_evaluation(run.workdir, config.data)
    with self._stop.holding(True):
      metrics = self._train(start) or metrics
      self._checkpoints.wait()
    self._stop.unsaved = False
    self._console.end(self._checkpoints.best_step)
    return metrics

  def _train(self, start: int) -> dict[str, float]:
    """Takes the steps from `start` on; returns the last evaluation or {}."""
    config = self._config
    compiled = self._run.program.train_step(
      max_traces=len(self._loader.plan.shapes)
    )
    compiled = self._placement.bind(compiled)
    metrics: dict[str, float] = {}
    done = start
    profile = ProfileWindow(config.profile.steps, self._run.workdir)
    batches = self._console.watch(self._batches(start), start)
    try:
      for batch, counts in batches:
        with profile.step(done):
          self._state, measured, inputs = compiled(self._state, batch)
        self._stop.unsaved = True
        profile.after(done, measured)
        # The metrics of the step before are fetched while this one runs.
        self._look_at_pending()
        done += 1
        self._pending = nonfinite.Step(done, batch, measured, inputs), counts
        if self._stop.reached():
          raise Preempted
        if self._is_due(done, config.eval, config.checkpoint):
          self._look_at_pending()
          metrics = self._between_steps(done) or metrics
        self._checkpoints.poll()
    except Preempted:
      self._look_at_pending()
      self._save_and_stop(done)
    finally:
      batches.close()
      profile.close()
    return metrics

  def _is_due(self, done: int, *settings: Any) -> bool:
    """Returns whether the run, or an interval of `settings`, ends at a step."""
    is_last = done == self._config.total_steps
    return is_last or any(_is_multiple(done, s.every_steps) for s in settings)

  def _between_steps(self, done: int) -> dict[str, float]:
    """Evaluates and saves as is due; returns the evaluation or {}."""
    metrics = {}
    with self._console.pause():
      state = self._placement.gather_state(self._state)
      if self._is_due(done, self._config.eval):
        with_samples = self._evaluator.samples_due(done)
        try:
          with self._stop.holding(False):
            metrics = self._evaluator.evaluate(
              done, state, with_samples=with_samples
            )
        except (OSError, ValueError, RuntimeError):
          # Such as a full disk. The steps so far are saved with one process
          # only: other hosts, which have not failed, would not join the save.
          if jax.process_count() == 1:
            self._save(done, state, {})
            self._checkpoints.wait()
          raise
        self._check_evaluation(done, metrics)
      if self._is_due(done, self._config.checkpoint):
        self._save(done, state, metrics)
    return metrics

  def _save(
    self, done: int, state: TrainState, metrics: dict[str, float]
  ) -> None:
    self._lock.check()
    self._check_finite(done, state)
    self._checkpoints.save(done, state, metrics or None)

  def _save_and_stop(self, done: int) -> NoReturn:
    """Saves the state, unless no step is done or its checkpoint is there.

    Raises:
      Preempted: always.
    """
    self._checkpoints.wait()
    if done and done not in self._checkpoints.steps:
      self._save(done, self._placement.gather_state(self._state), {})
      self._checkpoints.wait()
    self._stop.unsaved = False
    if done:
      _LOG.warning("step %d is saved: the same command resumes from it", done)
    else:
      _LOG.warning("no step was taken yet: the same command starts again")
    raise Preempted(done)

  def _check_finite(self, done: int, state: TrainState) -> None:
    """Raises NonFiniteError if parameters or moments are not finite."""
    for name, tree in (
      ("a parameter", state.params),
      ("a moment of the optimizer", state.opt_state),
    ):
      if not trees.all_finite(tree):
        raise NonFiniteError(
          f"after step {done} {name} is not finite, so it is not saved."
          f" {self._advice(done)}"
        )

  def _check_evaluation(self, done: int, metrics: Mapping[str, float]) -> None:
    """Raises NonFiniteError if the loss of a held-out set is not finite."""
    for set_name in config_lib.eval_sets(self._config.data):
      name = f"{config_lib.metric_prefix(set_name)}loss"
      if not math.isfinite(metrics.get(name, 0.0)):
        raise NonFiniteError(
          f"after step {done} {name} is {metrics[name]}, so it is not saved."
          f" {self._advice(done)}"
        )

  def _advice(self, done: int) -> str:
    """Names the last good checkpoint, and settings that may help.

    Args:
      done: steps whose parameters are at fault.
    """
    self._checkpoints.wait()
    found, steps = "No checkpoint was saved", self._checkpoints.steps
    if steps:
      found = (
        f"The last good checkpoint is step {steps[-1]};"
        f" --config.resume.step={steps[-1]} goes back to it"
      )
    if steps and steps[-1] == done:
      found += ", which helps if the data are at fault, not the parameters"
      if steps[:-1]:
        found += f"; --config.resume.step={steps[-2]} goes back further"
    return f"{found}; a lower learning rate or a smaller max_grad_norm may help"

  def _batches(
    self, start: int
  ) -> Generator[tuple[Any, dict[str, float]], None, None]:
    """Yields what `_make_batch` returns for each step left, made ahead."""
    while start < self._config.total_steps:
      self._look_at_pending()  # before a policy that is not finite samples
      stop = self._begin_batches(start)
      yield from loader_lib.prefetch(self._make_batch, start, stop, depth=2)
      start = stop

  def _begin_batches(self, step: int) -> int:
    """Prepares the batches from a step on, sampled if `online.kind` says so.

    Metrics of the sampling are recorded.

    Returns:
      The step after the last of these batches.
    """
    params = self._placement.gather_state(self._state).policy_params
    with self._stop.holding(False):
      stop, metrics = self._loader.begin(
        step, params, oldest=min(self._checkpoints.steps, default=0)
      )
    if metrics:
      self._record(step, "online", metrics)
    return min(stop, self._config.total_steps)

  def _make_batch(self, step: int) -> tuple[Any, dict[str, float]]:
    """Returns a placed batch, and the counts of it over all hosts.

    The counts are "num_tokens", "num_groups" and "padding_fraction".
    """
    loader = self._loader
    batch = loader.batch(step)
    # Over all hosts, counted by each of them.
    num_tokens = loader.num_tokens(step)
    counts = {
      "num_tokens": float(num_tokens),
      "num_groups": float(self._config.batch_size),
      "padding_fraction": float(
        1.0 - num_tokens / (batch.tokens.size * loader.process_count)
      ),
    }
    return self._placement.place_training_batch(batch), counts

  def _record(self, step: int, split: str, metrics: Mapping[str, Any]) -> None:
    if self._lock.lost:
      raise self._lock.lost
    self._writer.write(step, split, metrics)
    self._console.show(step, split, metrics)

  def _look_at_pending(self) -> None:
    """Checks the pending step's metrics, and records them if a log is due.

    Raises:
      NonFiniteError: see `nonfinite.check`.
    """
    if self._pending is None:
      return
    (step, counts), self._pending = self._pending, None
    metrics = nonfinite.check(self._run, self._loader, step, self._advice)
    self._console.count(metrics, counts)
    if _is_multiple(step.number, self._config.log.every_steps):
      padding = {"padding_fraction": counts["padding_fraction"]}
      rates = self._console.rates()
      self._record(step.number, "train", metrics | rates | padding)


def _is_multiple(step: int, every: int) -> bool:
  return every > 0 and step % every == 0


def main() -> None:
  given, config = flags.FLAGS, flags.FLAGS.config
  config_lib.check_keys(config)
  with hosts.joined(
    given.coordinator_address,
    given.num_processes,
    given.process_id,
    start_timeout_s=config.hosts.start_timeout_s,
    peer_timeout_s=config.hosts.peer_timeout_s,
  ):
    command_line.show_logs(jax.process_index())
    train(config, given.workdir)


if __name__ == "__main__":
  command_line.run(main)
