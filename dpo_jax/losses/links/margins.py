"""Links of pairs that read the margin only: f32 [B] -> f32 [B].

The row of a loss in `dpo_jax.losses.catalogue` has its formula and paper. In
docstrings here D is the margin and s the sigmoid.
"""

import jax
import jax.numpy as jnp

from dpo_jax.losses.links.base import Link, margin_links
from dpo_jax.losses.numerics import safe_exp


def logistic(margins: jax.Array, *, beta: float) -> jax.Array:
  """Logistic loss of the margin.

  Args:
    margins: f32 [B], chosen minus rejected reward, nats.
    beta: strength of the tie to the reference, > 0, 1/nats.

  Returns:
    f32 [B], nats; log 2 at a margin of zero.
  """
  return -jax.nn.log_sigmoid(beta * margins)


def unscaled_logistic(margins: jax.Array) -> jax.Array:
  """Logistic loss of the margin itself, without a beta."""
  return -jax.nn.log_sigmoid(margins)


def smoothed_logistic(
  margins: jax.Array, *, beta: float, label_smoothing: float
) -> jax.Array:
  """Logistic loss in expectation over labels that may be flipped.

  With e = label_smoothing it is -(1 - e) log s(beta D) - e log s(-beta D). Its
  gradient vanishes where s(beta D) = 1 - e.
  """
  z = beta * margins
  return -(1.0 - label_smoothing) * jax.nn.log_sigmoid(
    z
  ) - label_smoothing * jax.nn.log_sigmoid(-z)


def robust_logistic(
  margins: jax.Array, *, beta: float, label_smoothing: float
) -> jax.Array:
  """Logistic loss that flipped labels do not bias.

  With e = label_smoothing it is (e log s(-beta D) - (1 - e) log s(beta D)) /
  (1 - 2 e). In expectation over the flips it equals the loss on clean labels.
  """
  z = beta * margins
  flipped = label_smoothing * jax.nn.log_sigmoid(-z)
  kept = (1.0 - label_smoothing) * jax.nn.log_sigmoid(z)
  return (flipped - kept) / (1.0 - 2.0 * label_smoothing)


def squared(margins: jax.Array, *, tau: float) -> jax.Array:
  """Squared distance of the margin from 1 / (2 tau), in nats^2."""
  return jnp.square(margins - 0.5 / tau)


def hinge(margins: jax.Array, *, beta: float) -> jax.Array:
  """Hinge loss max(0, 1 - beta D): no gradient once D is above 1 / beta."""
  return jax.nn.relu(1.0 - beta * margins)


def shifted_hinge(margins: jax.Array, *, delta: float) -> jax.Array:
  """Hinge loss max(0, delta - D): no gradient once D is above `delta` nats."""
  return jax.nn.relu(delta - margins)


def shifted_logistic(
  margins: jax.Array, *, beta: float, gamma_over_beta: float
) -> jax.Array:
  """Logistic loss with a target margin of `gamma_over_beta`."""
  return -jax.nn.log_sigmoid(beta * (margins - gamma_over_beta))


def weighted_logistic(
  margins: jax.Array, *, odds_ratio_weight: float
) -> jax.Array:
  """Logistic loss of the margin itself, times `odds_ratio_weight`."""
  return -odds_ratio_weight * jax.nn.log_sigmoid(margins)


def clipped_logistic(
  margins: jax.Array, *, beta: float, clip: float
) -> jax.Array:
  """Logistic loss of the scaled margin clipped to [-2 clip, 2 clip]."""
  return -jax.nn.log_sigmoid(jnp.clip(beta * margins, -2 * clip, 2 * clip))


def linear(margins: jax.Array) -> jax.Array:
  """Negative margin."""
  return -margins


def exact(
  margins: jax.Array, *, beta: float, label_smoothing: float
) -> jax.Array:
  """KL divergence from the policy's preference to the smoothed label.

  With p = s(beta D) and e = label_smoothing it is p log(p / (1 - e)) +
  (1 - p) log((1 - p) / e), which is infinite at e = 0.
  """
  z = beta * margins
  log_p, log_q = jax.nn.log_sigmoid(z), jax.nn.log_sigmoid(-z)
  return jnp.exp(log_p) * (log_p - jnp.log1p(-label_smoothing)) + jnp.exp(
    log_q
  ) * (log_q - jnp.log(label_smoothing))


def discovered(margins: jax.Array, *, beta: float, tau: float) -> jax.Array:
  """Mix of the logistic and the exponential loss, weighted by w = s(z / tau).

  With z = beta D it is -(1 - w) log s(z) + w exp(-z). The second term is
  computed as exp(-z + log s(z / tau)), which has no product of 0 and infinity.
  """
  z = beta * margins
  logistic_part = -jax.nn.sigmoid(-z / tau) * jax.nn.log_sigmoid(z)
  return logistic_part + safe_exp(-z + jax.nn.log_sigmoid(z / tau))


def exponential(margins: jax.Array, *, beta: float) -> jax.Array:
  """Exponential loss exp(-z), z = beta D, linear below z = -80."""
  return safe_exp(-beta * margins)


LINKS: dict[str, Link] = margin_links(
  logistic,
  unscaled_logistic,
  smoothed_logistic,
  robust_logistic,
  squared,
  hinge,
  shifted_hinge,
  shifted_logistic,
  weighted_logistic,
  clipped_logistic,
  linear,
  exact,
  discovered,
  exponential,
)
