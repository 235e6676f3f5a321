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


# By channels of a head and bytes of a channel. None was timed in this form. An
# earlier form of these kernels was fastest on an H200 with those of (64, 2),
# and forward with that of (128, 2). The others fit into shared memory, and XLA,
# compiling for an H200, spills no registers, but for dq in float32. For dkv of
# (128, 2) the earlier form was faster with (64, 64, 4, 2), which spills here:
# `benchmarks.gpu_kernel` times both.
TILES = {
  (64, 2): Kernels(
    Tiles(64, 64, 4, 3), Tiles(64, 64, 4, 3), Tiles(64, 64, 4, 3)
  ),
  (128, 2): Kernels(
    Tiles(128, 64, 8, 3), Tiles(64, 64, 4, 2), Tiles(64, 128, 8, 2)
  ),
  (256, 2): Kernels(
    Tiles(64, 32, 4, 2), Tiles(32, 32, 4, 1), Tiles(32, 32, 4, 1)
  ),
  (64, 4): Kernels(
    Tiles(32, 32, 4, 2), Tiles(32, 32, 4, 2), Tiles(32, 32, 4, 1)
  ),
  (128, 4): Kernels(
    Tiles(32, 16, 4, 2), Tiles(16, 16, 4, 1), Tiles(32, 16, 4, 1)
  ),
  (256, 4): Kernels(
    Tiles(16, 16, 4, 1), Tiles(16, 16, 4, 1), Tiles(16, 16, 4, 1)
  ),
}
# Where they differ, on GPUs with 100 KiB.
SMALL_TILES = {
  (128, 2): Kernels(
    Tiles(64, 64, 4, 2), Tiles(64, 64, 4, 1), Tiles(32, 64, 4, 1)
  ),
  (256, 2): Kernels(
    Tiles(64, 32, 4, 1), Tiles(32, 32, 4, 1), Tiles(32, 32, 4, 1)
  ),
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
  """Returns the tiles of the three kernels for the GPU that is compiled for.

  Without a GPU they are those of a large one.

  Args:
    width: channels of a head, a power of two up to 256.
    dtype: dtype of queries, keys and values, of 2 or 4 bytes.
  """
  key = max(width, 64), jnp.dtype(dtype).itemsize
  capability = compat.compute_capability()
  if capability is not None and capability not in _LARGE:
    return SMALL_TILES.get(key, TILES[key])
  return TILES[key]
