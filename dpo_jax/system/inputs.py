"""Finds the files that a user names, and refuses what cannot be read."""

import difflib
import glob
import os
import stat

from etils import epath

_SHOWN = 5  # names that an error lists


def is_remote(path: epath.PathLike) -> bool:
  """Returns whether a path is not of this machine's file system."""
  return "://" in str(epath.Path(path))


def is_there(path: epath.PathLike) -> bool:
  """Returns whether a path exists, and refuses one that cannot be read.

  Args:
    path: file or folder, local or remote.

  Raises:
    FileNotFoundError: a link whose target does not exist, or leads back to it.
    OSError: a local pipe or device, whose content has no end or is read once.
  """
  path = epath.Path(path)
  if is_remote(path):
    return path.exists()
  try:
    mode = os.stat(path).st_mode
  except ValueError:  # a name with a NUL
    return False
  except OSError as error:
    if os.path.islink(path):
      raise FileNotFoundError(
        f"{str(path)!r} is a link to {os.readlink(path)!r}, which cannot be"
        f" opened ({error.strerror}): mend the link, or delete it"
      ) from error
    if isinstance(error, FileNotFoundError | NotADirectoryError):
      return False
    raise
  if not stat.S_ISREG(mode) and not stat.S_ISDIR(mode):
    raise OSError(
      f"{str(path)!r} is a pipe or a device, and a file is wanted: write its"
      " content to a file, and name that"
    )
  return True


def existing(path: epath.PathLike) -> epath.Path:
  """Checks that a file exists.

  Args:
    path: local or remote.

  Returns:
    The path.

  Raises:
    FileNotFoundError: no such file, or a folder; names what is there.
    OSError: see `is_there`.
  """
  path = epath.Path(path)
  if not is_there(path):
    raise FileNotFoundError(f"no file {str(path)!r}{_what_is_there(path)}")
  if path.is_dir():
    names = _list([p.name for p in path.iterdir()])
    raise FileNotFoundError(
      f"{str(path)!r} is a folder, and a file is wanted; it holds {names}"
    )
  return path


def find(pattern: str) -> list[epath.Path]:
  """Finds the files of a pattern, or the one file of that name.

  Args:
    pattern: path, local or remote; may hold *, ? and [].

  Returns:
    The files, in the order of their names.

  Raises:
    FileNotFoundError: no such file; names what is there.
    OSError: see `is_there`.
  """
  path = epath.Path(pattern)
  # A name may hold brackets without being a pattern.
  if glob.escape(pattern) == pattern or path.exists():
    return [existing(path)]
  # epath joins both to one pattern, so folders may hold * too.
  paths = sorted(p for p in path.parent.glob(path.name) if not p.is_dir())
  if not paths:
    raise FileNotFoundError(
      f"no file matches {pattern!r}{_what_is_there(path)}"
    )
  return [existing(path) for path in paths]


def _what_is_there(path: epath.Path) -> str:
  folder = path.parent
  if glob.escape(str(folder)) != str(folder):
    return ""
  if not folder.is_dir():
    return f": the folder {str(folder)!r} does not exist"
  names = sorted(p.name for p in folder.iterdir())
  near = difflib.get_close_matches(path.name, names, n=_SHOWN)
  return f": the folder {str(folder)!r} holds {_list(near or names)}"


def _list(names: list[str]) -> str:
  more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
  return (", ".join(sorted(names)[:_SHOWN]) or "nothing") + more
