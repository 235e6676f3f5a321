"""Runs gcloud, and reads what Google and the workers say."""

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

# Seconds between two states of a progress bar that `logs --follow` shows.
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
  """Runs commands one after the other; stops at the first that fails."""
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
  """Answer of a command; code None: nothing within the time."""

  code: int | None
  out: str
  error: str

  @property
  def is_absent(self) -> bool:
    """Whether Google said that it does not exist."""
    words = ("not_found", "not found", "no urls matched", "no objects")
    return bool(self.code) and any(w in self.error.lower() for w in words)


def ask(command: list[str], timeout_s: float) -> Answer:
  """Runs a command for what it prints, carriage returns included."""
  try:
    done = subprocess.run(
      command, capture_output=True, check=False, timeout=timeout_s
    )
  except subprocess.TimeoutExpired:
    return Answer(None, "", f"no answer after {timeout_s:g} s")
  out, error = (x.decode(errors="replace") for x in (done.stdout, done.stderr))
  return Answer(done.returncode, out, error.strip())


class Request(NamedTuple):
  """The queued request: its state, or ABSENT, or UNKNOWN."""

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
  """Parses an RFC 3339 time; ValueError unless it is one with a zone."""
  # Google gives nanoseconds, which are more than datetime takes.
  text = re.sub(r"(\.\d{6})\d+", r"\1", text)
  time_ = datetime.datetime.fromisoformat(text)
  if time_.tzinfo is None:
    raise ValueError(f"{text!r} has no time zone")
  return time_


class Worker(NamedTuple):
  """Run on one host.

  Attributes:
    host: its name.
    state: "running", "ended CODE", "lost" (its process is gone, and left no
      exit code) or "none".
    workdir: workdir of the run.
    last_line: last line of its log.
  """

  host: str
  state: str
  workdir: str
  last_line: str


def read_workers(options: argparse.Namespace) -> list[Worker]:
  """Asks all workers for their runs; [] where one of them does not answer."""
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
  """Tells the last step that a run has measured."""
  answer = ask(tpu_commands.last_metrics(workdir), timeout_s)
  if answer.is_absent:
    return f"no step yet: {workdir}/metrics.jsonl does not exist"
  if answer.code != 0:
    return f"step unknown: {answer.error}"
  try:
    row = json.loads(answer.out.splitlines()[-1])
    figures = [f"{row['split']} step {row['step']}"]
    names = ("loss", "reward/accuracy", "groups_per_second")
    figures += [f"{n} {row[n]:.4g}" for n in names if row.get(n) is not None]
    return ", ".join(figures)
  except (ValueError, KeyError, TypeError, IndexError):
    return f"step unknown: not understood: {answer.out!r:.200}"


def show_status(options: argparse.Namespace) -> int:
  """Prints the state of the request, the last step, and a line a host.

  Returns:
    0, or 1 where something is unknown.
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
    The exit code of gcloud, or 1 where it did not answer.
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

  A progress bar ends each of its states by \r, and only the last by \n.

  Args:
    pieces: text that ends at each \r, \n or \r\n.
    period_s: seconds after which a state of a bar is a line too.
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
