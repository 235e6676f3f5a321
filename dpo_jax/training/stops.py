"""Reasons to stop a run early: SIGTERM, and metrics that are not finite."""

import logging
import signal
from typing import Any

import jax
from jax.experimental import multihost_utils

from dpo_jax import EXIT_PREEMPTED

_LOG = logging.getLogger(__name__)


class Preempted(SystemExit):
  """SIGTERM came, and the run has saved."""

  def __init__(self, step: int):
    super().__init__(EXIT_PREEMPTED)
    self.step = step


class NonFiniteError(FloatingPointError):
  """A loss, gradient or log-prob is not a finite number."""


class StopSignal:
  """Remembers a SIGTERM, so that the loop can save before it ends."""

  def __enter__(self) -> "StopSignal":
    self._is_set = False
    self._previous = None
    if jax.process_count() > 1:
      # JAX's own handler tells the other hosts; ours would replace it.
      return self
    try:
      self._previous = signal.signal(signal.SIGTERM, self._remember)
    except ValueError:  # only the main thread receives signals
      _LOG.warning("not on the main thread: SIGTERM will not be noticed")
    return self

  def _remember(self, number: int, frame: Any) -> None:
    del number, frame
    self._is_set = True

  def __exit__(self, *error: Any) -> None:
    if self._previous is not None:
      signal.signal(signal.SIGTERM, self._previous)

  def reached(self, step: int) -> bool:
    """Returns whether to stop after a step; all hosts get the same answer."""
    if jax.process_count() > 1:
      return multihost_utils.reached_preemption_sync_point(step)
    return self._is_set
