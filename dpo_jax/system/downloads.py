"""Digests that the Hub's client keeps of the files that it downloads.

In its cache, a file of a snapshot is a link to blobs/DIGEST. For files that it
downloaded into another folder, .cache/huggingface/download/NAME.metadata there
has the commit, the digest and the time, a line each. A digest is the sha256 of
a large file, and the sha1 that git gives to a small one.
"""

from collections.abc import Sequence
from concurrent import futures
import hashlib
import os
import re

from etils import epath

_THREADS = 8  # hashing releases the interpreter
_DIGEST = "[0-9a-f]{40}|[0-9a-f]{64}"
_METADATA = re.compile(rf"[0-9a-f]+\n({_DIGEST})\n(\d+(?:\.\d+)?)\n?")


def verify(paths: Sequence[epath.PathLike]) -> None:
  """Compares files with the digests that were downloaded with them.

  Args:
    paths: local files; those without a digest are not read.

  Raises:
    ValueError: a file with other content; names it.
  """
  with futures.ThreadPoolExecutor(_THREADS) as pool:
    for _ in pool.map(_verify, map(str, paths)):
      pass


def _verify(path: str) -> None:
  wanted = _downloaded_digest(path)
  if not wanted:
    return
  with open(path, "rb") as file:
    if len(wanted) == 64:
      found = hashlib.file_digest(file, "sha256").hexdigest()
    else:
      start = b"blob %d\0" % os.path.getsize(path)
      found = hashlib.file_digest(file, lambda: hashlib.sha1(start)).hexdigest()
  if found != wanted:
    raise ValueError(
      f"{path} is damaged: its digest is {found[:12]}, and that of its download"
      f" {wanted[:12]}; delete {os.path.realpath(path)} and fetch it again"
    )


def _downloaded_digest(path: str) -> str:
  """Returns the digest that was downloaded with a file; "" without one.

  A file that was changed more than a second after its download has none.
  """
  blobs, name = os.path.split(os.path.realpath(path))
  if os.path.basename(blobs) == "blobs" and re.fullmatch(_DIGEST, name):
    return name
  folder, name = os.path.split(path)
  metadata = os.path.join(
    folder, ".cache", "huggingface", "download", f"{name}.metadata"
  )
  if not os.path.exists(metadata) or not os.path.exists(path):
    return ""
  with open(metadata, encoding="utf-8", errors="replace") as file:
    match = _METADATA.fullmatch(file.read())
  # A file that was written after its download is the user's own.
  is_own = match and os.path.getmtime(path) - 1 > float(match[2])
  return match[1] if match and not is_own else ""
