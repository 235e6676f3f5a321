"""The training loop: train(config, workdir).

  python -m dpo_jax.train --config=configs/hh.py --workdir=runs/hh

The one module that knows all the others: run.py checks and builds, and this
one restores, steps, evaluates and saves.
"""

from collections.abc import Collection, Iterator
import dataclasses
import json
import logging
import os
import signal
import subprocess
import sys
from typing import Any

from absl import app, flags
from ml_collections import config_flags

from dpo_jax import EXIT_PREEMPTED, command_line, trees
from dpo_jax.records import resume

if __name__ == "__main__":
  command_line.define_flags()
  config_flags.DEFINE_config_file(
    "config", None, "path of a config file, such as configs/hh.py"
  )
  flags.DEFINE_string("workdir", None, "folder of the run, local or gs://")
  flags.DEFINE_string(
    "coordinator_address", None, "HOST:PORT of process 0; a TPU pod needs none"
  )
  flags.DEFINE_integer("num_processes", None, "of the run, over all hosts")
  flags.DEFINE_integer("process_id", None, "of this process, from 0")
  flags.mark_flags_as_required(["config", "workdir"])
  # Answered before JAX and what needs it are imported, which takes seconds.
  if {"--help", "-help", "--helpshort", "-h"} & set(sys.argv[1:]):
    app.usage(shorthelp=True, writeto_stdout=True, exitcode=0)

from etils import epath
import jax
from jax.experimental import multihost_utils
import numpy as np

from dpo_jax import config as config_lib
from dpo_jax import model_sources, online
from dpo_jax.data import batch_plan
from dpo_jax.data import loader as loader_lib
from dpo_jax.models import lora
from dpo_jax.parallel import hosts, mesh
from dpo_jax.parallel.hosts import to_host
from dpo_jax.records.checkpoint import open_checkpoints
from dpo_jax.records.metrics import (
  GrowingFile,
  MetricsWriter,
  read_last_evaluation,
  read_metrics,
)
from dpo_jax.records.profile import ProfileWindow
from dpo_jax.records.resume import check_same_data, record_data
from dpo_jax.records.workdir import Workdir
from dpo_jax.system.cache import use_compilation_cache
from dpo_jax.system.files import write_atomically, write_json
from dpo_jax.training import evaluation, reference
from dpo_jax.training import start as start_lib
from dpo_jax.training.console import Console
from dpo_jax.training.setup import build_run
from dpo_jax.types import TrainState

_LOG = logging.getLogger(__name__)


class Preempted(SystemExit):
  """SIGTERM came, and the run has saved."""

  def __init__(self, step: int):
    super().__init__(EXIT_PREEMPTED)
    self.step = step


class NonFiniteError(FloatingPointError):
  """A loss or gradient that is not a number."""


def train(config: Any, workdir: epath.PathLike) -> dict[str, float]:
  """Trains, or goes on training, the run of a workdir.

  Args:
    config: complete, see `dpo_jax.config.default_config`.
    workdir: local or gs://; holds config.json, model.json, data.json,
      metrics.jsonl, samples.jsonl, checkpoints/ and reference/; and, when the
      run is over, finished.json.

  Returns:
    The figures of the last evaluation.

  Raises:
    ValueError: whatever is wrong with the config, the data or the workdir.
    NonFiniteError: a loss or gradient that is not finite; the last good
      checkpoint stays.
    Preempted: SIGTERM came; the run has saved, and goes on when it is started
      again.
  """
  workdir = Workdir.at(workdir)
  workdir.check_format()
  use_compilation_cache(config.compilation_cache_dir)
  hosts.check_same(
    {k: v for k, v in config_lib.flatten(config) if "cache_dir" not in k},
    "config",
  )
  run = hosts.together(lambda: build_run(config, workdir))
  identity = run.data.identity()
  hosts.check_same(identity, "data")
  check_same_data(identity, workdir)
  resume.record_config(run.config, workdir, is_writer=run.is_writer)
  if run.is_writer:
    record_data(run.data.description(), workdir)
    write_json(workdir.model, dataclasses.asdict(run.program.policy.config))
    write_atomically(workdir.git, _git_hash() + "\n")
  checkpoints = open_checkpoints(workdir, run.config)
  writer = MetricsWriter(
    workdir,
    is_writer=run.is_writer,
    tensorboard=run.config.log.tensorboard,
  )
  try:
    with _StopSignal() as stop, Console(run) as console:
      figures = _Loop(run, checkpoints, writer, stop, console).run_all()
  finally:
    writer.close()
    checkpoints.close()
  if run.is_writer:
    workdir.write_finished(run.config.total_steps)
  return figures


def _git_hash() -> str:
  here = os.path.dirname(os.path.abspath(__file__))
  done = subprocess.run(
    ["git", "describe", "--always", "--dirty", "--abbrev=40"],
    cwd=here,
    capture_output=True,
    text=True,
    check=False,
  )
  return done.stdout.strip() or "unknown"


class _StopSignal:
  """Remembers a SIGTERM, so that the loop can save before it ends."""

  def __enter__(self) -> "_StopSignal":
    self.is_set = False
    self._before = None
    if jax.process_count() > 1:
      # JAX's own handler tells the other hosts; ours would take its place.
      return self
    try:
      self._before = signal.signal(signal.SIGTERM, self._remember)
    except ValueError:  # not the main thread, which alone gets signals
      _LOG.warning("not on the main thread: SIGTERM will not be noticed")
    return self

  def _remember(self, number: int, frame: Any) -> None:
    del number, frame
    self.is_set = True

  def __exit__(self, *error: Any) -> None:
    if self._before is not None:
      signal.signal(signal.SIGTERM, self._before)

  def reached(self, step: int) -> bool:
    """Whether to stop now; all hosts answer the same."""
    if jax.process_count() > 1:
      return multihost_utils.reached_preemption_sync_point(step)
    return self.is_set


class _Loop:
  """The steps of one run, from where its checkpoint left off."""

  def __init__(self, run, checkpoints, writer, stop, console):
    self.run, self.checkpoints = run, checkpoints
    self.writer, self.stop, self.console = writer, stop, console
    self.config, self.program = run.config, run.program
    self.placement = run.program.placement
    self.figures: dict[str, float] = {}
    self.ref_samples: evaluation.Samples | None = None

  def run_all(self) -> dict[str, float]:
    run, config = self.run, self.config
    done = max(self.checkpoints.steps, default=0)
    self.console.begin(done)
    if done >= config.total_steps:
      self.console.end(self.checkpoints.best_step)
      return read_last_evaluation(run.workdir, config.data)
    state = self._start_state()
    start = int(state.step)
    if run.is_writer:  # of a run that is to take more steps
      run.workdir.finished.unlink(missing_ok=True)
    self._attach_reference(state, is_fresh=start == 0)
    self.state = self.placement.place_state(state)
    if start == 0:
      self._begin_batches(0)
      self._check_step_zero(state)
    if run.data.eval and config.eval.num_samples:
      # Sampled even on a resume: the policy is compared with these.
      self.ref_samples = self._sample(self._reference_params(state))
    if start == 0:
      self._evaluate(0, state, is_edge=True)
    elif _is_due(start, config.eval.every_steps):
      self._make_up_for_evaluation(start, state)
    self._train(start)
    self.checkpoints.wait()
    self.console.end(self.checkpoints.best_step)
    return self.figures

  def _start_state(self) -> TrainState:
    """Returns the latest checkpoint's state, or a fresh one."""
    run, program, init = self.run, self.program, self.config.policy.init
    target, _ = program.abstract_state()
    state = self.checkpoints.restore(target)
    if state is not None:
      if target.frozen_params is not None:
        frozen = program.split_params(self._load(init))[1]
        model_sources.check_frozen(frozen, run.workdir, init)
        state = state.replace(frozen_params=frozen)
      return state
    ref_params = None
    if program.has_live_reference:
      # Loaded a second time: the first step donates the policy's buffers.
      ref_params = self._load(run.reference_init)
    state = program.make_state(self._load(init), ref_params)
    if state.frozen_params is not None and run.is_writer:
      digest = trees.params_digest(state.frozen_params)
      write_atomically(run.workdir.frozen_digest, digest + "\n")
    return state

  def _load(self, init: str) -> Any:
    return model_sources.parse(init).load(
      self.program.policy, self.placement.mesh, seed=self.config.seed
    )

  def _reference_params(self, state: TrainState) -> Any:
    """What the reference began as; loaded anew if not on the devices."""
    kind = self.config.reference.kind
    if state.ref_params is not None and kind in ("frozen", "adapter_off"):
      return state.reference_params
    has_adapters = self.program.policy.config.lora is not None
    if has_adapters and self.run.starts_as_reference:
      return lora.without_adapters(state.policy_params)
    return lora.without_adapters(self._load(self.run.reference_init))

  def _attach_reference(self, state: TrainState, *, is_fresh: bool) -> None:
    """Gives the loaders cached log-probs, computing them where needed."""
    run, config = self.run, self.config
    self.train_loader = run.data.train
    self.eval_loaders = {
      name: loader
      for name, loader in run.data.eval.items()
      if name in run.data.measured
    }
    is_online = config.online.kind != "none"
    if is_online:
      self.train_loader = self._on_policy()
    is_cached = config.reference.kind == "cached"
    if not (is_cached and self.program.objective.needs_reference):
      return
    folder = config.reference.cache_dir or run.workdir.reference_cache
    params = self._reference_params(state)
    policy = self.program.policy.without_adapters
    self._check_same_reference(params, is_fresh=is_fresh)
    if is_fresh and run.starts_as_reference:
      start_lib.check_adapters(state.policy_params)
    by_store: dict[str, np.ndarray] = {}

    def attach(loader: loader_lib.Loader) -> loader_lib.Loader:
      key = reference.cache_key(
        params, policy.config, f"{loader.store.digest}/{len(loader.store)}"
      )
      if key not in by_store:
        whole = self._every_group(loader)
        logps = self._cached_logps(folder, key, params, whole)
        if is_fresh and run.starts_as_reference:
          self._check_cache(folder, key, logps, whole, state, params)
        by_store[key] = logps
      return dataclasses.replace(loader, ref_logps=by_store[key])

    if not is_online:
      self.train_loader = attach(self.train_loader)
    elif is_fresh and run.starts_as_reference:
      self._check_in_float32(self._every_group(run.data.train), state, params)
    self.eval_loaders = {n: attach(x) for n, x in self.eval_loaders.items()}

  def _on_policy(self) -> online.OnPolicy:
    """A loader of what the policy says."""
    run = self.run
    return online.OnPolicy(
      self.config,
      run.workdir,
      run.data.train,
      program=self.program,
      ref_params=self._load(run.reference_init),
      tokenizer=run.data.tokenizer,
      judge=run.online_judge,
    )

  def _check_same_reference(self, params: Any, *, is_fresh: bool) -> None:
    """Stops a run that would go on with another reference than it began with.

    What `reference.init` points at may have changed since: a run that was
    trained on, a folder that was written again.
    """
    path = self.run.workdir.reference_digest
    digest = trees.params_digest(params)
    before = "" if is_fresh else self.run.workdir.read_digest(path)
    if before and before != digest:
      raise ValueError(
        f"{self.run.reference_init} holds other weights than when this run"
        f" began: {path} says {before[:12]}, and they are {digest[:12]} now."
        " Bring the old ones back, or choose another workdir"
      )
    if self.run.is_writer:
      write_atomically(path, digest + "\n")

  def _every_group(self, loader: loader_lib.Loader) -> loader_lib.Loader:
    """A loader of all groups of a store, as the reference scores them."""
    indices = np.arange(len(loader.store))
    size = self.config.eval.batch_size
    plan = batch_plan.make_plan(
      loader.store,
      indices,
      batch_size=size,
      row_tokens=self.config.data.row_tokens,
      row_multiple=self.placement.num_row_shards,
      layout=self.config.data.layout,
      max_shapes=self.config.data.max_shapes,
    )
    return loader_lib.Loader(
      loader.store,
      indices,
      plan,
      size,
      seed=0,
      process_index=loader.process_index,
      process_count=loader.process_count,
    )

  def _scoring_layout(self, whole: loader_lib.Loader) -> dict[str, Any]:
    return reference.scoring_layout(
      whole, self.program.policy, self.placement, self.config.logps_chunk
    )

  def _cached_logps(self, folder, key, params, whole) -> np.ndarray:
    logps = reference.load_cache(folder, key)
    if logps is not None:
      return logps
    logps = reference.compute_logps(
      self.program.logps_step,
      params,
      whole,
      self.placement,
      label=self.console.label("reference"),
    )
    if not np.isfinite(logps).all():
      bad = int(np.flatnonzero(~np.isfinite(logps).all(1))[0])
      raise NonFiniteError(
        f"the reference gives group {bad} a log-prob that is not finite"
      )
    if self.run.is_writer:
      layout = self._scoring_layout(whole)
      reference.write_cache(folder, key, logps, layout)
    if jax.process_count() > 1:
      # The others read the manifest next.
      multihost_utils.sync_global_devices("reference cached")
    return logps

  def _check_cache(self, folder, key, logps, whole, state, ref_params) -> None:
    """Stops a run whose policy does not start as what was cached."""
    layout = json.loads(json.dumps(self._scoring_layout(whole)))
    if reference.read_layout(folder, key) != layout:
      self._check_in_float32(whole, state, ref_params)
      return
    start_lib.check_in_its_layout(
      self.program.logps_step,
      lora.without_adapters(state.policy_params),
      whole,
      logps,
      self.placement,
    )

  def _check_in_float32(self, whole, state, ref_params) -> None:
    start_lib.check_in_float32(
      self.program.policy.without_adapters,
      lora.without_adapters(state.policy_params),
      ref_params,
      whole,
      self.placement,
      self.config.logps_chunk,
    )

  def _check_step_zero(self, state: TrainState) -> None:
    """Stops a run whose policy should start as its reference and does not."""
    program = self.program
    needs_reference = program.objective.needs_reference
    if not (needs_reference and self.run.starts_as_reference):
      return
    batch = self.placement.place_rows(self.train_loader.batch(0))
    sequences = jax.tree.map(
      to_host,
      program.eval_step(state.policy_params, state.reference_params, batch),
    )
    loss_state = jax.tree.map(to_host, state.loss_state)
    per_group, _, is_valid = program.measure(sequences, loss_state)
    start_lib.check_first_batch(
      sequences,
      float(per_group.sum() / max(is_valid.sum(), 1)),
      dtype=program.policy.config.compute_dtype,
      is_live=program.has_live_reference,
    )

  def _train(self, start: int) -> None:
    run, config, placement = self.run, self.config, self.placement
    compiled = self.program.train_step(
      max_traces=len(self.train_loader.plan.shapes)
    )
    if config.parallelism == "jit":
      compiled = mesh.on_mesh(placement.mesh)(compiled)
    pending = None
    profile = ProfileWindow(config.profile.steps, run.workdir)
    batches = self.console.watch(self._batches(start), start)
    try:
      for step, (batch, counts) in enumerate(batches, start):
        with profile.step(step):
          self.state, metrics = compiled(self.state, batch)
        profile.after(step, metrics)
        # The step before is looked at while this one runs.
        self._look_at(pending)
        pending = (step, metrics, counts)
        done = step + 1
        is_last = done == config.total_steps
        # A run that is over is not interrupted: its last figures are due.
        must_stop = self.stop.reached(done) and not is_last
        wants_eval = _is_due(done, config.eval.every_steps) or is_last
        wants_save = _is_due(done, config.checkpoint.every_steps) or is_last
        if wants_eval or wants_save or must_stop:
          self._look_at(pending)
          pending = None
          with self.console.pause():
            on_mesh = placement.gather_state(self.state)
            if wants_eval and not must_stop:
              self._evaluate(done, on_mesh, is_edge=is_last)
            if wants_save or must_stop:
              measured = self.figures if wants_eval and not must_stop else None
              self.checkpoints.save(done, on_mesh, measured)
        if must_stop:
          self.checkpoints.wait()
          _LOG.warning("SIGTERM: saved at step %d", done)
          raise Preempted(done)
        self.checkpoints.poll()
    finally:
      batches.close()
      profile.close()

  def _batches(self, start: int) -> Iterator[tuple[Any, dict[str, float]]]:
    """The batches from a step to the last, made ahead while they are known."""
    while start < self.config.total_steps:
      stop = self._begin_batches(start)
      yield from loader_lib.prefetch(self._make_batch, start, stop, depth=2)
      start = stop

  def _begin_batches(self, step: int) -> int:
    """Where the batches end that do not depend on what is learned till then."""
    params = self.placement.gather_state(self.state).policy_params
    stop, figures = self.train_loader.begin(
      step, params, oldest=min(self.checkpoints.steps, default=0)
    )
    if figures:
      self._record(step, "online", figures)
    return min(stop, self.config.total_steps)

  def _make_batch(self, step: int) -> tuple[Any, dict[str, float]]:
    """A placed batch, and what the host knows of it."""
    loader = self.train_loader
    batch = loader.batch(step)
    # Of all hosts, counted by each of them.
    num_tokens = loader.num_tokens(step)
    counts = {
      "num_tokens": float(num_tokens),
      "num_groups": float(self.config.batch_size),
      "padding_fraction": float(
        1.0 - num_tokens / (batch.tokens.size * loader.process_count)
      ),
    }
    return self.placement.place_training_batch(batch), counts

  def _record(self, step: int, split: str, figures: dict[str, Any]) -> None:
    self.writer.write(step, split, figures)
    self.console.show(step, split, figures)

  def _look_at(self, pending: Any) -> None:
    """Fetches a step's metrics; stops on what is not finite; logs."""
    if pending is None:
      return
    step, metrics, counts = pending
    metrics = self.placement.fetch(metrics)
    for name in ("loss", "grad_norm"):
      if not np.isfinite(metrics[name]):
        self.checkpoints.wait()
        ids = self.train_loader.order(step)[:8].tolist()
        good = self.checkpoints.steps
        raise NonFiniteError(
          f"step {step + 1}: {name} is {metrics[name]}. Groups of the batch:"
          f" {ids}... The last good checkpoint is"
          f" {f'step {good[-1]}' if good else 'none'}; a lower learning rate or"
          " a smaller max_grad_norm may help"
        )
    self.console.count(metrics, counts)
    if _is_due(step + 1, self.config.log.every_steps):
      self._record(
        step + 1,
        "train",
        metrics
        | self.console.rates()
        | {"padding_fraction": counts["padding_fraction"]},
      )

  def _evaluate(
    self,
    step: int,
    state: TrainState,
    *,
    is_edge: bool,
    skip: Collection[str] = (),
  ) -> None:
    """Measures the held-out sets; samples too at the start and the end."""
    found: dict[str, dict[str, float]] = {}
    for name, loader in self.eval_loaders.items():
      if name in skip:
        continue
      found[name], records = evaluation.evaluate(
        self.program,
        state.policy_params,
        state.reference_params,
        state.loss_state,
        loader,
      )
      if self.config.eval.save_logps and self.run.is_writer:
        evaluation.write_records(self.run.workdir, step, records, name)
    if is_edge and self.ref_samples is not None:
      first = next(iter(self.run.data.eval))
      found[first] = found.get(first, {}) | self._measure_samples(step, state)
    if not found:
      return
    self.figures = {}
    for name, metrics in found.items():
      self._record(step, config_lib.split_name(name), metrics)
      prefix = config_lib.metric_prefix(name)
      self.figures |= {f"{prefix}{k}": v for k, v in metrics.items()}

  def _make_up_for_evaluation(self, step: int, state: TrainState) -> None:
    """Evaluates the step of a checkpoint that a SIGTERM left no time for."""
    done = {
      name
      for name in self.eval_loaders
      for row in read_metrics(self.run.workdir, config_lib.split_name(name))
      if row["step"] == step
    }
    self._evaluate(step, state, is_edge=False, skip=done)

  def _measure_samples(self, step: int, state: TrainState) -> dict[str, float]:
    """Samples from the policy, and compares with the reference's samples."""
    samples = self._sample(state.policy_params)
    metrics = evaluation.compare_samples(samples, self.ref_samples)
    settings = self.config.eval
    if (settings.temperature, settings.top_k, settings.top_p) == (1, 0, 1):
      metrics |= evaluation.sampled_kl(
        self.program.logps_step,
        state.policy_params,
        self._reference_params(state),
        samples,
        self.placement,
        batch_size=settings.batch_size,
      )
    self._write_samples(step, samples)
    return metrics

  def _sample(self, params: Any) -> evaluation.Samples:
    settings, loader = self.config.eval, self.run.data.first_eval
    prompts = evaluation.held_out_prompts(
      loader.store,
      loader.indices,
      settings.num_samples,
      max_tokens=self.program.policy.config.max_positions
      - settings.max_response_tokens,
    )
    return evaluation.draw_samples(
      self.program.policy,
      params,
      prompts,
      self.run.data.tokenizer,
      self.run.judge,
      seed=self.config.seed,
      config=settings,
      placement=self.placement,
      label=self.console.label("sampling"),
    )

  def _write_samples(self, step: int, samples: evaluation.Samples) -> None:
    if not self.run.is_writer:
      return
    file = GrowingFile(self.run.workdir.samples)
    for i, (prompt, text) in enumerate(
      zip(samples.prompt_texts, samples.texts, strict=True)
    ):
      row = {"step": step, "prompt": prompt, "response": text}
      if samples.rewards is not None:
        row["reward"] = float(samples.rewards[i])
      file.append(json.dumps(row) + "\n")
    file.close()


def _is_due(step: int, every: int) -> bool:
  return every > 0 and step % every == 0


def main() -> None:
  hosts.initialize(
    flags.FLAGS.coordinator_address,
    flags.FLAGS.num_processes,
    flags.FLAGS.process_id,
  )
  command_line.show_logs(jax.process_index())
  train(flags.FLAGS.config, flags.FLAGS.workdir)


if __name__ == "__main__":
  command_line.run(main)
