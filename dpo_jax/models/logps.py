"""Log-probs of the scored tokens, and their sums over responses.

The vocabulary projection runs on scored positions only, a chunk at a time,
and the backward pass computes a chunk's logits again: [S, V] never exists.
"""

from typing import Any

import jax
import jax.numpy as jnp

from dpo_jax.models.decoder import Policy
from dpo_jax.types import Batch


def chunked_token_logps(
  hidden: jax.Array,
  unembedding: jax.Array,
  targets: jax.Array,
  *,
  chunk_size: int,
) -> jax.Array:
  """log softmax(hidden @ unembedding)[target] for every position.

  Args:
    hidden: [R, S, D] states that predict.
    unembedding: [D, V].
    targets: i32 [R, S].
    chunk_size: positions of a row projected at once; memory is
      R * chunk_size * V floats.

  Returns:
    f32 [R, S], nats; the log-softmax is float32 whatever the dtype of hidden.
  """
  num_rows, length, width = hidden.shape
  chunk_size = min(chunk_size, length)
  num_chunks = -(-length // chunk_size)
  padding = num_chunks * chunk_size - length
  hidden = jnp.pad(hidden, ((0, 0), (0, padding), (0, 0)))
  targets = jnp.pad(targets, ((0, 0), (0, padding)))

  @jax.checkpoint
  def chunk_logps(hidden, targets):
    logits = jnp.einsum(
      "rsd,dv->rsv", hidden, unembedding, preferred_element_type=jnp.float32
    )
    target_logits = jnp.take_along_axis(logits, targets[..., None], -1)[..., 0]
    return target_logits - jax.nn.logsumexp(logits, axis=-1)

  # Chunks lead, rows stay whole: rows are what the mesh splits.
  chunks = (
    hidden.reshape(num_rows, num_chunks, chunk_size, width).swapaxes(0, 1),
    targets.reshape(num_rows, num_chunks, chunk_size).swapaxes(0, 1),
  )
  logps = jax.lax.map(lambda chunk: chunk_logps(*chunk), chunks)
  return logps.swapaxes(0, 1).reshape(num_rows, -1)[:, :length]


def sum_by_slot(
  values: jax.Array, slots: jax.Array, group_shape: tuple[int, int]
) -> jax.Array:
  """Sums figures of tokens into figures of responses.

  Args:
    values: f32 [R, S].
    slots: i32 [R, S], g * K + k, or G * K where padded.
    group_shape: (G, K).

  Returns:
    f32 [R, G, K]; 0 for a response without scored tokens.
  """
  num_slots = group_shape[0] * group_shape[1]

  def sum_row(values, slots):
    return jax.ops.segment_sum(values, slots, num_slots + 1)[:num_slots]

  sums = jax.vmap(sum_row)(values, slots)
  return sums.reshape(-1, *group_shape)


def num_tokens(batch: Batch) -> jax.Array:
  """Scored tokens of every response: f32 [R, G, K]."""
  ones = jnp.ones(batch.slots.shape, jnp.float32)
  return sum_by_slot(ones, batch.slots, batch.valid.shape[1:])


def response_logps(
  policy: Policy, params: Any, batch: Batch, *, chunk_size: int
) -> jax.Array:
  """log pi(y|x) of every response, summed over its scored tokens.

  Args:
    policy: the decoder.
    params: its parameters.
    batch: packed rows.
    chunk_size: see `chunked_token_logps`.

  Returns:
    f32 [R, G, K], nats; 0 where a slot holds no response.
  """
  hidden = policy.hidden_states(
    params, batch.tokens, batch.positions, batch.segments, batch.branches
  )
  predicting = jnp.take_along_axis(hidden, batch.predictors[..., None], axis=1)
  token_logps = chunked_token_logps(
    predicting,
    policy.unembedding(params),
    batch.targets,
    chunk_size=chunk_size,
  )
  return sum_by_slot(token_logps, batch.slots, batch.valid.shape[1:])
