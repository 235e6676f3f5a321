"""Rotary position embeddings: Su et al. 2021 (arXiv:2104.09864)."""

import math

import jax
import jax.numpy as jnp

from dpo_jax.models.config import ModelConfig, RopeScaling

# cos and sin: f32 [B, T, 1, rotary_dim / 2] each.
Rotation = tuple[jax.Array, jax.Array]


def rotations(
  config: ModelConfig, positions: jax.Array
) -> tuple[Rotation | None, Rotation | None]:
  """Computes the rotary embeddings of global and of local layers.

  Args:
    config: shape of the model.
    positions: i32 [B, T].

  Returns:
    The two rotations. The second is None if local layers use the first; both
    are None if positions are learned.
  """
  if config.has_learned_positions:
    return None, None
  size = config.rotary_dim or config.head_dim
  everywhere = rotation(positions, size, config.rope_theta, config.rope_scaling)
  if config.local_rope_theta is None:
    return everywhere, None
  return everywhere, rotation(positions, size, config.local_rope_theta, None)


def rotation(
  positions: jax.Array, size: int, theta: float, scaling: RopeScaling | None
) -> Rotation:
  """Computes cos and sin of the angles of positions.

  Angles are float32, because positions above 256 collide in bfloat16.

  Args:
    positions: i32 [B, T].
    size: number of channels that are rotated.
    theta: base of the frequencies.
    scaling: scaling of the frequencies, or None.

  Returns:
    cos and sin, f32 [B, T, 1, size / 2].
  """
  frequencies = scale_frequencies(
    theta ** (-jnp.arange(0, size, 2, dtype=jnp.float32) / size), scaling
  )
  angles = positions[..., None, None].astype(jnp.float32) * frequencies
  return jnp.cos(angles), jnp.sin(angles)


def scale_frequencies(
  frequencies: jax.Array, scaling: RopeScaling | None
) -> jax.Array:
  """Scales frequencies for a longer context; see `RopeScaling` for the kinds.

  Args:
    frequencies: f32 [size / 2], radians per position.
    scaling: kind and factors; None changes nothing.
  """
  if scaling is None:
    return frequencies
  slow = frequencies / scaling.factor
  if scaling.kind == "linear":
    return slow
  turns = scaling.original_positions * frequencies / (2.0 * math.pi)
  low, high = scaling.low_freq_factor, scaling.high_freq_factor
  blend = jnp.clip((turns - low) / (high - low), 0.0, 1.0)
  return (1.0 - blend) * slow + blend * frequencies


def rotate(x: jax.Array, angles: Rotation) -> jax.Array:
  """Rotates the first channels of every head, i paired with i + size / 2.

  The pairing is that of Hugging Face's Llama checkpoints.

  Args:
    x: [B, T, H, head_dim].
    angles: from `rotation`.

  Returns:
    Like x.
  """
  cos, sin = angles
  size = 2 * cos.shape[-1]
  first, second = jnp.split(x[..., :size].astype(jnp.float32), 2, axis=-1)
  rotated = jnp.concatenate(
    [first * cos - second * sin, second * cos + first * sin], -1
  ).astype(x.dtype)
  if size == x.shape[-1]:
    return rotated
  return jnp.concatenate([rotated, x[..., size:]], -1)
