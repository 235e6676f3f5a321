"""Peers: the processes of a run, which end together when one is lost."""

import atexit
import json
import logging
import os
import subprocess
import sys
import threading
from typing import Any

import jax

from dpo_jax import EXIT_PREEMPTED
from dpo_jax.parallel import watcher

_LOG = logging.getLogger(__name__)
# Time for the cause of an error, such as a killed peer, to become known.
_CAUSE_S = 2.0

_current: "Peers | None" = None


class OtherHostError(RuntimeError):
  """Another host has failed, or did not come."""


def tell_saved(step: int) -> None:
  """Tells the other hosts the last checkpoint, for the message about a loss.

  Only process 0's word counts. Does nothing in a run of one process.

  Args:
    step: step of the last whole checkpoint; 0 for none.
  """
  if _current is not None:
    _current.send(saved=step)


class Peers:
  """Other processes of a run, as a context.

  If one is killed, is frozen or raises an error, its watcher tells those of the
  others, and they end: see `watcher`.
  """

  def __init__(self, settings: watcher.Settings):
    self._settings = settings
    self._has_failed = False
    self._decided = threading.Event()

  def send(self, **message: Any) -> None:
    """Sends the arguments to the watcher as one JSON object.

    Within the context only. Does nothing if the watcher has ended.
    """
    self._channel.send(**message)

  def __enter__(self) -> "Peers":
    """Waits until all processes have come.

    Raises:
      OtherHostError: names those that did not come.
    """
    global _current
    # A session of its own: Ctrl-C ends the process, and not its watcher.
    self._process = subprocess.Popen(
      [sys.executable, "-I", watcher.__file__, json.dumps(self._settings)],
      stdin=subprocess.PIPE,
      stdout=subprocess.PIPE,
      start_new_session=True,
    )
    assert self._process.stdin and self._process.stdout
    self._channel = watcher.Channel(-1, self._process.stdin.fileno())
    for line in self._process.stdout:
      message = json.loads(line)
      if "waiting" in message:
        _LOG.warning(message["waiting"])
      elif "error" in message:
        raise OtherHostError(message["error"])
      else:
        break
    else:
      raise OtherHostError("the watcher has ended: its message is above")
    threading.Thread(target=self._listen, daemon=True).start()
    _current = self
    return self

  def _listen(self) -> None:
    """Ends this process when the watcher says that another was lost.

    The exit code is 1 if that one raised an error, otherwise EXIT_PREEMPTED.
    If this process has raised an error too, it ends in `_leave`.
    """
    assert self._process.stdout
    for line in self._process.stdout:
      loss = watcher.Loss(*json.loads(line)["loss"])
      is_own = loss.index == self._settings.index
      if not is_own and not (loss.is_error and self._has_failed):
        os._exit(1 if loss.is_error else EXIT_PREEMPTED)
      self._decided.set()

  def __exit__(
    self, kind: Any, error: BaseException | None, trace: Any
  ) -> None:
    global _current
    _current = None
    if error is None or isinstance(error, SystemExit):
      # All reach this, so no process waits for one that has ended.
      jax.distributed.shutdown()
      self.send(done=True)
      self._process.wait()
      return
    self._has_failed = True
    text = f"failed: {str(error) or type(error).__name__}"
    self.send(loss=watcher.Loss(self._settings.index, text, is_error=True))
    self._decided.wait(_CAUSE_S)
    # Runs before JAX's own, which would wait for the other processes.
    atexit.register(self._leave)

  def _leave(self) -> None:
    """Ends this process with code 1, once the others know of its error."""
    self._decided.wait(2 * self._settings.peer_timeout_s)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(1)
