"""Functions whose values and gradients stay finite at extreme arguments."""

import dataclasses

import jax
import jax.numpy as jnp

from dpo_jax.types import Sequences

# exp(80) is 6e34, and the largest float32 is 3e38.
_LARGEST_EXPONENT = 80.0


def safe_exp(
  x: jax.Array, *, straight_above: float = _LARGEST_EXPONENT
) -> jax.Array:
  """exp(x), continued by its tangent above x = `straight_above`.

  exp of a log-ratio overflows float32 at 89. The tangent keeps value and
  gradient finite (by default up to x = 6,000), and the gradient has the right
  sign.

  Args:
    x: f32 [...].
    straight_above: start of the tangent; choose it lower if the result is
      multiplied or summed further.

  Returns:
    f32 [...], exact up to `straight_above`.
  """
  below = jnp.minimum(x, straight_above)
  above = jnp.maximum(x - straight_above, 0.0)
  return jnp.exp(below) * (1.0 + above)


def log1mexp(x: jax.Array) -> jax.Array:
  """log(1 - exp(x)) for x <= 0, accurate near 0 and far from it.

  It is -inf at x = 0, so x is clipped to at most -1e-6, where it is -13.8.

  Args:
    x: f32 [...], log-probabilities.

  Returns:
    f32 [...].
  """
  x = jnp.minimum(x, -1e-6)
  is_near = x > -0.6931472
  # Each branch sees only arguments it is accurate for; otherwise the gradient
  # of the branch not taken would be NaN.
  near = jnp.log(-jnp.expm1(jnp.where(is_near, x, -0.5)))
  far = jnp.log1p(-jnp.exp(jnp.where(is_near, -1.0, x)))
  return jnp.where(is_near, near, far)


def masked_mean(x: jax.Array, mask: jax.Array) -> jax.Array:
  """Mean of the entries where `mask` is True, over all axes; 0 if none is.

  Args:
    x: float [...].
    mask: bool of that shape.
  """
  return jnp.where(mask, x, 0.0).sum() / jnp.maximum(mask.sum(), 1)


def blank_invalid(sequences: Sequences) -> Sequences:
  """Sets every field to 0 in slots that hold no response.

  Masking the loss alone would still send NaN through the gradient of the
  branch that `where` drops.
  """
  valid = sequences.valid

  def blank(x):
    if x is None or x.ndim == 0:
      return x
    # [B], [B, K] or [B, K, M].
    mask = {1: valid[:, 0], 2: valid, 3: valid[..., None]}[x.ndim]
    return jnp.where(mask, x, 0)

  return dataclasses.replace(
    sequences,
    **{
      field.name: blank(getattr(sequences, field.name))
      for field in dataclasses.fields(sequences)
      if field.name != "valid"
    },
  )
