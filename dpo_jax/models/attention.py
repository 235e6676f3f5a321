"""Attention, and the masks that packed rows need."""

import jax
import jax.numpy as jnp


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


def attend(
  queries: jax.Array, keys: jax.Array, values: jax.Array, mask: jax.Array
) -> jax.Array:
  """Softmax attention with grouped key and value heads.

  Scores and softmax are float32; scores are divided by sqrt(head_dim).

  Args:
    queries: [B, T, H, head_dim].
    keys: [B, J, num_kv_heads, head_dim].
    values: like keys.
    mask: bool [B, T, J], true where a query sees a key.

  Returns:
    [B, T, H, head_dim] in the dtype of queries.
  """
  return jax.nn.dot_product_attention(queries, keys, values, mask=mask[:, None])


def rotate(x: jax.Array, positions: jax.Array, *, theta: float) -> jax.Array:
  """Rotary position embedding, channel i paired with i + head_dim / 2.

  Su et al. 2021 (arXiv:2104.09864), in the pairing of Hugging Face's Llama
  checkpoints. Angles are float32: in bfloat16 positions above 256 collide.

  Args:
    x: [B, T, H, head_dim].
    positions: i32 [B, T].
    theta: base of the frequencies.

  Returns:
    Like x.
  """
  half = x.shape[-1] // 2
  frequencies = theta ** (-jnp.arange(half, dtype=jnp.float32) / half)
  angles = positions[..., None, None].astype(jnp.float32) * frequencies
  cos, sin = jnp.cos(angles), jnp.sin(angles)
  first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
  turned = jnp.concatenate(
    [first * cos - second * sin, second * cos + first * sin], -1
  )
  return turned.astype(x.dtype)
