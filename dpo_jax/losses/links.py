"""A group's loss: what the rewards of its responses are held against.

Every function takes `rewards`, f32 [B, K] nats, and returns f32 [B]. A pair
has the chosen response in slot 0. Means over groups are the caller's.
"""

import chex
import jax
import jax.numpy as jnp


def margins(rewards: jax.Array) -> jax.Array:
  """Chosen minus rejected reward of pairs: f32 [B, 2] -> f32 [B]."""
  chex.assert_shape(rewards, (None, 2))
  return rewards[:, 0] - rewards[:, 1]


def logistic(rewards: jax.Array, *, beta: float) -> jax.Array:
  """-log sigmoid(beta D), D the margin.

  Rafailov et al. 2023 (arXiv:2305.18290), eq. 7.

  Args:
    rewards: f32 [B, 2], log-ratios, nats.
    beta: strength of the tie to the reference, > 0, 1/nats.

  Returns:
    f32 [B], nats; log 2 at a margin of zero.
  """
  return -jax.nn.log_sigmoid(beta * margins(rewards))


def smoothed_logistic(
  rewards: jax.Array, *, beta: float, label_smoothing: float
) -> jax.Array:
  """Logistic loss on labels that are wrong with a given probability.

  Mitchell 2023, "A note on DPO with noisy preferences", eq. 3. Its gradient
  vanishes where sigmoid(beta D) = 1 - label_smoothing.

  Args:
    rewards: f32 [B, 2], log-ratios, nats.
    beta: as in `logistic`.
    label_smoothing: probability of a flipped label, in [0, 0.5).

  Returns:
    f32 [B], nats.
  """
  logits = beta * margins(rewards)
  return -(1.0 - label_smoothing) * jax.nn.log_sigmoid(
    logits
  ) - label_smoothing * jax.nn.log_sigmoid(-logits)


def squared(rewards: jax.Array, *, tau: float) -> jax.Array:
  """(D - 1 / (2 tau))^2: regress the margin onto a finite target.

  Azar et al. 2023 (arXiv:2310.12036), eq. 17.

  Args:
    rewards: f32 [B, 2], log-ratios, nats.
    tau: regularisation strength, > 0, 1/nats.

  Returns:
    f32 [B], nats^2.
  """
  return jnp.square(margins(rewards) - 0.5 / tau)


def hinge(rewards: jax.Array, *, beta: float) -> jax.Array:
  """max(0, 1 - beta D): no pull once a pair is separated by 1 / beta.

  Liu et al. 2023 (arXiv:2309.06657), eq. 10, with gamma as our `beta`.

  Args:
    rewards: f32 [B, 2], log-ratios, nats.
    beta: inverse of the margin asked for, > 0, 1/nats.

  Returns:
    f32 [B].
  """
  return jax.nn.relu(1.0 - beta * margins(rewards))


def negative(rewards: jax.Array) -> jax.Array:
  """Minus the reward of the first response: likelihood, if that is logps."""
  return -rewards[:, 0]
