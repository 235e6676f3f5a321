"""Sends a run to W&B or trackio, which may fail, hang or die without harm.

The tracker runs in a process of its own. A thread sends it what a bounded queue
holds, so no step waits for it. Its first failure is a warning: the files of the
workdir have everything.
"""

from collections.abc import Mapping, Sequence
import contextlib
import importlib.util
import json
import logging
import os
import queue
import subprocess
import sys
import textwrap
import threading
import time
from typing import Any

from etils import epath

from dpo_jax.config.values import parse_trackers
from dpo_jax.records import tracker_child
from dpo_jax.records.sinks import Sink, TensorBoard
from dpo_jax.records.workdir import Workdir
from dpo_jax.system import files, inputs

_LOG = logging.getLogger(__name__)
_QUEUED = 1000  # messages that wait for the tracker
_CLOSING_S = 15.0
_SHOWN = 300  # characters of an error


def check_installed(trackers: str) -> None:
  """Checks that the packages of the trackers are installed.

  Args:
    trackers: `log.trackers`.

  Raises:
    ValueError: one is not; names it.
  """
  for name in parse_trackers(trackers):
    spec = importlib.util.find_spec(name)
    # W&B leaves a folder of its name, which is found as a package of no file.
    if spec is None or spec.origin is None:
      raise ValueError(
        f"log.trackers={trackers!r}: the package {name} is not installed. Run"
        f" pip install {name}, or leave it out of log.trackers"
      )


def open_sinks(settings: Any, workdir: Workdir) -> list[Sink]:
  """Opens the sinks of a run.

  Args:
    settings: `config.log`.
    workdir: run directory, which holds the config.
  """
  sinks: list[Sink] = []
  if settings.tensorboard:
    sinks.append(TensorBoard(workdir.tensorboard))
  for kind in parse_trackers(settings.trackers):
    folder = workdir.path
    if inputs.is_remote(folder):
      folder = epath.Path(files.cache_dir())
    opening = {
      "kind": kind,
      "project": settings.project,
      "name": settings.run_name or workdir.path.name,
      "id": workdir.run_id,
      "folder": str(folder),
      "mode": settings.wandb_mode,
      "config": {**workdir.read_config(), "workdir_path": str(workdir)},
    }
    sinks.append(Tracker(opening))
  return sinks


class Tracker:
  """Sink that sends to a tracker, and never raises or waits long."""

  def __init__(self, settings: Mapping[str, Any]):
    """Starts the process of the tracker.

    Args:
      settings: see `tracker_child`.
    """
    self._kind = settings["kind"]
    self._has_warned = False
    self._process: subprocess.Popen[str] | None = None
    self._queue: queue.Queue[Any] = queue.Queue(_QUEUED)
    self._put(settings)
    self._thread = threading.Thread(target=self._run, daemon=True)
    self._thread.start()

  def write(self, step: int, split: str, metrics: Mapping[str, float]) -> None:
    named = {f"{split}/{name}": value for name, value in metrics.items()}
    self._put({"step": step, "metrics": named})

  def write_samples(self, step: int, rows: Sequence[Mapping[str, Any]]) -> None:
    self._put({"step": step, "samples": list(rows)})

  def write_plot(self, path: epath.Path) -> None:
    self._put({"plot": files.local(path)})

  def close(self) -> None:
    """Waits for what is left to be sent, but not longer than `_CLOSING_S`."""
    deadline = time.monotonic() + _CLOSING_S
    if self._thread.is_alive():
      with contextlib.suppress(queue.Full):
        self._queue.put(None, timeout=_CLOSING_S)
    self._thread.join(max(deadline - time.monotonic(), 0))
    if self._thread.is_alive():
      self._warn(f"has not ended {_CLOSING_S:g} s after the run")
      if self._process is not None:
        self._process.kill()

  def _put(self, message: Mapping[str, Any]) -> None:
    try:
      self._queue.put_nowait(message)
    except queue.Full:
      self._warn(f"has {_QUEUED:,} messages to send, and later ones are lost")

  def _run(self) -> None:
    """Starts the process, and logs what it tells."""
    path = os.pathsep.join(filter(None, sys.path))
    try:
      # A session of its own: Ctrl-C is not for it.
      self._process = process = subprocess.Popen(
        [sys.executable, "-P", tracker_child.__file__],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        env={**os.environ, "PYTHONPATH": path},
        start_new_session=True,
        text=True,
      )
    except OSError as error:
      self._warn(f"does not start: {error}")
      return
    threading.Thread(target=self._send, args=[process], daemon=True).start()
    for line in process.stdout:
      message = json.loads(line)
      if "link" in message:
        _LOG.info("%-11s %s", self._kind, message["link"])
      else:
        self._warn(
          f"failed: {textwrap.shorten(message['error'], _SHOWN).rstrip('.')}"
        )
    code = process.wait()
    if code:
      self._warn(f"ended with code {code}")

  def _send(self, process: subprocess.Popen[str]) -> None:
    """Writes the queue to the process; `_run` notices when that has ended."""
    with contextlib.suppress(OSError), process.stdin as stdin:
      for message in iter(self._queue.get, None):
        stdin.write(json.dumps(message) + "\n")
        stdin.flush()

  def _warn(self, what: str) -> None:
    if not self._has_warned:
      self._has_warned = True
      _LOG.warning(
        "%s %s. The run does not need it: metrics.jsonl and samples.jsonl have"
        " everything",
        self._kind,
        what,
      )
