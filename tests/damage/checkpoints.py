"""Damaged checkpoints: the state that a run resumes from is one it saved."""

import functools
import hashlib
import json
import pathlib
import shutil
import tempfile
from typing import Any, NamedTuple
from unittest import mock

import jax
import numpy as np

from dpo_jax.records.checkpoint import Checkpoints, open_checkpoints
from dpo_jax.records.workdir import Workdir
from dpo_jax.train import train
from dpo_jax.training.setup import build_run
from tests import tiny
from tests.damage import files

_SETTINGS = {
  "total_steps": 3,
  "checkpoint__every_steps": 1,
  "checkpoint__keep": 3,
  "loss__name": "sft",
  "reference__kind": "none",
  "data__source": "synthetic:review_demonstrations:40",
  "data__layout": "padded",
}
# JSON other than a table of files, and text other than JSON.
_ODD = (
  "[]",
  "null",
  "3",
  '"x"',
  "{}",
  '{"a": 1}',
  '["params"]',
  "",
  "{",
  "NaN",
)


class Made(NamedTuple):
  """Two sound runs with a checkpoint at each of their steps.

  Attributes:
    run: workdir of the one that is damaged.
    other: workdir of a run with another seed.
    config: resolved config of `run`.
    target: shapes and shardings of its state.
    digests: digest of each state of `run` when it was saved, by step.
  """

  run: pathlib.Path
  other: pathlib.Path
  config: Any
  target: Any
  digests: dict[int, str]


def digest(state: Any) -> str:
  """Returns the sha256 of all arrays of a state, with paths and dtypes."""
  total = hashlib.sha256()
  for path, leaf in jax.tree_util.tree_leaves_with_path(state):
    array = np.asarray(leaf)
    total.update(f"{path} {array.dtype} {array.shape}".encode())
    total.update(array.tobytes())
  return total.hexdigest()


@functools.cache
def made() -> Made:
  """Trains both runs, once in a process."""
  folder = pathlib.Path(tempfile.mkdtemp())
  digests: dict[int, str] = {}
  save = Checkpoints.save

  def note(self, step, state, metrics):
    digests[step] = digest(state)
    save(self, step, state, metrics)

  jax.config.update("jax_disable_most_optimizations", True)
  cache = {"data__cache_dir": str(folder / "cache")}
  train(tiny.make_config(**_SETTINGS, **cache, seed=1), folder / "other")
  with mock.patch.object(Checkpoints, "save", note):
    train(tiny.make_config(**_SETTINGS, **cache), folder / "run")
  config = tiny.make_config(**_SETTINGS, **cache)
  run = build_run(config, Workdir.at(folder / "run"))
  target, _ = run.program.abstract_state()
  return Made(folder / "run", folder / "other", run.config, target, digests)


def _file(rng, root, other) -> str:
  del other
  path = files.pick(rng, files.all_files(root))
  return f"{path.parent.relative_to(root)}/{files.damage(rng, path)}"


def _swapped_file(rng, root, other) -> str:
  """Replaces a file by that of another step, or of the other run."""
  path = files.pick(rng, files.all_files(root))
  step, *rest = path.relative_to(root).parts
  there = files.pick(rng, (root, other))
  steps = [s.name for s in root.iterdir() if there == other or s.name != step]
  source = there / files.pick(rng, sorted(steps)) / pathlib.Path(*rest)
  if not source.exists():  # names of array files are random
    source = files.pick(
      rng, files.all_files(there / source.parts[-len(rest) - 1])
    )
  files.replace(path, source)
  return (
    f"{path.relative_to(root)} replaced by {source.relative_to(there.parent)}"
  )


def _extra_file(rng, root, other) -> str:
  del other
  folders = [path for path in root.rglob("*") if path.is_dir()]
  path = files.pick(rng, sorted(folders)) / "extra"
  path.write_bytes(rng.bytes(16))
  return f"{path.relative_to(root)} added"


def _odd_manifest(rng, root, other) -> str:
  del other
  step, text = files.pick(rng, sorted(root.iterdir())), files.pick(rng, _ODD)
  (step / "manifest.json").write_text(text)
  return f"{step.name}/manifest.json is {text!r}"


def _manifest_without_a_line(rng, root, other) -> str:
  """Drops an entry of a manifest, and damages or keeps its file."""
  del other
  step = files.pick(rng, sorted(root.iterdir()))
  table = json.loads((step / "manifest.json").read_text())
  name = files.pick(rng, sorted(table))
  del table[name]
  (step / "manifest.json").write_text(json.dumps(table))
  what = "kept"
  if rng.random() < 0.5 and (step / name).is_file():
    what = files.damage(rng, step / name)
  return f"{step.name}/manifest.json lacks {name}, {what}"


def _foreign_step(rng, root, other) -> str:
  """Replaces a step by one of another run, of the same number or not."""
  step = files.pick(rng, sorted(root.iterdir()))
  source = files.pick(rng, sorted(other.iterdir()))
  files.replace(step, source)
  return f"{step.name} is step {source.name} of another run"


def _renamed_step(rng, root, other) -> str:
  del other
  step = files.pick(rng, sorted(root.iterdir()))
  name = files.pick(rng, ("7", "0", "12", f"{step.name}.bak", f"0{step.name}"))
  step.rename(root / name)
  return f"{step.name} renamed to {name}"


def _exchanged_steps(rng, root, other) -> str:
  """Copies a step over another, or exchanges their names."""
  del other
  one, two = rng.permutation(sorted(root.iterdir()))[:2]
  if rng.random() < 0.5:
    files.replace(one, two)
    return f"{one.name} is a copy of {two.name}"
  one.rename(root / "aside")
  two.rename(one)
  (root / "aside").rename(two)
  return f"{one.name} and {two.name} exchanged"


_DAMAGES = (
  *(_file,) * 6,
  *(_swapped_file,) * 2,
  _extra_file,
  _odd_manifest,
  _manifest_without_a_line,
  _foreign_step,
  _renamed_step,
  _exchanged_steps,
)


def checkpoints(
  rng: np.random.Generator, folder: pathlib.Path
) -> tuple[str, str]:
  """Damages the checkpoints of a run once, and restores the latest."""
  sound = made()
  workdir = folder / "run"
  shutil.copytree(sound.run, workdir)
  root = workdir / "checkpoints"
  detail = files.pick(rng, _DAMAGES)(rng, root, sound.other / "checkpoints")
  try:
    opened = open_checkpoints(Workdir.at(workdir), sound.config)
    try:
      state = opened.restore(sound.target)
      step = max(opened.steps, default=0)
    finally:
      opened.close()
  except Exception as error:
    outcome = "named" if files.names(error, workdir) else "unnamed"
    return f"refused, {outcome}", f"{detail}: {error!r}"
  if state is None:
    return "wrong, starts again", detail
  if digest(state) != sound.digests.get(step):
    return "wrong, silent", f"{detail}: restored as step {step}"
  newest = "newest" if step == max(sound.digests) else "earlier"
  return f"{newest}, right", detail
