"""The output projection in blocks of the vocabulary, on one device or a mesh.

A block of the vocabulary is read with `read_block`, its gradient is written
with `write_block`, and `scan` visits all blocks. `TileSizes` says how large
blocks of the vocabulary and chunks of positions are.
"""

from collections.abc import Callable
import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from dpo_jax.models.decoder import Readout
from dpo_jax.parallel import active_mesh
from dpo_jax.parallel.active_mesh import ROW_AXES
from dpo_jax.system import compat

# Minimum block width: a multiple of the lane count, wide enough to keep the
# matmul unit busy.
MIN_COLUMNS = 256


@dataclasses.dataclass(frozen=True)
class TileSizes:
  """Tile sizes of the loops on one device.

  Attributes:
    positions: maximum positions of a chunk. The gradient of a block is read and
      written once a chunk, which the chunk's work must outweigh. Chunks after
      the last scored position are skipped.
    logits: logits that exist at a time.
  """

  positions: int
  logits: int

  def chunk(self, num_rows: int, length: int) -> int:
    """Returns the positions of each row in a chunk.

    Args:
      num_rows: rows on a device, all of which a chunk has.
      length: positions of a row, at least 1.
    """
    most = -(-self.positions // num_rows)
    return -(-length // -(-length // most))  # chunks of equal size

  def columns(self, num_positions: int) -> int:
    """Returns a block's width, a multiple of MIN_COLUMNS and at least that.

    Args:
      num_positions: positions of a chunk, in all rows of a device.
    """
    size = self.logits // max(num_positions, 1)
    return max(size // MIN_COLUMNS, 1) * MIN_COLUMNS


# 4 MiB of float32, about a core's share of the cache.
CPU = TileSizes(positions=256, logits=2**20)
# A tile of an accelerator may take this share of its memory, in float32. On an
# H200 256 MiB instead of 16 saved a tenth of a step's time: few large matmuls
# instead of many small ones.
_SHARE_OF_MEMORY = 1 / 512
_LEAST_SIDE = 2048


def tile_sizes() -> TileSizes:
  """Returns the tile sizes of the device that the program is compiled for.

  They follow from the kind of device and not from what is free on it, so that a
  run repeats its bits on a device that other programs use too.
  """
  if active_mesh.platform() == "cpu":
    return CPU
  logits = compat.device_memory() * _SHARE_OF_MEMORY / 4
  side = 2 ** int(math.log2(max(logits, 1.0)) / 2)
  side = max(side, _LEAST_SIDE)
  return TileSizes(positions=side, logits=side * side)


def constrain(x: jax.Array, *axes: Any) -> jax.Array:
  """Constrains x to be sharded over mesh axes.

  Args:
    x: array.
    axes: name, names or None for each axis of x. Names that the mesh lacks, and
      those that do not divide the axis, are ignored.

  Returns:
    x.
  """
  shape = active_mesh.free_axes()
  if math.prod(shape.values()) == 1:
    return x
  spec = []
  for size, axis in zip(x.shape, axes, strict=True):
    names = (axis,) if isinstance(axis, str) else axis or ()
    names = tuple(name for name in names if name in shape)
    divides = size % math.prod(shape[name] for name in names) == 0
    spec.append(names if names and divides else None)
  return jax.lax.with_sharding_constraint(x, PartitionSpec(*spec))


def by_row_shard(x: jax.Array, *axes: Any) -> jax.Array:
  """Reshapes [R, S, ...] to [N, R / N, S, ...], for N shards of the rows.

  Axis N is sharded as rows are, those after S over `axes`, see `constrain`.
  """
  shards = x.reshape(active_mesh.num_row_shards(len(x)), -1, *x.shape[1:])
  return constrain(shards, ROW_AXES, None, None, *axes)


class VocabularyBlocks:
  """Blocks of the vocabulary, each with columns from every device's shard.

  The kernel [D, V] is viewed as [D, P, V / P], for P devices on the mesh axis
  `tensor`; P = 1 if they do not divide V. A block is `size` columns of all P
  shards; the last block may be narrower.
  """

  def __init__(self, readout: Readout, targets: jax.Array):
    """Chooses the width of a block.

    Args:
      readout: output projection.
      targets: i32 [C, R, S], the chunks of positions that blocks are used with.
    """
    vocab_size = readout.kernel.shape[1]
    shards = active_mesh.free_axes().get("tensor", 1)
    self.num_shards = shards if vocab_size % shards == 0 else 1
    self.shard_width = vocab_size // self.num_shards
    # The axis P is dropped on a CPU if P = 1: XLA:CPU copies the kernel for it.
    # XLA:TPU needs it, and writes a block's gather as an all-reduce without it.
    self.has_shard_axis = self.num_shards > 1 or active_mesh.platform() != "cpu"
    _, num_rows, length = targets.shape
    num_rows //= active_mesh.num_row_shards(num_rows)
    size = tile_sizes().columns(num_rows * length)
    num_blocks = -(-self.shard_width // size)
    # Blocks of equal width, if the number of blocks divides the shard.
    even = -(-self.shard_width // num_blocks)
    self.size = even if even * num_blocks == self.shard_width else size
    self.size = min(self.size, self.shard_width)

  def view(self, readout: Readout) -> Readout:
    """Views the kernel as [D, P, V / P] and the bias as [P, V / P].

    Without `has_shard_axis` it returns the readout as it is.
    """
    if not self.has_shard_axis:
      return readout
    return jax.tree.map(
      lambda x: x.reshape(*x.shape[:-1], self.num_shards, self.shard_width),
      readout,
    )

  def read_block(self, viewed: Readout, start: Any, size: int) -> Readout:
    """Reads a block of the vocabulary, and gathers it over `fsdp`.

    Args:
      viewed: from `view`.
      start: i32 [], first column within each shard.
      size: columns of each shard.

    Returns:
      Readout with a kernel [D, P, size] and a bias [P, size], if there is one.
    """

    def slice_columns(x):
      block = jax.lax.dynamic_slice_in_dim(x, start, size, axis=-1)
      return block if self.has_shard_axis else block[..., None, :]

    # Sliced before it is gathered: otherwise every block gathers the kernel.
    block = jax.tree.map(slice_columns, viewed)
    kernel = constrain(block.kernel, "fsdp", "tensor", None)
    return block.replace(
      kernel=constrain(kernel, None, "tensor", None),
      bias=None
      if block.bias is None
      else constrain(block.bias, "tensor", None),
    )

  def zeros(self, readout: Readout) -> Readout:
    """Returns float32 zeros in the shapes of `view`, the kernel's sharded."""
    viewed = jax.tree.map(
      lambda x: jnp.zeros(x.shape, jnp.float32), self.view(readout)
    )
    tensor = ("tensor",) if self.has_shard_axis else ()
    return Readout(constrain(viewed.kernel, "fsdp", *tensor, None), viewed.bias)

  def write_block(self, viewed: Readout, block: Readout, start: Any) -> Readout:
    """Returns `viewed` with a block written over the columns from `start` on.

    Args:
      viewed: from `view` or `zeros`.
      block: kernel [D, P, size], and a bias [P, size] or None.
      start: i32 [], first column within each shard.
    """
    return jax.tree.map(
      lambda total, x: jax.lax.dynamic_update_slice_in_dim(
        total, x.reshape(*total.shape[:-1], x.shape[-1]), start, total.ndim - 1
      ),
      viewed,
      block,
    )

  def scan(
    self, body: Callable[..., Any], carry: Any, *readouts: Readout | None
  ) -> Any:
    """Loops over the blocks of the vocabulary.

    carry = body(carry, start, ids, *blocks) for each block of columns.

    Args:
      body: function of the carry, the block's first column within each shard,
        the token ids of its columns, i32 [P, size], and a block of each of
        `readouts`.
      carry: initial carry.
      readouts: output projections of the same shape; any may be None.

    Returns:
      The last carry.
    """
    viewed = [None if x is None else self.view(x) for x in readouts]
    shards = jnp.arange(self.num_shards, dtype=jnp.int32)[:, None]
    first_ids = shards * self.shard_width

    def visit(carry, start, size):
      blocks = [
        None if x is None else self.read_block(x, start, size) for x in viewed
      ]
      ids = first_ids + start + jnp.arange(size, dtype=jnp.int32)
      return body(carry, start, ids, *blocks)

    num_blocks, rest = divmod(self.shard_width, self.size)
    carry = jax.lax.fori_loop(
      0, num_blocks, lambda i, c: visit(c, i * self.size, self.size), carry
    )
    if rest:
      carry = visit(carry, self.shard_width - rest, rest)
    return carry
