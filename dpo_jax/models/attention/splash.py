"""Attention of packed rows by the TPU's splash kernel, block-sparse.

What a token sees is two intervals of its row: of its prompt, and of its own
prompt or response up to itself. The kernel runs once for each; the two are
joined by their log-sum-exps, and the backward kernels, given the joined
output and log-sum-exp, compute each interval's share of the gradient. An
interval's ends travel in the kernel's one integer a query, 16 bits each, so
that no mask exists in memory; blocks that no interval touches are skipped.
"""

import functools
from typing import Any

import jax
from jax.ad_checkpoint import checkpoint_name
from jax.experimental.pallas.ops.tpu.splash_attention import (
  splash_attention_kernel as kernel_lib,
)
from jax.experimental.pallas.ops.tpu.splash_attention import (
  splash_attention_mask_info as mask_info_lib,
)
import jax.numpy as jnp

from dpo_jax.models.attention.masks import start_indices
from dpo_jax.models.config import ATTENDED
from dpo_jax.system import compat

# Tokens of a block, of queries and of keys.
BLOCK = 512
_LANES = 128
_LONGEST = 2**15
_MASKED = float(kernel_lib.DEFAULT_MASK_VALUE)

# (positions, segments, branches): i32 [R, T] each.
Labels = tuple[jax.Array, jax.Array, jax.Array]


def intervals(
  labels: Labels, window: jax.Array | None
) -> tuple[jax.Array, jax.Array]:
  """What each token of a row sees: [first, end) of its own prompt or
  response, then of its prompt.

  Args:
    labels: of one row, i32 [T] each.
    window: i32 [], see `attention.attend_rows`, or None.

  Returns:
    i32 [T, 2] each. Padding sees itself.
  """
  positions, segments, branches = labels
  places = jnp.arange(len(positions), dtype=jnp.int32)

  starts, prompt_starts = (
    start_indices(segments, branches),
    start_indices(segments),
  )
  # A response goes on from its prompt, so its first position is the length.
  prompt_ends = prompt_starts + jnp.where(branches > 0, positions[starts], 0)
  if window is not None:
    starts = jnp.maximum(starts, places - (window - 1))
    prompt_starts = jnp.clip(
      prompt_starts + positions - (window - 1), prompt_starts, prompt_ends
    )
  is_padding = segments == 0
  starts = jnp.where(is_padding, places, starts)
  prompt_ends = jnp.where(is_padding, prompt_starts, prompt_ends)
  return (
    jnp.stack([starts, places + 1], 1),
    jnp.stack([prompt_starts, prompt_ends], 1),
  )


def _is_inside(packed: jax.Array, places: jax.Array) -> jax.Array:
  """Whether a key's place is in the interval that a query's integer holds."""
  return (places >= packed >> 16) & (places < packed & 0xFFFF)


def _mask_infos(
  interval: jax.Array, size: int, num_key_blocks: int
) -> tuple[Any, Any]:
  """The kernel's tables for the passes over queries, and over keys."""
  blocks = interval.reshape(-1, size, 2)
  is_empty = blocks[..., 0] >= blocks[..., 1]
  first = jnp.where(is_empty, _LONGEST, blocks[..., 0]).min(1)
  end = jnp.where(is_empty, 0, blocks[..., 1]).max(1)
  edges = jnp.arange(num_key_blocks, dtype=jnp.int32) * size
  # A query's interval and the hull of its block's: no more than edges' worth.
  runs = (edges < end[:, None]) & (edges + size > first[:, None])

  def info(axis):
    index = jax.lax.broadcasted_iota(jnp.int32, runs.shape, axis)
    # A block that is skipped stays with the one before: nothing is fetched.
    fetched = jax.lax.cummax(jnp.where(runs, index, 0), axis=axis)
    return mask_info_lib.MaskInfo(
      data_next=fetched[None],
      mask_next=None,
      block_mask=runs.astype(jnp.int32)[None],
      partial_mask_blocks=None,
      q_sequence=(interval[:, 0] << 16) | interval[:, 1],
    )

  return info(1), info(0)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5, 6))
def _attend(queries, keys, values, infos, size, soft_cap, interpret):
  return _forward(queries, keys, values, infos, size, soft_cap, interpret)[0]


def _settings(size, soft_cap, interpret):
  block_sizes = kernel_lib.BlockSizes(
    block_q=size,
    block_kv=size,
    block_kv_compute=size,
    block_q_dkv=size,
    block_kv_dkv=size,
    block_kv_dkv_compute=size,
    block_q_dq=size,
    block_kv_dq=size,
  )
  return dict(
    block_sizes=block_sizes,
    mask_value=_MASKED,
    mask_function=_is_inside,
    soft_cap=soft_cap,
    interpret=interpret,
  )


def _forward(queries, keys, values, infos, size, soft_cap, interpret):
  settings = _settings(size, soft_cap, interpret)
  (own, own_lse), (prompt, prompt_lse) = (
    compat.splash_forward(by_queries, queries, keys, values, **settings)
    for by_queries, _ in infos
  )
  # A line that saw no key has a log-sum-exp of the mask, or of no block.
  has_prompt = prompt_lse > 0.5 * _MASKED
  prompt_lse = jnp.where(has_prompt, prompt_lse, _MASKED)
  lse = jnp.logaddexp(own_lse, prompt_lse)
  prompt = jnp.where(has_prompt[..., None], prompt.astype(jnp.float32), 0.0)
  out = own.astype(jnp.float32) * jnp.exp(own_lse - lse)[..., None]
  out += prompt * jnp.exp(prompt_lse - lse)[..., None]
  return out.astype(queries.dtype), lse


def _attend_fwd(queries, keys, values, infos, size, soft_cap, interpret):
  out, lse = _forward(queries, keys, values, infos, size, soft_cap, interpret)
  out, lse = checkpoint_name((out, lse), ATTENDED)
  return out, (queries, keys, values, infos, out, lse)


def _attend_bwd(size, soft_cap, interpret, saved, pull):
  queries, keys, values, infos, out, lse = saved
  settings = _settings(size, soft_cap, interpret)
  own, prompt = (
    compat.splash_backward(
      interval, queries, keys, values, out, lse, pull, **settings
    )
    for interval in infos
  )
  return *(a + b for a, b in zip(own, prompt, strict=True)), None


_attend.defvjp(_attend_fwd, _attend_bwd)


def is_cut_well(length: int) -> bool:
  """Whether a part of a row of this many queries is whole blocks."""
  return length % _LANES == 0


def attend_splash(
  queries: jax.Array,
  keys: jax.Array,
  values: jax.Array,
  labels: Labels,
  *,
  window: jax.Array | None,
  scale: float,
  soft_cap: float | None,
  first_query: jax.Array | int = 0,
  block: int = BLOCK,
  interpret: bool = False,
) -> jax.Array:
  """As `attention.attend_rows`, of the rows and heads of one device.

  The queries may be a part of each row that `is_cut_well` allows, from the
  place `first_query` on; keys, values and labels are of whole rows.

  Raises:
    ValueError: rows longer than 16 bits of an interval's end can say.
  """
  length, num_keys = queries.shape[1], keys.shape[1]
  # The largest block that rows of this length do not pad by much, and that
  # parts of rows do not pad at all.
  size = min(block, -(-length // _LANES) * _LANES)
  if length < num_keys:
    sizes = range(_LANES, size + 1, _LANES)
    size = max(x for x in sizes if length % x == 0)
  padding = -num_keys % size
  if num_keys + padding > _LONGEST:
    raise ValueError(
      f"policy.attention='splash' takes rows of up to {_LONGEST} tokens, and"
      f" they have {num_keys}: lower data.row_tokens, or set"
      " policy.attention='xla'"
    )

  def one_row(scanned):
    *arrays, row_labels = scanned
    row_labels = tuple(jnp.pad(x, (0, padding)) for x in row_labels)
    infos = tuple(
      _mask_infos(
        jax.lax.dynamic_slice_in_dim(
          interval, first_query, length + -length % size
        ),
        size,
        (num_keys + padding) // size,
      )
      for interval in intervals(row_labels, window)
    )
    arrays = [
      jnp.pad(x, ((0, -len(x) % size), (0, 0), (0, 0))).swapaxes(0, 1)
      for x in arrays
    ]
    out = _attend(*arrays, infos, size, soft_cap, interpret)
    return out.swapaxes(0, 1)[:length]

  scaled = (queries * scale).astype(queries.dtype)
  return jax.lax.map(one_row, (scaled, keys, values, labels))
