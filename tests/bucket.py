"""A stand-in for gs://: a folder, reached through epath's own backend."""

import pathlib
import posixpath

from etils.epath import backend
import fsspec
from fsspec.implementations import dirfs, local


class _Buckets(dirfs.DirFileSystem):
  """Maps gs://NAME/PATH to FOLDER/NAME/PATH; `opened` lists files read.

  As in gcsfs, `pipe_file` with mode "create" is atomic.
  """

  def __init__(self, folder: str):
    super().__init__(path=folder, fs=local.LocalFileSystem(auto_mkdir=True))
    self.opened: list[str] = []

  def _join(self, path):
    if isinstance(path, str):
      path = path.removeprefix("gs://")
    return super()._join(path)

  def pipe_file(self, path, value, mode="overwrite", **settings):
    if mode != "create":
      return super().pipe_file(path, value, mode=mode, **settings)
    with open(self._join(path), "xb") as file:
      file.write(value)

  def open(self, path, mode="rb", **settings):
    if "r" in mode:
      self.opened.append(posixpath.basename(path))
    return super().open(path, mode=mode, **settings)


def stand_in(folder: pathlib.Path, monkeypatch) -> _Buckets:
  """Replaces gs:// by a folder.

  Args:
    folder: holds a folder for each bucket.
    monkeypatch: fixture that restores gs:// when the test ends.

  Returns:
    The file system.
  """
  buckets = _Buckets(str(folder))
  monkeypatch.setattr(
    backend.fsspec_backend,
    "_get_filesystem",
    lambda name: buckets if name == "gcs" else fsspec.filesystem(name),
    raising=False,
  )
  return buckets
