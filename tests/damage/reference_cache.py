"""Damaged caches of the reference: batches have its log-probs, or none."""

from collections.abc import Sequence
import functools
import pathlib
import shutil
import tempfile
from typing import Any, NamedTuple
from unittest import mock

from etils import epath
import jax
import jax.numpy as jnp
import numpy as np

from dpo_jax.records.workdir import Workdir
from dpo_jax.training import cached_reference, logps_cache, reference
from dpo_jax.training.initial_state import load_params
from dpo_jax.training.setup import Run, build_run
from tests import tiny
from tests.damage import files


class Made(NamedTuple):
  """A run with its cache, and that of a run with another policy.

  Attributes:
    run: run whose cache is damaged.
    state: its first state.
    caches: folder of its cache and folder of the other's.
    logps: log-probs of the reference, one array for each loader.
  """

  run: Run
  state: Any
  caches: tuple[pathlib.Path, pathlib.Path]
  logps: Sequence[np.ndarray]


def _attach(run: Run, state: Any) -> list[np.ndarray]:
  loaders = [run.data.train, *run.data.eval.values()]
  attached = cached_reference.attach(run, state, loaders)
  return [np.asarray(loader.ref_logps) for loader in attached]


def _start(folder: pathlib.Path, seed: int) -> tuple[Run, Any]:
  config = tiny.make_config(
    seed=seed,
    data__cache_dir=str(folder / "tokens"),
    data__eval_fraction=0.2,
    reference__kind="cached",
  )
  run = build_run(config, Workdir.at(folder / f"run{seed}"))
  state = run.program.make_state(load_params(run, run.config.policy.init), None)
  return run, state


@functools.cache
def made() -> Made:
  """Computes both caches, once in a process."""
  folder = pathlib.Path(tempfile.mkdtemp())
  jax.config.update("jax_disable_most_optimizations", True)
  other, other_state = _start(folder, 1)
  _attach(other, other_state)
  run, state = _start(folder, 0)
  logps = _attach(run, state)
  caches = [
    pathlib.Path(x.workdir.reference_cache).rename(folder / f"cache{i}")
    for i, x in enumerate((run, other))
  ]
  return Made(run, state, tuple(caches), logps)


def _file(rng, cache: pathlib.Path) -> str:
  return files.damage(rng, files.pick(rng, files.all_files(cache)))


def _others_file(rng, cache: pathlib.Path) -> str:
  """Replaces one or all files by those of another run."""
  ours, theirs = map(files.all_files, (cache, made().caches[1]))
  pairs = list(zip(ours, theirs, strict=True))
  if rng.random() < 0.5:
    pairs = [files.pick(rng, pairs)]
  for path, source in pairs:
    files.replace(path, source)
  return f"{[path.name for path, _ in pairs]} replaced by another run's"


def _rewritten(rng, cache: pathlib.Path) -> str:
  """Writes a cache that agrees with its digest, and is not this run's."""
  key = files.pick(rng, sorted(cache.glob("*.json"))).stem
  logps = logps_cache.load_cache(cache, key)
  layout = logps_cache.read_layout(cache, key)
  changes = {
    "columns exchanged": logps[:, ::-1],
    "groups rolled": np.roll(logps, 1, axis=0),
    "rows missing": logps[:-3],
    "a row too many": np.concatenate([logps, logps[:1]]),
    "a column missing": logps[:, :1],
    "float64": logps.astype(np.float64),
    "not finite": np.where(logps == logps.min(), np.nan, logps),
  }
  name = files.pick(rng, changes)
  logps_cache.write_cache(epath.Path(cache), key, changes[name], layout)
  return f"{name}, with a digest"


_DAMAGES = (*(_file,) * 5, *(_others_file,) * 2, _rewritten)


def reference_cache(
  rng: np.random.Generator, folder: pathlib.Path
) -> tuple[str, str]:
  """Damages a cache once; a fresh or a resumed run then reads it."""
  del folder  # the run has its own
  sound = made()
  cache = pathlib.Path(sound.run.workdir.reference_cache)
  shutil.rmtree(cache, ignore_errors=True)
  shutil.copytree(sound.caches[0], cache)
  detail = files.pick(rng, _DAMAGES)(rng, cache)
  state = sound.state
  if rng.random() < 0.5:
    state = state.replace(step=jnp.int32(2))
    detail = f"{detail}, resumed"
  compute = mock.patch.object(
    reference, "compute_logps", wraps=reference.compute_logps
  )
  try:
    with compute as computed:
      found = _attach(sound.run, state)
  except Exception as error:
    is_named = files.names(error, cache)
    return (
      f"refused, {'named' if is_named else 'unnamed'}",
      f"{detail}: {error!r}",
    )
  same = [
    a.dtype == b.dtype and a.tobytes() == b.tobytes()
    for a, b in zip(found, sound.logps, strict=True)
  ]
  if not all(same):
    return "wrong, silent", detail
  return ("computed again, right" if computed.called else "same"), detail
