"""What goes wrong on purpose: damaged files, killed and typed-out processes."""

import os
import pathlib
import re
import signal
import subprocess
import sys
import time

from dpo_jax.training import stops

ROOT = pathlib.Path(__file__).parents[1]


def flip_byte(path: pathlib.Path, place: int | None = None) -> None:
  """Turns all bits of one byte of a file, the middle one unless told."""
  content = bytearray(path.read_bytes())
  place = len(content) // 2 if place is None else place
  content[place] ^= 0xFF
  path.write_bytes(content)


def truncate(path: pathlib.Path) -> None:
  """Cuts the second half of a file off."""
  os.truncate(path, path.stat().st_size // 2)


def largest_file(folder: pathlib.Path) -> pathlib.Path:
  """The one that holds the arrays of a checkpoint."""
  files = [
    path
    for path in folder.rglob("*")
    if path.is_file() and path.name != "manifest.json"
  ]
  return max(files, key=lambda path: (path.stat().st_size, str(path)))


def environment(num_devices: int = 1) -> dict[str, str]:
  """Variables of a child with that many simulated devices.

  It compiles as this process does, and finds in the cache what others have
  compiled.
  """
  flag = "--xla_force_host_platform_device_count="
  given = os.environ["XLA_FLAGS"]
  flags = re.sub(rf"{flag}\d+", f"{flag}{num_devices}", given)
  return os.environ | {"PYTHONPATH": str(ROOT), "XLA_FLAGS": flags}


def stop_at(monkeypatch, *steps: int) -> None:
  """Lets runs end as if SIGTERM had come in the middle of these steps."""
  monkeypatch.setattr(
    stops.StopSignal, "reached", lambda self, step: step in steps
  )


def spawn(
  code: str, *arguments: str, num_devices: int = 1, **variables: str
) -> subprocess.Popen:
  """Starts `python -c code arguments` with its output in pipes.

  Args:
    code: what it runs.
    *arguments: its sys.argv[1:].
    num_devices: simulated devices.
    **variables: of its environment, besides.

  Returns:
    The process.
  """
  return subprocess.Popen(
    [sys.executable, "-c", code, *arguments],
    cwd=ROOT,
    env=environment(num_devices) | variables,
    stdout=subprocess.PIPE,
    stderr=subprocess.STDOUT,
    text=True,
  )


def kill_when(
  process: subprocess.Popen, is_time, number: int, *, timeout_s: float = 120
) -> int:
  """Sends a signal as soon as `is_time()`, and waits for the end.

  Args:
    process: from `spawn`.
    is_time: polled every millisecond.
    number: of the signal.
    timeout_s: how long to wait for the time, and then for the end.

  Returns:
    The exit code; minus the signal's number if that ended it.

  Raises:
    AssertionError: the process ended before its time came.
  """
  deadline = time.monotonic() + timeout_s
  while not is_time():
    assert process.poll() is None, process.communicate()[0]
    assert time.monotonic() < deadline, "the time to kill never came"
    time.sleep(0.001)
  process.send_signal(number)
  try:
    return process.wait(timeout_s)
  except subprocess.TimeoutExpired:
    process.send_signal(signal.SIGKILL)
    raise
