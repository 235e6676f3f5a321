"""Signals end a command at once; a run that trains saves first.

  command                       a signal ends it
  dpo_jax.train, experiments.*  with code 75: started again, it resumes
  every other                   as the system does; a shell reports 130 or 143

Python would raise KeyboardInterrupt, and only once C++ returns. A callback of
the garbage collector swallows it, and JAX sets one (jax#14882). So the system
or a thread ends the process. Imports nothing slow: it stands before JAX.
"""

from collections.abc import Callable, Iterator
import contextlib
import os
import signal
import threading
from typing import Any

from dpo_jax import EXIT_PREEMPTED

_is_command = False
# Answers the number of a signal, in the thread; None without the thread.
_answer: Callable[[int], None] | None = None


def heeded() -> list[signal.Signals]:
  """Returns the signals that stop a run; nohup takes SIGHUP away."""
  found = [signal.SIGTERM, signal.SIGINT]
  if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:
    found.append(signal.SIGHUP)
  return found


def begin() -> None:
  """Leaves Ctrl-C to the system: this process is a command."""
  global _is_command
  _is_command = True
  # Not where a shell has it ignored, as in the background of a script.
  if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def end_with_preempted() -> None:
  """Makes signals end a command with EXIT_PREEMPTED; elsewhere does nothing.

  Python writes the number of a signal to the pipe as soon as it comes, and a
  thread reads it there, also while C++ runs.
  """
  global _answer
  if not _is_command or _answer is not None:
    return
  _answer = _end_at_any
  read, write = os.pipe()
  os.set_blocking(write, False)
  signal.set_wakeup_fd(write)
  for number in heeded():
    signal.signal(number, _leave_to_thread)
  threading.Thread(target=_watch, args=[read], daemon=True).start()


def end() -> None:
  """Ends the process now: started again, it resumes."""
  os._exit(EXIT_PREEMPTED)


def _end_at_any(number: int) -> None:
  del number
  end()


def _leave_to_thread(number: int, frame: Any) -> None:
  """Stands as the handler, without which Python writes no number."""


def _watch(read: int) -> None:
  while number := os.read(read, 1):
    assert _answer is not None
    _answer(number[0])


@contextlib.contextmanager
def answering(answer: Callable[[int], None]) -> Iterator[bool]:
  """Lets a function answer signals in a block, from the thread.

  Args:
    answer: number of a signal -> None.

  Yields:
    Whether the thread runs: this process may be ended without an exception
    that reaches the caller, as a command may, and not a notebook.
  """
  global _answer
  before = _answer
  if before is None:
    yield False
    return
  _answer = answer
  try:
    yield True
  finally:
    _answer = before
