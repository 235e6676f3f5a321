"""SIGTERM, SIGHUP, Ctrl-C: a run saves what it can, and ends with code 75.

A run is told to stop in one of three states:

  held         a step is running, or steps are not saved yet: the signal is
               remembered, and the loop saves after the step (`reached`)
  not held     caching, sampling, evaluation: `Preempted` is raised at once, and
               the loop saves the last step if that is not saved
  in C++       XLA compiles, and Python's handlers wait: the thread of a command
               ends the process if nothing would be lost

With several processes JAX's own handler tells the others. All stop after the
same call of `reached` or `check`, which all of them make in the same order.
"""

from collections.abc import Callable, Iterator
import contextlib
import logging
import signal
import threading
from typing import Any

import jax

from dpo_jax import EXIT_PREEMPTED
from dpo_jax.system import compat, signals

_LOG = logging.getLogger(__name__)
# Seconds after which a process ends that has nothing to save, and does not
# answer; platforms kill after 10 to 30 s.
_GRACE_S = 5.0


class Preempted(SystemExit):
  """A run was told to stop; started again, it resumes."""

  def __init__(self, step: int | None = None):
    """Ends the process with EXIT_PREEMPTED.

    Args:
      step: step that was saved; None where nothing was to be saved.
    """
    super().__init__(EXIT_PREEMPTED)
    self.step = step


class StopSignal:
  """Notices the signals, from its entry to its exit."""

  def __init__(self) -> None:
    self.unsaved = False  # whether a step would be lost
    self._is_set = self._is_held = False
    self._is_command = False
    self._is_seen = False  # as _is_set, by the thread of a command
    self._num_calls = 0
    self._ended = threading.Event()
    self._is_agreed: Callable[[int], bool] | None = None
    self._undo = contextlib.ExitStack()

  def __enter__(self) -> "StopSignal":
    global _current
    _current = self
    is_main = threading.current_thread() is threading.main_thread()
    numbers = signals.heeded() if is_main else []
    if jax.process_count() > 1:
      self._is_agreed = self._undo.enter_context(compat.stop_agreement())
      if self._is_agreed is None:
        _LOG.warning(
          "JAX's preemption service does not run: a signal ends this process"
          " without a save"
        )
        return self
      # JAX's own handler tells the other processes; ours would replace it.
      numbers = [n for n in numbers if n != signal.SIGTERM]
    elif not is_main:
      _LOG.warning("not on the main thread: SIGTERM will not be noticed")
    self._undo.callback(self._ended.set)
    self._is_command = self._undo.enter_context(signals.answering(self._answer))
    for number in numbers:
      before = signal.signal(number, self._handle)
      self._undo.callback(signal.signal, number, before)
    return self

  def __exit__(self, *error: Any) -> None:
    global _current
    _current = None
    self._undo.close()

  def _handle(self, number: int, frame: Any) -> None:
    """Answers a signal on the main thread, once C++ has returned."""
    del frame
    if self._is_set:
      self._end_at_second(number)
      return
    self._is_set = True
    _LOG.warning(
      "%s: the run saves and ends; once more ends it at once",
      signal.Signals(number).name,
    )
    if self._is_agreed is not None:
      signal.raise_signal(signal.SIGTERM)
    elif not self._is_held:
      raise Preempted

  def _answer(self, number: int) -> None:
    """Answers a signal in the thread of a command, also while C++ runs."""
    if self._is_seen:
      self._end_at_second(number)
      return
    self._is_seen = True
    if self._is_agreed is None:
      threading.Thread(target=self._end_late, daemon=True).start()

  def _end_at_second(self, number: int) -> None:
    if number == signal.SIGHUP:  # a terminal that closes sends two
      return
    if self._is_command:
      signals.end()
    raise KeyboardInterrupt

  def _end_late(self) -> None:
    if not self._ended.wait(_GRACE_S) and not self.unsaved:
      signals.end()

  @contextlib.contextmanager
  def holding(self, is_held: bool) -> Iterator[None]:
    """Sets for a block whether a signal is remembered or raises Preempted.

    Args:
      is_held: True remembers it for `reached`. False raises, also for a signal
        that was remembered before the block.
    """
    before, self._is_held = self._is_held, is_held
    try:
      if self.is_told and not is_held:
        raise Preempted
      yield
    finally:
      self._is_held = before

  @property
  def is_told(self) -> bool:
    """Whether this process was told to stop, and agrees with no other."""
    return self._is_set and self._is_agreed is None

  def reached(self) -> bool:
    """Returns whether to stop here; all processes get the same answer."""
    if self._is_agreed is not None:
      self._num_calls += 1
      return self._is_agreed(self._num_calls)
    return self._is_set


_current: StopSignal | None = None


def check() -> None:
  """Raises Preempted if the run was told to stop.

  All processes must call it in the same order, as loops over batches do. With
  one process the handler has raised already; this is for an exception that was
  swallowed, as by a callback of the garbage collector.
  """
  if _current is None:
    return
  if _current.is_told or (jax.process_count() > 1 and _current.reached()):
    raise Preempted
