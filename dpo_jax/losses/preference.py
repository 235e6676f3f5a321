"""The public losses on plain arrays, for use without the rest of dpo_jax."""

from collections.abc import Callable
from typing import Any

import chex
import jax
import jax.numpy as jnp

from dpo_jax.losses.links import margins


def dpo_loss(
  policy_chosen_logps: jax.Array,
  policy_rejected_logps: jax.Array,
  ref_chosen_logps: jax.Array,
  ref_rejected_logps: jax.Array,
  *,
  beta: float,
  label_smoothing: float = 0.0,
) -> jax.Array:
  """Direct Preference Optimization loss of each pair.

  Rafailov et al. 2023 (arXiv:2305.18290), eq. 7; with `label_smoothing` the
  conservative loss of Mitchell 2023, eq. 3.

  Args:
    policy_chosen_logps: [B], log pi(y_w|x) summed over tokens, nats.
    policy_rejected_logps: [B], the same of the rejected response.
    ref_chosen_logps: [B], log pi_ref(y_w|x).
    ref_rejected_logps: [B], log pi_ref(y_l|x).
    beta: strength of the tie to the reference, > 0, 1/nats.
    label_smoothing: probability that a label is flipped, in [0, 0.5).

  Returns:
    f32 [B] loss, nats. The caller takes the mean over the global batch.

  Raises:
    ValueError: beta or label_smoothing out of range; under a transformation
      that traces them they have no value to check.
  """
  _check_range("beta", beta, "(0, inf)", lambda x: 0.0 < x < float("inf"))
  _check_range(
    "label_smoothing", label_smoothing, "[0, 0.5)", lambda x: 0.0 <= x < 0.5
  )
  arrays = (
    policy_chosen_logps,
    policy_rejected_logps,
    ref_chosen_logps,
    ref_rejected_logps,
  )
  chex.assert_rank(arrays, 1)
  chex.assert_equal_shape(arrays)
  return _smoothed_loss(*arrays, beta, label_smoothing)


@jax.jit
def _smoothed_loss(*arrays_and_knobs: jax.Array) -> jax.Array:
  *arrays, beta, label_smoothing = arrays_and_knobs
  chosen, rejected, ref_chosen, ref_rejected = (
    jnp.asarray(x, jnp.float32) for x in arrays
  )
  differences = (chosen - ref_chosen) - (rejected - ref_rejected)
  return margins.smoothed_logistic(
    differences, beta=beta, label_smoothing=label_smoothing
  )


def _check_range(
  name: str, value: Any, wanted: str, is_in: Callable[[float], bool]
) -> None:
  if not isinstance(value, jax.core.Tracer) and not is_in(float(value)):
    raise ValueError(f"{name}={value} is outside {wanted}")
