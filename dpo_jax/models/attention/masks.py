"""Masks of packed rows: the tokens that a token attends to."""

import functools

import jax
import jax.numpy as jnp

# Score of a masked key, and the initial running maximum. Finite, so that no
# gradient or difference is NaN.
MASKED = -0.7 * float(jnp.finfo(jnp.float32).max)


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
  """Returns whether a key is within a query's window.

  Args:
    query_positions: i32 [B, T].
    key_positions: i32 [B, J].
    window: i32 [], positions that a query sees, itself included.

  Returns:
    bool [B, T, J].
  """
  distance = query_positions[:, :, None] - key_positions[:, None, :]
  return distance < window
