"""A group's loss: what the rewards of its responses are held against.

A margin link takes `margins`, f32 [B], chosen minus rejected reward, nats. A
group link takes `rewards`, f32 [B, K], and the sequences they came from. Both
return f32 [B]; the mean over groups is the caller's. A pooled link sorts the
batch, and gives every group the mean of the sorted losses. A link with state
takes it after the sequences and returns it after the loss. Keyword-only
arguments are knobs.

s is the sigmoid, D the margin, r the reward of a response, w and l the chosen
and the rejected one.
"""

from collections.abc import Callable
import dataclasses
from typing import Any

import chex
import jax
import jax.numpy as jnp

from dpo_jax.losses import policy_gradient
from dpo_jax.losses.numerics import safe_exp
from dpo_jax.types import Sequences

State = dict[str, jax.Array]


@dataclasses.dataclass(frozen=True)
class Link:
  """A link and what it asks for.

  Attributes:
    function: see the module's docstring.
    kind: "margin", "group" or "pooled".
    needs: optional fields of Sequences that it reads.
    needs_anchor: whether it holds single rewards against a constant, so that
      their zero must mean policy = reference.
    needs_ordered_scores: whether a pair teaches something only where the
      chosen response scores higher.
    is_coupled: whether a group's loss depends on the other groups.
    init: state at the first step, or None for a link without.
  """

  function: Callable[..., Any]
  kind: str
  needs: frozenset[str] = frozenset()
  needs_anchor: bool = False
  needs_ordered_scores: bool = False
  is_coupled: bool = False
  init: Callable[[], State] | None = None


# Margin links.


def logistic(margins: jax.Array, *, beta: float) -> jax.Array:
  """-log s(beta D).

  Rafailov et al. 2023 (arXiv:2305.18290), eq. 7.

  Args:
    margins: f32 [B], nats.
    beta: strength of the tie to the reference, > 0, 1/nats.

  Returns:
    f32 [B], nats; log 2 at a margin of zero.
  """
  return -jax.nn.log_sigmoid(beta * margins)


def unscaled_logistic(margins: jax.Array) -> jax.Array:
  """-log s(D), without a beta: the first term of Cal-DPO (arXiv:2412.14516)."""
  return -jax.nn.log_sigmoid(margins)


def smoothed_logistic(
  margins: jax.Array, *, beta: float, label_smoothing: float
) -> jax.Array:
  """-(1 - e) log s(beta D) - e log s(-beta D): labels wrong at a rate of e.

  Mitchell 2023, "A note on DPO with noisy preferences", eq. 3. Its gradient
  vanishes where s(beta D) = 1 - e.
  """
  z = beta * margins
  return -(1.0 - label_smoothing) * jax.nn.log_sigmoid(
    z
  ) - label_smoothing * jax.nn.log_sigmoid(-z)


def robust_logistic(
  margins: jax.Array, *, beta: float, label_smoothing: float
) -> jax.Array:
  """[-(1 - e) log s(beta D) + e log s(-beta D)] / (1 - 2 e).

  Chowdhury et al. 2024 (arXiv:2403.00409): in expectation over flips
  at a rate of e it is the loss on clean labels.
  """
  z = beta * margins
  flipped = label_smoothing * jax.nn.log_sigmoid(-z)
  kept = (1.0 - label_smoothing) * jax.nn.log_sigmoid(z)
  return (flipped - kept) / (1.0 - 2.0 * label_smoothing)


def squared(margins: jax.Array, *, tau: float) -> jax.Array:
  """(D - 1 / (2 tau))^2: regress the margin onto a finite target.

  Azar et al. 2023 (arXiv:2310.12036), eq. 17.
  """
  return jnp.square(margins - 0.5 / tau)


def hinge(margins: jax.Array, *, beta: float) -> jax.Array:
  """max(0, 1 - beta D): no pull once a pair is separated by 1 / beta.

  Liu et al. 2023 (arXiv:2309.06657), with gamma as our `beta`.
  """
  return jax.nn.relu(1.0 - beta * margins)


def shifted_hinge(margins: jax.Array, *, delta: float) -> jax.Array:
  """max(0, delta - D): Zhao et al. 2023, SLiC-HF (arXiv:2305.10425)"""
  return jax.nn.relu(delta - margins)


def shifted_logistic(
  margins: jax.Array, *, beta: float, gamma_over_beta: float
) -> jax.Array:
  """-log s(beta D - gamma), gamma = gamma_over_beta * beta.

  Meng et al. 2024, SimPO (arXiv:2405.14734)
  """
  return -jax.nn.log_sigmoid(beta * (margins - gamma_over_beta))


def weighted_logistic(
  margins: jax.Array, *, odds_ratio_weight: float
) -> jax.Array:
  """-lambda log s(D): the odds-ratio term of ORPO (arXiv:2403.07691)"""
  return -odds_ratio_weight * jax.nn.log_sigmoid(margins)


def clipped_logistic(
  margins: jax.Array, *, beta: float, clip: float
) -> jax.Array:
  """-log s(clip(beta D, -2R, 2R)).

  Huang et al. 2024, chi-PO (arXiv:2407.13399), R as our `clip`.
  """
  return -jax.nn.log_sigmoid(jnp.clip(beta * margins, -2 * clip, 2 * clip))


def linear(margins: jax.Array) -> jax.Array:
  """-D: Xiao et al. 2025, SimPER (arXiv:2502.00883)"""
  return -margins


def exact(
  margins: jax.Array, *, beta: float, label_smoothing: float
) -> jax.Array:
  """KL from (s(z), s(-z)) to the smoothed label (1 - e, e), z = beta D.

  Ji et al. 2024, EXO (arXiv:2402.00856)
  """
  z = beta * margins
  log_p, log_q = jax.nn.log_sigmoid(z), jax.nn.log_sigmoid(-z)
  return jnp.exp(log_p) * (log_p - jnp.log1p(-label_smoothing)) + jnp.exp(
    log_q
  ) * (log_q - jnp.log(label_smoothing))


def discovered(margins: jax.Array, *, beta: float, tau: float) -> jax.Array:
  """(1 - m)(-log s(z)) + m exp(-z), m = s(z / tau), z = beta D.

  Lu et al. 2024, DiscoPOP (arXiv:2406.08414) m exp(-z) is taken as
  exp(-z + log s(z / tau)), where inf times 0 cannot arise.
  """
  z = beta * margins
  logistic_part = -jax.nn.sigmoid(-z / tau) * jax.nn.log_sigmoid(z)
  return logistic_part + safe_exp(-z + jax.nn.log_sigmoid(z / tau))


def exponential(margins: jax.Array, *, beta: float) -> jax.Array:
  """exp(-beta D): Tang et al. 2024, GPO (arXiv:2402.05749)."""
  return safe_exp(-beta * margins)


# Group links on pairs.


def shifted_reward_logistic(
  rewards: jax.Array, sequences: Sequences, *, beta: float, shift: float
) -> jax.Array:
  """-log s(beta r_w - lambda beta r_l), lambda as our `shift`.

  Yang et al. 2025, DPO-Shift (arXiv:2502.07599)
  """
  del sequences
  return -jax.nn.log_sigmoid(beta * (rewards[:, 0] - shift * rewards[:, 1]))


def offset_logistic(
  rewards: jax.Array, sequences: Sequences, *, beta: float, alpha: float
) -> jax.Array:
  """-log s(beta D - alpha log(score_w - score_l)).

  Amini et al. 2024, ODPO (arXiv:2402.10571) Where the chosen response
  does not score higher there is no offset to ask for, and the pair is left
  out: its loss is 0.
  """
  gap = sequences.score[:, 0] - sequences.score[:, 1]
  is_ordered = gap > 0.0
  offset = alpha * jnp.log(jnp.where(is_ordered, gap, 1.0))
  loss = -jax.nn.log_sigmoid(beta * _margins(rewards) - offset)
  return jnp.where(is_ordered, loss, 0.0)


def positive_logistic(
  rewards: jax.Array,
  sequences: Sequences,
  *,
  beta: float,
  penalty_weight: float,
) -> jax.Array:
  """-log s(beta (D - lambda max(0, -r_w))): the chosen must not lose.

  Pal et al. 2024, DPOP (arXiv:2402.13228)
  """
  del sequences
  penalty = penalty_weight * jax.nn.relu(-rewards[:, 0])
  return -jax.nn.log_sigmoid(beta * (_margins(rewards) - penalty))


def token_level_logistic(
  rewards: jax.Array, sequences: Sequences, *, beta: float, alpha: float
) -> jax.Array:
  """-log s(beta D - beta alpha (KL_l - sg KL_w)).

  Zeng et al. 2024, TDPO2 (arXiv:2404.11999) KL_y is the sum over the
  positions of y of the exact KL(pi_ref || pi) over the vocabulary.
  """
  kl = sequences.kl
  difference = kl[:, 1] - jax.lax.stop_gradient(kl[:, 0])
  return -jax.nn.log_sigmoid(beta * (_margins(rewards) - alpha * difference))


def weighted_policy_logistic(
  rewards: jax.Array, sequences: Sequences, *, beta: float
) -> jax.Array:
  """-sg(w_w w_l) log s(beta D): off-policy pairs count less.

  Zhou et al. 2024, WPO (arXiv:2406.11827): w = exp of the mean
  over tokens of log p(token) - log sum_v p(v)^2.
  """
  weight = jnp.exp(sequences.alignment.sum(-1))
  loss = -jax.nn.log_sigmoid(beta * _margins(rewards))
  return jax.lax.stop_gradient(weight) * loss


def noise_contrastive(
  rewards: jax.Array, sequences: Sequences, *, beta: float
) -> jax.Array:
  """-log s(b r_w) - 1/2 log s(-b r_w) - 1/2 log s(-b r_l), b = beta.

  Chen et al. 2024, NCA (arXiv:2402.05369).
  """
  del sequences
  z = beta * rewards
  noise = 0.5 * jax.nn.log_sigmoid(-z).sum(-1)
  return -jax.nn.log_sigmoid(z[:, 0]) - noise


def two_squares(
  rewards: jax.Array, sequences: Sequences, *, beta: float
) -> jax.Array:
  """(r_w - 1 / (2 beta))^2 + (r_l + 1 / (2 beta))^2.

  Wu et al. 2024, SPPO (arXiv:2405.00675).
  """
  del sequences
  target = 0.5 / beta
  return jnp.square(rewards[:, 0] - target) + jnp.square(rewards[:, 1] + target)


def anchored_zero(
  rewards: jax.Array, sequences: Sequences, *, beta: float
) -> jax.Array:
  """1 - s(beta r_w) + s(beta r_l): chosen up, rejected down.

  D'Oosterlinck et al. 2024, APO-zero (arXiv:2408.06266)
  """
  del sequences
  z = beta * rewards
  return jax.nn.sigmoid(-z[:, 0]) + jax.nn.sigmoid(z[:, 1])


def anchored_down(
  rewards: jax.Array, sequences: Sequences, *, beta: float
) -> jax.Array:
  """s(beta r_w) + 1 - s(beta D): both down, the rejected further.

  D'Oosterlinck et al. 2024, APO-down (arXiv:2408.06266)
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
  """-lp_w + alpha lp_l, or with -sum log(1 - p) on y_l if `token_level`.

  Rafailov et al. 2023 (arXiv:2305.18290), sec. 6; by tokens Welleck et al.
  2019 (arXiv:1908.04319)
  """
  if token_level:
    return -rewards[:, 0] - alpha * sequences.complement_logps[:, 1]
  return -rewards[:, 0] + alpha * rewards[:, 1]


# Links with state.


def _running(init: float) -> Callable[[], State]:
  def make() -> State:
    return {"mean": jnp.float32(init), "count": jnp.float32(0.0)}

  return make


def _masked_mean(x: jax.Array, mask: jax.Array) -> jax.Array:
  return jnp.where(mask, x, 0.0).sum() / jnp.maximum(mask.sum(), 1)


def _update_mean(mean, count, batch_mean, has_any):
  """Mean over the steps so far that had something to average."""
  count = count + has_any.astype(jnp.float32)
  step = (batch_mean - mean) / jnp.maximum(count, 1.0)
  return jnp.where(has_any, mean + step, mean), count


def binary_pair(
  rewards: jax.Array, sequences: Sequences, state: State, *, beta: float
) -> tuple[jax.Array, State]:
  """-log s(beta r_w - d) - log s(-(beta r_l - d)).

  Jung et al. 2024, BCO (arXiv:2404.04656); d is the mean over the
  steps so far, this one included, of the batch's mean beta (r_w + r_l) / 2.
  """
  z = beta * rewards
  is_valid = sequences.valid.all(-1)
  batch_mean = _masked_mean(jax.lax.stop_gradient(z).mean(-1), is_valid)
  mean, count = _update_mean(
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
  """DPO whose beta follows the batch: beta (1 + alpha (M - M0)).

  Wu et al. 2024, beta-DPO (arXiv:2407.08639): M is the batch's
  mean beta D, M0 its moving average with momentum 0.9. The paper leaves open
  what a negative factor means; it is held above 0.001.
  """
  margins = _margins(rewards)
  is_valid = sequences.valid.all(-1)
  batch_mean = _masked_mean(beta * jax.lax.stop_gradient(margins), is_valid)
  factor = jnp.maximum(1.0 + alpha * (batch_mean - state["mean"]), 1e-3)
  loss = -jax.nn.log_sigmoid(beta * factor * margins)
  mean = jnp.where(
    is_valid.any(), 0.9 * state["mean"] + 0.1 * batch_mean, state["mean"]
  )
  return loss, {"mean": mean, "count": state["count"] + 1.0}


def _class_means() -> State:
  # An array each: a step donates its state, and no buffer twice.
  names = (
    "desirable",
    "desirable_count",
    "undesirable",
    "undesirable_count",
  )
  return {name: jnp.float32(0.0) for name in names}


def binary(
  rewards: jax.Array, sequences: Sequences, state: State, *, beta: float
) -> tuple[jax.Array, State]:
  """-log s(b r - d) if desirable, -log s(-(b r - d)) if not, b = beta.

  Jung et al. 2024, BCO (arXiv:2404.04656): d is halfway between
  the mean rewards of the two classes, each over the steps so far that had
  one; where a class was never seen, the mean of the other.
  """
  z = beta * rewards[:, 0]
  is_desirable = _is_desirable(sequences)
  is_valid = sequences.valid[:, 0]
  new_state, shift, seen = {}, 0.0, 0.0
  for name, mask in (
    ("desirable", is_valid & is_desirable),
    ("undesirable", is_valid & ~is_desirable),
  ):
    batch_mean = _masked_mean(jax.lax.stop_gradient(z), mask)
    mean, count = _update_mean(
      state[name], state[f"{name}_count"], batch_mean, mask.any()
    )
    new_state |= {name: mean, f"{name}_count": count}
    shift += mean * (count > 0)
    seen += count > 0
  shift = shift / jnp.maximum(seen, 1.0)
  sign = jnp.where(is_desirable, 1.0, -1.0)
  return -jax.nn.log_sigmoid(sign * (z - shift)), new_state


# Links that couple the batch without state.


def optimal_transport(
  rewards: jax.Array,
  sequences: Sequences,
  *,
  beta: float,
  label_smoothing: float,
) -> jax.Array:
  """cDPO on sort(lp_w - lp_l) - sort(ref_w - ref_l), the mean: f32 [B].

  Melnyk et al. 2024, AOT (arXiv:2406.05882): the policy's margins must
  dominate the reference's as distributions.
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
  """cDPO on sort(r_w) - sort(r_l), the mean: f32 [B].

  Melnyk et al. 2024, AOT (arXiv:2406.05882)
  """
  return _sorted_loss(
    rewards[:, 0],
    rewards[:, 1],
    sequences.valid.all(-1),
    beta,
    label_smoothing,
  )


def _sorted_loss(x, y, is_valid, beta, label_smoothing) -> jax.Array:
  """Mean cDPO loss of sort(x) - sort(y) over the valid entries: f32 [B]."""
  # What is not valid sorts to the end of both, where it is cut off.
  largest = jnp.finfo(jnp.float32).max
  x, y = (jnp.sort(jnp.where(is_valid, v, largest)) for v in (x, y))
  count = is_valid.sum()
  is_kept = jnp.arange(x.shape[0]) < count
  margins = jnp.where(is_kept, x, 0.0) - jnp.where(is_kept, y, 0.0)
  loss = smoothed_logistic(margins, beta=beta, label_smoothing=label_smoothing)
  return jnp.broadcast_to(_masked_mean(loss, is_kept), is_valid.shape)


def kahneman_tversky(
  rewards: jax.Array,
  sequences: Sequences,
  *,
  beta: float,
  desirable_weight: float,
  undesirable_weight: float,
) -> jax.Array:
  """lam_D (1 - s(b r - z)) if desirable, lam_U (1 - s(z - b r)) if not.

  Ethayarajh et al. 2024, KTO (arXiv:2402.01306); b = beta. z is the
  mean of b r over the batch's mismatched prompts and responses, at least 0,
  and no gradient flows through it.
  """
  z = beta * rewards[:, 0]
  mismatched = beta * (
    sequences.mismatched_logps - sequences.mismatched_ref_logps
  )
  point = jax.lax.stop_gradient(
    jax.nn.relu(_masked_mean(mismatched, sequences.valid[:, 0]))
  )
  return jnp.where(
    _is_desirable(sequences),
    desirable_weight * jax.nn.sigmoid(point - z),
    undesirable_weight * jax.nn.sigmoid(z - point),
  )


# Links on single responses and on rankings.


def negative(rewards: jax.Array, sequences: Sequences) -> jax.Array:
  """Minus the reward of the first response: likelihood, if that is logps."""
  del sequences
  return -rewards[:, 0]


def anchored_unpaired(
  rewards: jax.Array, sequences: Sequences, *, beta: float
) -> jax.Array:
  """1 - s(beta r) if desirable, s(beta r) if not.

  D'Oosterlinck et al. 2024, APO-zero (arXiv:2408.06266).
  """
  sign = jnp.where(_is_desirable(sequences), -1.0, 1.0)
  return jax.nn.sigmoid(sign * beta * rewards[:, 0])


def plackett_luce(
  rewards: jax.Array, sequences: Sequences, *, beta: float
) -> jax.Array:
  """-sum_k [b r_k - logsumexp_{j >= k} b r_j], responses best first.

  Rafailov et al. 2023 (arXiv:2305.18290), app. A.3, eq. 20; b = beta. Of
  responses with the same score none precedes the other: each competes with
  those ranked below both. So a tie of two teaches nothing, K = 2 is DPO, and
  slots without a response change nothing.
  """
  return _ranking_loss(beta * rewards, sequences)


def bradley_terry(rewards: jax.Array, sequences: Sequences) -> jax.Array:
  """-log s(v_w - v_l); for K > 2 by Plackett-Luce.

  Rafailov et al. 2023 (arXiv:2305.18290), eq. 2 and app. A.3.
  """
  return _ranking_loss(rewards, sequences)


def _ranking_loss(z: jax.Array, sequences: Sequences) -> jax.Array:
  valid, score = sequences.valid, sequences.score
  num_slots = z.shape[1]
  below = jnp.triu(jnp.ones((1, num_slots, num_slots), bool), 1)
  differs = score[:, :, None] != score[:, None, :]
  competes = below & differs & valid[:, None, :] & valid[:, :, None]
  competes |= jnp.eye(num_slots, dtype=bool)[None]
  # exp of a difference from the winner's own figure: finite for any z.
  gaps = jnp.where(competes, z[:, None, :] - z[:, :, None], -jnp.inf)
  return jnp.where(valid, jax.nn.logsumexp(gaps, axis=-1), 0.0).sum(-1)


def clipped_policy_gradient(
  rewards: jax.Array,
  sequences: Sequences,
  *,
  clip: float,
  value_clip: float,
  value_weight: float,
) -> jax.Array:
  """PPO: the clipped surrogate and the value head's error, summed over tokens.

  Schulman et al. 2017 (arXiv:1707.06347), eq. 7 and 9; the advantages and the
  returns are those of `online.py`. `rewards` are not read: what a response is
  worth is in its advantages.
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
  """RLOO: -min(u A, clip(u, 1 - eps, 1 + eps) A), the mean over responses.

  Ahmadian et al. 2024 (arXiv:2402.14740), sec. 3: A is a response's score
  minus the mean of its siblings' scores; `online.py` has subtracted the price
  of the KL from the score. u = pi / pi_old, of whole responses, and its clip
  are those of TRL's RLOOTrainer: samples may be used for more than one step.
  While the policy is the one that sampled, u = 1 and the gradient is
  REINFORCE's, -A grad log pi.
  """
  valid = sequences.valid
  advantages = policy_gradient.leave_one_out(sequences.score, valid)
  loss = policy_gradient.clipped_surrogate(
    rewards, sequences.old_logps, advantages, valid, clip=clip
  )
  return loss.sum(-1) / jnp.maximum(valid.sum(-1), 1)


def _is_desirable(sequences: Sequences) -> jax.Array:
  return sequences.score[:, 0] > 0.5


def _margins(rewards: jax.Array) -> jax.Array:
  chex.assert_shape(rewards, (None, 2))
  return rewards[:, 0] - rewards[:, 1]


def _group(function, **attributes) -> Link:
  return Link(function, "group", **attributes)


LINKS: dict[str, Link] = {
  **{
    f.__name__: Link(f, "margin")
    for f in (
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
  },
  **{
    f.__name__: _group(f, needs_anchor=True)
    for f in (
      shifted_reward_logistic,
      positive_logistic,
      noise_contrastive,
      two_squares,
      anchored_zero,
      anchored_down,
      anchored_unpaired,
    )
  },
  "offset_logistic": _group(offset_logistic, needs_ordered_scores=True),
  "token_level_logistic": _group(token_level_logistic, needs=frozenset({"kl"})),
  "weighted_policy_logistic": _group(
    weighted_policy_logistic, needs=frozenset({"alignment"})
  ),
  "unlikely": _group(unlikely, needs=frozenset({"complement_logps"})),
  "binary_pair": _group(
    binary_pair, is_coupled=True, init=_running(0.0), needs_anchor=True
  ),
  "dynamic_logistic": _group(
    dynamic_logistic, is_coupled=True, init=_running(0.0)
  ),
  "binary": _group(
    binary, is_coupled=True, init=_class_means, needs_anchor=True
  ),
  "kahneman_tversky": _group(
    kahneman_tversky,
    is_coupled=True,
    needs_anchor=True,
    needs=frozenset({"mismatched_logps", "mismatched_ref_logps"}),
  ),
  "optimal_transport": Link(optimal_transport, "pooled", is_coupled=True),
  "unpaired_optimal_transport": Link(
    unpaired_optimal_transport, "pooled", is_coupled=True
  ),
  "negative": _group(negative),
  "plackett_luce": _group(plackett_luce),
  "bradley_terry": _group(bradley_terry),
  "leave_one_out": _group(leave_one_out, needs=frozenset({"old_logps"})),
  "clipped_policy_gradient": _group(
    clipped_policy_gradient,
    needs=frozenset(
      {
        "token_mask",
        "token_logps",
        "token_values",
        "old_token_logps",
        "old_token_values",
        "advantages",
        "returns",
      }
    ),
  ),
}
