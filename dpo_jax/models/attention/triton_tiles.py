"""Block sizes of the kernels of attention, by device and size of a head."""

import dataclasses
from typing import Any

import jax.numpy as jnp

from dpo_jax.system import compat

# Shared memory of a block on A100, H100, H200 and B200: 164 KiB and more. Other
# GPUs of these generations have 100.
_LARGE = ((8, 0), (9, 0), (10, 0), (10, 3))


@dataclasses.dataclass(frozen=True)
class Tiles:
  """Sizes of a kernel's blocks, and how Triton compiles it.

  Attributes:
    queries: queries of a block; divides 128.
    keys: keys of a block; divides 128.
    warps: groups of 32 threads that work on a block.
    stages: blocks that are loaded ahead.
  """

  queries: int
  keys: int
  warps: int
  stages: int


@dataclasses.dataclass(frozen=True)
class Kernels:
  """Tiles of the three kernels."""

  forward: Tiles
  dq: Tiles
  dkv: Tiles


# By the bytes of a head's channels. Those of 128 and 256 (bf16, head sizes 64
# and 128) were the fastest of a few that were tried on an H200, but for dq of
# 256, with an earlier form of these kernels; the others fit into shared memory
# by formula.
TILES = {
  128: Kernels(Tiles(64, 64, 4, 3), Tiles(64, 64, 4, 3), Tiles(64, 64, 4, 3)),
  256: Kernels(Tiles(128, 64, 8, 3), Tiles(64, 64, 4, 2), Tiles(64, 64, 4, 2)),
  512: Kernels(Tiles(64, 32, 4, 2), Tiles(32, 32, 4, 1), Tiles(32, 32, 4, 1)),
  1024: Kernels(Tiles(16, 16, 4, 1), Tiles(16, 16, 4, 1), Tiles(16, 16, 4, 1)),
}


@dataclasses.dataclass(frozen=True)
class Settings:
  """Settings of the kernels that are compiled in.

  Attributes:
    scale: factor of the scores.
    soft_cap: see `attention.attend_rows`.
    kernels: tiles.
    interpret: whether JAX interprets the kernels, on a machine without a GPU.
  """

  scale: float
  soft_cap: float | None
  kernels: Kernels
  interpret: bool


def choose_kernels(width: int, dtype: Any) -> Kernels:
  """Returns the tiles for this machine's GPU.

  Args:
    width: channels of a head, a power of two.
    dtype: dtype of queries, keys and values.
  """
  num_bytes = max(width * jnp.dtype(dtype).itemsize, min(TILES))
  capability = compat.compute_capability()
  if capability is not None and capability not in _LARGE:
    num_bytes *= 2  # half of the memory
  return TILES[min(num_bytes, max(TILES))]
