"""Attention over packed rows: chooses the backend and shards it over a mesh."""

from collections.abc import Callable
import functools
import logging
import math
from typing import Any

import flax.struct
import jax
from jax.sharding import PartitionSpec

from dpo_jax.models.attention import blockwise, splash, triton
from dpo_jax.models.attention.dense import attend
from dpo_jax.models.attention.masks import in_window, shared_prompt_mask
from dpo_jax.parallel import active_mesh

_LOG = logging.getLogger(__name__)

# Tokens of a block of the "xla" backend. On a CPU, small blocks fit short
# groups closely, and large blocks keep all cores busy.
_CPU_BLOCKS = (64, 128, 256, 512)
# Measured: groups of 340, 3,072 and 12,288 tokens are fastest in blocks of 64,
# 256 and 512.
_BLOCKS_PER_GROUP = 12
_ACCELERATOR_BLOCK = 256


@flax.struct.dataclass
class Rows:
  """Packed rows as attention reads them; made once for all layers.

  Attributes:
    positions: i32 [R, T], position of a token in its own prompt + response.
    segments: i32 [R, T], 0 is padding.
    branches: i32 [R, T], 0 in a prompt, k + 1 in the k-th response.
    mask: bool [R, T, T], see `shared_prompt_mask`; for "dense".
    blocks: the rows in blocks; for "xla".
    backend: one of ATTENTION_BACKENDS except "auto".
  """

  positions: jax.Array
  segments: jax.Array
  branches: jax.Array
  mask: jax.Array | None
  blocks: blockwise.Blocks | None
  backend: str = flax.struct.field(pytree_node=False)


def check_backend(backend: str, head_dim: int) -> None:
  """Checks that a backend can run on the platform of the active mesh.

  Warns where "auto" takes a slow one on a GPU.

  Args:
    backend: one of config.ATTENTION_BACKENDS.
    head_dim: channels of a head.

  Raises:
    ValueError: it cannot.
  """
  platform = active_mesh.platform()
  if backend == "splash" and platform != "tpu":
    raise ValueError(
      f"policy.attention='splash' needs a TPU; this is a {platform}. Set"
      " policy.attention='auto'"
    )
  if backend not in ("auto", "triton"):
    return
  obstacle = triton.obstacle(head_dim)
  if obstacle and backend == "triton":
    raise ValueError(
      f"policy.attention='triton' cannot run: {obstacle}. Set"
      " policy.attention='auto'"
    )
  if obstacle and platform == "gpu":
    _LOG.warning(
      "attention runs in blocks of XLA, which is slower, without the kernel"
      " 'triton': %s",
      obstacle,
    )


def make_rows(
  positions: jax.Array,
  segments: jax.Array,
  branches: jax.Array,
  *,
  head_dim: int,
  backend: str = "auto",
  groups_per_row: int = 1,
) -> Rows:
  """Prepares rows for `attend_rows`.

  Args:
    positions: i32 [R, T], see `types.Batch`.
    segments: i32 [R, T].
    branches: i32 [R, T].
    head_dim: channels of a head, on which "auto" depends.
    backend: one of config.ATTENTION_BACKENDS. "dense" holds a mask of T x T;
      "xla" works in blocks; "splash" is the TPU's kernel, "triton" that of
      NVIDIA GPUs, interpreted elsewhere. "auto" is splash on a TPU and triton
      on a GPU that can run it, see `check_backend`; elsewhere it is dense for
      rows of up to two blocks and xla for longer rows.
    groups_per_row: groups that a row has room for, up to twice the number that
      it holds; used only to choose the size of blocks.

  Returns:
    Argument of `attend_rows`.
  """
  length = positions.shape[1]
  size = _block_size(length, groups_per_row)
  if backend == "auto":
    backend = _choose_backend(length, size, head_dim)
  mask = blocks = None
  if backend == "dense":
    mask = shared_prompt_mask(segments, branches)
  elif backend == "xla":
    blocks = blockwise.make_blocks(positions, segments, branches, size)
  return Rows(positions, segments, branches, mask, blocks, backend)


def _choose_backend(length: int, size: int, head_dim: int) -> str:
  """Returns what "auto" is for rows of `length` tokens in blocks of `size`."""
  platform = active_mesh.platform()
  if platform == "tpu":
    return "splash"
  if platform == "gpu" and not triton.obstacle(head_dim):
    return "triton"
  return "dense" if length <= 2 * size else "xla"


def _block_size(length: int, groups_per_row: int) -> int:
  """Returns the tokens of a block of the "xla" backend."""
  if active_mesh.platform() != "cpu":
    return _ACCELERATOR_BLOCK
  most = max(length // groups_per_row // _BLOCKS_PER_GROUP, _CPU_BLOCKS[0])
  sizes = [size for size in _CPU_BLOCKS if size <= most]
  # The axis `context` shards rows between blocks only, see `_context_shard`.
  num_shards = active_mesh.free_axes().get("context", 1)
  dividing = [x for x in sizes if length % (num_shards * x) == 0]
  return max(dividing if num_shards > 1 and dividing else sizes)


def attend_rows(
  queries: jax.Array,
  keys: jax.Array,
  values: jax.Array,
  rows: Rows,
  *,
  window: jax.Array | None,
  scale: float,
  soft_cap: float | None,
) -> jax.Array:
  """Computes attention over packed rows with shared prompts.

  Args:
    queries: [R, T, H, head_dim].
    keys: [R, T, num_kv_heads, head_dim].
    values: like keys.
    rows: from `make_rows`.
    window: i32 [], number of positions that a token sees, itself included,
      counted in `positions`, not in indices of the row; None is all.
    scale: factor of the scores.
    soft_cap: scores become soft_cap * tanh(scores / soft_cap); None: no cap.

  Returns:
    [R, T, H, head_dim] in the dtype of queries. Values at padding are finite
    and not specified.
  """
  settings = dict(scale=scale, soft_cap=soft_cap)
  if rows.backend == "dense":
    mask = rows.mask
    if window is not None:
      mask &= in_window(rows.positions, rows.positions, window)
    return attend(queries, keys, values, mask, **settings)
  kernels = {
    "xla": blockwise.attend_blocks,
    "splash": splash.attend_splash,
    "triton": triton.attend_triton,
  }
  labels = rows.blocks
  if rows.backend != "xla":
    labels = (rows.positions, rows.segments, rows.branches)
  return _on_each_device(
    functools.partial(kernels[rows.backend], **settings),
    queries,
    keys,
    values,
    labels,
    window,
    _context_shard(rows),
  )


def _context_shard(rows: Rows) -> int:
  """Returns the queries of a row on each device of the mesh axis `context`.

  0 means that every device takes all queries, because a shard would not be
  whole blocks.
  """
  size = active_mesh.free_axes().get("context", 1)
  length = rows.positions.shape[1]
  if size == 1 or length % size:
    return 0
  shard = length // size
  if rows.backend != "xla":
    kernel = {"splash": splash, "triton": triton}[rows.backend]
    return shard if kernel.is_divisible(shard) else 0
  return shard if shard % rows.blocks.positions.shape[2] == 0 else 0


def _on_each_device(
  kernel: Callable[..., jax.Array],
  queries: jax.Array,
  keys: jax.Array,
  values: jax.Array,
  labels: Any,
  window: jax.Array | None,
  context_shard: int,
) -> jax.Array:
  """Runs a kernel on the rows, heads and queries of each device.

  Explicit, because the partitioner does not support loops whose length depends
  on the data. Each device sees all keys of its rows and heads.

  Args:
    kernel: function as `attend_blocks`, with its settings bound.
    queries, keys, values, window: see `attend_rows`.
    labels: labels or blocks of rows, as the kernel takes them.
    context_shard: queries of a row on a device, see `_context_shard`; 0: all.
  """
  sizes = active_mesh.free_axes()
  if math.prod(sizes.values()) == 1:
    return kernel(queries, keys, values, labels, window=window)
  axes = tuple(name for name in active_mesh.ROW_AXES if name in sizes)
  if queries.shape[0] % math.prod(sizes[name] for name in axes):
    axes = ()  # few rows, as in a test: every device takes all
  heads = "tensor" if keys.shape[2] % sizes.get("tensor", 1) == 0 else None
  if "tensor" not in sizes:
    heads = None
  by_rows = PartitionSpec(axes or None)
  whole = PartitionSpec(axes or None, None, heads)
  split = PartitionSpec(
    axes or None, "context" if context_shard else None, heads
  )

  def on_device(queries, keys, values, labels, window):
    first = 0
    if context_shard:
      first = jax.lax.axis_index("context") * context_shard
    return kernel(
      queries, keys, values, labels, window=window, first_query=first
    )

  return jax.shard_map(
    on_device,
    in_specs=(split, whole, whole, by_rows, PartitionSpec()),
    out_specs=split,
    axis_names=set(sizes),
    check_vma=False,
  )(queries, keys, values, labels, window)
