"""SIGTERM and Ctrl-C: a run saves what it can, and ends soon with code 75.

A run is told to stop in one of three states:

  held         a step is running, or steps are not saved yet: the signal is
               remembered, and the loop saves after the step (`reached`)
  not held     caching, sampling, evaluation: `Preempted` is raised at once, and
               the loop saves the last step if that is not saved
  in C++       XLA compiles, and Python's handlers wait: a thread ends the
               process if nothing would be lost

With several processes JAX's own handler tells the others. All stop after the
same call of `reached` or `check`, which all of them make in the same order.
"""

from collections.abc import Callable, Iterator
import contextlib
import logging
import os
import signal
import threading
from typing import Any

import jax

from dpo_jax import EXIT_PREEMPTED
from dpo_jax.system import compat

_LOG = logging.getLogger(__name__)
_NUMBERS = (signal.SIGTERM, signal.SIGINT)
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

  def __init__(self, *, ends_process: bool = False):
    """Notices nothing yet.

    Args:
      ends_process: whether the process may be ended without its exception
        reaching the caller, as a command may, and not a notebook.
    """
    self.unsaved = False  # whether a step would be lost
    self._ends_process = ends_process
    self._is_set = self._is_held = False
    self._num_calls = 0
    self._is_agreed: Callable[[int], bool] | None = None
    self._undo = contextlib.ExitStack()

  def __enter__(self) -> "StopSignal":
    global _current
    _current = self
    if jax.process_count() > 1:
      # JAX's own handler tells the other processes; ours would replace it.
      self._is_agreed = self._undo.enter_context(compat.stop_agreement())
      if self._is_agreed is None:
        _LOG.warning(
          "JAX's preemption service does not run: SIGTERM will not be noticed"
        )
      return self
    if threading.current_thread() is not threading.main_thread():
      _LOG.warning("not on the main thread: SIGTERM will not be noticed")
      return self
    if self._ends_process:
      self._watch()
    for number in _NUMBERS:
      before = signal.signal(number, self._handle)
      self._undo.callback(signal.signal, number, before)
    return self

  def __exit__(self, *error: Any) -> None:
    global _current
    _current = None
    self._undo.close()

  def _handle(self, number: int, frame: Any) -> None:
    del frame
    if self._is_set:  # the second one
      raise KeyboardInterrupt
    self._is_set = True
    _LOG.warning(
      "%s: the run saves and ends; once more ends it at once",
      signal.Signals(number).name,
    )
    if not self._is_held:
      raise Preempted

  def _watch(self) -> None:
    """Starts the thread that ends a process which does not answer.

    Python writes the number of a signal to the pipe as soon as it comes, and
    runs its handler only once C++ returns.
    """
    read, write = os.pipe()
    os.set_blocking(write, False)
    before = signal.set_wakeup_fd(write)
    ended = threading.Event()
    self._undo.callback(os.close, write)
    self._undo.callback(signal.set_wakeup_fd, before)
    self._undo.callback(ended.set)

    def watch() -> None:
      num_seen = 0
      while number := os.read(read, 1):
        num_seen += number[0] in _NUMBERS
        if num_seen == 1:
          threading.Thread(target=end_late, daemon=True).start()
        elif num_seen > 1:
          os._exit(EXIT_PREEMPTED)
      os.close(read)

    def end_late() -> None:
      if not ended.wait(_GRACE_S) and not self.unsaved:
        os._exit(EXIT_PREEMPTED)

    threading.Thread(target=watch, daemon=True).start()

  @contextlib.contextmanager
  def holding(self, is_held: bool) -> Iterator[None]:
    """Sets for a block whether a signal is remembered or raises Preempted.

    Args:
      is_held: True remembers it for `reached`. False raises, also for a signal
        that was remembered before the block.
    """
    before, self._is_held = self._is_held, is_held
    try:
      if self._is_set and not is_held:
        raise Preempted
      yield
    finally:
      self._is_held = before

  def reached(self) -> bool:
    """Returns whether to stop here; all processes get the same answer."""
    if self._is_agreed is not None:
      self._num_calls += 1
      return self._is_agreed(self._num_calls)
    return self._is_set


_current: StopSignal | None = None


def check() -> None:
  """Raises Preempted if a run of several processes was told to stop.

  All processes must call it in the same order, as loops over batches do. With
  one process it does nothing: its signal handler raises by itself.
  """
  if _current is not None and jax.process_count() > 1 and _current.reached():
    raise Preempted
