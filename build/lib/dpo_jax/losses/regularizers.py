"""Terms added to a link's loss, in nats: Sequences -> f32 [B].

Keyword-only arguments are knobs. The row of a loss in
`dpo_jax.losses.catalogue` has its formula and paper.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from dpo_jax.losses import numerics, rewards
from dpo_jax.losses.links import pairs
from dpo_jax.types import Sequences

# The ratio of two policies continues along its tangent above exp of this.
_LARGEST_LOG_RATIO = 20.0


def likelihood(
  sequences: Sequences, *, sft_weight: float, sft_per_token: bool
) -> jax.Array:
  """Weighted NLL of the chosen response.

  With `sft_per_token` the mean over groups becomes the mean over all chosen
  tokens of the global batch: a group's NLL is multiplied by groups / tokens.
  """
  loss = -sft_weight * sequences.logps[:, 0]
  if not sft_per_token:
    return loss
  return loss * (
    sequences.num_groups / jnp.maximum(sequences.total_tokens, 1.0)
  )


def mean_likelihood(sequences: Sequences, *, sft_weight: float) -> jax.Array:
  """Weighted NLL of the chosen response, divided by its number of tokens."""
  return -sft_weight * rewards.mean_logps(sequences)[:, 0]


def mean_nll(sequences: Sequences) -> jax.Array:
  """NLL of the chosen response, divided by its number of tokens."""
  return -rewards.mean_logps(sequences)[:, 0]


def calibration(sequences: Sequences, *, beta: float) -> jax.Array:
  """Half the squared distances of both log-ratios from their targets.

  The targets are +1 / (2 beta) and -1 / (2 beta), as in the authors' code
  (tengxiao1/Cal-DPO, scripts/dpo_trainer.py).
  """
  # Blank slots must not reach the gradient through the square.
  log_ratios = jnp.where(sequences.valid, rewards.log_ratio(sequences), 0.0)
  return 0.5 * pairs.two_squares(log_ratios, sequences, beta=beta)


def sampled_kl(sequences: Sequences, *, kl_weight: float) -> jax.Array:
  """Weighted KL(pi || pi_ref), estimated on samples of the policy.

  A term of the loss in HyPO (Song et al. 2024, arXiv:2406.01462). There the
  samples are fresh. Here they may be some steps old, so with the ratio
  u = pi / pi_old each gives u log(pi / pi_ref) - u + 1. The mean of that over
  pi_old is the KL of pi, and the mean of its gradient is the KL's gradient.

  Args:
    sequences: responses of the data have `sample_weight` 0.
    kl_weight: weight of a nat.
  """
  log_ratios = rewards.log_ratio(sequences)
  ratios = numerics.safe_exp(
    sequences.logps - jax.lax.stop_gradient(sequences.old_logps),
    straight_above=_LARGEST_LOG_RATIO,
  )
  terms = ratios * log_ratios - ratios + 1.0
  return kl_weight * (sequences.sample_weight * terms).sum(-1)


# Optional fields of Sequences that regularizers read.
NEEDS: dict[Callable[..., jax.Array], frozenset[str]] = {
  calibration: frozenset({"ref_logps"}),
  sampled_kl: frozenset({"ref_logps", "old_logps", "sample_weight"}),
}
