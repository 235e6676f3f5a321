"""Damaged caches of the reference: batches have its log-probs, or none."""

from collections.abc import Sequence
import contextlib
import dataclasses
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

from dpo_jax.parallel import stop_signal
from dpo_jax.records.workdir import Workdir
from dpo_jax.training import cached_reference, logps_cache
from dpo_jax.training.initial_state import load_params
from dpo_jax.training.setup import Run, build_run
from tests import tiny
from tests.damage import files


class Made(NamedTuple):
  """A run that has scored its groups, and what else it may find there.

  Attributes:
    run: the run.
    state: its first state.
    caches: workdirs: of the run, of the run when it was stopped while scoring,
      and of a run with another policy.
    logps: log-probs of the reference, one array for each loader.
  """

  run: Run
  state: Any
  caches: tuple[pathlib.Path, pathlib.Path, pathlib.Path]
  logps: Sequence[np.ndarray]


class _StoppedError(Exception):
  pass


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
  """Computes the caches, once in a process."""
  folder = pathlib.Path(tempfile.mkdtemp())
  jax.config.update("jax_disable_most_optimizations", True)
  other, other_state = _start(folder, 1)
  _attach(other, other_state)
  run, state = _start(folder, 0)
  logps = _attach(run, state)
  whole, stopped, others = (folder / x for x in ("run0", "stopped", "run1"))
  shutil.copytree(whole, stopped)
  shutil.rmtree(stopped / "reference")
  check = mock.patch.object(
    stop_signal, "check", side_effect=[None, _StoppedError]
  )
  with check, contextlib.suppress(_StoppedError):
    _attach(_moved(run, stopped), state)
  return Made(run, state, (whole, stopped, others), logps)


def _moved(run: Run, folder: pathlib.Path) -> Run:
  return dataclasses.replace(run, workdir=Workdir.at(folder))


def _file(rng, cache: pathlib.Path) -> str:
  return files.damage(rng, files.pick(rng, files.all_files(cache)))


def _others_file(rng, cache: pathlib.Path) -> str:
  """Replaces one or all files by those of another run."""
  ours, theirs = map(files.all_files, (cache, made().caches[2] / "reference"))
  pairs = list(zip(ours, theirs, strict=False))  # parts have other numbers
  if rng.random() < 0.5:
    pairs = [files.pick(rng, pairs)]
  for path, source in pairs:
    files.replace(path, source)
  return f"{[path.name for path, _ in pairs]} replaced by another run's"


def _rewritten(rng, cache: pathlib.Path) -> str:
  """Writes a cache that agrees with its digest, and is not this run's."""
  whole = made().caches[0] / "reference"
  key = files.pick(rng, sorted(whole.glob("*.json"))).stem
  logps = np.load(whole / f"{key}.npy")
  sound = logps_cache.load_cache(epath.Path(whole), key, logps.shape)
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
  logps_cache.write_cache(epath.Path(cache), key, changes[name], sound.layout)
  return f"{name}, with a digest"


_DAMAGES = (*(_file,) * 5, *(_others_file,) * 2, _rewritten)


def reference_cache(
  rng: np.random.Generator, folder: pathlib.Path
) -> tuple[str, str]:
  """Damages a cache once; a fresh or a resumed run then reads it."""
  sound = made()
  is_stopped = rng.random() < 0.25
  workdir = folder / "run"
  shutil.copytree(sound.caches[is_stopped], workdir)
  detail = files.pick(rng, _DAMAGES)(rng, workdir / "reference")
  detail += ", stopped while scoring" * is_stopped
  state = sound.state
  if rng.random() < 0.5:
    state = state.replace(step=jnp.int32(2))
    detail += ", resumed"
  try:
    found = _attach(_moved(sound.run, workdir), state)
  except Exception as error:
    outcome = "named" if files.names(error, workdir) else "unnamed"
    return f"refused, {outcome}", f"{detail}: {error!r}"
  same = [
    a.dtype == b.dtype and a.tobytes() == b.tobytes()
    for a, b in zip(found, sound.logps, strict=True)
  ]
  return ("right" if all(same) else "wrong, silent"), detail
