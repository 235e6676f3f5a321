"""Parts of PPO and RLOO as pure functions.

Arrays are [B, T]: one row for each sampled response, one column for each token.
A bool `mask` says which tokens count. The values of other tokens (padding,
prompt, gaps) are ignored. Functions that work elementwise also take [B, K], one
value for each response.

Losses are f32 of the mask's shape, to be minimised, and 0 where masked. The
caller divides their sum by the tokens of the global batch; `masked_mean` does
so for arrays that are the whole batch. No gradient flows through values
measured while sampling, or through what is computed from them.

Above e^20 a probability ratio continues along its tangent (`safe_exp`). Sums
stay finite, and the gradient still points back.
"""

import chex
import jax
import jax.numpy as jnp

from dpo_jax.losses import numerics
from dpo_jax.losses.numerics import safe_exp

KL_ESTIMATORS = ("k1", "k2", "k3")

_LARGEST_LOG_RATIO = 20.0
# Keeps whitening finite if all advantages are equal.
_SMALLEST_VARIANCE = 1e-8
# Bound on the relative error of the KL, from Ziegler et al.
_LARGEST_KL_ERROR = 0.2


def masked_mean(values: jax.Array, mask: jax.Array) -> jax.Array:
  """Mean of the counted entries: f32 [], 0 if there are none.

  It is one sum over one count, not a mean of row means: every token has the
  same weight, in a short response and in a long one.
  """
  chex.assert_equal_shape((values, mask))
  return numerics.masked_mean(values.astype(jnp.float32), mask)


def gae(
  rewards: jax.Array,
  values: jax.Array,
  mask: jax.Array,
  last_values: jax.Array | None = None,
  *,
  discount: float,
  gae_lambda: float,
) -> tuple[jax.Array, jax.Array]:
  """Generalised advantages, and the returns that a value head is fitted to.

  Schulman et al. 2015 (arXiv:1506.02438), eq. 16: A_t = sum_l (gamma lambda)^l
  delta_{t+l} with delta_t = r_t + gamma V_{t+1} - V_t (eq. 10). Token t + 1 is
  the next token that counts.

  Args:
    rewards: f32 [B, T], reward of each token.
    values: f32 [B, T], V of the state in which that token was chosen.
    mask: bool [B, T].
    last_values: f32 [B], V after a row's last token: 0, the default, if the
      response ended by itself, a bootstrap if it was cut off.
    discount: gamma, in [0, 1].
    gae_lambda: lambda, in [0, 1]: 0 is the one-step error, 1 is the sum of
      later rewards minus the baseline.

  Returns:
    advantages: f32 [B, T], 0 where masked.
    returns: f32 [B, T], advantages + values, 0 where masked.
  """
  chex.assert_rank(mask, 2)
  chex.assert_equal_shape((rewards, values, mask))
  rewards, values = _data(rewards, mask), _data(values, mask)
  if last_values is None:
    last_values = jnp.zeros(mask.shape[:1], jnp.float32)
  last_values = jax.lax.stop_gradient(last_values)

  def step(following, token):
    next_advantage, next_value = following
    reward, value, counts = token
    delta = reward + discount * next_value - value
    advantage = delta + discount * gae_lambda * next_advantage
    following = (
      jnp.where(counts, advantage, next_advantage),
      jnp.where(counts, value, next_value),
    )
    return following, jnp.where(counts, advantage, 0.0)

  _, advantages = jax.lax.scan(
    step,
    (jnp.zeros_like(last_values), last_values),
    (rewards.T, values.T, mask.T),
    reverse=True,
  )
  return advantages.T, advantages.T + values


def whiten(
  advantages: jax.Array, mask: jax.Array, *, shift_mean: bool
) -> jax.Array:
  """Advantages divided by their standard deviation, centred if `shift_mean`.

  Mean and variance are over all counted entries together. Given the global
  batch, before it is split into microbatches, they are the same on any number
  of devices. PPO's paper does not mention whitening; its implementations do it.

  Args:
    advantages: f32 [B, T] or [B, K].
    mask: bool of that shape.
    shift_mean: whether the mean becomes 0; False keeps it, for rewards whose
      sign has a meaning.

  Returns:
    f32, of that shape, 0 where masked. Equal advantages give 0 (or the mean).
  """
  advantages = _data(advantages, mask)
  mean = masked_mean(advantages, mask)
  centred = advantages - mean
  variance = masked_mean(jnp.square(centred), mask)
  whitened = centred * jax.lax.rsqrt(variance + _SMALLEST_VARIANCE)
  return jnp.where(mask, whitened if shift_mean else whitened + mean, 0.0)


def leave_one_out(rewards: jax.Array, valid: jax.Array) -> jax.Array:
  """RLOO's advantages: a reward minus the mean of its siblings' rewards.

  Ahmadian et al. 2024 (arXiv:2402.14740), sec. 3; Kool et al. 2019. The
  baseline does not depend on the response it is subtracted from, so the
  gradient is unbiased. A response without siblings has no baseline and gets 0.

  Args:
    rewards: f32 [B, K], of whole responses to a prompt, penalties included.
    valid: bool [B, K].

  Returns:
    f32 [B, K], 0 where not valid.
  """
  chex.assert_rank(rewards, 2)
  chex.assert_equal_shape((rewards, valid))
  rewards = _data(rewards, valid)
  others = valid.sum(-1, keepdims=True) - 1
  # r - (sum - r) / (n - 1) without a difference of two large numbers. It is
  # r - r for a single response.
  centred = rewards - rewards.sum(-1, keepdims=True) / jnp.maximum(
    others + 1, 1
  )
  advantages = centred * (others + 1) / jnp.maximum(others, 1)
  return jnp.where(valid, advantages, 0.0)


def reinforce(
  logps: jax.Array, advantages: jax.Array, mask: jax.Array
) -> jax.Array:
  """-A log pi, whose gradient is REINFORCE's (Williams 1992).

  With `leave_one_out`'s advantages and the log-probs of whole responses it is
  RLOO's (arXiv:2402.14740), which treats a response as one action.

  Args:
    logps: f32 [B, K] of responses, or [B, T] of tokens, nats.
    advantages: f32 of that shape.
    mask: bool of that shape.

  Returns:
    f32 of that shape, 0 where masked.
  """
  chex.assert_equal_shape((logps, advantages, mask))
  return -_data(advantages, mask) * _counted(logps, mask)


def clipped_surrogate(
  logps: jax.Array,
  old_logps: jax.Array,
  advantages: jax.Array,
  mask: jax.Array,
  *,
  clip: float,
) -> jax.Array:
  """-min(ratio A, clip(ratio, 1 - eps, 1 + eps) A), ratio = pi / pi_old.

  Schulman et al. 2017 (arXiv:1707.06347), eq. 7, as a loss. The minimum is a
  lower bound: the clip removes what a token gains by moving further, never
  what it loses.

  Args:
    logps: f32 [B, T], of the sampled tokens under the policy, nats.
    old_logps: f32 [B, T], under the policy that sampled them.
    advantages: f32 [B, T].
    mask: bool [B, T].
    clip: eps, > 0; 0.2 in the paper.

  Returns:
    f32 [B, T], 0 where masked.
  """
  chex.assert_equal_shape((logps, old_logps, advantages, mask))
  advantages = _data(advantages, mask)
  ratio = safe_exp(
    _log_ratio(logps, old_logps, mask), straight_above=_LARGEST_LOG_RATIO
  )
  clipped = jnp.clip(ratio, 1.0 - clip, 1.0 + clip)
  loss = -jnp.minimum(ratio * advantages, clipped * advantages)
  return jnp.where(mask, loss, 0.0)


def clipped_value_loss(
  values: jax.Array,
  old_values: jax.Array,
  returns: jax.Array,
  mask: jax.Array,
  *,
  clip: float,
) -> jax.Array:
  """1/2 max((V - R)^2, (V_clipped - R)^2), V_clipped within eps of V_old.

  Schulman et al. 2017 (arXiv:1707.06347), eq. 9, has the plain square. The
  clip and the factor 1/2 are those of its code; Engstrom et al. 2020
  (arXiv:2005.12729, sec. 2) study the clip.

  Args:
    values: f32 [B, T], the value head now.
    old_values: f32 [B, T], when the responses were sampled.
    returns: f32 [B, T], from `gae`.
    mask: bool [B, T].
    clip: eps, > 0, in units of the value; inf is the plain square.

  Returns:
    f32 [B, T], 0 where masked.
  """
  chex.assert_equal_shape((values, old_values, returns, mask))
  values = _counted(values, mask)
  old_values, returns = _data(old_values, mask), _data(returns, mask)
  clipped = old_values + jnp.clip(values - old_values, -clip, clip)
  return 0.5 * jnp.maximum(
    jnp.square(values - returns), jnp.square(clipped - returns)
  )


def kl_penalty(
  logps: jax.Array, ref_logps: jax.Array, mask: jax.Array, *, estimator: str
) -> jax.Array:
  """Estimate of KL(pi || pi_ref) from one sample of pi, token by token.

  Schulman 2020, "Approximating KL divergence" (joschu.net/blog/kl-approx.html),
  with x = log pi - log pi_ref:

    k1: x, unbiased, of either sign;
    k2: x^2 / 2, biased, its gradient that of the KL on samples of pi;
    k3: exp(-x) - 1 + x, unbiased and never below 0.

  The gradient of k1 has expectation 0, so k1 belongs in a reward; k2 and k3 may
  be a term of the loss.

  Args:
    logps: f32 [B, T] of tokens, or [B, K] of responses, nats.
    ref_logps: f32 of that shape, the same under the reference.
    mask: bool of that shape.
    estimator: one of KL_ESTIMATORS.

  Returns:
    f32 of that shape, nats, 0 where masked.

  Raises:
    ValueError: unknown estimator.
  """
  chex.assert_equal_shape((logps, ref_logps, mask))
  x = _log_ratio(logps, ref_logps, mask)
  if estimator == "k1":
    return x
  if estimator == "k2":
    return 0.5 * jnp.square(x)
  if estimator == "k3":
    return _exp_above_tangent(-x)
  raise ValueError(
    f"estimator={estimator!r} is unknown: choose one of"
    f" {', '.join(KL_ESTIMATORS)}"
  )


def shape_rewards(
  scores: jax.Array,
  logps: jax.Array,
  ref_logps: jax.Array,
  mask: jax.Array,
  *,
  kl_coef: float | jax.Array,
  estimator: str,
) -> jax.Array:
  """Rewards of tokens: a KL penalty on each, the score added on the last.

  Ziegler et al. 2019 (arXiv:1909.08593), eq. 2, R = r - beta log(pi / rho),
  with the log-ratio split into its tokens.

  Args:
    scores: f32 [B], a judge's score of each response.
    logps: f32 [B, T], under the policy that sampled the tokens, nats.
    ref_logps: f32 [B, T], under the reference.
    mask: bool [B, T]. A row without tokens has no last one and loses its score.
    kl_coef: beta, >= 0, units of the score per nat.
    estimator: one of KL_ESTIMATORS; "k1" in the paper.

  Returns:
    f32 [B, T], 0 where masked.
  """
  chex.assert_shape(scores, mask.shape[:1])
  kl = kl_penalty(logps, ref_logps, mask, estimator=estimator)
  # The last counted token is the first when counted from the end.
  is_last = mask & (jnp.cumsum(mask[:, ::-1], axis=1)[:, ::-1] == 1)
  rewards = jnp.where(is_last, scores[:, None], 0.0) - kl_coef * kl
  return jax.lax.stop_gradient(rewards)


def update_kl_coef(
  kl_coef: jax.Array, kl: jax.Array, *, target: float, gain: float
) -> jax.Array:
  """Updates the KL coefficient: raises it if the KL exceeds its target.

  Ziegler et al. 2019 (arXiv:1909.08593), sec. 2.2: e = clip(KL / target - 1,
  -0.2, 0.2), beta <- beta (1 + K e). The paper has K = 0.1. Its code has K =
  the batch's responses over a horizon of 10,000.

  Args:
    kl_coef: f32 [], beta of the batch just seen, > 0.
    kl: f32 [], that batch's mean KL to the reference, summed over a response,
      nats.
    target: target KL, > 0, nats.
    gain: K, in (0, 5); a larger one may turn the coefficient negative.

  Returns:
    f32 [].
  """
  error = jnp.clip(kl / target - 1.0, -_LARGEST_KL_ERROR, _LARGEST_KL_ERROR)
  return jax.lax.stop_gradient(kl_coef * (1.0 + gain * error))


def _counted(x: jax.Array, mask: jax.Array) -> jax.Array:
  return jnp.where(mask, x.astype(jnp.float32), 0.0)


def _data(x: jax.Array, mask: jax.Array) -> jax.Array:
  return jax.lax.stop_gradient(_counted(x, mask))


def _log_ratio(
  logps: jax.Array, other_logps: jax.Array, mask: jax.Array
) -> jax.Array:
  return _counted(logps, mask) - _data(other_logps, mask)


def _exp_above_tangent(x: jax.Array) -> jax.Array:
  """exp(x) - 1 - x, which is near x^2 / 2 about 0.

  There the plain formula is a difference of nearly equal numbers. At x = 1e-4,
  the size of a step's log-ratios, float32 would lose all digits.
  """
  is_near = jnp.abs(x) < 0.1
  near = jnp.where(is_near, x, 0.0)
  series = 1.0 + near / 3 * (1.0 + near / 4 * (1.0 + near / 5))
  far = jnp.where(is_near, 1.0, x)
  plain = safe_exp(far, straight_above=_LARGEST_LOG_RATIO) - 1.0 - far
  return jnp.where(is_near, 0.5 * jnp.square(near) * series, plain)
