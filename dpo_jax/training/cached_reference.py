"""Cached log-probs of the reference: computed once, checked, and attached."""

from collections.abc import Sequence
import dataclasses
import json
from typing import Any

import jax
from jax.experimental import multihost_utils
import numpy as np

from dpo_jax.data import batch_plan
from dpo_jax.data.loader import Loader
from dpo_jax.models import lora
from dpo_jax.system.files import write_atomically
from dpo_jax.training import initial_state, logps_cache, reference, start
from dpo_jax.training.setup import Run
from dpo_jax.training.stops import NonFiniteError
from dpo_jax.trees import params_digest
from dpo_jax.types import TrainState


def attach(
  run: Run,
  state: TrainState,
  loaders: Sequence[Loader],
  *,
  unscored: Loader | None = None,
  label: str = "",
) -> list[Loader]:
  """Gives loaders the reference's log-probs, computing them where needed.

  Args:
    run: run whose reference is read.
    state: first state, or that of the latest checkpoint; on the mesh.
    loaders: training batches and held-out sets.
    unscored: groups that a fresh policy is compared with its reference on,
      where the training batches are sampled and have no log-probs yet.
    label: name of the work for `progress.track`; "" shows nothing.

  Returns:
    The loaders, with `ref_logps` where the run's reference is cached.

  Raises:
    ValueError: a reference that has changed since the run began.
    StartError: a fresh policy that differs from its reference.
    NonFiniteError: a log-prob that is not finite.
  """
  is_cached = run.config.reference.kind == "cached"
  if not (is_cached and run.program.objective.needs_reference):
    return list(loaders)
  is_fresh = int(state.step) == 0
  params = initial_state.reference_params(run, state)
  digest = params_digest(params)
  _check_same_reference(run, digest, is_fresh=is_fresh)
  # Each store is scored once, however many loaders read it.
  by_key: dict[str, np.ndarray] = {}
  attached = []
  for loader in loaders:
    key = reference.cache_key(
      digest,
      run.program.policy.without_adapters.config,
      f"{loader.store.digest}/{len(loader.store)}",
    )
    if key not in by_key:
      by_key[key] = _logps_of_store(run, state, params, loader, key, label)
    attached.append(dataclasses.replace(loader, ref_logps=by_key[key]))
  if unscored is not None and is_fresh and run.starts_as_reference:
    start.check_adapters(state.policy_params)
    _check_in_float32(run, state, params, _every_group(run, unscored))
  return attached


def _check_same_reference(run: Run, digest: str, *, is_fresh: bool) -> None:
  """Stops a run that would resume with another reference than it began with.

  The target of `reference.init` may have changed since: a run that was
  trained further, a folder that was written again.
  """
  path = run.workdir.reference_digest
  before = "" if is_fresh else run.workdir.read_digest(path)
  if before and before != digest:
    raise ValueError(
      f"{run.reference_init} holds other weights than when this run began:"
      f" {path} says {before[:12]}, and they are {digest[:12]} now. Restore the"
      " old ones, or choose another workdir"
    )
  if run.is_writer:
    write_atomically(path, digest + "\n")


def _every_group(run: Run, loader: Loader) -> Loader:
  """Returns a loader of all groups of a store, as the reference scores them."""
  config = run.config
  indices = np.arange(len(loader.store))
  plan = batch_plan.make_plan(
    loader.store,
    indices,
    batch_size=config.eval.batch_size,
    row_tokens=config.data.row_tokens,
    row_multiple=run.program.placement.num_row_shards,
    layout=config.data.layout,
    max_shapes=config.data.max_shapes,
  )
  return Loader(
    loader.store,
    indices,
    plan,
    config.eval.batch_size,
    seed=0,
    process_index=loader.process_index,
    process_count=loader.process_count,
  )


def _logps_of_store(
  run: Run, state: TrainState, params: Any, loader: Loader, key: str, label: str
) -> np.ndarray:
  """Reads or computes the log-probs of a store: f32 [N, K]."""
  folder = run.config.reference.cache_dir or run.workdir.reference_cache
  whole = _every_group(run, loader)
  layout = logps_cache.scoring_layout(
    whole,
    run.program.policy,
    run.program.placement,
    run.program.chunk_size,
  )
  logps = logps_cache.load_cache(folder, key)
  if logps is None:
    logps = _compute(run, params, whole, label)
    if run.is_writer:
      logps_cache.write_cache(folder, key, logps, layout)
    if jax.process_count() > 1:
      # The other processes read the manifest next.
      multihost_utils.sync_global_devices("reference cached")
  if int(state.step) == 0 and run.starts_as_reference:
    start.check_adapters(state.policy_params)
    layout = json.loads(json.dumps(layout))
    if logps_cache.read_layout(folder, key) == layout:
      start.check_in_its_layout(
        run.program.logps_step,
        lora.without_adapters(state.policy_params),
        whole,
        logps,
        run.program.placement,
      )
    else:
      _check_in_float32(run, state, params, whole)
  return logps


def _compute(run: Run, params: Any, whole: Loader, label: str) -> np.ndarray:
  """Scores all groups by the reference: f32 [N, K], finite."""
  logps = reference.compute_logps(
    run.program.logps_step, params, whole, run.program.placement, label=label
  )
  if not np.isfinite(logps).all():
    bad = int(np.flatnonzero(~np.isfinite(logps).all(1))[0])
    raise NonFiniteError(
      f"the reference gives group {bad} a log-prob that is not finite"
    )
  return logps


def _check_in_float32(
  run: Run, state: TrainState, params: Any, whole: Loader
) -> None:
  start.check_in_float32(
    run.program.policy.without_adapters,
    lora.without_adapters(state.policy_params),
    params,
    whole,
    run.program.placement,
    run.program.chunk_size,
  )
