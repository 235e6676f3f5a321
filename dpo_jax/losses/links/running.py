"""Running means: the state that some links carry from step to step."""

import jax
import jax.numpy as jnp

State = dict[str, jax.Array]


def init_mean() -> State:
  """Returns the state {"mean": 0, "count": 0} of a running mean."""
  return {"mean": jnp.float32(0.0), "count": jnp.float32(0.0)}


def init_class_means() -> State:
  """Returns zeros: the state of a running mean for each of two labels.

  Its keys are "desirable", "undesirable" and each with "_count" added.
  """
  # One array each: a step donates its state, and no buffer can be given twice.
  names = (
    "desirable",
    "desirable_count",
    "undesirable",
    "undesirable_count",
  )
  return {name: jnp.float32(0.0) for name in names}


def update_mean(
  mean: jax.Array, count: jax.Array, batch_mean: jax.Array, has_any: jax.Array
) -> tuple[jax.Array, jax.Array]:
  """Adds a step to the mean over the steps that had something to average.

  Args:
    mean: f32 [], mean over the earlier steps.
    count: f32 [], number of those steps.
    batch_mean: f32 [], this step's value.
    has_any: bool [], whether this step has a value.

  Returns:
    mean and count, f32 [] each; unchanged if this step has no value.
  """
  count = count + has_any.astype(jnp.float32)
  step = (batch_mean - mean) / jnp.maximum(count, 1.0)
  return jnp.where(has_any, mean + step, mean), count
