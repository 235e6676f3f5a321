"""Cached log-probs of the reference: computed once, checked, and attached."""

from collections.abc import Mapping, Sequence
import dataclasses
import functools
import json
import logging
from typing import Any

from etils import epath
import numpy as np

from dpo_jax.data import scoring
from dpo_jax.data.loader import Loader
from dpo_jax.models import lora
from dpo_jax.parallel import hosts
from dpo_jax.system.files import write_json
from dpo_jax.training import known_reference, logps_cache, start
from dpo_jax.training.logps_cache import Cached
from dpo_jax.training.logps_parts import Parts, remove_parts
from dpo_jax.training.setup import Run
from dpo_jax.training.stops import NonFiniteError
from dpo_jax.types import TrainState

_LOG = logging.getLogger(__name__)


def attach(
  run: Run,
  state: TrainState,
  loaders: Sequence[Loader],
  *,
  unscored: Loader | None = None,
  label: str = "",
) -> list[Loader]:
  """Gives loaders the reference's log-probs; computes and caches missing ones.

  Process 0 writes the caches, and their digests to WORKDIR/reference.json. At
  step 0 a policy that should start as its reference is compared with it.

  Args:
    run: run whose reference is read.
    state: first state, or that of the latest checkpoint; on the mesh.
    loaders: training batches and held-out sets.
    unscored: groups that a fresh policy is compared with its reference on,
      where the training batches are sampled and have no log-probs yet.
    label: name of the work for `progress.track`; "" shows nothing.

  Returns:
    The loaders, with `ref_logps` if the run's reference is cached.

  Raises:
    ValueError: a reference, or log-probs, that have changed since the run
      began; or a damaged cache.
    FileNotFoundError: neither the reference nor its log-probs are there, or
      the hosts do not share the folder of caches.
    StartError: a fresh policy that differs from its reference.
    NonFiniteError: a log-prob that is not finite.
  """
  if not known_reference.is_cached(run):
    return list(loaders)
  is_fresh = int(state.step) == 0
  params, digest = known_reference.read_reference(run, state)
  known = {} if is_fresh else known_reference.known_caches(run, digest)
  scorer = _Scorer(run, params, label)
  # Each store is scored once, however many loaders read it.
  caches: dict[str, Cached] = {}
  attached = []
  for loader in loaders:
    key = known_reference.key_of(run, loader, digest)
    if key not in caches:
      whole = known_reference.every_group(run, loader)
      caches[key] = scorer.open(whole, key, known)
      if is_fresh and run.starts_as_reference:
        path = logps_cache.cache_path(scorer.folder, key)
        _check_start(run, state, params, whole, caches[key], path)
    ref_logps = caches[key].logps
    attached.append(dataclasses.replace(loader, ref_logps=ref_logps))
  if unscored is not None and is_fresh and run.starts_as_reference:
    start.check_adapters(state.policy_params)
    _check_in_float32(
      run, state, params, known_reference.every_group(run, unscored)
    )
  if run.is_writer:
    digests = {key: cache.digest for key, cache in caches.items()}
    write_json(
      run.workdir.reference_digests, {"weights": digest, "logps": digests}
    )
  return attached


@dataclasses.dataclass(frozen=True)
class _Scorer:
  """Reference of a run, which scores the groups that no cache holds.

  Attributes:
    run: run whose reference it is.
    params: its parameters; None if they cannot be read.
    label: see `attach`.
  """

  run: Run
  params: Any
  label: str

  @property
  def folder(self) -> epath.Path:
    """Folder of caches."""
    return known_reference.cache_folder(self.run)

  def open(self, whole: Loader, key: str, known: Mapping[str, str]) -> Cached:
    """Reads the log-probs of a store; computes them first if there are none.

    Args:
      whole: all groups of the store.
      key: key of the cache.
      known: digests of the caches that the run began with, by key.

    Raises:
      ValueError: other log-probs than the run began with; or a damaged cache.
      FileNotFoundError: no cache, and no parameters to compute it with; or a
        folder of caches that the hosts do not share.
      NonFiniteError: a computed log-prob that is not finite.
    """
    path = logps_cache.cache_path(self.folder, key)
    shape = whole.store.score.shape
    cache = logps_cache.load_cache(self.folder, key, shape)
    was_there = cache is not None
    if cache is None:
      if self.params is None:
        raise known_reference.both_gone(self.run, key)
      parts = self._compute(whole, key)
      # The other processes read the cache next.
      hosts.together(lambda: self._write(key, parts))
      cache = logps_cache.load_cache(self.folder, key, shape)
    if cache is None:
      raise FileNotFoundError(
        f"process 0 has written {path}, and it is not there:"
        " reference.cache_dir must be a folder that all hosts share"
      )
    if known.get(key, cache.digest) != cache.digest:
      if was_there:
        raise known_reference.other_logps(
          self.run, key, known[key], cache.digest
        )
      _LOG.warning(
        "%s was computed again, and rounds differently than when this run"
        " began: its layout is another, or the version of jax",
        path,
      )
    if self.run.is_writer:
      remove_parts(self.folder, key)
    return cache

  def _write(self, key: str, parts: Parts) -> None:
    """Writes a cache, unless a run that shares the folder was faster.

    That run, and others, may already train with what it wrote.
    """
    if not self.run.is_writer:
      return
    if logps_cache.load_cache(self.folder, key, parts.logps.shape) is None:
      logps_cache.write_cache(self.folder, key, parts.logps, parts.layout)

  def _compute(self, whole: Loader, key: str) -> Parts:
    """Scores the groups that no part has yet.

    Process 0 reads and writes the parts, and the others score what it lacks.

    Args:
      whole: all groups of the store.
      key: key of the cache.

    Returns:
      Parts, which on process 0 hold the log-probs of all groups.

    Raises:
      NonFiniteError: a log-prob that is not finite.
    """
    run = self.run
    shape = whole.store.score.shape
    parts = Parts(self.folder, key, _layout(run, whole), shape)
    hosts.together(lambda: parts.read() if run.is_writer else None)
    count = whole.num_eval_batches()
    left = [i for i in range(count) if not parts.has(whole.eval_order(i))]
    left = json.loads(hosts.gather_texts(json.dumps(left))[0])
    if len(left) < count:
      done = count - len(left)
      _LOG.info("log-probs of %d of %d batches are there", done, count)
    step = functools.partial(run.program.logps_step, self.params)
    placement = run.program.placement
    try:
      for ids, logps in scoring.score_batches(
        step, whole, placement, label=self.label, batches=left
      ):
        if not np.isfinite(logps).all():
          bad = int(ids[~np.isfinite(logps).all(1)][0])
          raise NonFiniteError(
            f"the reference gives group {bad} a log-prob that is not finite"
          )
        if run.is_writer:
          parts.add(ids, logps)
    except BaseException:  # KeyboardInterrupt and SystemExit too
      parts.write()
      raise
    return parts


def _layout(run: Run, whole: Loader) -> dict[str, Any]:
  return logps_cache.scoring_layout(
    whole, run.program.policy, run.program.placement, run.program.chunk_size
  )


def _check_start(
  run: Run,
  state: TrainState,
  params: Any,
  whole: Loader,
  cache: Cached,
  path: epath.Path,
) -> None:
  """Raises StartError unless a fresh policy starts as its reference.

  In the cache's own layout it must give the cached log-probs; in another it is
  compared with the reference in float32.
  """
  start.check_adapters(state.policy_params)
  if cache.layout == json.loads(json.dumps(_layout(run, whole))):
    start.check_in_its_layout(
      run.program.logps_step,
      lora.without_adapters(state.policy_params),
      whole,
      cache.logps,
      run.program.placement,
      path,
    )
  else:
    _check_in_float32(run, state, params, whole)


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
