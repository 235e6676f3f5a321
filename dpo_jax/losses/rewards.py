"""Rewards of responses, in nats: the quantities that a link compares.

Every function takes `Sequences` with [B, K] fields and returns f32 [B, K].
Keyword-only arguments are knobs. Slots without a response give a finite number
that links must not read. The row of a loss in `dpo_jax.losses.catalogue` has
its formula and paper.

An anchored reward is 0 where the policy equals its reference, so a link may
compare it with a constant. Other rewards are defined up to a constant: only
their margins mean something.
"""

from collections.abc import Callable
import dataclasses

import jax
import jax.numpy as jnp

from dpo_jax.losses.numerics import log1mexp, safe_exp
from dpo_jax.types import Sequences

DIVERGENCES = ("reverse_kl", "forward_kl", "jensen_shannon", "alpha")


@dataclasses.dataclass(frozen=True)
class Reward:
  """A reward and what it requires.

  Attributes:
    function: Sequences -> f32 [B, K].
    needs: optional fields of Sequences that it reads.
    is_anchored: whether it is 0 where the policy equals its reference.
  """

  function: Callable[..., jax.Array]
  needs: frozenset[str] = frozenset()
  is_anchored: bool = False


def _lengths(sequences: Sequences) -> jax.Array:
  return jnp.maximum(sequences.num_tokens, 1.0)


def log_ratio(sequences: Sequences) -> jax.Array:
  """log pi(y|x) / pi_ref(y|x), the implicit reward of DPO without its beta.

  Rafailov et al. 2023 (arXiv:2305.18290), eq. 5, without the log-partition
  term, which is the same for all responses to a prompt.
  """
  return sequences.logps - sequences.ref_logps


def mean_log_ratio(sequences: Sequences) -> jax.Array:
  """`log_ratio` divided by the response's number of scored tokens."""
  return log_ratio(sequences) / _lengths(sequences)


def summed_or_mean_log_ratio(
  sequences: Sequences, *, length_normalize: bool
) -> jax.Array:
  """`log_ratio`, or `mean_log_ratio` if `length_normalize`.

  Published implementations of a loss disagree on the two. The same strength of
  regularisation is a different objective under each.
  """
  return mean_log_ratio(sequences) if length_normalize else log_ratio(sequences)


def penalized_log_ratio(
  sequences: Sequences, *, beta: float, alpha: float
) -> jax.Array:
  """log_ratio + (alpha / beta) |y|: reward of R-DPO over beta.

  The optimum of E[r - alpha |y|] - beta KL has r = beta log_ratio + alpha |y|
  + const. So the length has a plus sign: a longer chosen response needs a
  smaller log-ratio.
  """
  return log_ratio(sequences) + alpha / beta * sequences.num_tokens


def desensitized_log_ratio(sequences: Sequences, *, alpha: float) -> jax.Array:
  """Log-ratio whose tokens beyond the pair's shorter length count alpha times.

  It is alpha log_ratio + (1 - alpha) log_ratio of the head, the first tokens up
  to that length.
  """
  head = sequences.head_logps - sequences.ref_head_logps
  return alpha * log_ratio(sequences) + (1.0 - alpha) * head


def sampled_log_ratio(sequences: Sequences) -> jax.Array:
  """Log-ratio summed over as many tokens as the shorter response has.

  The data pipeline draws the tokens once for each response, at random.
  """
  return sequences.sampled_logps - sequences.ref_sampled_logps


def f_divergence(
  sequences: Sequences, *, divergence: str, alpha: float
) -> jax.Array:
  """f'(u), u = pi / pi_ref: implicit reward under an f-divergence.

  Additive constants are dropped: "reverse_kl" gives log u, "forward_kl" -1 / u,
  "jensen_shannon" log(2 u / (1 + u)), "alpha" (1 - u^-alpha) / alpha. It is
  computed from r = log u, so that no r overflows.
  """
  r = log_ratio(sequences)
  if divergence == "reverse_kl":
    return r
  if divergence == "forward_kl":
    return -safe_exp(-r)
  if divergence == "jensen_shannon":
    return jnp.log(2.0) + jax.nn.log_sigmoid(r)
  return (1.0 - safe_exp(-alpha * r)) / alpha


def forward_kl(sequences: Sequences) -> jax.Array:
  """1 - pi_ref / pi: `f_divergence` of the forward KL, anchored."""
  return 1.0 - safe_exp(-log_ratio(sequences))


def chi_squared(sequences: Sequences) -> jax.Array:
  """u + log u, u = pi / pi_ref: reward of mixed chi-squared regularisation.

  The constant -1 that would anchor it cancels in every margin.
  """
  r = log_ratio(sequences)
  return safe_exp(r) + r


def logps(sequences: Sequences) -> jax.Array:
  """log pi(y|x): reference-free."""
  return sequences.logps


def mean_logps(sequences: Sequences) -> jax.Array:
  """log pi(y|x) / |y|: mean over the response's tokens."""
  return sequences.logps / _lengths(sequences)


def summed_or_mean_logps(
  sequences: Sequences, *, per_sequence: bool
) -> jax.Array:
  """`logps`, or `mean_logps` if `per_sequence`."""
  return mean_logps(sequences) if per_sequence else logps(sequences)


def mean_prob(sequences: Sequences) -> jax.Array:
  """Inverse perplexity: exp of the mean log-prob of a token."""
  return jnp.exp(mean_logps(sequences))


def power_mean_prob(sequences: Sequences, *, alpha: float) -> jax.Array:
  """(1 - p^-alpha) / alpha, p = exp of the mean log-prob of a token.

  It is log p at alpha = 0, the limit. A traced alpha must not be 0.
  """
  log_p = mean_logps(sequences)
  if not isinstance(alpha, jax.core.Tracer) and alpha == 0.0:
    return log_p
  return (1.0 - safe_exp(-alpha * log_p)) / alpha


def log_odds(sequences: Sequences) -> jax.Array:
  """log(p / (1 - p)), p = exp of a token's mean log-prob; at most 13.8."""
  log_p = mean_logps(sequences)
  return log_p - log1mexp(log_p)


def values(sequences: Sequences) -> jax.Array:
  """Output of the value head at the response's last token."""
  return sequences.values


_REFERENCE = frozenset({"ref_logps"})

REWARDS: dict[str, Reward] = {
  "log_ratio": Reward(log_ratio, _REFERENCE, is_anchored=True),
  "mean_log_ratio": Reward(mean_log_ratio, _REFERENCE, is_anchored=True),
  "summed_or_mean_log_ratio": Reward(
    summed_or_mean_log_ratio, _REFERENCE, is_anchored=True
  ),
  "penalized_log_ratio": Reward(penalized_log_ratio, _REFERENCE),
  "desensitized_log_ratio": Reward(
    desensitized_log_ratio,
    _REFERENCE | {"head_logps", "ref_head_logps"},
    is_anchored=True,
  ),
  "sampled_log_ratio": Reward(
    sampled_log_ratio,
    _REFERENCE | {"sampled_logps", "ref_sampled_logps"},
    is_anchored=True,
  ),
  "f_divergence": Reward(f_divergence, _REFERENCE),
  "forward_kl": Reward(forward_kl, _REFERENCE, is_anchored=True),
  "chi_squared": Reward(chi_squared, _REFERENCE),
  "logps": Reward(logps),
  "mean_logps": Reward(mean_logps),
  "summed_or_mean_logps": Reward(summed_or_mean_logps),
  "mean_prob": Reward(mean_prob),
  "power_mean_prob": Reward(power_mean_prob),
  "log_odds": Reward(log_odds),
  "values": Reward(values, frozenset({"values"})),
}
