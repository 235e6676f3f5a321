"""Attention, and the masks that packed rows need."""

import flax.struct
import jax
import jax.numpy as jnp

# Of a score that is masked: finite, so that no gradient is NaN.
_MASKED = -0.7 * float(jnp.finfo(jnp.float32).max)


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


@flax.struct.dataclass
class Rows:
  """Packed rows, as attention sees them; made once for all layers.

  Attributes:
    positions: i32 [R, T], of a token in its own prompt + response.
    mask: bool [R, T, T], see `shared_prompt_mask`.
  """

  positions: jax.Array
  mask: jax.Array


def make_rows(
  positions: jax.Array, segments: jax.Array, branches: jax.Array
) -> Rows:
  """Prepares rows for `attend_rows`: i32 [R, T] each, see `types.Batch`."""
  return Rows(positions, shared_prompt_mask(segments, branches))


def attend_rows(
  queries: jax.Array,
  keys: jax.Array,
  values: jax.Array,
  rows: Rows,
  *,
  window: jax.Array | None,
  scale: float,
  soft_cap: float | None,
) -> jax.Array:
  """Attention of packed rows with shared prompts.

  Args:
    queries: [R, T, H, head_dim].
    keys: [R, T, num_kv_heads, head_dim].
    values: like keys.
    rows: from `make_rows`.
    window: i32 [], a token sees this many positions, itself included; counted
      in positions, not in places of the row. None: all.
    scale: of the scores.
    soft_cap: scores become soft_cap * tanh(scores / soft_cap); None: none.

  Returns:
    [R, T, H, head_dim] in the dtype of queries.
  """
  mask = rows.mask
  if window is not None:
    mask &= in_window(rows.positions, rows.positions, window)
  return attend(queries, keys, values, mask, scale=scale, soft_cap=soft_cap)


def in_window(
  query_positions: jax.Array, key_positions: jax.Array, window: jax.Array
) -> jax.Array:
  """Whether a key is among a query's last `window`: [B, T], [B, J] -> bool
  [B, T, J]."""
  distance = query_positions[:, :, None] - key_positions[:, None, :]
  return distance < window


def attend(
  queries: jax.Array,
  keys: jax.Array,
  values: jax.Array,
  mask: jax.Array,
  *,
  scale: float,
  soft_cap: float | None,
) -> jax.Array:
  """Softmax attention with grouped key and value heads, all scores at once.

  Scores and softmax are float32.

  Args:
    queries: [B, T, H, head_dim].
    keys: [B, J, num_kv_heads, head_dim].
    values: like keys.
    mask: bool [B, T, J], true where a query sees a key; no row is empty.
    scale: of the scores.
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
  scores = jnp.where(mask[:, None, None], scores, _MASKED)
  weights = jax.nn.softmax(scores, axis=-1).astype(values.dtype)
  out = jnp.einsum("bkgtj,bjkd->btkgd", weights, values)
  return out.reshape(batch, length, num_heads, head_dim)
