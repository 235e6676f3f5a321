"""Chat templates, rendered where they can do no harm.

A template is a program that came with a checkpoint. jinja2's sandbox keeps it
from files and from the process, but stops neither nested loops nor a string of
a gigabyte, so it runs in a child process with caps on output, time and memory.
The child serves many renders over pipes, one after the other; a render that
breaks a cap ends the child, and the next one starts another.

`python -m dpo_jax.data.templates` is the child. It imports little, so that it
starts fast, and is no fork of a process that runs jax.
"""

from collections.abc import Mapping, Sequence
import contextlib
import dataclasses
import datetime
import json
import math
import os
import pathlib
import resource
import selectors
import signal
import struct
import subprocess
import sys
import threading
import time
from typing import IO, Any
import weakref

import jinja2
from jinja2.ext import Extension
from jinja2.sandbox import ImmutableSandboxedEnvironment

from dpo_jax.data.dialogues import Request
from dpo_jax.data.messages import RecordError

_ROOT = pathlib.Path(__file__).parents[2]
_LENGTH = struct.Struct(">Q")
# How much longer than its time a render may take on a machine that is busy.
_PATIENCE = 3.0
_BATCH = 256  # requests sent at once


@dataclasses.dataclass(frozen=True)
class Caps:
  """What one render may take.

  Attributes:
    chars: of text.
    seconds: of processor time; of the wall clock, three times that.
    mebibytes: of memory, the child's own 40 or so included.
  """

  chars: int = 4_500_000  # a prompt and a response of `messages.MAX_CHARS`
  seconds: int = 10
  mebibytes: int = 512


class ChatTemplate:
  """A template and the child process that renders it.

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
      variables: that it always sees, such as `bos_token`.
      date: what `strftime_now` says. It is fixed so that the same data are
        the same tokens on another day.
      caps: of a render; the defaults unless given.
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

  def render(self, requests: Sequence[Request]) -> list[str | RecordError]:
    """Conversations as text.

    Args:
      requests: what to render; each has the caps for itself.

    Returns:
      A text for each, or the error in its place: the template raises, or
      breaks a cap, and it says which.
    """
    replies: list[str | RecordError] = []
    with self._lock:
      while len(replies) < len(requests):
        start = len(replies)
        replies += self._ask(requests[start : start + _BATCH])
    return replies

  def close(self) -> None:
    """Ends the child; a later render starts another."""
    if self._child is not None:
      self._child.end()
      self._child = None

  def _ask(self, requests: Sequence[Request]) -> list[str | RecordError]:
    """Replies to the first requests, one at least: a fault may end a child."""
    if self._child is None:
      self._child = _Child(self._setting)
      weakref.finalize(self, self._child.end)
    child = self._child
    replies: list[str | RecordError] = []
    try:
      # Replies start when the whole batch is read: neither side waits for
      # the other to empty a full pipe.
      child.send([request._asdict() for request in requests])
      for request in requests:
        reply = self._reply(child)
        replies.append(
          reply["text"] if "text" in reply else _error(reply, request)
        )
        if reply.get("ends"):
          self.close()
          break
    except BaseException:
      # Replies that nobody read would answer the next requests.
      self.close()
      raise
    return replies

  def _reply(self, child: "_Child") -> Mapping[str, Any]:
    deadline = time.monotonic() + _PATIENCE * self._caps.seconds
    try:
      return child.receive(deadline)
    except TimeoutError:
      fault = f"took longer than {self._caps.seconds} s"
    except EOFError:
      fault = child.explain_end(self._caps)
    return {"fault": fault, "ends": True}


def _error(reply: Mapping[str, Any], request: Request) -> RecordError:
  roles = [message.get("role") for message in request.messages]
  told = f": {reply['told']}" if "told" in reply else ""
  return RecordError(
    f"the chat template {reply['fault']} on messages with the roles"
    f" {roles}{told}"
  )


class _Child:
  """A running child and its pipes."""

  def __init__(self, setting: Mapping[str, Any]):
    path = os.pathsep.join([str(_ROOT), *filter(None, sys.path)])
    self._process = subprocess.Popen(
      [sys.executable, "-m", "dpo_jax.data.templates"],
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
    self._setting: Mapping[str, Any] | None = setting

  def send(self, batch: Any) -> None:
    """Sends what JSON can hold; a child that is gone is noticed later."""
    try:
      message = json.dumps(batch, default=_to_plain).encode()
    except (TypeError, ValueError) as error:
      raise RecordError(f"a message holds what JSON cannot: {error}") from error
    with contextlib.suppress(BrokenPipeError):
      if self._setting:
        _send(self._stdin, json.dumps(self._setting).encode())
        self._setting = None
      _send(self._stdin, message)

  def receive(self, deadline: float) -> Mapping[str, Any]:
    """The next reply.

    Raises:
      TimeoutError: none came before the deadline.
      EOFError: the child ended.
    """
    length = _LENGTH.unpack(self._read(_LENGTH.size, deadline))[0]
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
    """What a child died of."""
    code = self._process.wait()
    if code == -signal.SIGXCPU:
      return f"took longer than {caps.seconds} s"
    last = self._stderr.read().decode(errors="replace").strip()[-300:]
    if "MemoryError" in last:
      return f"needed more memory than {caps.mebibytes} MiB"
    return f"ended its process with exit code {code}: {last}"

  def end(self) -> None:
    """Kills the child and waits for it: no zombie stays."""
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
  raise TypeError(f"{type(value).__name__} is none of its types")


def _send(file: IO[bytes], message: bytes) -> None:
  rest = memoryview(_LENGTH.pack(len(message)) + message)
  while rest:
    rest = rest[file.write(rest) :]


# What follows runs in the child.


class _Generation(Extension):
  """{% generation %}: marks what a model wrote, and changes no text."""

  tags = {"generation"}

  def parse(self, parser: Any) -> jinja2.nodes.Node:
    line = next(parser.stream).lineno
    body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
    return jinja2.nodes.Scope(body, lineno=line)


def _compile(source: str, date: datetime.date) -> jinja2.Template:
  """Compiles a template; it may read its arguments and nothing else."""

  def raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)

  def strftime_now(spec: str) -> str:
    return date.strftime(spec)

  def tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
  ) -> str:
    # jinja2's own filter writes HTML's escapes.
    return json.dumps(
      value,
      ensure_ascii=ensure_ascii,
      indent=indent,
      separators=separators,
      sort_keys=sort_keys,
    )

  environment = ImmutableSandboxedEnvironment(
    trim_blocks=True,
    lstrip_blocks=True,
    extensions=["jinja2.ext.loopcontrols", _Generation],
  )
  environment.filters["tojson"] = tojson
  environment.globals["raise_exception"] = raise_exception
  environment.globals["strftime_now"] = strftime_now
  return environment.from_string(source)


def _limit(what: int, value: int) -> None:
  """Lowers a limit, or says on stderr that this system has none."""
  hard = resource.getrlimit(what)[1]
  value = value if hard == resource.RLIM_INFINITY else min(value, hard)
  try:
    resource.setrlimit(what, (value, hard))
  except (OSError, ValueError) as error:  # macOS has no cap on addresses
    print(f"no limit {what}: {error}", file=sys.stderr)


def _render(
  template: jinja2.Template, variables: Mapping[str, Any], caps: Caps
) -> dict[str, Any]:
  pieces, length = [], 0
  for piece in template.generate(**variables):
    pieces.append(piece)
    length += len(piece)
    if length > caps.chars:
      return {"fault": f"wrote more than {caps.chars} characters"}
  return {"text": "".join(pieces)}


def _serve(requests: IO[bytes], replies: IO[bytes]) -> None:
  setting = _receive(requests)
  caps = Caps(**setting["caps"])
  date = datetime.date.fromisoformat(setting["date"])
  _limit(resource.RLIMIT_CORE, 0)
  _limit(resource.RLIMIT_AS, caps.mebibytes << 20)
  template = None
  while (batch := _receive(requests)) is not None:
    for request in batch:
      # The limit counts from the start of the process.
      spent = math.ceil(time.process_time())
      _limit(resource.RLIMIT_CPU, spent + caps.seconds)
      variables = {
        "tools": None,
        "documents": None,
        **setting["variables"],
        **request["extras"],
        "messages": request["messages"],
        "add_generation_prompt": request["header"],
      }
      try:
        template = template or _compile(setting["source"], date)
        reply = _render(template, variables, caps)
      except MemoryError:
        fault = f"needed more memory than {caps.mebibytes} MiB"
        reply = {"fault": fault, "ends": True}
      except Exception as error:  # a template is a program: it may raise any
        told = f"{type(error).__name__}: {str(error)[:500]}"
        reply = {"fault": "fails", "told": told}
      _send(replies, json.dumps(reply).encode())


def _receive(file: IO[bytes]) -> Any:
  head = file.read(_LENGTH.size)
  if len(head) < _LENGTH.size:
    return None  # the parent is gone
  return json.loads(file.read(*_LENGTH.unpack(head)))


if __name__ == "__main__":
  with open(sys.stdout.fileno(), "wb", buffering=0, closefd=False) as out:
    _serve(sys.stdin.buffer, out)
