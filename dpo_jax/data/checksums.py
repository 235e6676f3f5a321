"""Checksums of the files of a folder, by blocks that threads share.

CRC-32 finds damage: one random error in four billion is missed. It does not
stop someone who changes files on purpose.
"""

from concurrent import futures
import json
import os
import zlib

from dpo_jax.system import files

_NAME = "checksums.json"
_BLOCK = 2**24  # bytes


class DamagedError(ValueError):
  """A file is not what was written."""


def exist(folder: str) -> bool:
  """Returns whether a folder holds checksums.json."""
  return os.path.exists(os.path.join(folder, _NAME))


def write(folder: str) -> None:
  """Writes size and CRC-32s of a folder's files to its checksums.json.

  The folder holds files only, and no checksums.json yet.
  """
  names = sorted(os.listdir(folder))
  content = {name: _describe(os.path.join(folder, name)) for name in names}
  with open(os.path.join(folder, _NAME), "w", encoding="utf-8") as file:
    json.dump(content, file)


def verify(folder: str) -> None:
  """Compares the files of a folder with its checksums.json.

  Raises:
    DamagedError: checksums.json is missing or unreadable, or a file differs,
      is missing or was added; names the first such file.
  """
  _check_file(folder, _NAME)
  try:
    with open(os.path.join(folder, _NAME), encoding="utf-8") as file:
      content = dict(files.parse_json(file.read()))
  except (OSError, ValueError, TypeError) as error:
    raise DamagedError(f"{_NAME} is damaged") from error
  names = {name for name in os.listdir(folder) if name != _NAME}
  for name in sorted(content.keys() | names):
    if name not in names:
      raise DamagedError(f"{name} is missing")
    _check_file(folder, name)
    if content.get(name) != _describe(os.path.join(folder, name)):
      raise DamagedError(f"{name} is damaged")


def _check_file(folder: str, name: str) -> None:
  """Raises DamagedError for a folder, a pipe or a broken link."""
  path = os.path.join(folder, name)
  # Another process may have moved the folder meanwhile.
  if os.path.lexists(path) and not os.path.isfile(path):
    raise DamagedError(f"{name} is not a file")


def _describe(path: str) -> dict[str, int | list[int]]:
  """Returns {"size": bytes, "crc32": CRC-32 of each block of 16 MiB}."""
  size = os.path.getsize(path)

  def checksum(start: int) -> int:
    with open(path, "rb") as file:
      file.seek(start)
      return zlib.crc32(file.read(_BLOCK))

  with futures.ThreadPoolExecutor() as pool:
    return {
      "size": size,
      "crc32": list(pool.map(checksum, range(0, size, _BLOCK))),
    }
