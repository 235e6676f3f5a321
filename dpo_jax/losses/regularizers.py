"""Terms added to a link's loss, in nats: Sequences -> f32 [B].

Keyword-only arguments are knobs.
"""

import jax
import jax.numpy as jnp

from dpo_jax.losses import links, rewards
from dpo_jax.types import Sequences


def likelihood(sequences: Sequences, *, sft_weight: float) -> jax.Array:
  """-lambda lp_w: SLiC (arXiv:2305.10425); CPO (arXiv:2401.08417)."""
  return -sft_weight * sequences.logps[:, 0]


def mean_likelihood(sequences: Sequences, *, sft_weight: float) -> jax.Array:
  """-alpha lp_w / n_w: Pang et al. 2024, RPO (arXiv:2404.19733)"""
  return -sft_weight * rewards.mean_logps(sequences)[:, 0]


def mean_nll(sequences: Sequences) -> jax.Array:
  """-lp_w / n_w: ORPO's (arXiv:2403.07691) SFT term, eq. 6."""
  return -rewards.mean_logps(sequences)[:, 0]


def calibration(sequences: Sequences, *, beta: float) -> jax.Array:
  """Ties both log-ratios to +-1 / (2 beta).

  Xiao et al. 2024, Cal-DPO (arXiv:2412.14516)
  """
  # Slots without a response must not square into the gradient.
  log_ratios = jnp.where(sequences.valid, rewards.log_ratio(sequences), 0.0)
  return links.two_squares(log_ratios, sequences, beta=beta)
