"""Attention of packed rows, a block at a time, without what the mask empties.

The memory of a row is linear in its length: scores of one block of queries (on
a GPU of a fixed number of them) and one of keys exist at a time, and the
backward pass computes them again (Dao et al. 2022, arXiv:2205.14135). Which
blocks of keys a block of queries needs follows from where its first token
stands: what it sees lies in that token's prompt, and from the start of that
token's own prompt or response on. These are two ranges, so that the responses
before it in its group, and all other groups, cost nothing.
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

# Of the blocks of queries that take their steps together on a GPU, whose
# processors one alone would leave idle: 128 MiB of float32, of which the
# backward pass holds about three.
_SCORES_OF_TURN = 2**25


@flax.struct.dataclass
class Blocks:
  """Rows cut into N blocks of `size` tokens, T padded to N * size.

  Attributes:
    positions: i32 [R, N, size].
    segments: i32 [R, N, size], 0 where padded.
    branches: i32 [R, N, size].
    starts: i32 [R, N], index of the first token of the prompt or response
      that a block begins in.
    prompt_starts: i32 [R, N], likewise of its prompt.
    prompt_lengths: i32 [R, N]; 0 where the block begins in the prompt.
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
  """Cuts rows: i32 [R, T] each, see `types.Batch`."""
  length = positions.shape[1]
  num_blocks = -(-length // size)

  def cut(x):
    x = jnp.pad(x, ((0, 0), (0, num_blocks * size - length)))
    return x.reshape(x.shape[0], num_blocks, size)

  starts = start_indices(segments, branches)
  # A response goes on from its prompt, so its first position is the length.
  prompt_lengths = jnp.take_along_axis(positions, starts, 1)
  prompt_lengths = jnp.where(branches > 0, prompt_lengths, 0)
  first = slice(None, None, size)
  return Blocks(
    cut(positions),
    cut(segments),
    cut(branches),
    starts[:, first],
    start_indices(segments)[:, first],
    prompt_lengths[:, first],
  )


def key_blocks(
  blocks: Blocks, window: jax.Array | None
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
  """The two ranges of blocks of keys that a block of queries needs.

  Args:
    blocks: from `make_blocks`.
    window: i32 [], see `attention.attend_rows`, or None.

  Returns:
    (first, number) of the range in the prompt, then of the range from the
    block's own response on: i32 [R, N] each. They do not overlap.
  """
  num_blocks, size = blocks.positions.shape[1:]
  here = jnp.arange(num_blocks, dtype=jnp.int32)
  starts = blocks.starts
  prompt_starts = blocks.prompt_starts
  prompt_ends = prompt_starts + blocks.prompt_lengths
  if window is not None:
    starts = jnp.maximum(starts, here * size - (window - 1))
    # The lowest position that a token of this segment has in the block: a
    # response that begins in it begins where the prompt ends.
    first, last = blocks.positions[..., 0], blocks.branches[..., -1]
    goes_on = (blocks.segments[..., 0] == blocks.segments[..., -1]) & (
      blocks.branches[..., 0] == last
    )
    lowest = jnp.where(goes_on, first, blocks.prompt_lengths)
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
  """As `attention.attend_rows`; padding gets zeros.

  The queries may be a part of each row, whole blocks of it from the place
  `first_query` on; keys, values and blocks are of whole rows.
  """
  num_rows, length, num_heads, head_dim = queries.shape
  num_blocks, size = blocks.positions.shape[1:]
  num_query_blocks = -(-length // size)
  num_kv_heads = keys.shape[2]

  def cut(x):
    """[R, T, H, d] -> [R * N, num_kv_heads, H / num_kv_heads * size, d]."""
    x = jnp.pad(x, ((0, 0), (0, -x.shape[1] % size), (0, 0), (0, 0)))
    x = x.reshape(-1, size, num_kv_heads, x.shape[2] // num_kv_heads, head_dim)
    x = jnp.transpose(x, (0, 2, 3, 1, 4))
    return x.reshape(*x.shape[:2], -1, head_dim)

  def of_queries(x):
    """[R, N, ...] -> those of the queries' blocks, rows one by one."""
    x = jax.lax.dynamic_slice_in_dim(
      x, first_query // size, num_query_blocks, axis=1
    )
    return x.reshape(-1, *x.shape[2:])

  first_prompt, in_prompt, first_own, own = key_blocks(blocks, window)
  # Rows one behind the other: a block's number is that of all rows' blocks.
  offsets = jnp.arange(num_rows, dtype=jnp.int32)[:, None] * num_blocks
  ranges = (first_prompt + offsets, in_prompt, first_own + offsets, own)
  labels = (blocks.positions, blocks.segments, blocks.branches)
  out = _attend(
    cut(queries),
    cut(keys),
    cut(values),
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


def _num_lanes(queries: jax.Array, size: int) -> int:
  """How many of the blocks of queries, [N, ...], take their steps together:
  a lane each, a turn for all lanes."""
  if active_mesh.platform() != "gpu":
    return 1
  num_blocks, num_kv_heads, num_lines, _ = queries.shape
  most = max(_SCORES_OF_TURN // (num_kv_heads * num_lines * size), 1)
  num_turns = -(-num_blocks // most)
  return -(-num_blocks // num_turns)


def _in_turns(x: jax.Array, lanes: int) -> jax.Array:
  """[N, ...] -> [turns, lanes, ...], zeros behind the N-th: no steps."""
  x = jnp.pad(x, ((0, -len(x) % lanes), *[(0, 0)] * (x.ndim - 1)))
  return x.reshape(-1, lanes, *x.shape[1:])


def _num_steps(wanted: Any) -> jax.Array:
  """Blocks of keys that a block of queries needs."""
  (_, in_prompt, _, own), _ = wanted
  return in_prompt + own


def _pick(ranges: Any, step: jax.Array) -> jax.Array:
  """The step-th block of keys of two ranges."""
  first_prompt, in_prompt, first_own, _ = ranges
  return jnp.where(
    step < in_prompt, first_prompt + step, first_own + step - in_prompt
  )


def _visible(
  query_labels: Any, key_labels: Any, window: jax.Array | None
) -> jax.Array:
  """bool [size, size]: see `attention.shared_prompt_mask`."""
  positions, segments, branches = (x[:, None] for x in query_labels)
  key_positions, key_segments, key_branches = (x[None] for x in key_labels)
  seen = (segments == key_segments) & (segments > 0)
  seen &= (branches == key_branches) | (key_branches == 0)
  seen &= key_positions <= positions
  if window is not None:
    seen &= positions - key_positions < window
  return seen


_product = functools.partial(jnp.einsum, preferred_element_type=jnp.float32)


def _scores(queries, keys, seen, scale, soft_cap):
  """Masked scores f32 [h, g * size, size], and what the cap's slope is of."""
  raw = scale * _product("hqd,hkd->hqk", queries, keys)
  capped = raw if soft_cap is None else soft_cap * jnp.tanh(raw / soft_cap)
  groups = queries.shape[1] // seen.shape[0]
  seen = jnp.tile(seen, (groups, 1))[None]
  return jnp.where(seen, capped, MASKED), seen


@functools.partial(jax.custom_vjp, nondiff_argnums=(6, 7))
def _attend(queries, keys, values, wanted, labels, window, scale, soft_cap):
  return _forward(
    queries, keys, values, wanted, labels, window, scale, soft_cap
  )[0]


def _forward(queries, keys, values, wanted, labels, window, scale, soft_cap):
  """Outputs like queries, and the log of each softmax's sum, f32.

  `wanted` is of each block of queries: its ranges of keys, and its labels.
  """

  def one_block(scanned):
    query, wanted = scanned
    ranges, query_labels = wanted

    def add(step, carry):
      peak, total, out = carry
      place = _pick(ranges, step)
      seen = _visible(query_labels, [x[place] for x in labels], window)
      scores, seen = _scores(query, keys[place], seen, scale, soft_cap)
      new_peak = jnp.maximum(peak, scores.max(-1))
      weights = jnp.where(seen, jnp.exp(scores - new_peak[..., None]), 0.0)
      shrink = jnp.exp(peak - new_peak)
      total = total * shrink + weights.sum(-1)
      out = out * shrink[..., None] + _product(
        "hqk,hkd->hqd", weights.astype(values.dtype), values[place]
      )
      return new_peak, total, out

    lines = query.shape[:-1]
    carry = (
      jnp.full(lines, MASKED, jnp.float32),
      jnp.zeros(lines, jnp.float32),
      jnp.zeros(query.shape, jnp.float32),
    )
    peak, total, out = jax.lax.fori_loop(0, _num_steps(wanted), add, carry)
    total = jnp.where(total > 0.0, total, 1.0)  # padding sees nothing
    out = (out / total[..., None]).astype(query.dtype)
    return out, peak + jnp.log(total)

  lanes = _num_lanes(queries, keys.shape[2])
  if lanes == 1:
    return jax.lax.map(one_block, (queries, wanted))
  # A turn lasts as long as its longest lane.
  order = jnp.argsort(_num_steps(wanted))
  sorted_blocks = jax.tree.map(lambda x: x[order], (queries, wanted))
  done = jax.lax.map(one_block, sorted_blocks, batch_size=lanes)
  return jax.tree.map(lambda x: x[jnp.argsort(order)], done)


def _attend_fwd(queries, keys, values, wanted, labels, window, scale, cap):
  out, lse = _forward(queries, keys, values, wanted, labels, window, scale, cap)
  out, lse = checkpoint_name((out, lse), ATTENDED)
  return out, (queries, keys, values, wanted, labels, window, out, lse)


def _attend_bwd(scale, soft_cap, saved, out_gradient):
  queries, keys, values, wanted, labels, window, out, lse = saved
  # What each line's weights sum to, weighed by their own gradients.
  delta = jnp.sum(
    out.astype(jnp.float32) * out_gradient.astype(jnp.float32), -1
  )

  def differentiate(step, query, pull, line_lse, line_delta, wanted):
    """What a block of queries and its step-th block of keys add to the
    gradients of the queries, and of those keys and values at `place`."""
    ranges, query_labels = wanted
    place = _pick(ranges, step)
    key, value = keys[place], values[place]
    seen = _visible(query_labels, [x[place] for x in labels], window)
    scores, seen = _scores(query, key, seen, scale, soft_cap)
    weights = jnp.where(seen, jnp.exp(scores - line_lse[..., None]), 0.0)
    slope = weights * (
      _product("hqd,hkd->hqk", pull, value) - line_delta[..., None]
    )
    if soft_cap is not None:
      slope *= jnp.where(seen, 1.0 - jnp.square(scores / soft_cap), 0.0)
    slope = (scale * slope).astype(query.dtype)
    weights = weights.astype(query.dtype)
    return place, (
      _product("hqk,hkd->hqd", slope, key),
      _product("hqk,hqd->hkd", slope, query),
      _product("hqk,hqd->hkd", weights, pull),
    )

  def in_lane(step, *block):
    """Likewise, and nothing from a lane that is at its end."""
    place, parts = differentiate(step, *block)
    is_wanted = step < _num_steps(block[-1])
    return place, jax.tree.map(lambda x: jnp.where(is_wanted, x, 0.0), parts)

  lanes = _num_lanes(queries, keys.shape[2])
  step_of_turn = differentiate
  if lanes > 1:
    step_of_turn = jax.vmap(in_lane, in_axes=(None, 0, 0, 0, 0, 0))

  def one_turn(gradients, blocks):
    def add(step, carry):
      query_gradient, key_gradient, value_gradient = carry
      place, (of_query, of_key, of_value) = step_of_turn(step, *blocks)
      return (
        query_gradient + of_query,
        key_gradient.at[place].add(of_key),
        value_gradient.at[place].add(of_value),
      )

    num_steps = _num_steps(blocks[-1]).max()
    carry = (jnp.zeros(blocks[0].shape, jnp.float32), *gradients)
    query_gradient, *gradients = jax.lax.fori_loop(0, num_steps, add, carry)
    return tuple(gradients), query_gradient.astype(queries.dtype)

  zeros = tuple(jnp.zeros(x.shape, jnp.float32) for x in (keys, values))
  blocks = (queries, out_gradient, lse, delta, wanted)
  if lanes > 1:
    order = jnp.argsort(_num_steps(wanted))
    blocks = jax.tree.map(lambda x: _in_turns(x[order], lanes), blocks)
  (key_gradient, value_gradient), query_gradient = jax.lax.scan(
    one_turn, zeros, blocks
  )
  if lanes > 1:
    query_gradient = query_gradient.reshape(-1, *queries.shape[1:])
    query_gradient = query_gradient[jnp.argsort(order)]
  return (
    query_gradient,
    key_gradient.astype(keys.dtype),
    value_gradient.astype(values.dtype),
    None,
    None,
    None,
  )


_attend.defvjp(_attend_fwd, _attend_bwd)
