"""One trial of the harness, in a worker whose memory and time are limited."""

import importlib
import logging
import os
import pathlib
import resource
import signal
import tempfile
import time
from typing import Any, NamedTuple

import numpy as np

CONTROL = -1  # index of a kind's control: a planted difference must be found
_MEMORY = 16 * 2**30  # bytes of address space; JAX reserves more than it uses


class Kind(NamedTuple):
  """A kind of trial: function NAME of module tests/damage/NAME.py.

  Attributes:
    meaning: files or processes that are damaged.
    small: number of trials in CI.
    timeout_s: time limit of a trial.
  """

  meaning: str
  small: int
  timeout_s: int = 120


KINDS = {
  "checkpoints": Kind("files of a run's checkpoints", 20),
  "store": Kind("files of a token store", 20),
  "reference_cache": Kind("cached log-probs of the reference", 60),
  "workdir": Kind("records of a run that is resumed", 20),
  "outside": Kind("data, tokenizer and Hugging Face files", 20),
  "kills": Kind("runs that are killed and resumed", 1, timeout_s=3600),
  "hosts": Kind("one of two processes", 1, timeout_s=3600),
}


class Result(NamedTuple):
  """One trial.

  Attributes:
    kind: key of KINDS.
    index: index of the trial; -1 for the control.
    outcome: a few words; those that begin with "wrong" are failures.
    detail: the damage, and the error if there was one.
    seconds: duration.
  """

  kind: str
  index: int
  outcome: str
  detail: Any
  seconds: float


def run_trial(kind: str, seed: int, index: int) -> Result:
  """Runs one trial in a folder of its own."""
  module = importlib.import_module(f"tests.damage.{kind}")
  rng = np.random.default_rng([seed, index + 1])
  function, arguments = getattr(module, kind), ()
  if index == CONTROL:
    function = module.control
  elif hasattr(module, "VARIANTS"):  # taken in turn
    arguments = (module.VARIANTS[index % len(module.VARIANTS)],)
  begin = time.monotonic()
  signal.alarm(KINDS[kind].timeout_s)
  try:
    with tempfile.TemporaryDirectory() as folder:
      outcome, detail = function(rng, pathlib.Path(folder), *arguments)
  except (MemoryError, TimeoutError) as error:
    outcome, detail = f"wrong, {type(error).__name__}", str(error)
  finally:
    signal.alarm(0)
  seconds = round(time.monotonic() - begin, 2)
  return Result(kind, index, outcome, detail, seconds)


def limit(folder: str) -> None:
  """Limits a worker and its children: memory, time, and where they write."""
  tempfile.tempdir = os.environ["TMPDIR"] = folder
  resource.setrlimit(resource.RLIMIT_AS, (_MEMORY, _MEMORY))
  signal.signal(signal.SIGALRM, _time_is_up)
  logging.disable()  # a warning for each trial


def _time_is_up(number: int, frame: Any) -> None:
  del number, frame
  raise TimeoutError("the trial took too long")
