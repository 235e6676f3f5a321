"""Random damage to one file."""

from collections.abc import Callable
import pathlib
import shutil

import numpy as np

Damage = Callable[[np.random.Generator, pathlib.Path], str]


def pick(rng: np.random.Generator, items):
  """Draws one item, of equal chances."""
  items = list(items)
  return items[rng.integers(len(items))]


def all_files(folder: pathlib.Path) -> list[pathlib.Path]:
  """Returns the files of a folder and its subfolders, sorted."""
  return sorted(path for path in folder.rglob("*") if path.is_file())


def flip(rng: np.random.Generator, path: pathlib.Path) -> str:
  """Flips one to eight bits; adds a byte to an empty file."""
  content = bytearray(path.read_bytes()) or bytearray(1)
  places = rng.integers(len(content), size=rng.integers(1, 9)).tolist()
  for place in places:
    content[place] ^= 1 << int(rng.integers(8))
  if content == path.read_bytes():  # flipped back
    content[0] ^= 1
  path.write_bytes(content)
  return f"bits flipped at {places}"


def truncate(rng: np.random.Generator, path: pathlib.Path) -> str:
  """Cuts off the end of a file; deletes an empty one."""
  size = path.stat().st_size
  if not size:
    return delete(rng, path)
  kept = int(rng.integers(size))
  path.write_bytes(path.read_bytes()[:kept])
  return f"cut to {kept} of {size} bytes"


def delete(rng: np.random.Generator, path: pathlib.Path) -> str:
  del rng
  path.unlink()
  return "deleted"


def empty(rng: np.random.Generator, path: pathlib.Path) -> str:
  del rng
  path.write_bytes(b"")
  return "emptied"


def extend(rng: np.random.Generator, path: pathlib.Path) -> str:
  """Adds random bytes to a file."""
  more = rng.bytes(int(rng.integers(1, 64)))
  path.write_bytes(path.read_bytes() + more)
  return f"{len(more)} bytes added"


def overwrite(rng: np.random.Generator, path: pathlib.Path) -> str:
  """Replaces a block of a file by random bytes, or by zeros."""
  content = bytearray(path.read_bytes()) or bytearray(1)
  start = int(rng.integers(len(content)))
  size = min(int(rng.integers(1, 4096)), len(content) - start)
  new = rng.bytes(size) if rng.random() < 0.5 else bytes(size)
  content[start : start + size] = new
  path.write_bytes(content)
  return f"{size} bytes overwritten at {start}"


DAMAGES: tuple[Damage, ...] = (flip, truncate, delete, empty, extend, overwrite)


def damage(rng: np.random.Generator, path: pathlib.Path) -> str:
  """Damages a file in a random way, and says how."""
  return f"{path.name} {pick(rng, DAMAGES)(rng, path)}"


def replace(path: pathlib.Path, other: pathlib.Path) -> None:
  """Replaces a file or folder by a copy of another."""
  if other.is_dir():
    shutil.rmtree(path)
    shutil.copytree(other, path)
  else:
    shutil.copyfile(other, path)


def names(error: BaseException, folder: pathlib.Path) -> bool:
  """Returns whether an error's message has a path inside of a folder."""
  return str(folder) in str(error)
