"""Links of rewarded samples of the policy: f32 [B, K] -> f32 [B].

The row of a loss in `dpo_jax.losses.catalogue` has its formula and paper.
"""

import jax
import jax.numpy as jnp

from dpo_jax.losses import policy_gradient
from dpo_jax.losses.links.base import Link, group_links
from dpo_jax.types import Sequences


def clipped_policy_gradient(
  rewards: jax.Array,
  sequences: Sequences,
  *,
  clip: float,
  value_clip: float,
  value_weight: float,
) -> jax.Array:
  """Computes PPO's loss: clipped surrogate + value_weight * value error.

  The two are summed over the tokens of a group's responses. The batch brings
  advantages and returns (`policy_gradient.gae`). `rewards` are not read: the
  advantages contain a response's score.

  Returns:
    f32 [B].
  """
  del rewards
  mask = sequences.token_mask
  shape = mask.shape

  def flat(x):
    return x.reshape(-1, shape[-1])

  mask = flat(mask & sequences.valid[..., None])
  loss = policy_gradient.clipped_surrogate(
    flat(sequences.token_logps),
    flat(sequences.old_token_logps),
    flat(sequences.advantages),
    mask,
    clip=clip,
  )
  loss += value_weight * policy_gradient.clipped_value_loss(
    flat(sequences.token_values),
    flat(sequences.old_token_values),
    flat(sequences.returns),
    mask,
    clip=value_clip,
  )
  return loss.reshape(shape).sum((-2, -1))


def leave_one_out(
  rewards: jax.Array, sequences: Sequences, *, clip: float
) -> jax.Array:
  """Clipped surrogate of whole responses: the mean over a prompt's samples.

  A response's advantage is its score minus the mean of its siblings' scores;
  the score already contains the KL penalty. The ratio to the sampling policy
  and its clip are those of TRL's RLOOTrainer: samples may be used for more
  than one step. In the first step the ratio is 1, and the gradient is
  REINFORCE's, -A grad log pi.
  """
  valid = sequences.valid
  advantages = policy_gradient.leave_one_out(sequences.score, valid)
  loss = policy_gradient.clipped_surrogate(
    rewards, sequences.old_logps, advantages, valid, clip=clip
  )
  return loss.sum(-1) / jnp.maximum(valid.sum(-1), 1)


LINKS: dict[str, Link] = {
  **group_links(leave_one_out, needs=("old_logps",)),
  **group_links(
    clipped_policy_gradient,
    needs=(
      "token_mask",
      "token_logps",
      "token_values",
      "old_token_logps",
      "old_token_values",
      "advantages",
      "returns",
    ),
  ),
}
