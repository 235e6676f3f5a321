"""The reference that a run began with: its weights and cached log-probs."""

from collections.abc import Mapping, Sequence
import dataclasses
import json
import logging
from typing import Any

from etils import epath
import numpy as np

from dpo_jax.config import parse_allowed
from dpo_jax.data import batch_plan
from dpo_jax.data.loader import Loader
from dpo_jax.records import history
from dpo_jax.records.workdir import Workdir
from dpo_jax.system.files import read_json
from dpo_jax.training import initial_state, logps_cache, reference
from dpo_jax.training.setup import EvalRun
from dpo_jax.trees import params_digest
from dpo_jax.types import TrainState

_LOG = logging.getLogger(__name__)


def read(
  run: EvalRun, state: TrainState, loaders: Sequence[Loader], *, label: str = ""
) -> list[Loader]:
  """Gives loaders the reference's log-probs, and writes nothing.

  Those that the run has cached are read, and the others computed.

  Args:
    run: run whose reference is read.
    state: state of a checkpoint, on the mesh.
    loaders: held-out sets.
    label: name of the work for `progress.track`; "" shows nothing.

  Returns:
    The loaders, with `ref_logps` where the run's reference is cached.

  Raises:
    ValueError: a reference, or log-probs, that have changed since the run
      began; or a damaged cache.
    FileNotFoundError: neither the reference nor its log-probs are there.
  """
  if not is_cached(run):
    return list(loaders)
  params, digest = read_reference(run, state)
  # A run whose own loss reads no reference has no record of one.
  is_known = _read_digests(run.workdir)["weights"]
  known = known_caches(run, digest) if is_known else {}
  found: dict[str, np.ndarray] = {}
  attached = []
  for loader in loaders:
    key = key_of(run, loader, digest)
    if key not in found:
      found[key] = _read_logps(run, params, loader, key, known, label)
    attached.append(dataclasses.replace(loader, ref_logps=found[key]))
  return attached


def _read_logps(
  run: EvalRun,
  params: Any,
  loader: Loader,
  key: str,
  known: Mapping[str, str],
  label: str,
) -> np.ndarray:
  """Returns the log-probs of a store, f32 [N, K]: from its cache, or computed.

  Raises:
    ValueError: other log-probs than the run began with, or a damaged cache.
    FileNotFoundError: no cache, and no parameters to compute them with.
  """
  folder = cache_folder(run)
  cache = logps_cache.load_cache(folder, key, loader.store.score.shape)
  if cache is not None:
    if known.get(key, cache.digest) != cache.digest:
      raise other_logps(run, key, known[key], cache.digest)
    return cache.logps
  if params is None:
    raise both_gone(run, key)
  return reference.compute_logps(
    run.program.logps_step,
    params,
    every_group(run, loader),
    run.program.placement,
    label=label,
  )


def is_cached(run: EvalRun) -> bool:
  kind = run.config.reference.kind
  return kind == "cached" and run.program.objective.needs_reference


def cache_folder(run: EvalRun) -> epath.Path:
  """Returns the folder of a run's caches."""
  given = run.config.reference.cache_dir
  return epath.Path(given or run.workdir.reference_cache)


def key_of(run: EvalRun, loader: Loader, digest: str) -> str:
  return reference.cache_key(
    digest,
    run.program.policy.without_adapters.config,
    f"{loader.store.digest}/{len(loader.store)}",
  )


def other_logps(run: EvalRun, key: str, before: str, now: str) -> ValueError:
  path = logps_cache.cache_path(cache_folder(run), key)
  return ValueError(
    f"{path} holds other log-probs than this run began with:"
    f" {run.workdir.reference_digests} says {before[:12]}, and their sha256 is"
    f" {now[:12]} now. Restore the file; or delete it and"
    f" {path.with_suffix('.json')}, and the log-probs are computed again"
  )


def both_gone(run: EvalRun, key: str) -> FileNotFoundError:
  path = logps_cache.cache_path(cache_folder(run), key)
  return FileNotFoundError(
    f"{path} is gone, and {run.reference_init} too, which gave it: put one of"
    " them back"
  )


def read_reference(run: EvalRun, state: TrainState) -> tuple[Any, str]:
  """Returns the reference's parameters, and their digest.

  A resumed run whose reference was moved gets None and the recorded digest,
  which names its caches. It needs the parameters only if a cache is gone.

  Raises:
    FileNotFoundError: the reference is gone, at step 0 or without a record.
  """
  try:
    params = initial_state.reference_params(run, state)
  except FileNotFoundError as error:
    digest = _read_digests(run.workdir)["weights"]
    if int(state.step) == 0 or not digest:
      raise
    _LOG.warning("%s. The log-probs that are cached are used", error)
    return None, digest
  return params, params_digest(params)


def known_caches(run: EvalRun, digest: str) -> Mapping[str, str]:
  """Returns the digests of the caches that a run began with, by key.

  The target of `reference.init` may have changed since: a run that was
  trained further, a folder that was written again. If `resume.allow` takes
  that, the change is added to the history of the run, and no cache is known.

  Args:
    run: run that resumes.
    digest: digest of the reference's parameters now.

  Raises:
    ValueError: another reference than the run began with, or no record of it.
  """
  before = _read_digests(run.workdir)
  path = run.workdir.reference_digests
  if not before["weights"]:
    record = json.dumps({"weights": digest, "logps": {}})
    raise ValueError(
      f"{path} is missing, so nothing tells whether {run.reference_init} still"
      " holds the reference that this run began with. Restore the file; or, if"
      f" you know that it has not changed, write {record} into it"
    )
  if before["weights"] != digest:
    if "reference" in parse_allowed(run.config.resume.allow):
      if run.is_writer:
        change = f"{before['weights'][:12]} there, {digest[:12]} now"
        history.add_to_history(run.workdir, {"reference": [change]})
      return {}
    raise ValueError(
      f"{run.reference_init} holds other weights than when this run began:"
      f" {run.workdir} records {before['weights'][:12]}, and they are"
      f" {digest[:12]} now. Restore the old ones, or choose another workdir;"
      " --config.resume.allow=reference takes the new ones"
    )
  return before["logps"]


def _read_digests(workdir: Workdir) -> Mapping[str, Any]:
  """Reads reference.json: digests of "weights", and by cache key of "logps".

  "weights" is "" if nothing was recorded.

  Raises:
    ValueError: a damaged file; names it.
  """
  path = workdir.reference_digests
  if path.exists():
    found = read_json(path)
    logps = found.get("logps")
    texts = [*logps.values()] if isinstance(logps, dict) else [None]
    if not all(isinstance(x, str) for x in (found.get("weights"), *texts)):
      raise ValueError(
        f'{path} is damaged: it must hold "weights", a digest, and "logps",'
        " digests by key. Restore it from a copy"
      )
    return found
  # Older runs recorded that of the weights alone.
  weights = workdir.read_digest(workdir.old_reference_digest)
  return {"weights": weights, "logps": {}}


def every_group(run: EvalRun, loader: Loader) -> Loader:
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
