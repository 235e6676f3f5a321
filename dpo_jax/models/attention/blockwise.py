"""Blockwise attention over packed rows that skips fully masked blocks.

Memory is linear in the length of a row: scores exist for one block of queries
and one of keys at a time (on a GPU for several blocks of queries), and the
backward pass recomputes them (Dao et al. 2022, arXiv:2205.14135).

The keys that a query block needs follow from its first token: they are in that
token's prompt, or from the start of that token's own prompt or response on.
These are two ranges, so other groups and earlier responses cost nothing.

  forward:
    for query block in row:
      m, s, out = lowest, 0, 0                     # running_max, running_sum
      for key block in its two ranges:
        scores = mask(scale * q @ k.T)
        new_m  = max(m, max(scores))
        p      = exp(scores - new_m)
        s      = s * exp(m - new_m) + sum(p)       # rescale
        out    = out * exp(m - new_m) + p @ v
        m      = new_m
      out = out / s;  lse = m + log(s)             # log-sum-exp
  backward, with delta = sum(out * dout):
    for query block in row:
      for key block in its two ranges:
        p  = exp(mask(scale * q @ k.T) - lse)      # recomputed
        ds = scale * p * (dout @ v.T - delta)
        dq += ds @ k;  dk[block] += ds.T @ q;  dv[block] += p.T @ dout
"""

import functools
from typing import Any

import flax.struct
import jax
from jax.ad_checkpoint import checkpoint_name
import jax.numpy as jnp

from dpo_jax.models.attention.masks import MASKED, start_indices
from dpo_jax.models.config import ATTENDED
from dpo_jax.parallel import active_mesh

# Maximum scores of the query blocks that a GPU processes in parallel; a single
# block would leave it idle. 128 MiB of float32, of which the backward pass
# holds about three copies.
_MAX_PARALLEL_SCORES = 2**25

# Ranges of key blocks, see `key_blocks`, and labels of a query block.
Work = tuple[tuple[jax.Array, ...], tuple[jax.Array, ...]]


@flax.struct.dataclass
class Blocks:
  """Rows in N blocks of `size` tokens, T padded to N * size.

  Attributes:
    positions: i32 [R, N, size].
    segments: i32 [R, N, size], 0 where padded.
    branches: i32 [R, N, size].
    starts: i32 [R, N], index in the row at which the prompt or response of a
      block's first token starts.
    prompt_starts: i32 [R, N], index at which its prompt starts.
    prompt_lengths: i32 [R, N], length of its prompt; 0 if the block's first
      token is in the prompt.
  """

  positions: jax.Array
  segments: jax.Array
  branches: jax.Array
  starts: jax.Array
  prompt_starts: jax.Array
  prompt_lengths: jax.Array


def make_blocks(
  positions: jax.Array, segments: jax.Array, branches: jax.Array, size: int
) -> Blocks:
  """Groups the tokens of packed rows, i32 [R, T], into blocks of `size`."""
  length = positions.shape[1]
  num_blocks = -(-length // size)

  def split(x):
    x = jnp.pad(x, ((0, 0), (0, num_blocks * size - length)))
    return x.reshape(x.shape[0], num_blocks, size)

  starts = start_indices(segments, branches)
  # A response's first position is the length of its prompt.
  prompt_lengths = jnp.take_along_axis(positions, starts, 1)
  prompt_lengths = jnp.where(branches > 0, prompt_lengths, 0)
  first = slice(None, None, size)
  return Blocks(
    split(positions),
    split(segments),
    split(branches),
    starts[:, first],
    start_indices(segments)[:, first],
    prompt_lengths[:, first],
  )


def key_blocks(
  blocks: Blocks, window: jax.Array | None
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
  """Finds the two ranges of key blocks that each query block needs.

  Args:
    blocks: from `make_blocks`.
    window: i32 [], see `attention.attend_rows`, or None.

  Returns:
    Four arrays i32 [R, N]: first block and number of blocks in the prompt, then
    of those from the start of the first token's part to the block itself. A
    block in both counts in the second; padding has the number 0.
  """
  num_blocks, size = blocks.positions.shape[1:]
  here = jnp.arange(num_blocks, dtype=jnp.int32)
  starts = blocks.starts
  prompt_starts = blocks.prompt_starts
  prompt_ends = prompt_starts + blocks.prompt_lengths
  if window is not None:
    starts = jnp.maximum(starts, here * size - (window - 1))
    # Lowest position in the block of a token of the first token's segment: a
    # response that starts in the block starts at the prompt's length.
    first, last = blocks.positions[..., 0], blocks.branches[..., -1]
    is_one_part = (blocks.segments[..., 0] == blocks.segments[..., -1]) & (
      blocks.branches[..., 0] == last
    )
    lowest = jnp.where(is_one_part, first, blocks.prompt_lengths)
    prompt_starts += jnp.clip(lowest - (window - 1), 0, blocks.prompt_lengths)
  first_own = starts // size
  own = jnp.where((blocks.segments > 0).any(-1), here - first_own + 1, 0)
  first_prompt = prompt_starts // size
  last_prompt = jnp.minimum((prompt_ends - 1) // size, first_own - 1)
  has_prompt = (prompt_ends > prompt_starts) & (own > 0)
  in_prompt = jnp.where(
    has_prompt, jnp.maximum(last_prompt - first_prompt + 1, 0), 0
  )
  return first_prompt, in_prompt, first_own, own


def attend_blocks(
  queries: jax.Array,
  keys: jax.Array,
  values: jax.Array,
  blocks: Blocks,
  *,
  window: jax.Array | None,
  scale: float,
  soft_cap: float | None,
  first_query: jax.Array | int = 0,
) -> jax.Array:
  """Computes `attention.attend_rows` by blocks; padding gets zeros.

  Queries may be a slice of each row: the tokens from index `first_query` on, a
  multiple of the block size. Keys, values and `blocks` cover whole rows.
  """
  num_rows, length, num_heads, head_dim = queries.shape
  num_blocks, size = blocks.positions.shape[1:]
  num_query_blocks = -(-length // size)
  num_kv_heads = keys.shape[2]

  def split(x):
    """Cuts [R, T, H, d] into [R * blocks, KV heads, H / KV heads * size, d]."""
    x = jnp.pad(x, ((0, 0), (0, -x.shape[1] % size), (0, 0), (0, 0)))
    x = x.reshape(-1, size, num_kv_heads, x.shape[2] // num_kv_heads, head_dim)
    x = jnp.transpose(x, (0, 2, 3, 1, 4))
    return x.reshape(*x.shape[:2], -1, head_dim)

  def of_queries(x):
    """Takes the query blocks of rows: [R, N, ...] -> [R * blocks, ...]."""
    x = jax.lax.dynamic_slice_in_dim(
      x, first_query // size, num_query_blocks, axis=1
    )
    return x.reshape(-1, *x.shape[2:])

  first_prompt, in_prompt, first_own, own = key_blocks(blocks, window)
  # Blocks are numbered through all rows.
  offsets = jnp.arange(num_rows, dtype=jnp.int32)[:, None] * num_blocks
  ranges = (first_prompt + offsets, in_prompt, first_own + offsets, own)
  labels = (blocks.positions, blocks.segments, blocks.branches)
  out = _attend(
    split(queries),
    split(keys),
    split(values),
    jax.tree.map(of_queries, (ranges, labels)),
    tuple(x.reshape(-1, size) for x in labels),
    window,
    scale,
    soft_cap,
  )
  out = out.reshape(
    num_rows, num_query_blocks, num_kv_heads, -1, size, head_dim
  )
  out = jnp.transpose(out, (0, 1, 4, 2, 3, 5))
  out = out.reshape(num_rows, num_query_blocks * size, num_heads, head_dim)
  return out[:, :length]


def _num_parallel(queries: jax.Array, size: int) -> int:
  """Returns how many of the query blocks [N, ...] are processed in parallel."""
  if active_mesh.platform() != "gpu":
    return 1
  num_blocks, num_kv_heads, num_lines, _ = queries.shape
  most = max(_MAX_PARALLEL_SCORES // (num_kv_heads * num_lines * size), 1)
  num_batches = -(-num_blocks // most)
  return -(-num_blocks // num_batches)


def _in_batches(x: jax.Array, size: int) -> jax.Array:
  """Reshapes [N, ...] to [batches, size, ...], padded by zeros."""
  x = jnp.pad(x, ((0, -len(x) % size), *[(0, 0)] * (x.ndim - 1)))
  return x.reshape(-1, size, *x.shape[1:])


def _num_key_blocks(work: Work) -> jax.Array:
  """Returns the number of key blocks that a query block needs."""
  (_, in_prompt, _, own), _ = work
  return in_prompt + own


def _key_block(ranges: tuple[jax.Array, ...], step: jax.Array) -> jax.Array:
  """Returns the number of the key block at a step through the two ranges."""
  first_prompt, in_prompt, first_own, _ = ranges
  return jnp.where(
    step < in_prompt, first_prompt + step, first_own + step - in_prompt
  )


def _block_mask(
  query_labels: Any, key_labels: Any, window: jax.Array | None
) -> jax.Array:
  """Computes the mask of a block, bool [size, size]; padding sees nothing."""
  positions, segments, branches = (x[:, None] for x in query_labels)
  key_positions, key_segments, key_branches = (x[None] for x in key_labels)
  mask = (segments == key_segments) & (segments > 0)
  mask &= (branches == key_branches) | (key_branches == 0)
  mask &= key_positions <= positions
  if window is not None:
    mask &= positions - key_positions < window
  return mask


_product = functools.partial(jnp.einsum, preferred_element_type=jnp.float32)


def _scores(queries, keys, mask, scale, soft_cap):
  """Computes masked scores f32 [h, g * size, size], and the mask for all g."""
  raw = scale * _product("hqd,hkd->hqk", queries, keys)
  capped = raw if soft_cap is None else soft_cap * jnp.tanh(raw / soft_cap)
  groups = queries.shape[1] // mask.shape[0]
  mask = jnp.tile(mask, (groups, 1))[None]
  return jnp.where(mask, capped, MASKED), mask


@functools.partial(jax.custom_vjp, nondiff_argnums=(6, 7))
def _attend(queries, keys, values, work, labels, window, scale, soft_cap):
  return _forward(queries, keys, values, work, labels, window, scale, soft_cap)[
    0
  ]


def _forward(queries, keys, values, work, labels, window, scale, soft_cap):
  """Computes outputs like queries, and log-sum-exps f32."""

  def attend_block(scanned):
    query, work = scanned
    ranges, query_labels = work

    def add_key_block(step, carry):
      running_max, running_sum, out = carry
      block = _key_block(ranges, step)
      mask = _block_mask(query_labels, [x[block] for x in labels], window)
      scores, mask = _scores(query, keys[block], mask, scale, soft_cap)
      new_max = jnp.maximum(running_max, scores.max(-1))
      weights = jnp.where(mask, jnp.exp(scores - new_max[..., None]), 0.0)
      rescale = jnp.exp(running_max - new_max)
      running_sum = running_sum * rescale + weights.sum(-1)
      out = out * rescale[..., None] + _product(
        "hqk,hkd->hqd", weights.astype(values.dtype), values[block]
      )
      return new_max, running_sum, out

    lines = query.shape[:-1]
    carry = (
      jnp.full(lines, MASKED, jnp.float32),
      jnp.zeros(lines, jnp.float32),
      jnp.zeros(query.shape, jnp.float32),
    )
    running_max, running_sum, out = jax.lax.fori_loop(
      0, _num_key_blocks(work), add_key_block, carry
    )
    # The sum is 0 where a query is padding.
    running_sum = jnp.where(running_sum > 0.0, running_sum, 1.0)
    out = (out / running_sum[..., None]).astype(query.dtype)
    return out, running_max + jnp.log(running_sum)

  size = _num_parallel(queries, keys.shape[2])
  if size == 1:
    return jax.lax.map(attend_block, (queries, work))
  # Sorted, because a batch takes as long as its longest member.
  order = jnp.argsort(_num_key_blocks(work))
  sorted_blocks = jax.tree.map(lambda x: x[order], (queries, work))
  done = jax.lax.map(attend_block, sorted_blocks, batch_size=size)
  return jax.tree.map(lambda x: x[jnp.argsort(order)], done)


def _attend_fwd(queries, keys, values, work, labels, window, scale, soft_cap):
  out, lse = _forward(
    queries, keys, values, work, labels, window, scale, soft_cap
  )
  out, lse = checkpoint_name((out, lse), ATTENDED)
  return out, (queries, keys, values, work, labels, window, out, lse)


def _make_block_gradients(
  keys, values, labels, window, scale, soft_cap, *, is_parallel
):
  """Returns a function for the gradients of a query block and a key block.

  The function takes (step, query, out_gradient, lse, delta, work), and returns
  the number of the step-th key block and the gradients (query, key, value).
  With `is_parallel`, its arguments have a leading axis but for the step, and a
  query block with fewer key blocks than the step gets zeros.
  """

  def gradients(step, query, out_gradient, lse, delta, work):
    ranges, query_labels = work
    block = _key_block(ranges, step)
    key, value = keys[block], values[block]
    mask = _block_mask(query_labels, [x[block] for x in labels], window)
    scores, mask = _scores(query, key, mask, scale, soft_cap)
    weights = jnp.where(mask, jnp.exp(scores - lse[..., None]), 0.0)
    score_gradient = weights * (
      _product("hqd,hkd->hqk", out_gradient, value) - delta[..., None]
    )
    if soft_cap is not None:
      slope = jnp.where(mask, 1.0 - jnp.square(scores / soft_cap), 0.0)
      score_gradient *= slope
    score_gradient = (scale * score_gradient).astype(query.dtype)
    weights = weights.astype(query.dtype)
    return block, (
      _product("hqk,hkd->hqd", score_gradient, key),
      _product("hqk,hqd->hkd", score_gradient, query),
      _product("hqk,hqd->hkd", weights, out_gradient),
    )

  def masked_gradients(step, *arguments):
    block, found = gradients(step, *arguments)
    is_needed = step < _num_key_blocks(arguments[-1])
    return block, jax.tree.map(lambda x: jnp.where(is_needed, x, 0.0), found)

  if not is_parallel:
    return gradients
  return jax.vmap(masked_gradients, in_axes=(None, 0, 0, 0, 0, 0))


def _attend_bwd(scale, soft_cap, saved, out_gradient):
  queries, keys, values, work, labels, window, out, lse = saved
  # Sum over the keys of weights times their gradients.
  delta = jnp.sum(
    out.astype(jnp.float32) * out_gradient.astype(jnp.float32), -1
  )
  size = _num_parallel(queries, keys.shape[2])
  block_gradients = _make_block_gradients(
    keys, values, labels, window, scale, soft_cap, is_parallel=size > 1
  )

  def visit_queries(gradients, arguments):
    def add_key_block(step, carry):
      query_gradient, key_gradient, value_gradient = carry
      block, (of_query, of_key, of_value) = block_gradients(step, *arguments)
      return (
        query_gradient + of_query,
        key_gradient.at[block].add(of_key),
        value_gradient.at[block].add(of_value),
      )

    num_steps = _num_key_blocks(arguments[-1]).max()
    carry = (jnp.zeros(arguments[0].shape, jnp.float32), *gradients)
    query_gradient, *gradients = jax.lax.fori_loop(
      0, num_steps, add_key_block, carry
    )
    return tuple(gradients), query_gradient.astype(queries.dtype)

  zeros = tuple(jnp.zeros(x.shape, jnp.float32) for x in (keys, values))
  arguments = (queries, out_gradient, lse, delta, work)
  if size > 1:
    order = jnp.argsort(_num_key_blocks(work))
    arguments = jax.tree.map(lambda x: _in_batches(x[order], size), arguments)
  (key_gradient, value_gradient), query_gradient = jax.lax.scan(
    visit_queries, zeros, arguments
  )
  if size > 1:
    query_gradient = query_gradient.reshape(-1, *queries.shape[1:])
    query_gradient = query_gradient[jnp.argsort(order)]
  key_gradient = key_gradient.astype(keys.dtype)
  value_gradient = value_gradient.astype(values.dtype)
  return query_gradient, key_gradient, value_gradient, None, None, None


_attend.defvjp(_attend_fwd, _attend_bwd)
