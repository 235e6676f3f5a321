"""Child process that renders chat templates; see `templates`.

`python -m dpo_jax.data.template_child` serves renders over its pipes. It
imports little, so that it starts fast, and is not a fork of a process that runs
jax.
"""

from collections.abc import Mapping
import ctypes
import dataclasses
import datetime
import json
import math
import resource
import signal
import struct
import sys
import time
from typing import IO, Any

import jinja2
from jinja2.ext import Extension
from jinja2.sandbox import ImmutableSandboxedEnvironment

LENGTH = struct.Struct(">Q")  # precedes a message
_PR_SET_PDEATHSIG = 1  # of linux/prctl.h


@dataclasses.dataclass(frozen=True)
class Caps:
  """Limits of one render.

  Attributes:
    chars: characters of text.
    seconds: processor time; the wall-clock limit is three times that.
    mebibytes: memory, including about 40 of the child's own.
  """

  chars: int = 4_500_000  # a prompt and a response of `messages.MAX_CHARS`
  seconds: int = 10
  mebibytes: int = 512


def send(file: IO[bytes], message: bytes) -> None:
  """Writes the length of a message, 8 bytes big-endian, then the message."""
  rest = memoryview(LENGTH.pack(len(message)) + message)
  while rest:
    rest = rest[file.write(rest) :]


class _Generation(Extension):
  """{% generation %}: marks what a model wrote, and changes no text."""

  tags = {"generation"}

  def parse(self, parser: Any) -> jinja2.nodes.Node:
    line = next(parser.stream).lineno
    body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
    return jinja2.nodes.Scope(body, lineno=line)


def _compile(source: str, date: datetime.date) -> jinja2.Template:
  """Compiles a chat template in jinja2's sandbox.

  A template may use its variables, the filter `tojson`, and the functions
  `raise_exception` and `strftime_now`.

  Args:
    source: text of the template.
    date: day that `strftime_now` formats.
  """

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
  """Sets a soft limit of this process, or says on stderr why it cannot.

  Args:
    what: limit, such as `resource.RLIMIT_CPU`.
    value: its value; the hard limit where that is lower.
  """
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


def _end_with_parent() -> None:
  """Asks Linux to kill this process when its parent ends, even in a render.

  Does nothing on another system.
  """
  if sys.platform == "linux":
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def _serve(requests: IO[bytes], replies: IO[bytes]) -> None:
  setting = _receive(requests)
  if setting["is_of_main"]:  # Linux takes the thread that started it as parent
    _end_with_parent()
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
      send(replies, json.dumps(reply).encode())


def _receive(file: IO[bytes]) -> Any:
  head = file.read(LENGTH.size)
  if len(head) < LENGTH.size:
    return None  # the parent is gone
  return json.loads(file.read(*LENGTH.unpack(head)))


if __name__ == "__main__":
  with open(sys.stdout.fileno(), "wb", buffering=0, closefd=False) as out:
    _serve(sys.stdin.buffer, out)
