"""The cache of the reference's log-probs: files that are verified."""

from collections.abc import Mapping
import dataclasses
import hashlib
import io
import json
import os
import platform
from typing import Any
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


def read_layout(folder: epath.PathLike, key: str) -> dict[str, Any]:
  """Returns the `scoring_layout` of a cache; {} of an older one."""
  meta = json.loads((epath.Path(folder) / f"{key}.json").read_text())
  return meta.get("layout", {})


def load_cache(folder: epath.PathLike, key: str) -> np.ndarray | None:
  """Reads a cache; None if there is no complete one.

  Raises:
    ValueError: the file does not agree with its digest.
  """
  path = epath.Path(folder) / f"{key}.npy"
  meta_path = epath.Path(folder) / f"{key}.json"
  if not (path.exists() and meta_path.exists()):
    return None
  content = path.read_bytes()
  digest = hashlib.sha256(content).hexdigest()
  if f'"{digest}"'.encode() not in meta_path.read_bytes():
    raise ValueError(
      f"{path} is damaged: its sha256 is not the one in {meta_path}. Delete"
      " both, and the log-probs are computed again"
    )
  return np.load(io.BytesIO(content))


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
  folder = epath.Path(folder)
  buffer = io.BytesIO()
  np.save(buffer, logps)
  content = buffer.getvalue()
  meta = {
    "sha256": hashlib.sha256(content).hexdigest(),
    "shape": list(logps.shape),
    "layout": layout,
  }
  write_atomically(folder / f"{key}.npy", content)
  write_json(folder / f"{key}.json", meta)
