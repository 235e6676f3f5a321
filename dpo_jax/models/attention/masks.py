"""Masks of packed rows: the tokens that a token attends to."""

import functools

import jax
import jax.numpy as jnp

# Score of a masked key, and the initial running maximum. Finite, so that no
# gradient or difference is NaN.
MASKED = -0.7 * float(jnp.finfo(jnp.float32).max)

# (positions, segments, branches) of rows: i32 [..., T] each.
Labels = tuple[jax.Array, jax.Array, jax.Array]


def start_indices(*labels: jax.Array) -> jax.Array:
  """Computes the index of the first token of each token's run of equal labels.

  Args:
    labels: [..., T] each; a run ends where any of them changes.

  Returns:
    i32 [..., T].
  """
  length = labels[0].shape[-1]
  changed = functools.reduce(
    jnp.logical_or, (x[..., 1:] != x[..., :-1] for x in labels)
  )
  starts = jnp.where(changed, jnp.arange(1, length, dtype=jnp.int32), 0)
  starts = jnp.pad(starts, [(0, 0)] * (starts.ndim - 1) + [(1, 0)])
  return jax.lax.cummax(starts, axis=starts.ndim - 1)


def end_indices(*labels: jax.Array) -> jax.Array:
  """Computes the index after the last token of each token's run of labels.

  Args:
    labels: [..., T] each; a run ends where any of them changes.

  Returns:
    i32 [..., T].
  """
  length = labels[0].shape[-1]
  backwards = start_indices(*(jnp.flip(x, -1) for x in labels))
  return length - jnp.flip(backwards, -1)


def intervals(
  labels: Labels, window: jax.Array | None
) -> tuple[jax.Array, jax.Array]:
  """Computes the two intervals of its row that each token sees.

  Args:
    labels: labels of rows.
    window: i32 [], see `attention.attend_rows`, or None.

  Returns:
    [first, end) in the token's own prompt or response, then [first, end) in its
    prompt: i32 [..., T, 2] each. Padding sees itself.
  """
  positions, segments, branches = labels
  indices = jnp.arange(positions.shape[-1], dtype=jnp.int32)
  starts = start_indices(segments, branches)
  prompt_starts = start_indices(segments)
  # A response's first position is the length of its prompt.
  prompt_lengths = jnp.take_along_axis(positions, starts, -1)
  prompt_ends = prompt_starts + jnp.where(branches > 0, prompt_lengths, 0)
  if window is not None:
    starts = jnp.maximum(starts, indices - (window - 1))
    prompt_starts = jnp.clip(
      prompt_starts + positions - (window - 1), prompt_starts, prompt_ends
    )
  is_padding = segments == 0
  starts = jnp.where(is_padding, indices, starts)
  prompt_ends = jnp.where(is_padding, prompt_starts, prompt_ends)
  ends = jnp.broadcast_to(indices + 1, starts.shape)
  return (
    jnp.stack([starts, ends], -1),
    jnp.stack([prompt_starts, prompt_ends], -1),
  )


def ends_of_sight(
  labels: Labels, window: jax.Array | None
) -> tuple[jax.Array, jax.Array]:
  """Computes up to which query each token is seen, as a key.

  Args:
    labels: labels of rows.
    window: i32 [], see `attention.attend_rows`, or None.

  Returns:
    The index after the last query that sees the token, and an index before
    which all queries from the token on do: i32 [..., T] each. They are equal
    without a window. Padding is seen by itself.
  """
  positions, segments, branches = labels
  length = positions.shape[-1]
  indices = jnp.arange(length, dtype=jnp.int32)
  part_ends = end_indices(segments, branches)
  segment_ends = end_indices(segments)
  in_prompt = branches == 0
  all_ends = jnp.where(in_prompt, segment_ends, part_ends)
  ends = unbroken = all_ends
  if window is not None:
    window = jnp.minimum(window, length)
    own_ends = jnp.minimum(part_ends, indices + window)
    # The last response sees a token of the prompt up to this index; all of a
    # segment's last tokens are in its last response, or in its prompt.
    last = segment_ends - 1
    last_starts = jnp.take_along_axis(
      start_indices(segments, branches), last, -1
    )
    in_response = jnp.take_along_axis(branches, last, -1) > 0
    prompt_lengths = jnp.take_along_axis(positions, last_starts, -1)
    reach = positions + window - prompt_lengths
    is_reached = in_prompt & in_response & (reach > 0)
    response_ends = jnp.minimum(segment_ends, last_starts + reach)
    ends = jnp.where(is_reached, response_ends, own_ends)
    unbroken = jnp.where(window == length, all_ends, own_ends)
  is_padding = segments == 0
  return (
    jnp.where(is_padding, indices + 1, ends),
    jnp.where(is_padding, indices + 1, unbroken),
  )


def shared_prompt_mask(segments: jax.Array, branches: jax.Array) -> jax.Array:
  """Computes the mask of rows of [prompt | response_0 | response_1 | ...].

  Token i sees token j when j <= i, both are of the same segment, and j is in
  the prompt or in i's own response. Padding (segment 0) sees only padding, so
  every row of the mask has a true entry.

  Args:
    segments: i32 [R, T], 0 is padding.
    branches: i32 [R, T], 0 in a prompt, k + 1 in the k-th response.

  Returns:
    bool [R, T, T], [r, i, j] true where i sees j.
  """
  length = segments.shape[1]
  causal = jnp.tril(jnp.ones((1, length, length), bool))
  same_segment = segments[:, :, None] == segments[:, None, :]
  same_branch = branches[:, :, None] == branches[:, None, :]
  in_prompt = (branches == 0)[:, None, :]
  return causal & same_segment & (same_branch | in_prompt)


def in_window(
  query_positions: jax.Array, key_positions: jax.Array, window: jax.Array
) -> jax.Array:
  """Returns whether a key is within a query's window, or after the query.

  Args:
    query_positions: i32 [B, T].
    key_positions: i32 [B, J].
    window: i32 [], positions that a query sees, itself included.

  Returns:
    bool [B, T, J].
  """
  distance = query_positions[:, :, None] - key_positions[:, None, :]
  return distance < window
