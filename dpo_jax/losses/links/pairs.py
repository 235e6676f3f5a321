"""Links of pairs that read more than the margin: f32 [B, 2] -> f32 [B].

The row of a loss in `dpo_jax.losses.catalogue` has its formula and paper. In
docstrings here w is the chosen and l the rejected response, r a reward, D the
margin.
"""

import chex
import jax
import jax.numpy as jnp

from dpo_jax.losses.links.base import Link, group_links
from dpo_jax.losses.links.margins import smoothed_logistic
from dpo_jax.losses.links.running import State, init_mean, update_mean
from dpo_jax.losses.numerics import masked_mean
from dpo_jax.types import Sequences

# Smallest factor on beta-DPO's beta: the paper does not define a negative one.
_SMALLEST_FACTOR = 1e-3


def shifted_reward_logistic(
  rewards: jax.Array, sequences: Sequences, *, beta: float, shift: float
) -> jax.Array:
  """Logistic loss -log s(beta (r_w - shift * r_l)), s the sigmoid."""
  del sequences
  return -jax.nn.log_sigmoid(beta * (rewards[:, 0] - shift * rewards[:, 1]))


def offset_logistic(
  rewards: jax.Array, sequences: Sequences, *, beta: float, alpha: float
) -> jax.Array:
  """Logistic loss with a target margin that grows with the gap in score.

  It is -log s(beta D - alpha log(gap)). A pair whose chosen response does not
  score higher has no offset: its loss is 0.
  """
  gap = sequences.score[:, 0] - sequences.score[:, 1]
  is_ordered = gap > 0.0
  offset = alpha * jnp.log(jnp.where(is_ordered, gap, 1.0))
  loss = -jax.nn.log_sigmoid(beta * _margins(rewards) - offset)
  return jnp.where(is_ordered, loss, 0.0)


def reward_aware_distance(
  rewards: jax.Array,
  sequences: Sequences,
  *,
  beta: float,
  score_scale: float,
  distance: str,
) -> jax.Array:
  """Distance of the margin from the one that the gap in score calls for.

  With m = beta D and g = score_scale * gap it is (m - g)^2, "squared", or the
  KL divergence between the probabilities s(m) and s(g) that the chosen response
  is preferred: KL(s(g) || s(m)), "backward_kl", or KL(s(m) || s(g)),
  "forward_kl". All are least at m = g; that is 0 for equal scores, and negative
  where the rejected response scores higher.
  """
  margin = beta * _margins(rewards)
  target = score_scale * (sequences.score[:, 0] - sequences.score[:, 1])
  if distance == "squared":
    return jnp.square(margin - target)
  if distance == "backward_kl":
    return _bernoulli_kl(target, margin)
  return _bernoulli_kl(margin, target)


def positive_logistic(
  rewards: jax.Array,
  sequences: Sequences,
  *,
  beta: float,
  penalty_weight: float,
) -> jax.Array:
  """Logistic loss with a penalty where the chosen response lost likelihood.

  It is -log s(beta (D - penalty_weight max(0, -r_w))).
  """
  del sequences
  penalty = penalty_weight * jax.nn.relu(-rewards[:, 0])
  return -jax.nn.log_sigmoid(beta * (_margins(rewards) - penalty))


def token_level_logistic(
  rewards: jax.Array, sequences: Sequences, *, beta: float, alpha: float
) -> jax.Array:
  """Logistic loss with an offset of the difference in sequential KL.

  It is -log s(beta (D - alpha (KL_l - KL_w))). KL_y sums over the positions of
  y the exact KL(pi_ref || pi) over the vocabulary. No gradient flows through
  KL_w.
  """
  kl = sequences.kl
  difference = kl[:, 1] - jax.lax.stop_gradient(kl[:, 0])
  return -jax.nn.log_sigmoid(beta * (_margins(rewards) - alpha * difference))


def weighted_policy_logistic(
  rewards: jax.Array, sequences: Sequences, *, beta: float
) -> jax.Array:
  """Logistic loss that weights down pairs far from the policy's own samples.

  It is -w_w w_l log s(beta D). A response's weight is exp of the mean over its
  tokens of log p(token) - log sum_v p(v)^2. No gradient flows through the
  weights.
  """
  weight = jnp.exp(sequences.alignment.sum(-1))
  loss = -jax.nn.log_sigmoid(beta * _margins(rewards))
  return jax.lax.stop_gradient(weight) * loss


def noise_contrastive(
  rewards: jax.Array, sequences: Sequences, *, beta: float
) -> jax.Array:
  """Noise-contrastive loss: each reward is classified against 0.

  It is -log s(beta r_w) - log s(-beta r_w) / 2 - log s(-beta r_l) / 2.
  """
  del sequences
  z = beta * rewards
  noise = 0.5 * jax.nn.log_sigmoid(-z).sum(-1)
  return -jax.nn.log_sigmoid(z[:, 0]) - noise


def two_squares(
  rewards: jax.Array, sequences: Sequences, *, beta: float
) -> jax.Array:
  """Computes (r_w - 1 / (2 beta))^2 + (r_l + 1 / (2 beta))^2, in nats^2."""
  del sequences
  target = 0.5 / beta
  return jnp.square(rewards[:, 0] - target) + jnp.square(rewards[:, 1] + target)


def anchored_zero(
  rewards: jax.Array, sequences: Sequences, *, beta: float
) -> jax.Array:
  """Raises the chosen reward above 0 and lowers the rejected one below it.

  It is s(-beta r_w) + s(beta r_l).
  """
  del sequences
  z = beta * rewards
  return jax.nn.sigmoid(-z[:, 0]) + jax.nn.sigmoid(z[:, 1])


def anchored_down(
  rewards: jax.Array, sequences: Sequences, *, beta: float
) -> jax.Array:
  """Lowers both rewards, the rejected one further.

  It is s(beta r_w) + s(-beta D).
  """
  del sequences
  return jax.nn.sigmoid(beta * rewards[:, 0]) + jax.nn.sigmoid(
    -beta * _margins(rewards)
  )


def unlikely(
  rewards: jax.Array,
  sequences: Sequences,
  *,
  alpha: float,
  token_level: bool,
) -> jax.Array:
  """Likelihood of the chosen response, unlikelihood of the rejected one.

  It is -r_w + alpha u. With `token_level` u is -sum log(1 - p) over the tokens
  of the rejected response, otherwise its reward r_l.
  """
  if token_level:
    return -rewards[:, 0] - alpha * sequences.complement_logps[:, 1]
  return -rewards[:, 0] + alpha * rewards[:, 1]


def binary_pair(
  rewards: jax.Array, sequences: Sequences, state: State, *, beta: float
) -> tuple[jax.Array, State]:
  """Classifies each reward against a running mean.

  It is -log s(beta r_w - mean) - log s(mean - beta r_l). The mean is over the
  steps so far, this one included, of the batch's mean beta (r_w + r_l) / 2 over
  valid pairs; a step without one does not count. No gradient flows through it.

  Returns:
    Loss f32 [B], and the state with the new mean.
  """
  z = beta * rewards
  is_valid = sequences.valid.all(-1)
  batch_mean = masked_mean(jax.lax.stop_gradient(z).mean(-1), is_valid)
  mean, count = update_mean(
    state["mean"], state["count"], batch_mean, is_valid.any()
  )
  loss = -jax.nn.log_sigmoid(z[:, 0] - mean) - jax.nn.log_sigmoid(
    mean - z[:, 1]
  )
  return loss, {"mean": mean, "count": count}


def dynamic_logistic(
  rewards: jax.Array,
  sequences: Sequences,
  state: State,
  *,
  beta: float,
  alpha: float,
) -> tuple[jax.Array, State]:
  """Logistic loss whose beta follows the batch's mean margin.

  It is -log s(beta f D), f = 1 + alpha (mean - average). The mean is that of
  beta D over the batch, the average its moving one over the earlier steps
  (momentum 0.9, from 0). No gradient flows through f. The paper does not define
  a negative f; it is at least 0.001.

  Returns:
    Loss f32 [B], and the state with the new average.
  """
  margins = _margins(rewards)
  is_valid = sequences.valid.all(-1)
  batch_mean = masked_mean(beta * jax.lax.stop_gradient(margins), is_valid)
  factor = jnp.maximum(
    1.0 + alpha * (batch_mean - state["mean"]), _SMALLEST_FACTOR
  )
  loss = -jax.nn.log_sigmoid(beta * factor * margins)
  mean = jnp.where(
    is_valid.any(), 0.9 * state["mean"] + 0.1 * batch_mean, state["mean"]
  )
  return loss, {"mean": mean, "count": state["count"] + 1.0}


def optimal_transport(
  rewards: jax.Array,
  sequences: Sequences,
  *,
  beta: float,
  label_smoothing: float,
) -> jax.Array:
  """Smoothed logistic loss of the batch's sorted margins: their mean, [B].

  The margins are sort(logps_w - logps_l) of the policy minus the same of the
  reference: the policy's must dominate as a distribution. Rewards are not read.
  """
  del rewards
  policy = sequences.logps[:, 0] - sequences.logps[:, 1]
  reference = sequences.ref_logps[:, 0] - sequences.ref_logps[:, 1]
  return _sorted_loss(
    policy, reference, sequences.valid.all(-1), beta, label_smoothing
  )


def unpaired_optimal_transport(
  rewards: jax.Array,
  sequences: Sequences,
  *,
  beta: float,
  label_smoothing: float,
) -> jax.Array:
  """Smoothed logistic loss of the batch's sorted rewards: their mean, [B].

  The margins are sort(r_w) - sort(r_l): the chosen rewards must dominate the
  rejected ones as distributions.
  """
  return _sorted_loss(
    rewards[:, 0],
    rewards[:, 1],
    sequences.valid.all(-1),
    beta,
    label_smoothing,
  )


def _sorted_loss(
  x: jax.Array,
  y: jax.Array,
  is_valid: jax.Array,
  beta: float,
  label_smoothing: float,
) -> jax.Array:
  """Mean loss of sort(x) - sort(y) over the valid entries, for each: f32 [B].

  The mean over groups of one value is that value, so a loss of the whole
  batch needs no reduction of its own.

  Args:
    x, y: f32 [B], each sorted by itself.
    is_valid: bool [B], entries that count.
    beta, label_smoothing: see `margins.smoothed_logistic`.
  """
  # Invalid entries sort to the end of both arrays, where they are cut off.
  largest = jnp.finfo(jnp.float32).max
  x, y = (jnp.sort(jnp.where(is_valid, v, largest)) for v in (x, y))
  count = is_valid.sum()
  is_kept = jnp.arange(x.shape[0]) < count
  margins = jnp.where(is_kept, x, 0.0) - jnp.where(is_kept, y, 0.0)
  loss = smoothed_logistic(margins, beta=beta, label_smoothing=label_smoothing)
  return jnp.broadcast_to(masked_mean(loss, is_kept), is_valid.shape)


def _bernoulli_kl(x: jax.Array, y: jax.Array) -> jax.Array:
  """KL(s(x) || s(y)) of two probabilities of an event, from their logits."""
  log_s = jax.nn.log_sigmoid
  return jnp.exp(log_s(x)) * (log_s(x) - log_s(y)) + jnp.exp(log_s(-x)) * (
    log_s(-x) - log_s(-y)
  )


def _margins(rewards: jax.Array) -> jax.Array:
  chex.assert_shape(rewards, (None, 2))
  return rewards[:, 0] - rewards[:, 1]


LINKS: dict[str, Link] = {
  **group_links(
    shifted_reward_logistic,
    positive_logistic,
    noise_contrastive,
    two_squares,
    anchored_zero,
    anchored_down,
    needs_anchor=True,
  ),
  **group_links(offset_logistic, gap_weight="alpha", needs_ordered_scores=True),
  **group_links(
    reward_aware_distance, gap_weight="score_scale", uses_ties=True
  ),
  **group_links(token_level_logistic, needs=("kl",)),
  **group_links(weighted_policy_logistic, needs=("alignment",)),
  **group_links(unlikely, needs=("complement_logps",)),
  **group_links(
    binary_pair, is_coupled=True, init=init_mean, needs_anchor=True
  ),
  **group_links(dynamic_logistic, is_coupled=True, init=init_mean),
  **group_links(
    optimal_transport,
    unpaired_optimal_transport,
    is_coupled=True,
    fixes_reward=True,
    needs=("ref_logps",),
  ),
}
