"""Faults on purpose: damaged files, and child processes that are killed."""

from collections.abc import Iterator
import contextlib
import itertools
import os
import pathlib
import re
import resource
import signal
import subprocess
import sys
import time

from dpo_jax.parallel import stop_signal

ROOT = pathlib.Path(__file__).parents[1]


def flip_byte(path: pathlib.Path, position: int | None = None) -> None:
  """Inverts all bits of one byte of a file, the middle one by default."""
  content = bytearray(path.read_bytes())
  position = len(content) // 2 if position is None else position
  content[position] ^= 0xFF
  path.write_bytes(content)


def truncate(path: pathlib.Path) -> None:
  """Cuts off the second half of a file."""
  os.truncate(path, path.stat().st_size // 2)


def largest_file(folder: pathlib.Path) -> pathlib.Path:
  """Returns the largest file of a checkpoint, which holds arrays."""
  files = [
    path
    for path in folder.rglob("*")
    if path.is_file() and path.name != "manifest.json"
  ]
  return max(files, key=lambda path: (path.stat().st_size, str(path)))


@contextlib.contextmanager
def limited_files(num_bytes: int) -> Iterator[None]:
  """Limits the size of files, as a disk with that much room would."""
  before = resource.getrlimit(resource.RLIMIT_FSIZE)
  resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, before[1]))
  try:
    yield
  finally:
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


def environment(num_devices: int = 1) -> dict[str, str]:
  """Returns the environment of a child with that many simulated devices.

  The child shares this process's flags and its cache of compiled programs.
  """
  flag = "--xla_force_host_platform_device_count="
  given = os.environ["XLA_FLAGS"]
  flags = re.sub(rf"{flag}\d+", f"{flag}{num_devices}", given)
  return os.environ | {"PYTHONPATH": str(ROOT), "XLA_FLAGS": flags}


def stop_at(monkeypatch, *steps: int) -> None:
  """Makes runs stop as if SIGTERM had arrived during these steps."""
  calls = itertools.count(1)  # one after each step
  monkeypatch.setattr(
    stop_signal.StopSignal, "reached", lambda self: next(calls) in steps
  )


def spawn(
  code: str, *arguments: str, num_devices: int = 1, **variables: str
) -> subprocess.Popen:
  """Starts `python -c code arguments`, in a session of its own.

  Args:
    code: Python source.
    *arguments: sys.argv[1:] of the child.
    num_devices: number of simulated devices.
    **variables: additional environment variables.

  Returns:
    The process, with its output in a pipe.
  """
  return subprocess.Popen(
    [sys.executable, "-c", code, *arguments],
    cwd=ROOT,
    env=environment(num_devices) | variables,
    stdout=subprocess.PIPE,
    stderr=subprocess.STDOUT,
    text=True,
    start_new_session=True,
  )


def kill_when(
  process: subprocess.Popen, is_time, number: int, *, timeout_s: float = 120
) -> int:
  """Sends a signal as soon as `is_time()` is true, and waits for the end.

  Args:
    process: child from `spawn`.
    is_time: condition, polled every millisecond.
    number: number of the signal.
    timeout_s: most seconds to wait for the condition, and then for the end.

  Returns:
    The exit code; minus the signal's number if the signal ended the process.

  Raises:
    AssertionError: the process ended before the condition was true.
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
