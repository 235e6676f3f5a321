"""Damaged records of a run: it resumes to the same bits, or is refused."""

import functools
import json
import pathlib
import shutil
import tempfile
from typing import Any, NamedTuple
from unittest import mock

import jax
import numpy as np

from dpo_jax.records.checkpoint import Checkpoints
from dpo_jax.records.metrics import read_metrics
from dpo_jax.train import train
from tests import tiny
from tests.damage import files, kills, outside

_STEPS = 4
_COMMON = {
  "total_steps": _STEPS,
  "checkpoint__every_steps": 2,
  "eval__every_steps": 2,
  "eval__num_samples": 2,
  "eval__max_response_tokens": 4,
  "eval__save_logps": True,
  "data__eval_fraction": 0.2,
}
# The judge of on-policy pairs is written by `made`.
_SETTINGS: dict[str, dict[str, Any]] = {
  "cached": {"reference__kind": "cached", "lora__rank": 2},
  # Sampled at steps 0 and 3: a run that resumes at step 2 reads the first.
  "on-policy": {
    "online__kind": "pairs",
    "online__every_steps": 3,
    "online__max_response_tokens": 8,
  },
}
VARIANTS = tuple(_SETTINGS)
# Folders that are damaged by kinds of their own.
_OTHERS = ("checkpoints", "reference")
# No digest covers what people read: a flipped digit is another number.
_OF_PEOPLE = ("metrics.jsonl", "samples.jsonl", "git.txt", "command.txt")
_ODD = ("[]", "null", "3", "{}", '{"a": 1}', "", "\n", "{", "\x00", "\ufeff{}")


class Made(NamedTuple):
  """A run that has ended, and what a kill before its last save had left.

  Attributes:
    half: workdir of the killed run; its checkpoint is that of half the steps.
    config: config of both.
    arrays: arrays of the last checkpoint, see `kills.arrays`.
    metrics: see `_metrics`.
  """

  half: pathlib.Path
  config: Any
  arrays: dict[str, bytes]
  metrics: Any


def _metrics(workdir: pathlib.Path) -> Any:
  """Returns the metrics of each split and step, but for those of the clock."""
  return [
    {k: x for k, x in row.items() if not k.endswith(kills.CLOCKS)}
    for split in ("train", "eval")
    for row in read_metrics(workdir, split)
  ]


@functools.cache
def made(variant: str) -> Made:
  """Trains a run, once in a process, and copies it before its last save."""
  folder = pathlib.Path(tempfile.mkdtemp())
  whole, half = folder / "whole", folder / "half"
  save = Checkpoints.save

  def copy_and_save(self, step, state, metrics):
    if step == _STEPS:
      self.wait()
      shutil.copytree(whole, half)
      (half / "lock.json").unlink()
    save(self, step, state, metrics)

  jax.config.update("jax_disable_most_optimizations", True)
  config = tiny.make_config(
    **_COMMON | _SETTINGS[variant], data__cache_dir=str(folder / "tokens")
  )
  if variant == "on-policy":
    config.online.judge = kills.write_judge(folder)
  with mock.patch.object(Checkpoints, "save", copy_and_save):
    train(config, whole)
  return Made(half, config, kills.arrays(whole, _STEPS), _metrics(whole))


def _damage(rng: np.random.Generator, workdir: pathlib.Path) -> tuple[str, str]:
  """Damages a record once; returns its name and the damage."""
  path = files.pick(
    rng,
    [
      path
      for path in files.all_files(workdir)
      if path.relative_to(workdir).parts[0] not in _OTHERS
    ],
  )
  name = str(path.relative_to(workdir))
  what = rng.random()
  if what < 0.2:
    text = files.pick(rng, _ODD)
    path.write_text(text)
    return name, f"{name} is {text!r}"
  if what < 0.3:
    path.unlink()
    path.mkdir()
    return name, f"{name} is a folder"
  if what < 0.6 and path.suffix == ".json":
    how = files.pick(rng, outside.OF_JSON)
    text = outside.OF_JSON[how](rng, json.loads(path.read_text()))
    path.write_text(text)
    return name, f"{name} has {how}"
  return name, files.damage(rng, path)


def workdir(
  rng: np.random.Generator, folder: pathlib.Path, variant: str
) -> tuple[str, str]:
  """Damages a record of a run that is half done, resumes it, and compares."""
  sound, run = made(variant), folder / "run"
  shutil.copytree(sound.half, run)
  name, detail = _damage(rng, run)
  try:
    with tiny.shared_programs():
      train(sound.config, run)
  except Exception as error:
    is_ours = isinstance(error, ValueError | OSError)
    is_named = is_ours and files.names(error, run)
    outcome = "refused, named" if is_named else "wrong, unnamed"
    return outcome, f"{detail}: {error!r}"
  if kills.arrays(run, _STEPS) != sound.arrays:
    return "wrong, other bits", detail
  try:
    found = _metrics(run)
  except Exception as error:
    is_named = isinstance(error, ValueError) and files.names(error, run)
    outcome = "same bits, lines named" if is_named else "wrong, unnamed"
    return outcome, f"{detail}: {error!r}"
  if found == sound.metrics:
    return "same bits", detail
  is_covered = name not in _OF_PEOPLE
  return "wrong, " * is_covered + "same bits, other metrics", detail
