"""Attention over packed rows by the TPU's splash kernel, block-sparse.

A token sees two intervals of its row: its prompt, and its own prompt or
response up to itself. The kernel runs once for each interval. An interval's
ends travel in the kernel's one integer per query, 16 bits each, so no mask
exists in memory. Blocks that no interval touches are skipped.

  forward:
    for interval in (own, prompt):                # splash kernel, by queries
      for query block in row:
        for key block that the interval touches:
          out_i, lse_i = softmax over the keys of the interval
    lse = logaddexp(lse_own, lse_prompt)          # log-sum-exp
    out = out_own * exp(lse_own - lse) + out_prompt * exp(lse_prompt - lse)
  backward, with delta = sum(out * dout):
    for interval in (own, prompt):                # splash kernel, by keys
      p  = exp(scores - lse)                      # lse of both intervals
      ds = p * (dout @ v.T - delta)
      dq += ds @ k;  dk += ds.T @ q;  dv += p.T @ dout
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

from dpo_jax.models.attention.masks import Labels, intervals
from dpo_jax.models.config import ATTENDED
from dpo_jax.system import compat

# Tokens of a query block and of a key block.
BLOCK = 512
_LANES = 128
_MAX_LENGTH = 2**15
_MASKED = float(kernel_lib.DEFAULT_MASK_VALUE)


def _is_inside(packed: jax.Array, indices: jax.Array) -> jax.Array:
  """Returns whether a key is in the interval that a query's integer holds.

  Args:
    packed: i32, first << 16 | end of the interval; the end is not included.
    indices: i32, index of the key in its row.
  """
  return (indices >= packed >> 16) & (indices < packed & 0xFFFF)


def _mask_infos(
  interval: jax.Array, size: int, num_key_blocks: int
) -> tuple[Any, Any]:
  """Returns the kernel's tables for the passes by queries and by keys.

  Args:
    interval: i32 [T, 2], first and end of what each query of a row sees.
    size: tokens of a block.
    num_key_blocks: blocks of keys in the row.
  """
  blocks = interval.reshape(-1, size, 2)
  is_empty = blocks[..., 0] >= blocks[..., 1]
  first = jnp.where(is_empty, _MAX_LENGTH, blocks[..., 0]).min(1)
  end = jnp.where(is_empty, 0, blocks[..., 1]).max(1)
  edges = jnp.arange(num_key_blocks, dtype=jnp.int32) * size
  # Key blocks between the first and the last that a query of the block needs.
  is_needed = (edges < end[:, None]) & (edges + size > first[:, None])

  def info(axis):
    index = jax.lax.broadcasted_iota(jnp.int32, is_needed.shape, axis)
    # A skipped step repeats the block before, so that nothing is fetched.
    fetched = jax.lax.cummax(jnp.where(is_needed, index, 0), axis=axis)
    return mask_info_lib.MaskInfo(
      data_next=fetched[None],
      mask_next=None,
      block_mask=is_needed.astype(jnp.int32)[None],
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
  # A query without a key in its prompt has a log-sum-exp of masked scores.
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


def _attend_bwd(size, soft_cap, interpret, saved, out_gradient):
  queries, keys, values, infos, out, lse = saved
  settings = _settings(size, soft_cap, interpret)
  own, prompt = (
    compat.splash_backward(
      interval, queries, keys, values, out, lse, out_gradient, **settings
    )
    for interval in infos
  )
  return *(a + b for a, b in zip(own, prompt, strict=True)), None


_attend.defvjp(_attend_fwd, _attend_bwd)


def is_divisible(length: int) -> bool:
  """Returns whether blocks divide a slice of `length` queries of a row."""
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
  """Computes `attention.attend_rows` for the rows and heads of one device.

  Queries may be a slice of each row: the tokens from index `first_query` on, as
  many as `is_divisible` accepts. Keys, values and labels cover whole rows. A
  block of the kernel has at most `block` tokens. With `interpret` the kernel
  runs without a TPU.

  Raises:
    ValueError: rows of more than 32,768 tokens, once padded to whole blocks.
  """
  length, num_keys = queries.shape[1], keys.shape[1]
  # A block of up to `block` tokens, but no longer than the padded row. Slices
  # of rows are not padded, so blocks must divide them.
  size = min(block, -(-length // _LANES) * _LANES)
  if length < num_keys:
    sizes = range(_LANES, size + 1, _LANES)
    size = max(x for x in sizes if length % x == 0)
  padding = -num_keys % size
  if num_keys + padding > _MAX_LENGTH:
    raise ValueError(
      f"policy.attention='splash' supports rows of up to {_MAX_LENGTH} tokens;"
      f" got {num_keys}. Lower data.row_tokens, or set policy.attention='xla'"
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
