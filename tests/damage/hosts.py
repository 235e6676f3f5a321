"""One of two processes ends, stops or never comes: the other ends in time."""

import contextlib
import pathlib
import re
import signal
import subprocess
import time
from typing import Any

import numpy as np

from dpo_jax import EXIT_PREEMPTED
from tests.parallel import test_hosts

VARIANTS = ("killed", "frozen", "told to stop", "never comes", "killed in save")
_NUMBERS = {
  "killed": signal.SIGKILL,
  "frozen": signal.SIGSTOP,
  "told to stop": signal.SIGTERM,
  "killed in save": signal.SIGKILL,
}
_PROMISED_S = 30
# Then it counts as hanging; the start of a run, and a wait for it.
_LIMIT_S, _START_S = 200, 600
_NAMES_STEP = r"last checkpoint is (step \d+|none)"


def _begin(
  folder: pathlib.Path, workdir: pathlib.Path, victim: int, variant: str
) -> list[subprocess.Popen]:
  """Starts both processes, or all but the victim."""
  flags = (
    "--config.total_steps=2000",
    "--config.checkpoint.every_steps=20",
    "--config.log.every_steps=50",  # a pipe that nothing reads must not fill
  )
  if variant == "never comes":
    flags += ("--config.hosts.start_timeout_s=5.0",)
  processes = test_hosts.start(folder, workdir, 2, *flags)
  if variant == "never comes":
    processes[victim].kill()
    processes[victim].communicate()
  return processes


def _wait_for_moment(
  rng: np.random.Generator, workdir: pathlib.Path, variant: str, processes
) -> None:
  """Waits until a run has a checkpoint, and for a random moment after it.

  Raises:
    TimeoutError: it has none after a while, or has ended.
  """
  root = workdir / "checkpoints"
  deadline = time.monotonic() + _START_S

  def until(has_come):
    while not has_come():
      has_ended = any(process.poll() is not None for process in processes)
      if has_ended or time.monotonic() > deadline:
        raise TimeoutError("the run did not come to its first checkpoint")
      time.sleep(0.001)

  until(lambda: any(root.glob("*/manifest.json")))
  if variant == "killed in save":
    until(lambda: any(root.glob("*tmp*")))
  else:
    time.sleep(float(rng.uniform(0.0, 3.0)))


def _judge(variant: str, victim: int, code: int | None, text: str) -> str:
  """Returns the outcome of a process that ended with a code and a text."""
  if code is None:
    return "wrong, hangs"
  if variant == "told to stop":
    return "saved" if code == EXIT_PREEMPTED else "wrong, not saved"
  is_host_named = re.search(rf"\bhost {victim}\b", text) is not None
  is_step_named = re.search(_NAMES_STEP, text) is not None
  if variant == "never comes":  # there is a checkpoint only of an earlier start
    is_step_named = True
  return "named" if is_host_named and is_step_named else "wrong, unnamed"


def hosts(
  rng: np.random.Generator, folder: pathlib.Path, variant: str
) -> tuple[str, dict[str, Any]]:
  """Does something to one of two processes, and times the other's end."""
  victim = int(rng.integers(2))
  workdir = folder / "run"
  processes = _begin(folder, workdir, victim, variant)
  other = processes[1 - victim]
  text, code = "", None
  try:
    if variant != "never comes":
      _wait_for_moment(rng, workdir, variant, processes)
      processes[victim].send_signal(_NUMBERS[variant])
    begin = time.monotonic()
    with contextlib.suppress(subprocess.TimeoutExpired):
      text, _ = other.communicate(timeout=_LIMIT_S)
      code = other.returncode
    seconds = time.monotonic() - begin
  finally:
    for process in processes:
      if process.poll() is None:
        process.kill()
        process.wait()
  outcome = _judge(variant, victim, code, text)
  if seconds > _PROMISED_S and not outcome.startswith("wrong"):
    outcome = "wrong, late"
  detail = {"variant": variant, "victim": victim, "code": code}
  return outcome, detail | {
    "seconds": round(seconds, 1),
    "output": text[-1500:],
  }
