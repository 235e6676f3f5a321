"""Runs gcloud, and parses the state of the request and of the workers."""

import argparse
from collections.abc import Iterable, Iterator
import datetime
import io
import json
import re
import shlex
import subprocess
import time
from typing import NamedTuple

import tpu_commands

# Seconds between two lines of a progress bar in `logs --follow`.
_BAR_PERIOD_S = 10.0
_LOG_LINES = 100


def say(text: str) -> None:
  print(text, flush=True)


def _announce(command: list[str]) -> None:
  line, _, rest = shlex.join(command).partition("\n")
  say(f"$ {line[:100]}{' ...' if rest or line[100:] else ''}")


def run_all(
  commands: tpu_commands.Commands, *, timeout_s: float | None = None
) -> int:
  """Runs commands in order, and stops at the first that fails.

  Returns:
    Exit code of the last command that ran; 1 for one that timed out.
  """
  for command in commands:
    _announce(command)
    try:
      code = subprocess.run(command, check=False, timeout=timeout_s).returncode
    except subprocess.TimeoutExpired:
      say(f"no answer after {timeout_s:g} s")
      return 1
    if code:
      return code
  return 0


class Answer(NamedTuple):
  """Answer of a command; the code is None if it timed out."""

  code: int | None
  out: str
  error: str

  @property
  def is_absent(self) -> bool:
    """Whether Google answered that the resource does not exist."""
    words = ("not_found", "not found", "no urls matched", "no objects")
    return bool(self.code) and any(w in self.error.lower() for w in words)


def ask(command: list[str], timeout_s: float) -> Answer:
  """Runs a command and returns its output, carriage returns included."""
  try:
    done = subprocess.run(
      command, capture_output=True, check=False, timeout=timeout_s
    )
  except subprocess.TimeoutExpired:
    return Answer(None, "", f"no answer after {timeout_s:g} s")
  out, error = (x.decode(errors="replace") for x in (done.stdout, done.stderr))
  return Answer(done.returncode, out, error.strip())


class Request(NamedTuple):
  """Queued request; the state may also be ABSENT or UNKNOWN."""

  state: str
  reason: str = ""
  created_at: datetime.datetime | None = None

  def describe(self) -> str:
    return f"{self.state}, {self.reason}" if self.reason else self.state


def read_request(options: argparse.Namespace) -> Request:
  """Asks Google for the state of the request."""
  [command] = tpu_commands.describe(options)
  answer = ask(command, options.timeout_s)
  if answer.is_absent:
    return Request("ABSENT")
  if answer.code != 0:
    return Request("UNKNOWN", answer.error)
  try:
    found = json.loads(answer.out)
    name = found["state"]["state"]
    data = found["state"].get(f"{name.lower()}Data") or {}
    reason = (data.get("error") or {}).get("message", "")
    return Request(name, reason, parse_time(found["createTime"]))
  except (ValueError, KeyError, TypeError, AttributeError):
    return Request("UNKNOWN", f"not understood: {answer.out!r:.200}")


def parse_time(text: str) -> datetime.datetime:
  """Parses an RFC 3339 time.

  Raises:
    ValueError: the text is not a time, or has no time zone.
  """
  # Google gives nanoseconds, and datetime takes microseconds.
  text = re.sub(r"(\.\d{6})\d+", r"\1", text)
  time_ = datetime.datetime.fromisoformat(text)
  if time_.tzinfo is None:
    raise ValueError(f"{text!r} has no time zone")
  return time_


class Worker(NamedTuple):
  """Run on one host.

  Attributes:
    host: name of the host.
    state: "running", "ended CODE", "none", or "lost" for a process that is gone
      without an exit code.
    workdir: run directory.
    last_line: last line of the log.
  """

  host: str
  state: str
  workdir: str
  last_line: str


def read_workers(options: argparse.Namespace) -> list[Worker]:
  """Asks all workers for their runs; returns [] if one does not answer."""
  workers = []
  for command in tpu_commands.report(options):
    answer = ask(command, options.timeout_s)
    if answer.code != 0:
      say(f"workers: unknown, {answer.error}")
      return []
    for line in answer.out.splitlines():
      mark, *fields = line.split("\t")
      if mark == tpu_commands.REPORT_MARK:
        workers.append(Worker(*fields))
  return workers


def describe_step(workdir: str, timeout_s: float) -> str:
  """Describes the last step that a run has measured."""
  answer = ask(tpu_commands.last_metrics(workdir), timeout_s)
  if answer.is_absent:
    return f"no step yet: {workdir}/metrics.jsonl does not exist"
  if answer.code != 0:
    return f"step unknown: {answer.error}"
  try:
    row = json.loads(answer.out.splitlines()[-1])
    words = [f"{row['split']} step {row['step']}"]
    names = ("loss", "reward/accuracy", "groups_per_second")
    words += [f"{n} {row[n]:.4g}" for n in names if row.get(n) is not None]
    return ", ".join(words)
  except (ValueError, KeyError, TypeError, IndexError):
    return f"step unknown: not understood: {answer.out!r:.200}"


def show_status(options: argparse.Namespace) -> int:
  """Prints the state of the request, the last step, and one line a host.

  Returns:
    1 if the state of the request or of a worker is unknown, otherwise 0.
  """
  request = read_request(options)
  say(f"{options.name}: {request.describe()}")
  if request.state != "ACTIVE":
    return int(request.state == "UNKNOWN")
  workers = read_workers(options)
  if not workers:
    return 1
  if workers[0].workdir:
    say(describe_step(workers[0].workdir, options.timeout_s))
  for host, state, _, last_line in workers:
    say(f"{host:24} {state:10} {last_line[:160]}".rstrip())
  return 0


def show_logs(options: argparse.Namespace) -> int:
  """Prints the end of a worker's log, without carriage returns.

  Returns:
    Exit code of gcloud, or 1 if it did not answer.
  """
  [command] = tpu_commands.logs(options)
  _announce(command)
  if options.follow:
    return _follow(command)
  answer = ask(command, options.timeout_s)
  pieces = io.StringIO(answer.out, newline="")
  lines = list(readable_lines(pieces, float("inf")))
  say("\n".join([*lines[-_LOG_LINES:], *filter(None, [answer.error])]))
  return 1 if answer.code is None else answer.code


def _follow(command: list[str]) -> int:
  with subprocess.Popen(command, stdout=subprocess.PIPE) as process:
    pieces = io.TextIOWrapper(process.stdout, errors="replace", newline="")
    try:
      for line in readable_lines(pieces, _BAR_PERIOD_S):
        say(line)
    except KeyboardInterrupt:
      say("no longer following: the run itself continues")
      process.terminate()
      return 0
  return process.returncode


def readable_lines(pieces: Iterable[str], period_s: float) -> Iterator[str]:
  r"""Yields lines without carriage returns.

  A progress bar ends each of its states with \r, and only the last with \n.

  Args:
    pieces: text that ends at each \r, \n or \r\n.
    period_s: seconds after which a state of a bar is also a line.
  """
  state, shown_at = "", time.monotonic()
  for piece in pieces:
    state = piece.rstrip() or state
    is_due = time.monotonic() - shown_at >= period_s
    if state and (piece.endswith("\n") or is_due):
      yield state
      state, shown_at = "", time.monotonic()
  if state:
    yield state
