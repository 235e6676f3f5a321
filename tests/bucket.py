"""A stand-in for gs://: a folder, reached through epath's own backend."""

import os
import pathlib
import posixpath
import uuid

from etils.epath import backend
import fsspec
from fsspec.implementations import dirfs, local


class _Buckets(dirfs.DirFileSystem):
  """Maps gs://NAME/PATH to FOLDER/NAME/PATH; `opened` lists files read.

  As in an object store, `pipe_file` writes a file whole, and with mode "create"
  only if there is none.
  """

  def __init__(self, folder: str):
    super().__init__(path=folder, fs=local.LocalFileSystem(auto_mkdir=True))
    self.opened: list[str] = []

  def _join(self, path):
    if isinstance(path, str):
      path = path.removeprefix("gs://")
    return super()._join(path)

  def pipe_file(self, path, value, mode="overwrite", **settings):
    target = pathlib.Path(self._join(path))
    target.parent.mkdir(parents=True, exist_ok=True)
    written = target.with_name(f"{target.name}.{uuid.uuid4().hex}")
    written.write_bytes(value)
    try:
      (os.link if mode == "create" else os.replace)(written, target)
    finally:
      written.unlink(missing_ok=True)

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
