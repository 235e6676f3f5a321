"""The public losses on plain arrays, for use without the rest of dpo_jax."""

import chex
import jax
import jax.numpy as jnp

from dpo_jax.losses import links


@jax.jit
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
  """
  arrays = (
    policy_chosen_logps,
    policy_rejected_logps,
    ref_chosen_logps,
    ref_rejected_logps,
  )
  chex.assert_rank(arrays, 1)
  chex.assert_equal_shape(arrays)
  chosen, rejected, ref_chosen, ref_rejected = (
    x.astype(jnp.float32) for x in arrays
  )
  margins = (chosen - ref_chosen) - (rejected - ref_rejected)
  return links.smoothed_logistic(
    margins, beta=beta, label_smoothing=label_smoothing
  )
