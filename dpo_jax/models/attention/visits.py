"""Visits: the blocks of keys, or of queries, that a block has to visit.

For each of the two intervals of its tokens a block visits the blocks between
the first and the last that it sees. Most are seen whole and need no mask; those
at an edge need one. With a window a block of a prompt's keys also visits the
blocks of queries between two responses that see it, all of them masked out.
"""

import flax.struct
import jax
import jax.numpy as jnp

from dpo_jax.models.attention.masks import Labels, ends_of_sight, intervals


@flax.struct.dataclass
class Visits:
  """Visits of N blocks a row, each a few ranges of other blocks.

  Attributes:
    whole: i32 [R, N, W, 2], first block and number of blocks of each range that
      is seen whole: by every query of the block, all keys.
    masked: i32 [R, N, 2 W, 2], the same of ranges that need a mask. No block is
      in two ranges.
  """

  whole: jax.Array
  masked: jax.Array


def spans(
  labels: Labels,
  window: jax.Array | None,
  first_query: jax.Array | int,
  num_queries: int,
) -> jax.Array:
  """Returns the two intervals of its row that each query sees, for a kernel.

  Args:
    labels: labels of rows, i32 [R, T] each.
    window: i32 [], see `attention.attend_rows`, or None.
    first_query: index of the first query.
    num_queries: queries from there on.

  Returns:
    i32 [R, 4, num_queries]: first and end of the query's own interval, first
    and end of the interval in its prompt, see `masks.intervals`.
  """
  both = jnp.concatenate(intervals(labels, window), -1)
  found = jax.lax.dynamic_slice_in_dim(both, first_query, num_queries, axis=1)
  return found.swapaxes(1, 2)


def visits_of_queries(found: jax.Array, queries: int, keys: int) -> Visits:
  """Computes the key blocks that each query block visits.

  Args:
    found: from `spans`, of whole blocks of queries.
    queries: queries of a block.
    keys: keys of a block.
  """
  num_rows, _, length = found.shape
  blocks = found.reshape(num_rows, 4, length // queries, queries)
  own = _edges(blocks[:, 0], blocks[:, 1], keys)
  prompt = _edges(blocks[:, 2], blocks[:, 3], keys)
  # Blocks in both are visited once, with the own interval's.
  prompt = [jnp.minimum(edge, own[0]) for edge in prompt]
  return _visits([prompt, own])


def visits_of_keys(
  labels: Labels,
  window: jax.Array | None,
  first_query: jax.Array | int,
  num_queries: int,
  queries: int,
  keys: int,
) -> Visits:
  """Computes the query blocks that each key block visits.

  Args:
    labels: as for `spans`; T is a multiple of `keys`.
    window: as for `spans`.
    first_query: as for `spans`.
    num_queries: as for `spans`; a multiple of `queries`.
    queries: queries of a block.
    keys: keys of a block.
  """
  num_rows, length = labels[0].shape
  ends, unbroken = (
    x.reshape(num_rows, length // keys, keys) - first_query
    for x in ends_of_sight(labels, window)
  )
  starts = jnp.arange(0, length, keys, dtype=jnp.int32) - first_query
  num_blocks = num_queries // queries
  first = jnp.broadcast_to(starts // queries, ends.shape[:2])
  edges = (
    first,
    # The first query block all of whose queries come after all keys.
    jnp.broadcast_to(-(-(starts + keys - 1) // queries), first.shape),
    unbroken.min(-1) // queries,
    -(-ends.max(-1) // queries),
  )
  return _visits([_ordered([jnp.clip(x, 0, num_blocks) for x in edges])])


def _edges(first: jax.Array, end: jax.Array, size: int) -> list[jax.Array]:
  """Computes blocks of keys that lines of queries need.

  Args:
    first: i32 [R, N, queries], first index that a query sees.
    end: i32 [R, N, queries], the index after the last; at most `first` if the
      query sees nothing.
    size: keys of a block.

  Returns:
    i32 [R, N] each: first block that any query sees; first and end of those
    that all queries see whole; end of those that any query sees.
  """
  is_empty = first >= end
  lowest = jnp.where(is_empty, jnp.iinfo(jnp.int32).max, first).min(-1)
  highest = jnp.where(is_empty, 0, end).max(-1)
  edges = (
    lowest // size,
    -(-first.max(-1) // size),
    end.min(-1) // size,
    -(-highest // size),
  )
  return _ordered(list(edges))


def _ordered(edges: list[jax.Array]) -> list[jax.Array]:
  """Makes four edges ascend: first, first whole, end of the whole, end.

  Nothing is seen whole where that range ends before it starts. The range of all
  blocks is kept, and empty if it ends before it starts.
  """
  first, whole, whole_end, end = edges
  first = jnp.minimum(first, end)
  whole = jnp.clip(whole, first, end)
  return [first, whole, jnp.clip(whole_end, whole, end), end]


def _visits(parts: list[list[jax.Array]]) -> Visits:
  """Makes visits of ordered edges.

  Args:
    parts: for each part of a row, such as the prompt, four edges i32 [R, N] as
      `_edges` returns them.
  """

  def ranges(pairs):
    return jnp.stack([jnp.stack([a, b - a], -1) for a, b in pairs], 2)

  return Visits(
    whole=ranges([(edges[1], edges[2]) for edges in parts]),
    masked=ranges([pair for a, b, c, d in parts for pair in ((a, b), (c, d))]),
  )
