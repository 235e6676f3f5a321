"""Dense attention: all T x T scores of a row in memory."""

import jax
from jax.ad_checkpoint import checkpoint_name
import jax.numpy as jnp

from dpo_jax.models.attention.masks import MASKED
from dpo_jax.models.config import ATTENDED


def attend(
  queries: jax.Array,
  keys: jax.Array,
  values: jax.Array,
  mask: jax.Array,
  *,
  scale: float,
  soft_cap: float | None,
) -> jax.Array:
  """Computes softmax attention with grouped key and value heads.

  Scores and softmax are float32.

  Args:
    queries: [B, T, H, head_dim].
    keys: [B, J, num_kv_heads, head_dim].
    values: like keys.
    mask: bool [B, T, J], true where a query sees a key; every query sees one.
    scale: factor of the scores.
    soft_cap: see `attend_rows`.

  Returns:
    [B, T, H, head_dim] in the dtype of queries.
  """
  batch, length, num_heads, head_dim = queries.shape
  grouped = queries.reshape(batch, length, keys.shape[2], -1, head_dim)
  scores = scale * jnp.einsum(
    "btkgd,bjkd->bkgtj", grouped, keys, preferred_element_type=jnp.float32
  )
  if soft_cap is not None:
    scores = soft_cap * jnp.tanh(scores / soft_cap)
  scores = jnp.where(mask[:, None, None], scores, MASKED)
  weights = jax.nn.softmax(scores, axis=-1).astype(values.dtype)
  out = jnp.einsum("bkgtj,bjkd->btkgd", weights, values)
  out = checkpoint_name(out, ATTENDED)
  return out.reshape(batch, length, num_heads, head_dim)
