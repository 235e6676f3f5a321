"""Files of JSON lines, which grow while a run trains.

A kill or a full disk may tear the last line; a run that resumes cuts it. Any
other damage is named with file and line.
"""

from collections.abc import Collection, Iterator
import contextlib
import json
import logging
import math
import os
import time
from typing import Any

from etils import epath

from dpo_jax.system.files import naming, write_atomically

_LOG = logging.getLogger(__name__)


class GrowingFile:
  """A text file to append to, local or in a bucket.

  Objects in a bucket cannot grow, and opening one for appending would truncate
  it. So the whole text is written again, at most every `_PERIOD_S` and at the
  end. A last line without an end, which a full disk or a kill leaves, is cut.
  """

  _PERIOD_S = 20.0

  def __init__(self, path: epath.Path):
    self._path = path
    self._text, self._written = "", -math.inf
    self._file = None
    if "://" not in str(path):
      _end_last_line(path)
      self._file = path.open("a")
    elif path.exists():
      lines = _whole_lines(path.read_bytes())
      self._text = b"".join(line + b"\n" for line in lines).decode()

  def append(self, text: str) -> None:
    if self._file is not None:
      try:
        with naming(self._path, len(text)):
          self._file.write(text)
          self._file.flush()
      except OSError:
        # Closing would try to write what is left once more.
        with contextlib.suppress(OSError):
          self._file.close()
        raise
      return
    self._text += text
    if time.monotonic() - self._written >= self._PERIOD_S:
      self._write()

  def _write(self) -> None:
    self._path.write_text(self._text)
    self._written = time.monotonic()

  def close(self) -> None:
    if self._file is not None:
      self._file.close()  # closing twice does nothing
    elif self._text:
      self._write()


def _whole_lines(content: bytes) -> list[bytes]:
  """Returns the lines of a file without a torn last one.

  A last line that is an object lacks its line end alone.
  """
  *lines, rest = content.split(b"\n")
  try:
    is_whole = isinstance(json.loads(rest), dict)
  except (ValueError, RecursionError):
    is_whole = False
  return [*lines, rest] if is_whole else lines


def _end_last_line(path: epath.Path) -> None:
  """Cuts a torn last line of a local file, or ends one that is whole."""
  content = path.read_bytes() if path.exists() else b""
  if content.endswith(b"\n") or not content:
    return
  end = sum(len(line) + 1 for line in _whole_lines(content))
  if end > len(content):
    with path.open("ab") as file:
      file.write(b"\n")
  else:
    _LOG.warning("%s: its last line is incomplete, and is cut", path)
    os.truncate(path, end)


def read_rows(
  path: epath.Path, keys: Collection[str]
) -> Iterator[dict[str, Any]]:
  """Yields the rows of a JSONL file, each of which must have `keys`.

  A torn last line is left out.

  Raises:
    ValueError: a damaged line; names file and line.
  """
  for number, line in enumerate(_whole_lines(path.read_bytes()), 1):
    try:
      row = json.loads(line.decode())
      fault = _find_fault(row, keys)
    except (ValueError, RecursionError) as error:
      fault = str(error)
    if fault:
      raise ValueError(
        f"{path}:{number} is damaged: {fault}. Remove the line to read the rest"
      )
    yield row


def _find_fault(row: Any, keys: Collection[str]) -> str:
  """Says what is wrong with a row; "" if nothing is.

  Args:
    row: any JSON value.
    keys: keys that it must have; "split" makes it one of metrics, which are
      numbers or null.
  """
  if not isinstance(row, dict):
    return f"it holds a {type(row).__name__}, not an object"
  for key in keys:
    if type(row.get(key)) is not (int if key == "step" else str):
      return f"{key} is {row.get(key)!r}"
  for key, value in row.items():
    is_metric = "split" in keys and key not in keys
    if is_metric and type(value) not in (int, float, type(None)):
      return f"{key} is {value!r}, not a number"
  return ""


def cut_lines_after(path: epath.Path, step: int) -> None:
  """Removes the lines of a JSONL file whose "step" is above a step."""
  if not path.exists():
    return
  rows = list(read_rows(path, ("step",)))
  kept = [row for row in rows if row["step"] <= step]
  if len(kept) < len(rows):
    write_atomically(path, "".join(json.dumps(row) + "\n" for row in kept))
