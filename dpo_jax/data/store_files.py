"""Folders of token stores in a cache: written whole, moved aside if damaged."""

from collections.abc import Callable, Iterator, Mapping
import contextlib
import json
import os
import re
import shutil
import tempfile
import time
from typing import Any

import numpy as np

from dpo_jax.data import checksums

# Arrays of a store; older stores do not have the optional ones.
ARRAYS = ("tokens", "starts", "lengths", "score", "prompt_hashes")
OPTIONAL_ARRAYS = ("scored", "records")
_FILES = frozenset(
  {f"{name}.npy" for name in (*ARRAYS, *OPTIONAL_ARRAYS)}
  | {"report.json", "checksums.json"}
)
_PREFIX = "writing_"
_TEMPORARY = re.compile(rf"{_PREFIX}\w{{8}}")
# Age after which no process can be writing a temporary folder any more.
_ABANDONED_S = 24 * 3600


@contextlib.contextmanager
def _naming_cache(cache_dir: str, action: str) -> Iterator[None]:
  """Adds `data.cache_dir` to an OSError, such as a full or read-only disk."""
  try:
    yield
  except OSError as error:
    raise OSError(
      f"data.cache_dir={cache_dir!r}: cannot {action}: {error}. Set"
      " data.cache_dir to a folder that can be written and has room"
    ) from error


def prepare(cache_dir: str) -> None:
  """Makes a cache, and deletes temporary folders that killed processes left.

  Raises:
    OSError: the cache cannot be written.
  """
  with _naming_cache(cache_dir, "make a folder for a token store"):
    os.makedirs(cache_dir, exist_ok=True)
    # Otherwise a read-only cache is found after all data are tokenized.
    os.rmdir(tempfile.mkdtemp(dir=cache_dir, prefix=_PREFIX))
    for name in os.listdir(cache_dir):
      path = os.path.join(cache_dir, name)
      if _TEMPORARY.fullmatch(name) and _is_abandoned(path):
        shutil.rmtree(path, ignore_errors=True)


def _is_abandoned(folder: str) -> bool:
  """Returns whether a folder has files of a store alone, the last a day ago."""
  try:
    age = time.time() - os.stat(folder).st_mtime
    return age > _ABANDONED_S and _FILES.issuperset(os.listdir(folder))
  except OSError:  # a file of that name, or its process has just renamed it
    return False


def write(
  cache_dir: str,
  folder: str,
  arrays: Mapping[str, np.ndarray],
  report: Mapping[str, Any],
) -> None:
  """Writes a temporary folder, then renames it `folder`, so it is complete.

  Args:
    cache_dir: existing folder of stores.
    folder: folder of the store in it.
    arrays: arrays by name.
    report: counts; the folder's name is added to them.

  Raises:
    OSError: the folder cannot be written; names it, and the bytes.
  """
  num_bytes = sum(x.nbytes for x in arrays.values())
  with _naming_cache(cache_dir, f"write {num_bytes:,} bytes of {folder}"):
    temporary = tempfile.mkdtemp(dir=cache_dir, prefix=_PREFIX)
    try:
      for name, value in arrays.items():
        np.save(os.path.join(temporary, f"{name}.npy"), value)
      path = os.path.join(temporary, "report.json")
      with open(path, "w", encoding="utf-8") as file:
        json.dump(
          {**report, "digest": os.path.basename(folder)}, file, indent=2
        )
      checksums.write(temporary)
      # If another process was faster, its folder has the same content.
      if not os.path.exists(folder):
        os.replace(temporary, folder)
    except OSError:
      if not os.path.exists(folder):
        raise
    finally:
      shutil.rmtree(temporary, ignore_errors=True)


def read(folder: str) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
  """Verifies a store, and maps its arrays.

  Returns:
    Arrays by name, and the report.

  Raises:
    DamagedError: a file differs from its checksums, or it is the store of other
      data.
  """
  if not os.path.isdir(folder) and os.path.lexists(folder):
    raise checksums.DamagedError("it is a file or a broken link, not a folder")
  checksums.verify(folder)
  with open(os.path.join(folder, "report.json"), encoding="utf-8") as file:
    report = json.load(file)
  name = os.path.basename(folder)
  if report.pop("digest", name) != name:  # older stores do not name theirs
    raise checksums.DamagedError("it is the store of other data")
  paths = {
    name: os.path.join(folder, f"{name}.npy")
    for name in (*ARRAYS, *OPTIONAL_ARRAYS)
  }
  arrays = {
    # A plain view of the mapped file: slices of a memmap are slow to make.
    name: np.load(path, mmap_mode="r").view(np.ndarray)
    for name, path in paths.items()
    if name in ARRAYS or os.path.exists(path)
  }
  return arrays, report


def delete(folder: str) -> None:
  """Deletes a store of an older version; another process may do so too.

  Raises:
    OSError: the cache cannot be written.
  """
  with _naming_cache(os.path.dirname(folder), f"delete {folder}"):
    _remove(folder)


def move_aside(folder: str) -> str:
  """Renames a damaged store, or what has its name, to FOLDER.damaged.

  Returns:
    The new path; what was there is deleted. Another process may be faster.

  Raises:
    OSError: the cache cannot be written.
  """
  aside = f"{folder}.damaged"
  action = f"move the damaged store {folder} to {aside}"
  with _naming_cache(os.path.dirname(folder), action):
    _remove(aside)
    with contextlib.suppress(FileNotFoundError):
      os.rename(folder, aside)
  return aside


def _remove(path: str) -> None:
  is_folder = os.path.isdir(path) and not os.path.islink(path)
  remove: Callable[[str], None] = shutil.rmtree if is_folder else os.unlink
  with contextlib.suppress(FileNotFoundError):
    remove(path)
