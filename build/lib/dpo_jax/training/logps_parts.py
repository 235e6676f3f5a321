"""Parts of an unfinished cache, which survive a kill."""

from collections.abc import Mapping
import hashlib
import io
import json
import logging
import time
from typing import Any

from etils import epath
import numpy as np

from dpo_jax.system.files import write_atomically

_LOG = logging.getLogger(__name__)
_EVERY_S = 60.0  # between two parts: the most that a kill loses


class Parts:
  """Log-probs that are being computed, and the parts that were written.

  A part is FOLDER/KEY.part-LAYOUT-SHA256.npz: its name holds the digest of its
  content. Runs that share a folder and have equal layouts use each other's.

  Attributes:
    logps: f32 [N, K], NaN where there are none yet.
    layout: `logps_cache.scoring_layout` of the log-probs. On a GPU it is that
      of another process once a part of another process was read.
  """

  def __init__(
    self,
    folder: epath.PathLike,
    key: str,
    layout: Mapping[str, Any],
    shape: tuple[int, int],
  ):
    """Reads nothing yet.

    Args:
      folder: folder of caches.
      key: `reference.cache_key`.
      layout: layout that this process scores in.
      shape: (N, K).
    """
    self.logps = np.full(shape, np.nan, np.float32)
    self.layout = dict(layout)
    self._folder, self._key = epath.Path(folder), key
    self._prefix = f"{key}.part-{_layout_digest(layout)}-"
    self._unwritten: list[np.ndarray] = []
    self._written_at = time.monotonic()

  def read(self) -> None:
    """Reads the parts that are there; moves damaged ones aside."""
    for path in sorted(self._folder.glob(f"{self._prefix}*.npz")):
      try:
        self._take(path)
      except FileNotFoundError:  # another run has just written the whole cache
        continue
      except ValueError as error:
        aside = path.with_name(f"{path.name}.damaged")
        path.replace(aside)
        _LOG.warning(
          "%s is not used: %s. Moved to %s; its log-probs are computed again",
          path,
          error,
          aside,
        )

  def _take(self, path: epath.Path) -> None:
    content = path.read_bytes()
    if path.name != f"{self._prefix}{_digest(content)}.npz":
      raise ValueError("its sha256 is not the one in its name")
    with np.load(io.BytesIO(content)) as part:
      layout = json.loads(part["layout"].item())
      mine = (self._key, _layout_digest(self.layout))
      if (part["key"].item(), _layout_digest(layout)) != mine:
        raise ValueError("it is a part of another cache")
      self.logps[part["ids"]] = part["logps"]
    if layout != _as_json(self.layout):
      self.layout = layout

  def has(self, ids: np.ndarray) -> bool:
    """Returns whether the log-probs of these groups are there."""
    return not np.isnan(self.logps[ids]).any()

  def add(self, ids: np.ndarray, logps: np.ndarray) -> None:
    """Adds log-probs, and writes a part once a minute.

    Args:
      ids: i64 [n], groups.
      logps: f32 [n, K], finite.
    """
    self.logps[ids] = logps
    self._unwritten.append(ids)
    if time.monotonic() - self._written_at >= _EVERY_S:
      self.write()

  def write(self) -> None:
    """Writes what no part holds yet."""
    if not self._unwritten:
      return
    ids = np.concatenate(self._unwritten)
    buffer = io.BytesIO()
    np.savez(
      buffer,
      key=self._key,
      layout=json.dumps(self.layout),
      ids=ids,
      logps=self.logps[ids],
    )
    content = buffer.getvalue()
    name = f"{self._prefix}{_digest(content)}.npz"
    write_atomically(self._folder / name, content)
    self._unwritten, self._written_at = [], time.monotonic()


def remove_parts(folder: epath.PathLike, key: str) -> None:
  """Removes the parts of a cache, of any layout, once it is whole."""
  for path in epath.Path(folder).glob(f"{key}.part-*.npz"):
    path.unlink(missing_ok=True)


def _layout_digest(layout: Mapping[str, Any]) -> str:
  """Returns a digest of a layout, which ignores the process.

  On a GPU no process would otherwise use what an earlier one computed.
  """
  shared = {name: x for name, x in layout.items() if name != "process"}
  return _digest(json.dumps(shared, sort_keys=True).encode())[:8]


def _digest(content: bytes) -> str:
  return hashlib.sha256(content).hexdigest()[:32]


def _as_json(layout: Mapping[str, Any]) -> dict[str, Any]:
  return json.loads(json.dumps(layout))
