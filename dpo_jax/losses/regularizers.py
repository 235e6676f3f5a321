"""Terms added to a link's loss, in nats: Sequences -> f32 [B].

Keyword-only arguments are knobs.
"""

import jax
import jax.numpy as jnp

from dpo_jax.losses import rewards
from dpo_jax.losses.links import pairs
from dpo_jax.types import Sequences


def likelihood(
  sequences: Sequences, *, sft_weight: float, sft_per_token: bool
) -> jax.Array:
  """-lambda lp_w: SLiC (arXiv:2305.10425); CPO (arXiv:2401.08417).

  With `sft_per_token` the mean over all chosen tokens of the global batch
  takes the place of the mean over groups of sums: a group's share of it is
  its sum times groups / tokens.
  """
  loss = -sft_weight * sequences.logps[:, 0]
  if not sft_per_token:
    return loss
  return loss * (
    sequences.num_groups / jnp.maximum(sequences.total_tokens, 1.0)
  )


def mean_likelihood(sequences: Sequences, *, sft_weight: float) -> jax.Array:
  """-alpha lp_w / n_w: Pang et al. 2024, RPO (arXiv:2404.19733)"""
  return -sft_weight * rewards.mean_logps(sequences)[:, 0]


def mean_nll(sequences: Sequences) -> jax.Array:
  """-lp_w / n_w: ORPO's (arXiv:2403.07691) SFT term, eq. 6."""
  return -rewards.mean_logps(sequences)[:, 0]


def calibration(sequences: Sequences, *, beta: float) -> jax.Array:
  """[(r_w - 1 / (2 beta))^2 + (r_l + 1 / (2 beta))^2] / 2.

  Xiao et al. 2024, Cal-DPO (arXiv:2412.14516), as the authors' code has it
  (tengxiao1/Cal-DPO, scripts/dpo_trainer.py).
  """
  # Slots without a response must not square into the gradient.
  log_ratios = jnp.where(sequences.valid, rewards.log_ratio(sequences), 0.0)
  return 0.5 * pairs.two_squares(log_ratios, sequences, beta=beta)
