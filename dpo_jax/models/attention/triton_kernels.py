"""Kernels of attention in Pallas-Triton: forward, dq, dkv.

Everything in the kernel language is here. JAX deprecates Pallas' Triton backend
since 0.11, and `triton` says where the kernels run instead if it is missing.
"""

from collections.abc import Callable
import functools
import math
from typing import Any

import jax
from jax.experimental import pallas as pl
import jax.numpy as jnp

from dpo_jax.models.attention.triton_tiles import Settings, Tiles
from dpo_jax.models.attention.visits import Visits

try:
  from jax.experimental.pallas import triton as pallas_triton
except ImportError:  # a later jax
  pallas_triton = None

HAS_BACKEND = pallas_triton is not None

_LOG2_E = math.log2(math.e)
# Below any score, and finite: no difference is NaN. The maximum starts above
# it, so that a masked score has no weight where nothing was seen before.
_MASKED, _LOWEST = -1e30, -5e29
MIN_HEAD_DIM = 16  # of a matmul in Triton


# Float32 is multiplied as such, not rounded to TF32.
_dot = functools.partial(
  jnp.dot,
  preferred_element_type=jnp.float32,
  precision=jax.lax.Precision.HIGHEST,
)


def _scores(
  left: jax.Array, right: jax.Array, settings: Settings
) -> tuple[jax.Array, jax.Array | None]:
  """Computes scores of queries and keys, f32 [left, right], in base 2.

  Returns:
    Scores times log2(e), and the slope of the soft cap or None.
  """
  raw = _dot(left, right.T)
  cap = settings.soft_cap
  if cap is None:
    return raw * (settings.scale * _LOG2_E), None
  capped = jnp.tanh(raw * (settings.scale / cap))
  return capped * (cap * _LOG2_E), 1.0 - capped * capped


def _is_seen(spans: list[jax.Array], keys: jax.Array) -> jax.Array:
  """Returns whether keys are in `spans`, first and end of two intervals."""
  first, end, prompt_first, prompt_end = spans
  in_own = (keys >= first) & (keys < end)
  return in_own | ((keys >= prompt_first) & (keys < prompt_end))


def _visit(
  whole_ref: Any, masked_ref: Any, body: Callable[..., Any], carry: Any
) -> Any:
  """Computes carry = body(block, carry, is_masked) for each visit of a block.

  Args:
    whole_ref: i32 [W, 2], see `visits.Visits`.
    masked_ref: i32 [2 W, 2].
    body: function of the number of the visited block.
    carry: initial carry.
  """
  for ref, is_masked in ((whole_ref, False), (masked_ref, True)):
    ranges = [(ref[i, 0], ref[i, 1]) for i in range(ref.shape[0])]

    def step(i, carry, ranges=ranges, is_masked=is_masked):
      block, passed = ranges[0][0] + i, ranges[0][1]
      for first, count in ranges[1:]:
        block = jnp.where(i >= passed, first + i - passed, block)
        passed += count
      return body(block, carry, is_masked)

    count = sum(count for _, count in ranges)
    carry = jax.lax.fori_loop(0, count, step, carry)
  return carry


def _forward_kernel(
  whole_ref,
  masked_ref,
  spans_ref,
  queries_ref,
  keys_ref,
  values_ref,
  out_ref,
  lse_ref,
  *,
  settings: Settings,
):
  """Computes outputs and log-sum-exps of a block of queries of a head."""
  size = settings.kernels.forward.keys
  queries = queries_ref[...]
  spans = [spans_ref[i, :][:, None] for i in range(4)]

  def visit(block, carry, is_masked):
    running_max, running_sum, out = carry
    at = pl.ds(block * size, size)
    scores, _ = _scores(queries, keys_ref[at, :], settings)
    if is_masked:
      seen = _is_seen(spans, block * size + jnp.arange(size)[None])
      scores = jnp.where(seen, scores, _MASKED)
    new_max = jnp.maximum(running_max, scores.max(-1))
    weights = jnp.exp2(scores - new_max[:, None])
    rescale = jnp.exp2(running_max - new_max)
    values = values_ref[at, :]
    out = out * rescale[:, None] + _dot(weights.astype(values.dtype), values)
    return new_max, running_sum * rescale + weights.sum(-1), out

  num_queries = queries.shape[0]
  running_max, running_sum, out = _visit(
    whole_ref,
    masked_ref,
    visit,
    (
      jnp.full(num_queries, _LOWEST, jnp.float32),
      jnp.zeros(num_queries, jnp.float32),
      jnp.zeros(queries.shape, jnp.float32),
    ),
  )
  out_ref[...] = (out / running_sum[:, None]).astype(out_ref.dtype)
  lse_ref[...] = running_max + jnp.log2(running_sum)


def _dq_kernel(
  whole_ref,
  masked_ref,
  spans_ref,
  queries_ref,
  keys_ref,
  values_ref,
  dout_ref,
  lse_ref,
  delta_ref,
  dq_ref,
  *,
  settings: Settings,
):
  """Computes the gradient of a block of queries of a head."""
  size = settings.kernels.dq.keys
  queries, dout = queries_ref[...], dout_ref[...]
  lse, delta = lse_ref[...][:, None], delta_ref[...][:, None]
  spans = [spans_ref[i, :][:, None] for i in range(4)]

  def visit(block, dq, is_masked):
    at = pl.ds(block * size, size)
    keys = keys_ref[at, :]
    scores, slope = _scores(queries, keys, settings)
    weights = jnp.exp2(scores - lse)
    if is_masked:
      seen = _is_seen(spans, block * size + jnp.arange(size)[None])
      weights = jnp.where(seen, weights, 0.0)
    dscores = weights * (_dot(dout, values_ref[at, :].T) - delta)
    if slope is not None:
      dscores *= slope
    return dq + _dot(dscores.astype(keys.dtype), keys)

  dq = _visit(
    whole_ref, masked_ref, visit, jnp.zeros(queries.shape, jnp.float32)
  )
  dq_ref[...] = (settings.scale * dq).astype(dq_ref.dtype)


def _dkv_kernel(
  whole_ref,
  masked_ref,
  spans_ref,
  queries_ref,
  keys_ref,
  values_ref,
  dout_ref,
  lse_ref,
  delta_ref,
  dk_ref,
  dv_ref,
  *,
  settings: Settings,
):
  """Computes the gradients of a block of keys and values of a group of heads.

  Queries, their gradients and log-sum-exps have an axis of the group's heads.
  """
  tiles = settings.kernels.dkv
  keys, values = keys_ref[...], values_ref[...]
  indices = pl.program_id(0) * tiles.keys + jnp.arange(tiles.keys)[:, None]

  def visit(head, block, carry, is_masked):
    dk, dv = carry
    at = pl.ds(block * tiles.queries, tiles.queries)
    queries, dout = queries_ref[at, head, :], dout_ref[at, head, :]
    scores, slope = _scores(keys, queries, settings)
    weights = jnp.exp2(scores - lse_ref[head, at][None])
    if is_masked:
      spans = [spans_ref[i, at][None] for i in range(4)]
      weights = jnp.where(_is_seen(spans, indices), weights, 0.0)
    dv = dv + _dot(weights.astype(dout.dtype), dout)
    dscores = weights * (_dot(values, dout.T) - delta_ref[head, at][None])
    if slope is not None:
      dscores *= slope
    return dk + _dot(dscores.astype(queries.dtype), queries), dv

  def visit_head(head, carry):
    body = functools.partial(visit, head)
    return _visit(whole_ref, masked_ref, body, carry)

  zeros = jnp.zeros(keys.shape, jnp.float32)
  num_heads = queries_ref.shape[1]
  dk, dv = jax.lax.fori_loop(0, num_heads, visit_head, (zeros, zeros))
  dk_ref[...] = (settings.scale * dk).astype(dk_ref.dtype)
  dv_ref[...] = dv.astype(dv_ref.dtype)


def forward(
  found: Visits,
  spans: jax.Array,
  queries: jax.Array,
  keys: jax.Array,
  values: jax.Array,
  settings: Settings,
) -> tuple[jax.Array, jax.Array]:
  """Computes attention.

  Args:
    found: visits of the query blocks.
    spans: see `visits.spans`.
    queries: [R, T, H, d], with d a power of two.
    keys: [R, J, num_kv_heads, d].
    values: like keys.
    settings: settings of the kernels.

  Returns:
    Output like queries, and f32 [R, H, T] log-sum-exp in base 2.
  """
  num_rows, length, num_heads, _ = queries.shape
  tiles = settings.kernels.forward
  grid, in_specs, of_queries, of_lse = _over_queries(
    found, queries, keys, tiles
  )
  call = _call(
    _forward_kernel,
    settings,
    tiles,
    "forward",
    grid=grid,
    in_specs=in_specs,
    out_specs=[of_queries, of_lse],
    out_shape=[
      jax.ShapeDtypeStruct(queries.shape, queries.dtype),
      jax.ShapeDtypeStruct((num_rows, num_heads, length), jnp.float32),
    ],
  )
  return call(found.whole, found.masked, spans, queries, keys, values)


def query_gradient(
  found: Visits,
  spans: jax.Array,
  saved: tuple[jax.Array, ...],
  settings: Settings,
) -> jax.Array:
  """Computes the gradient of queries.

  Args:
    found: visits of the query blocks.
    spans: see `visits.spans`.
    saved: queries, keys, values and the gradient of the output as in `forward`;
      its log-sum-exp; f32 [R, H, T], sum of the output times its gradient.
    settings: settings of the kernels.
  """
  queries, keys = saved[:2]
  tiles = settings.kernels.dq
  grid, in_specs, of_queries, of_lse = _over_queries(
    found, queries, keys, tiles
  )
  call = _call(
    _dq_kernel,
    settings,
    tiles,
    "dq",
    grid=grid,
    in_specs=[*in_specs, of_queries, of_lse, of_lse],
    out_specs=of_queries,
    out_shape=jax.ShapeDtypeStruct(queries.shape, queries.dtype),
  )
  return call(found.whole, found.masked, spans, *saved)


def key_gradients(
  found: Visits,
  spans: jax.Array,
  saved: tuple[jax.Array, ...],
  settings: Settings,
) -> tuple[jax.Array, jax.Array]:
  """Computes the gradients of keys and values.

  Args:
    found: visits of the key blocks.
    spans: as for `query_gradient`.
    saved: as for `query_gradient`.
    settings: settings of the kernels.
  """
  queries, keys = saved[:2]
  num_rows, length, num_heads, width = queries.shape
  num_keys, num_kv_heads = keys.shape[1:3]
  tiles = settings.kernels.dkv
  group = num_heads // num_kv_heads
  of_group = pl.BlockSpec(
    (None, length, group, width), lambda j, r, h: (r, 0, h, 0)
  )
  of_keys = pl.BlockSpec(
    (None, tiles.keys, None, width), lambda j, r, h: (r, j, h, 0)
  )
  of_lse = pl.BlockSpec((None, group, length), lambda j, r, h: (r, h, 0))
  of_spans = pl.BlockSpec((None, 4, length), lambda j, r, h: (r, 0, 0))
  call = _call(
    _dkv_kernel,
    settings,
    tiles,
    "dkv",
    grid=(num_keys // tiles.keys, num_rows, num_kv_heads),
    in_specs=[
      *_of_visits(found),
      of_spans,
      of_group,
      of_keys,
      of_keys,
      of_group,
      of_lse,
      of_lse,
    ],
    out_specs=[of_keys, of_keys],
    out_shape=[jax.ShapeDtypeStruct(keys.shape, keys.dtype)] * 2,
  )
  return call(found.whole, found.masked, spans, *saved)


def _call(
  kernel: Callable[..., None],
  settings: Settings,
  tiles: Tiles,
  name: str,
  **layout: Any,
) -> Callable[..., Any]:
  """Returns a kernel as a function of arrays; see `pallas_call` for layout."""
  if HAS_BACKEND:  # without it kernels can still be interpreted
    layout["compiler_params"] = pallas_triton.CompilerParams(
      num_warps=tiles.warps, num_stages=tiles.stages
    )
  return pl.pallas_call(
    functools.partial(kernel, settings=settings),
    name=f"shared_prompt_{name}",
    interpret=settings.interpret,
    **layout,
  )


def _of_visits(found: Visits) -> list[pl.BlockSpec]:
  """Returns the specs of a block's visits."""
  return [
    pl.BlockSpec((None, None, *x.shape[2:]), lambda i, r, h: (r, i, 0, 0))
    for x in (found.whole, found.masked)
  ]


def _over_queries(
  found: Visits, queries: jax.Array, keys: jax.Array, tiles: Tiles
) -> tuple[
  tuple[int, int, int], list[pl.BlockSpec], pl.BlockSpec, pl.BlockSpec
]:
  """Lays out a kernel over blocks of queries.

  Returns:
    The grid; specs of visits, spans, queries, keys and values; those of another
    array like queries, and of one number a query and head.
  """
  num_rows, length, num_heads, width = queries.shape
  num_keys, num_kv_heads = keys.shape[1:3]
  group, size = num_heads // num_kv_heads, tiles.queries
  of_spans = pl.BlockSpec((None, 4, size), lambda i, r, h: (r, 0, i))
  of_queries = pl.BlockSpec(
    (None, size, None, width), lambda i, r, h: (r, i, h, 0)
  )
  of_keys = pl.BlockSpec(
    (None, num_keys, None, width), lambda i, r, h: (r, 0, h // group, 0)
  )
  of_lse = pl.BlockSpec((None, None, size), lambda i, r, h: (r, h, i))
  grid = (length // size, num_rows, num_heads)
  in_specs = [*_of_visits(found), of_spans, of_queries, of_keys, of_keys]
  return grid, in_specs, of_queries, of_lse
