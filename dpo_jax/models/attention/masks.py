"""Masks of packed rows: which tokens a token attends to."""

import functools

import jax
import jax.numpy as jnp

# Score of a masked key, and running maximum before the first key: finite, so
# that no gradient or difference is NaN.
MASKED = -0.7 * float(jnp.finfo(jnp.float32).max)


def start_indices(*labels: jax.Array) -> jax.Array:
  """Index of the first token of the run that each token is in.

  Args:
    labels: [..., T] each; a run ends where one of them changes.

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
  """Who sees whom in rows of [prompt | response_0 | response_1 | ...].

  Token i sees token j when j <= i, both are of the same segment, and j is in
  the prompt or in i's own response. Padding (segment 0) sees padding only, so
  that no row of the mask is empty.

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
  """Whether a key is among a query's last `window`: [B, T], [B, J] -> bool
  [B, T, J]."""
  distance = query_positions[:, :, None] - key_positions[:, None, :]
  return distance < window
