"""Paths that a user gives: local, or gs:// and the others that epath opens.

Libraries that open files by themselves, such as safetensors and array_record,
read a copy on this machine. It is kept, and named by path, size and time of the
last change: a file is copied once, and a changed one is copied again.
"""

from collections.abc import Callable, Iterator, Mapping
import contextlib
import fcntl
import hashlib
import io
import json
import logging
import os
import shutil
import tempfile
from typing import Any

from etils import epath
from etils.epath import backend
import numpy as np

from dpo_jax.system import downloads
from dpo_jax.system.inputs import existing, is_remote, is_there

_LOG = logging.getLogger(__name__)
_CHUNK = 2**26  # bytes of a request


def cache_dir() -> str:
  """Returns $XDG_CACHE_HOME/dpo_jax, or ~/.cache/dpo_jax without it."""
  base = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
  return os.path.join(base, "dpo_jax")


def tree(folder: epath.PathLike) -> list[epath.Path]:
  """Returns the files of a folder and of its subfolders, sorted."""
  found, folders = [], [epath.Path(folder)]
  while folders:
    for path in folders.pop().iterdir():
      (folders if path.is_dir() else found).append(path)
  return sorted(found)


def size(path: epath.Path) -> int:
  """Returns the bytes of a file."""
  # epath's own looks up the owner, whom a container may not know.
  return path.stat().length if is_remote(path) else os.path.getsize(path)


def local(path: epath.PathLike) -> str:
  """Returns a path on this machine with the same content.

  Args:
    path: file or folder, local or remote.

  Returns:
    The path itself if it is local, and otherwise that of a copy, which is made
    unless it is there. A copy that was interrupted is resumed.

  Raises:
    OSError: the file changed while it was copied.
  """
  path = epath.Path(path)
  if not is_remote(path):
    return str(path)
  is_folder = path.is_dir()
  members = tree(path) if is_folder else [existing(path)]
  stats = [(str(member), member.stat()) for member in members]
  key = repr([(name, stat.length, stat.mtime) for name, stat in stats])
  key = hashlib.sha256(key.encode()).hexdigest()[:32]
  folder = os.path.join(cache_dir(), "files", key)
  os.makedirs(folder, exist_ok=True)
  # Processes of one machine share the copy.
  with open(f"{folder}.lock", "w", encoding="utf-8") as lock:
    fcntl.flock(lock, fcntl.LOCK_EX)
    for member, (_, stat) in zip(members, stats, strict=True):
      name = str(member.relative_to(path)) if is_folder else path.name
      _copy(member, os.path.join(folder, name), stat.length)
  return folder if is_folder else os.path.join(folder, path.name)


def _copy(source: epath.Path, target: str, num_bytes: int) -> None:
  if os.path.exists(target):
    return
  _LOG.info("copying %s, %.1f MB, to %s", source, num_bytes / 1e6, target)
  os.makedirs(os.path.dirname(target), exist_ok=True)
  part = f"{target}.part"
  with source.open("rb") as remote, open(part, "ab") as out:
    remote.seek(out.tell())
    shutil.copyfileobj(remote, out, _CHUNK)
  copied = os.path.getsize(part)
  if copied != num_bytes:
    os.remove(part)
    raise OSError(
      f"{source} has {num_bytes} bytes, and {copied} were read: it changed"
      " meanwhile; start again"
    )
  os.replace(part, target)


@contextlib.contextmanager
def writing(path: epath.PathLike) -> Iterator[str]:
  """Gives a local path to write to; the file is then copied to a remote `path`.

  A local `path` is given itself.
  """
  path = epath.Path(path)
  if not is_remote(path):
    yield str(path)
    return
  with tempfile.TemporaryDirectory() as folder:
    written = epath.Path(folder) / path.name
    yield str(written)
    written.copy(path, overwrite=True)


@contextlib.contextmanager
def naming(path: epath.PathLike, num_bytes: int) -> Iterator[None]:
  """Adds the file and the bytes to an OSError of writing, such as a full disk.

  Args:
    path: file that is written.
    num_bytes: bytes that are written.

  Raises:
    OSError: the error of the block, of the same type.
  """
  try:
    yield
  except OSError as error:
    if error.filename is not None or error.errno is None:
      raise
    text = f"{error.strerror}, while {num_bytes:,} bytes were written"
    raise type(error)(error.errno, text, str(path)) from error


def write_atomically(path: epath.PathLike, content: str | bytes) -> None:
  """Writes a file whole or not at all.

  Args:
    path: local or gs://; its folder is made.
    content: text as UTF-8, or bytes.
  """
  path = epath.Path(path)
  if isinstance(content, str):
    content = content.encode()
  if is_remote(path) and (store := _object_store(path)) is not None:
    store.pipe_file(str(path), content)  # an object is replaced as a whole
    return
  path.parent.mkdir(parents=True, exist_ok=True)
  # Processes that share a folder may write the same file at the same time.
  temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
  try:
    with naming(path, len(content)), temporary.open("wb") as file:
      file.write(content)
      if not is_remote(path):
        # Otherwise a loss of power may leave the new name, and no content.
        file.flush()
        os.fsync(file.fileno())
  except OSError:
    temporary.unlink(missing_ok=True)
    raise
  temporary.replace(path)


def create(path: epath.Path, content: bytes) -> bool:
  """Creates a file unless it exists.

  Of several processes that create the same file at the same time, one does.

  Args:
    path: local or gs://; its folder exists.
    content: bytes of the file.

  Returns:
    Whether this call created it.
  """
  try:
    if not is_remote(path):
      _create_local(path, content)
    elif (store := _object_store(path)) is not None:
      store.pipe_file(str(path), content, mode="create")
    elif path.exists():
      return False
    else:
      _LOG.warning(
        "%s: without gcsfs two processes may both create it; pip install gcsfs",
        path,
      )
      path.write_bytes(content)
  except FileExistsError:
    return False
  return True


def _create_local(path: epath.Path, content: bytes) -> None:
  try:
    with naming(path, len(content)), open(path, "xb") as file:
      file.write(content)
  except FileExistsError:
    raise
  except OSError:  # an empty file would count as created
    path.unlink(missing_ok=True)
    raise


def read_if_there(path: epath.Path) -> bytes | None:
  """Reads a file as it is now, or returns None if there is none."""
  store = _object_store(path) if is_remote(path) else None
  try:
    # epath looks up the size first, in listings that gcsfs has cached.
    return path.read_bytes() if store is None else store.cat_file(str(path))
  except FileNotFoundError:
    return None


def _object_store(path: epath.Path) -> Any:
  """Returns fsspec's file system, or None if epath has only TensorFlow's."""
  try:
    return backend.fsspec_backend.fs(path)
  except ImportError:
    return None


def read_text(path: epath.Path) -> str:
  """Reads a file of text in UTF-8, without a byte order mark.

  Raises:
    FileNotFoundError: no such file.
    OSError: see `is_there`.
    ValueError: it is damaged; names it.
  """
  is_there(path)
  downloads.verify([path])
  try:
    return path.read_bytes().decode("utf-8-sig")
  except UnicodeDecodeError as error:
    raise _damaged(path, error) from error


def read_json(path: epath.Path) -> dict[str, Any]:
  """Reads a file of one JSON object.

  Raises:
    OSError: see `read_text`.
    ValueError: it is damaged, holds a key twice or no object; names it.
  """
  text = read_text(path)
  try:
    value = parse_json(text, _unique)
  except _TwiceError as error:
    raise ValueError(
      f"{path} has the key {error} twice: leave one out"
    ) from error
  except ValueError as error:
    raise _damaged(path, error) from error
  if not isinstance(value, dict):
    raise _damaged(path, f"it holds a {type(value).__name__}, not an object")
  return value


def read_arrays(path: epath.Path) -> dict[str, np.ndarray]:
  """Reads an .npz file; zip verifies a checksum of each array.

  Raises:
    FileNotFoundError: no such file.
    ValueError: it is damaged; names it.
  """
  content = path.read_bytes()
  try:
    with np.load(io.BytesIO(content)) as file:
      return dict(file)
  except Exception as error:  # zip, zlib and numpy alike
    raise _damaged(path, f"{error!r}") from error


def write_arrays(path: epath.PathLike, arrays: Mapping[str, Any]) -> None:
  """Writes an .npz file whole or not at all."""
  buffer = io.BytesIO()
  np.savez(buffer, **arrays)
  write_atomically(path, buffer.getvalue())


def _damaged(path: epath.Path, why: object) -> ValueError:
  return ValueError(f"{path} is damaged: {why}. Restore it from a copy")


class _TwiceError(ValueError):
  """An object of JSON has a key twice."""


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
  found = dict(pairs)
  if len(found) < len(pairs):
    names = [name for name, _ in pairs]
    twice = next(name for name in names if names.count(name) > 1)
    raise _TwiceError(repr(twice))
  return found


def parse_json(
  text: str, to_object: Callable[[list[tuple[str, Any]]], Any] | None = None
) -> Any:
  """Parses JSON.

  Args:
    text: JSON.
    to_object: makes an object of its keys and values; None: a dict.

  Raises:
    ValueError: not JSON, nested too deeply, or a number of too many digits.
  """
  try:
    return json.loads(text, object_pairs_hook=to_object)
  except RecursionError as error:
    raise ValueError("it is nested too deeply") from error


def write_json(
  path: epath.PathLike, value: Any, *, sort_keys: bool = False
) -> None:
  """Writes a JSON file whole or not at all."""
  text = json.dumps(value, indent=2, sort_keys=sort_keys)
  write_atomically(path, text + "\n")
