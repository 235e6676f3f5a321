"""Kinds of group: how many responses a loss reads, and what its metrics show.

Metrics of a group are f32 [B] each, nats unless the name says otherwise; NaN
where a group has no value.
"""

from collections.abc import Callable, Mapping
import dataclasses

import jax
import jax.numpy as jnp

from dpo_jax.losses.links.unpaired import is_desirable
from dpo_jax.types import Array, Sequences

Metrics = dict[str, jax.Array]


def _chosen_metrics(
  values: Mapping[str, jax.Array], sequences: Sequences
) -> Metrics:
  """Returns slot 0 of each value, named "NAME/chosen".

  Args:
    values: name -> f32 [B, K].
    sequences: not read.
  """
  del sequences
  return {f"{name}/chosen": value[:, 0] for name, value in values.items()}


def _label_metrics(
  values: Mapping[str, jax.Array], sequences: Sequences
) -> Metrics:
  """Computes metrics of responses with a label.

  Args:
    values: name -> f32 [B, 1], "reward" among them.
    sequences: its scores are the labels.

  Returns:
    "NAME/chosen", NaN for an undesirable response; "NAME/rejected", NaN for a
    desirable one; "reward/accuracy", 1 where the reward has the sign of the
    label, 0 where not, 0.5 at 0.
  """
  is_good = is_desirable(sequences)
  metrics = {}
  for name, value in values.items():
    value = value[:, 0]
    metrics[f"{name}/chosen"] = jnp.where(is_good, value, jnp.nan)
    metrics[f"{name}/rejected"] = jnp.where(is_good, jnp.nan, value)
  sign = jnp.where(is_good, 1.0, -1.0)
  metrics["reward/accuracy"] = 0.5 * (
    jnp.sign(sign * values["reward"][:, 0]) + 1.0
  )
  return metrics


def _order_metrics(
  values: Mapping[str, jax.Array], sequences: Sequences
) -> Metrics:
  """Computes metrics of each group from the order of its responses.

  Args:
    values: name -> f32 [B, K], "reward" among them.
    sequences: slot 0 is the chosen response.

  Returns:
    "NAME/chosen", slot 0; "NAME/rejected", mean of the other responses;
    "reward/margin", their difference; "reward/accuracy", share of pairs of
    responses whose earlier one has the higher reward, NaN without a pair. A tie
    of rewards counts 0.5. With more than two slots, pairs of equal score are
    left out.
  """
  others = sequences.valid.at[:, 0].set(False)
  count = jnp.maximum(others.sum(-1), 1)
  metrics = {}
  for name, value in values.items():
    metrics[f"{name}/chosen"] = value[:, 0]
    metrics[f"{name}/rejected"] = jnp.where(others, value, 0.0).sum(-1) / count
  metrics["reward/margin"] = (
    metrics["reward/chosen"] - metrics["reward/rejected"]
  )
  reward, num_slots = values["reward"], sequences.valid.shape[1]
  is_pair = jnp.triu(jnp.ones((1, num_slots, num_slots), bool), 1)
  is_pair &= sequences.valid[:, :, None] & sequences.valid[:, None, :]
  if num_slots > 2:
    is_pair &= sequences.score[:, :, None] != sequences.score[:, None, :]
  wins = 0.5 * (jnp.sign(reward[:, :, None] - reward[:, None, :]) + 1.0)
  num_pairs = is_pair.sum((1, 2))
  accuracy = jnp.where(is_pair, wins, 0.0).sum((1, 2)) / num_pairs
  metrics["reward/accuracy"] = jnp.where(num_pairs > 0, accuracy, jnp.nan)
  return metrics


def _sample_metrics(
  values: Mapping[str, jax.Array], sequences: Sequences
) -> Metrics:
  """Returns means over a prompt's samples, named "NAME/mean".

  Args:
    values: name -> f32 [B, K].
    sequences: its valid slots are counted.
  """
  count = jnp.maximum(sequences.valid.sum(-1), 1)
  return {
    f"{name}/mean": jnp.where(sequences.valid, value, 0.0).sum(-1) / count
    for name, value in values.items()
  }


@dataclasses.dataclass(frozen=True)
class Group:
  """A kind of group.

  Attributes:
    wanted: description of a group that suits, for errors.
    fewest: smallest number of responses, in data and in a valid group.
    most: largest number of responses in data; None for no limit.
    num_slots: responses that the loss reads, the first ones; None for all.
    metrics: makes the metrics of the values [B, K] below.
    measures: value shown next to log-probs and log-ratios: "reward" (implicit,
      scaled), "score", or "" for none.
    is_ordered: whether its responses have an order, which equal scores do not
      give.
    needs_desirable: whether a single response with label False must not be
      learned from.
  """

  wanted: str
  fewest: int
  most: int | None
  num_slots: int | None
  metrics: Callable[[Mapping[str, jax.Array], Sequences], Metrics]
  measures: str = "reward"
  is_ordered: bool = False
  needs_desirable: bool = False

  def valid_groups(self, valid: Array) -> Array:
    """Returns which groups have enough responses: bool [B, K] -> bool [B].

    Enough is at least `fewest`. Slots after `num_slots` do not count.
    """
    return valid[:, : self.num_slots].sum(-1) >= self.fewest

  def scored_tokens(
    self, num_tokens: jax.Array, is_counted: jax.Array
  ) -> jax.Array:
    """Sums the tokens that a per-token mean divides by: f32 [].

    Of samples these are all tokens. Of any other group they are the first
    response's, the only one that a per-token term reads.

    Args:
      num_tokens: f32 [B, K], scored tokens of each response.
      is_counted: bool [B, K], responses of valid groups.
    """
    slots = None if self.measures == "score" else 1
    return jnp.where(is_counted, num_tokens, 0.0)[:, :slots].sum()

  def fits(self, num_responses: int) -> bool:
    """Returns whether `num_responses` is from `fewest` to `most`."""
    most = num_responses if self.most is None else self.most
    return self.fewest <= num_responses <= most


GROUPS: dict[str, Group] = {
  # Only slot 0 is read, so only slot 0 is packed.
  "first": Group(
    wanted="at least 1 response",
    fewest=1,
    most=None,
    num_slots=1,
    metrics=_chosen_metrics,
    measures="",
    needs_desirable=True,
  ),
  "single": Group(
    wanted="1 response with a label",
    fewest=1,
    most=1,
    num_slots=1,
    metrics=_label_metrics,
  ),
  "pair": Group(
    wanted="2 responses, the chosen first",
    fewest=2,
    most=2,
    num_slots=2,
    metrics=_order_metrics,
    is_ordered=True,
  ),
  "ranking": Group(
    wanted="2 or more responses, best first",
    fewest=2,
    most=None,
    num_slots=None,
    metrics=_order_metrics,
    is_ordered=True,
  ),
  # In any order, with their rewards as scores.
  "samples": Group(
    wanted="at least 1 response of the policy",
    fewest=1,
    most=None,
    num_slots=None,
    metrics=_sample_metrics,
    measures="score",
  ),
}
