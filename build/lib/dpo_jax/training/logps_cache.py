"""The cache of the reference's log-probs: files that are verified."""

from collections.abc import Mapping
import dataclasses
import hashlib
import io
import json
import os
import platform
from typing import Any, NamedTuple
import uuid

from etils import epath
import jax
import numpy as np

from dpo_jax.data.loader import Loader
from dpo_jax.models.decoder import Policy
from dpo_jax.parallel.placement import Placement
from dpo_jax.system.files import write_atomically, write_json


def scoring_layout(
  loader: Loader, policy: Policy, placement: Placement, chunk_size: int
) -> dict[str, Any]:
  """Describes all that rounding depends on, apart from weights and data.

  Two scorings with equal descriptions give the same bits. On a GPU XLA chooses
  its algorithms again in every process, so there the description holds an id of
  the process.

  Args:
    loader: loader of the groups that are scored.
    policy: the decoder.
    placement: mesh.
    chunk_size: see `logps.chunked_token_figures`.

  Returns:
    A dict that `json` can write.
  """
  device = placement.mesh.devices.flat[0]
  return {
    "batch_size": loader.batch_size,
    "shapes": [
      [shape.num_rows, *dataclasses.astuple(shape.row)]
      for shape in loader.plan.shapes
    ],
    "layout": loader.plan.layout,
    "mesh": dict(placement.mesh.shape),
    "backend": device.platform,
    "device": _machine() if device.platform == "cpu" else device.device_kind,
    "attention": policy.config.attention,
    "logps_chunk": chunk_size,
    "jax": [jax.__version__, jax.lib.__version__],
    "xla_flags": os.environ.get("XLA_FLAGS", ""),
    "process": _PROCESS if device.platform == "gpu" else "",
  }


# Tells this process from any other.
_PROCESS = uuid.uuid4().hex


def _machine() -> list[Any]:
  """Returns the processor and XLA's threads: rounding depends on both."""
  info = epath.Path("/proc/cpuinfo")
  lines = info.read_text().splitlines() if info.exists() else []
  names = {
    line.partition(":")[2].strip()
    for line in lines
    if line.startswith(("model name", "CPU part"))
  }
  has_affinity = hasattr(os, "sched_getaffinity")
  threads = len(os.sched_getaffinity(0)) if has_affinity else os.cpu_count()
  return [
    sorted(names) or platform.processor(),
    int(os.environ.get("NPROC") or threads),
  ]


class Cached(NamedTuple):
  """A cache that was read and verified.

  Attributes:
    logps: f32 [N, K].
    digest: sha256 of its file.
    layout: `scoring_layout`; {} of an older one.
  """

  logps: np.ndarray
  digest: str
  layout: dict[str, Any]


def cache_path(folder: epath.PathLike, key: str) -> epath.Path:
  """Returns the path of a cache's array."""
  return epath.Path(folder) / f"{key}.npy"


def load_cache(
  folder: epath.PathLike, key: str, shape: tuple[int, int]
) -> Cached | None:
  """Reads a cache; None if there is no complete one.

  Args:
    folder: folder of caches.
    key: `cache_key`.
    shape: (N, K) of the groups that it is for.

  Raises:
    ValueError: the file does not agree with its digest, has another shape, or
      holds a log-prob that is not finite.
  """
  path = cache_path(folder, key)
  meta_path = path.with_suffix(".json")
  if not (path.exists() and meta_path.exists()):
    return None
  content = path.read_bytes()
  digest = hashlib.sha256(content).hexdigest()
  try:
    meta = dict(json.loads(meta_path.read_bytes()))
  except (ValueError, TypeError):
    meta = {}
  if meta.get("sha256") != digest:
    raise ValueError(
      f"{path} is damaged: its sha256 is not the one in {meta_path}. Delete"
      " both, and the log-probs are computed again"
    )
  logps = np.load(io.BytesIO(content))
  if logps.shape != shape or logps.dtype != np.float32:
    raise ValueError(
      f"{path} holds {logps.dtype} {list(logps.shape)}, and the log-probs of"
      f" these groups are float32 {list(shape)}: it is not their cache. Delete"
      f" it and {meta_path}, and the log-probs are computed again"
    )
  if not np.isfinite(logps).all():
    raise ValueError(
      f"{path} holds log-probs that are not finite. Delete it and {meta_path},"
      " and they are computed again"
    )
  return Cached(logps, digest, meta.get("layout", {}))


def write_cache(
  folder: epath.PathLike,
  key: str,
  logps: np.ndarray,
  layout: Mapping[str, Any],
) -> None:
  """Writes a cache: the array, then the manifest with its digest.

  Args:
    folder: folder of caches.
    key: `cache_key`.
    logps: f32 [N, K].
    layout: `scoring_layout`.
  """
  buffer = io.BytesIO()
  np.save(buffer, logps)
  content = buffer.getvalue()
  meta = {
    "sha256": hashlib.sha256(content).hexdigest(),
    "shape": list(logps.shape),
    "layout": layout,
  }
  path = cache_path(folder, key)
  write_atomically(path, content)
  write_json(path.with_suffix(".json"), meta)
