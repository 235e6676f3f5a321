"""A training run that kills itself at a moment it was told."""

import json
import os
import re
import signal
import sys
import threading

_EVENTS = ("open", "os.mkdir", "os.rename")


def _kill() -> None:
  os.kill(os.getpid(), signal.SIGKILL)


def arm(pattern: str, count: int, delay_s: float) -> None:
  """Kills this process once a path was opened, made or renamed to so often.

  Args:
    pattern: regular expression of "EVENT PATH"; "" kills after the delay.
    count: number of events that match.
    delay_s: seconds from the last of them to the kill; 0 kills before the file
      is touched.
  """
  left = count

  def look(event, arguments):
    nonlocal left
    if event not in _EVENTS:
      return
    paths = [os.fsdecode(x) for x in arguments if isinstance(x, str | bytes)]
    if not any(re.search(pattern, f"{event} {path}") for path in paths):
      return
    left -= 1
    if left == 0 and delay_s:
      threading.Timer(delay_s, _kill).start()
    elif left == 0:
      _kill()

  if pattern:
    sys.addaudithook(look)
  else:
    timer = threading.Timer(delay_s, _kill)
    timer.daemon = True
    timer.start()


def main(workdir: str, settings: str, aim: str) -> None:
  """Trains a run: JSON of its config's overrides, and of `arm`'s arguments."""
  if json.loads(aim):
    arm(**json.loads(aim))
  from dpo_jax.train import train
  from tests import tiny

  train(tiny.make_config(**json.loads(settings)), workdir)
