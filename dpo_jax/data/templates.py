"""Renders chat templates in a sandboxed child process.

A template is a program that came with a checkpoint. jinja2's sandbox keeps it
from files and from the process, but stops neither nested loops nor a string of
a gigabyte, so it runs in a child process with caps on output, time and memory.
The child serves many renders over pipes, one after the other; a render that
breaks a cap ends the child, and the next one starts another. On Linux it ends
with this process, however that ends.
"""

from collections.abc import Iterator, Mapping, Sequence
import contextlib
import dataclasses
import datetime
import json
import math
import os
import pathlib
import selectors
import signal
import subprocess
import sys
import threading
import time
from typing import IO, Any
import weakref

from dpo_jax.data.dialogues import Request
from dpo_jax.data.messages import RecordError
from dpo_jax.data.template_child import LENGTH, Caps, send

_ROOT = pathlib.Path(__file__).parents[2]
# Wall-clock time that a render may take, as a multiple of its processor time.
_PATIENCE = 3.0
_BATCH = 256  # requests sent at once


class ChatTemplate:
  """Chat template, and the child process that renders it.

  Attributes:
    source: jinja2, as `transformers` reads it: loop controls, `tojson`,
      `raise_exception`, `strftime_now` and the `generation` tag.
  """

  def __init__(
    self,
    source: str,
    variables: Mapping[str, str],
    *,
    date: datetime.date,
    caps: Caps | None = None,
  ):
    """Compiles nothing yet: the child starts with the first render.

    Args:
      source: the template.
      variables: variables of every render, such as `bos_token`.
      date: date of `strftime_now`; fixed, so that the same data give the same
        tokens on another day.
      caps: limits of a render; the defaults unless given.
    """
    self.source = source
    self._caps = caps or Caps()
    self._setting = {
      "source": source,
      "variables": dict(variables),
      "date": date.isoformat(),
      "caps": dataclasses.asdict(self._caps),
    }
    self._lock = threading.Lock()
    self._child: _Child | None = None

  def render(
    self, requests: Sequence[Request], *, timeout_s: float = math.inf
  ) -> Iterator[str | RecordError]:
    """Renders conversations, one after the other.

    Args:
      requests: conversations; the caps apply to each.
      timeout_s: seconds that all of them may take together.

    Yields:
      A text for each, or an error in its place if the template raises or
      exceeds a cap, or a message holds what JSON cannot.

    Raises:
      TimeoutError: they took longer than `timeout_s`.
    """
    deadline = time.monotonic() + timeout_s
    done = 0
    while done < len(requests):
      try:
        for text in self._ask(requests[done : done + _BATCH], deadline):
          done += 1
          yield text
      except TimeoutError as error:
        raise TimeoutError(
          f"the chat template has rendered {done} of {len(requests)}"
          f" conversations in data.template_timeout_s={timeout_s:g}. Correct"
          " the template, or raise that limit"
        ) from error

  def close(self) -> None:
    """Ends the child; a later render starts another."""
    self._keep(None)

  def _keep(self, child: "_Child | None") -> None:
    """Keeps a child process for the next render, and ends the one before.

    Args:
      child: process that renders; None to keep none.
    """
    with self._lock:
      before, self._child = self._child, child
    if before is not None:
      before.end()

  def _take(self) -> "_Child":
    """Takes the child that was kept, or starts one.

    Renders of several threads so have a child each.
    """
    with self._lock:
      child, self._child = self._child, None
    if child is None:
      child = _Child(self._setting)
      weakref.finalize(self, child.end)
    return child

  def _ask(
    self, requests: Sequence[Request], deadline: float
  ) -> Iterator[str | RecordError]:
    """Yields a text or error for the first requests, at least one.

    A fault may end the child before the last request, and a request that JSON
    cannot hold ends the batch.

    Args:
      requests: conversations.
      deadline: value of `time.monotonic` at which TimeoutError is raised.
    """
    encoded: list[bytes] = []
    for request in requests:
      try:
        encoded.append(_encode(request))
      except RecordError as error:
        if not encoded:
          yield error
          return
        break
    child, is_read = self._take(), False
    try:
      # Replies start when the whole batch is read: neither side waits for
      # the other to empty a full pipe.
      child.send(encoded)
      for request in requests[: len(encoded)]:
        reply = self._reply(child, deadline)
        if reply.get("ends"):
          child.end()  # before an error stops whoever reads
        yield reply["text"] if "text" in reply else _error(reply, request)
        if reply.get("ends"):
          return
      is_read = True
    finally:
      if is_read:
        self._keep(child)
      else:
        # Unread replies would be taken for those to the next requests.
        child.end()

  def _reply(self, child: "_Child", deadline: float) -> Mapping[str, Any]:
    limit = time.monotonic() + _PATIENCE * self._caps.seconds
    try:
      return child.receive(min(limit, deadline))
    except TimeoutError:
      if deadline < limit:
        raise
      fault = f"took longer than {self._caps.seconds} s"
    except EOFError:
      fault = child.explain_end(self._caps)
    return {"fault": fault, "ends": True}


def parse_date(date: str) -> datetime.date:
  """Reads `data.template_date`, YYYY-MM-DD; another text is a ValueError."""
  try:
    return datetime.date.fromisoformat(date)
  except ValueError as error:
    raise ValueError(
      f"data.template_date={date!r} must be a day as YYYY-MM-DD"
    ) from error


def _encode(request: Request) -> bytes:
  """Encodes a request as JSON; RecordError for what JSON cannot hold."""
  try:
    return json.dumps(request._asdict(), default=_to_plain).encode()
  except (TypeError, ValueError) as error:
    raise RecordError(f"a message holds what JSON cannot: {error}") from error


def _error(reply: Mapping[str, Any], request: Request) -> RecordError:
  roles = [message.get("role") for message in request.messages]
  told = f": {reply['told']}" if "told" in reply else ""
  return RecordError(
    f"the chat template {reply['fault']} on messages with the roles"
    f" {roles}{told}"
  )


class _Child:
  """Running child process and its pipes."""

  def __init__(self, setting: Mapping[str, Any]):
    path = os.pathsep.join([str(_ROOT), *filter(None, sys.path)])
    self._process = subprocess.Popen(
      [sys.executable, "-m", "dpo_jax.data.template_child"],
      stdin=subprocess.PIPE,
      stdout=subprocess.PIPE,
      stderr=subprocess.PIPE,
      env={**os.environ, "PYTHONPATH": path},
      bufsize=0,
    )
    pipes = (self._process.stdin, self._process.stdout, self._process.stderr)
    self._stdin, self._stdout, self._stderr = (_opened(pipe) for pipe in pipes)
    self._selector = selectors.DefaultSelector()
    self._selector.register(self._stdout, selectors.EVENT_READ)
    is_main = threading.current_thread() is threading.main_thread()
    self._setting: Mapping[str, Any] | None = {**setting, "is_of_main": is_main}

  def send(self, requests: Sequence[bytes]) -> None:
    """Sends requests, JSON each, as a list; before the first, the setting.

    A child that has ended is not noticed here, but by `receive`.
    """
    with contextlib.suppress(BrokenPipeError):
      if self._setting:
        send(self._stdin, json.dumps(self._setting).encode())
        self._setting = None
      send(self._stdin, b"[" + b",".join(requests) + b"]")

  def receive(self, deadline: float) -> Mapping[str, Any]:
    """Receives the next reply.

    Args:
      deadline: value of `time.monotonic`.

    Raises:
      TimeoutError: none came before the deadline.
      EOFError: the child ended.
    """
    length = LENGTH.unpack(self._read(LENGTH.size, deadline))[0]
    return json.loads(self._read(length, deadline))

  def _read(self, size: int, deadline: float) -> bytes:
    pieces, missing = [], size
    while missing:
      left = deadline - time.monotonic()
      if left <= 0 or not self._selector.select(left):
        raise TimeoutError
      piece = os.read(self._stdout.fileno(), min(missing, 1 << 20))
      if not piece:
        raise EOFError
      pieces.append(piece)
      missing -= len(piece)
    return b"".join(pieces)

  def explain_end(self, caps: Caps) -> str:
    """Waits for the child to end, and says why it did, for an error."""
    code = self._process.wait()
    if code == -signal.SIGXCPU:
      return f"took longer than {caps.seconds} s"
    last = self._stderr.read().decode(errors="replace").strip()[-300:]
    if "MemoryError" in last:
      return f"needed more memory than {caps.mebibytes} MiB"
    return f"ended its process with exit code {code}: {last}"

  def end(self) -> None:
    """Kills the child and waits for it, so that no zombie remains."""
    self._process.kill()
    self._process.wait()
    self._selector.close()
    for pipe in (self._stdin, self._stdout, self._stderr):
      pipe.close()


def _opened(pipe: IO[bytes] | None) -> IO[bytes]:
  assert pipe is not None
  return pipe


def _to_plain(value: Any) -> Any:
  if isinstance(value, Mapping):
    return dict(value)
  raise TypeError(f"{type(value).__name__} is not a type of JSON")
