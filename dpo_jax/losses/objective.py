"""Objective: a loss with its knobs set, the function a step differentiates."""

from collections.abc import Mapping
import dataclasses
import functools
import operator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dpo_jax.losses.catalogue.row import Loss, knobs_of
from dpo_jax.losses.groups import GROUPS, Group, Metrics
from dpo_jax.losses.numerics import blank_invalid
from dpo_jax.types import Array, Sequences


@dataclasses.dataclass(frozen=True)
class Objective:
  """A loss with its knobs set.

  Attributes:
    loss: the row of the catalogue.
    knobs: a value for every knob that the row reads.
  """

  loss: Loss
  knobs: Mapping[str, Any]

  @property
  def name(self) -> str:
    return self.loss.name

  def to_dict(self) -> dict[str, Any]:
    """Config from which `build_objective` makes this objective."""
    row, knobs = self.loss, self.knobs
    read = {k: v for k, v in knobs.items() if row.is_read(k, knobs)}
    return {"name": row.name, "reward": row.reward, "link": row.link, **read}

  @property
  def needs(self) -> frozenset[str]:
    """Optional fields of `Sequences` that the loss reads."""
    return self.loss.needs(self.knobs)

  @property
  def needs_reference(self) -> bool:
    return bool(self.needs & {"ref_logps", "kl"})

  @property
  def is_coupled(self) -> bool:
    """Returns whether a group's loss depends on the rest of the batch."""
    return self.loss.is_coupled

  @property
  def group(self) -> str:
    """Name of the kind of group, in `groups.GROUPS`."""
    return self.loss.group

  @property
  def _group(self) -> Group:
    return GROUPS[self.loss.group]

  @property
  def num_slots(self) -> int | None:
    """Responses of a group that the loss reads; None for all."""
    return self._group.num_slots

  @property
  def reads_gap(self) -> bool:
    """Whether the size of a gap in score matters, not the order alone."""
    knob = self.loss.link_row.gap_weight
    return knob is not None and self.knobs[knob] != 0

  @property
  def uses_ties(self) -> bool:
    """Whether a pair of equal scores is kept, and learnt from."""
    return self.loss.link_row.uses_ties

  def init(self) -> Any:
    """State that the loss carries from step to step: a tree, () if none."""
    make = self.loss.link_row.init
    return make() if make else ()

  def valid_groups(self, valid: Array) -> Array:
    """Returns which groups the loss can read: bool [B, K] -> bool [B].

    A ranking needs two responses, samples one, and every other loss all slots
    that it reads.
    """
    return self._group.valid_groups(valid)

  def unusable(
    self, score: np.ndarray, present: np.ndarray
  ) -> dict[str, np.ndarray]:
    """Finds groups of a data set from which this loss learns nothing.

    Args:
      score: f32 [N, K].
      present: bool [N, K], which slots hold a response.

    Returns:
      reason -> bool [N]; a group counts under the first reason that applies.
      "too_few_responses"; "tied_scores", if all responses score the same, for
      a loss that learns from their order;
      "chosen_scores_lower", for a loss that needs the chosen to score higher;
      "undesirable_response", a single response with label False, for a loss
      that makes responses more likely. A tie within a longer ranking is kept.
    """
    reasons = {"too_few_responses": ~np.asarray(self.valid_groups(present))}
    if self._group.is_ordered and not self.uses_ties:
      highest = np.where(present, score, -np.inf).max(1)
      lowest = np.where(present, score, np.inf).min(1)
      reasons["tied_scores"] = highest == lowest
    if self.loss.link_row.needs_ordered_scores:
      reasons["chosen_scores_lower"] = score[:, 0] < score[:, 1]
    if self._group.needs_desirable:
      is_alone = present.sum(1) == 1
      reasons["undesirable_response"] = is_alone & (score[:, 0] == 0.0)
    return first_reasons(reasons)

  def scored_tokens(self, num_tokens: jax.Array, valid: jax.Array) -> jax.Array:
    """Sums the tokens that a per-token mean divides by: f32 [].

    Only valid groups count, and only the first response of each, but for
    samples; see `Group.scored_tokens`.
    """
    is_counted = valid & self.valid_groups(valid)[:, None]
    return self._group.scored_tokens(num_tokens, is_counted)

  def apply(
    self, sequences: Sequences, loss_state: Any
  ) -> tuple[jax.Array, Metrics, Any]:
    """Computes the loss and the metrics of every group.

    The objective is `mean_over_groups` of the losses, over the valid groups of
    the global batch. If `sequences` is a part of that batch, its `num_groups`
    and `total_tokens` give the size of the whole.

    Args:
      sequences: fields f32 [B, K].
      loss_state: from `init` or the step before.

    Returns:
      per_group: f32 [B] loss, 0 for a group that is not valid.
      metrics: name -> f32 [B], see `groups`, without a gradient; NaN where a
        group has no value.
      loss_state: for the next step.

    Raises:
      ValueError: K does not suit the loss, or a field that it reads is None.
    """
    sequences, rewards, per_group, loss_state = self._evaluate(
      sequences, loss_state
    )
    return per_group, self._metrics(sequences, rewards), loss_state

  def losses(self, sequences: Sequences) -> jax.Array:
    """Computes the losses alone, of a loss without state; see `apply`."""
    return self._evaluate(sequences, ())[2]

  def _evaluate(
    self, sequences: Sequences, loss_state: Any
  ) -> tuple[Sequences, jax.Array, jax.Array, Any]:
    """Computes rewards and losses of every group.

    Returns:
      sequences: as given, 0 in slots without a response, with the batch's size.
      rewards: f32 [B, K], 0 in those slots.
      per_group: f32 [B] loss, 0 for a group that is not valid.
      loss_state: for the next step.
    """
    self.check_group_size(sequences.valid.shape[1])
    self._check_fields(sequences)
    is_valid = self.valid_groups(sequences.valid)
    sequences = blank_invalid(self._counted(sequences, is_valid))
    reward = self.loss.reward_row.function
    rewards = reward(sequences, **self._knobs_for(reward))
    # A reward of blank fields need not be 0.
    rewards = jnp.where(sequences.valid, rewards, 0.0)
    per_group, loss_state = self._link(rewards, sequences, loss_state)
    for regularizer in self.loss.regularizers:
      per_group += regularizer(sequences, **self._knobs_for(regularizer))
    if self.loss.is_per_token and not self.knobs.get("per_sequence"):
      # Turns the mean over groups into a mean over tokens.
      total_tokens = jnp.maximum(sequences.total_tokens, 1.0)
      per_group = per_group * (sequences.num_groups / total_tokens)
    per_group = jnp.where(is_valid, per_group, 0.0)
    return sequences, rewards, per_group, loss_state

  def check_group_size(self, num_responses: int) -> None:
    """Raises ValueError unless groups of that size suit the loss."""
    if not self._group.fits(num_responses):
      raise ValueError(
        f"loss {self.name!r} reads groups of {self._group.wanted}; these hold"
        f" {num_responses}: choose a loss for groups of that size, or other"
        " data"
      )

  def _check_fields(self, sequences: Sequences) -> None:
    missing = sorted(
      field for field in self.needs if getattr(sequences, field) is None
    )
    if "ref_logps" in missing:
      raise ValueError(
        f"loss {self.name!r} compares with a reference, but ref_logps is None:"
        " set reference.kind to 'cached' or 'frozen'"
      )
    if missing:
      raise ValueError(
        f"loss {self.name!r} reads {', '.join(missing)} of the sequences, which"
        " must not be None"
      )

  def _knobs_for(self, function: Any) -> dict[str, Any]:
    return {name: self.knobs[name] for name in knobs_of(function)}

  def _link(
    self, rewards: jax.Array, sequences: Sequences, loss_state: Any
  ) -> tuple[jax.Array, Any]:
    link = self.loss.link_row
    knobs = self._knobs_for(link.function)
    if link.kind == "margin":
      return link.function(rewards[:, 0] - rewards[:, 1], **knobs), loss_state
    if link.init is not None:
      return link.function(rewards, sequences, loss_state, **knobs)
    return link.function(rewards, sequences, **knobs), loss_state

  def _counted(self, sequences: Sequences, is_valid: Array) -> Sequences:
    """Fills in `num_groups` and `total_tokens` if `num_groups` is None.

    Then these sequences are the whole batch.
    """
    if sequences.num_groups is not None:
      return sequences
    return dataclasses.replace(
      sequences,
      num_groups=is_valid.sum(),
      total_tokens=self.scored_tokens(sequences.num_tokens, sequences.valid),
    )

  def _metrics(self, sequences: Sequences, rewards: jax.Array) -> Metrics:
    is_valid = self.valid_groups(sequences.valid)
    sequences, rewards = jax.lax.stop_gradient((sequences, rewards))
    group = self._group
    scale = self.knobs[self.loss.scale] if self.loss.scale else 1.0
    values = {"logps": sequences.logps}
    if group.measures == "score":
      values["score"] = sequences.score
    elif group.measures == "reward":
      values["reward"] = scale * rewards
    if sequences.ref_logps is not None:
      values["log_ratio"] = sequences.logps - sequences.ref_logps
    metrics = group.metrics(values, sequences)
    if self.uses_ties:
      # Of a pair in any order: right if the better response has more reward.
      order = jnp.sign(sequences.score[:, 0] - sequences.score[:, 1])
      right = 0.5 + order * (metrics["reward/accuracy"] - 0.5)
      metrics["reward/accuracy"] = jnp.where(order == 0.0, jnp.nan, right)
    return {
      name: jnp.where(is_valid, value, jnp.nan)
      for name, value in metrics.items()
    }


def first_reasons(reasons: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
  """Keeps each group under the first reason that applies: bool [N] each."""
  seen: np.ndarray | bool = False
  first = {}
  for reason, mask in reasons.items():
    first[reason] = mask & ~np.asarray(seen)
    seen = seen | mask
  return first


@dataclasses.dataclass(frozen=True)
class WeightedSum:
  """Weighted sum of several losses on the same sequences.

  Wang et al. 2024, MPO (arXiv:2411.10442). It has the interface of
  `Objective` but for `losses`, `loss` and `knobs`. A metric that several terms
  have is the first one's; each term's own loss is a metric too.

  Attributes:
    terms: (weight, objective) each.
  """

  terms: tuple[tuple[float, Objective], ...]

  @property
  def name(self) -> str:
    return "+".join(term.name for _, term in self.terms)

  def to_dict(self) -> list[dict[str, Any]]:
    """Config from which `build_objective` makes this objective."""
    return [{**term.to_dict(), "weight": w} for w, term in self.terms]

  @property
  def needs(self) -> frozenset[str]:
    return frozenset().union(*(term.needs for _, term in self.terms))

  @property
  def needs_reference(self) -> bool:
    return any(term.needs_reference for _, term in self.terms)

  @property
  def is_coupled(self) -> bool:
    return any(term.is_coupled for _, term in self.terms)

  @property
  def reads_gap(self) -> bool:
    return any(term.reads_gap for _, term in self.terms)

  @property
  def uses_ties(self) -> bool:
    ordered = [t for _, t in self.terms if GROUPS[t.group].is_ordered]
    return bool(ordered) and all(term.uses_ties for term in ordered)

  @property
  def group(self) -> str:
    kinds = [term.group for _, term in self.terms]
    return next((kind for kind in kinds if kind != "first"), "first")

  @property
  def num_slots(self) -> int | None:
    slots = [term.num_slots for _, term in self.terms]
    counts = [count for count in slots if count is not None]
    return None if len(counts) < len(slots) else max(counts)

  def init(self) -> Any:
    return tuple(term.init() for _, term in self.terms)

  def valid_groups(self, valid: Array) -> Array:
    masks = [term.valid_groups(valid) for _, term in self.terms]
    return functools.reduce(operator.and_, masks)

  def unusable(
    self, score: np.ndarray, present: np.ndarray
  ) -> dict[str, np.ndarray]:
    """As `Objective.unusable`: groups that some term cannot use."""
    reasons: dict[str, np.ndarray] = {}
    for _, term in self.terms:
      for reason, mask in term.unusable(score, present).items():
        reasons[reason] = reasons.get(reason, False) | mask
    return first_reasons(reasons)

  def scored_tokens(self, num_tokens: jax.Array, valid: jax.Array) -> jax.Array:
    """As `Objective.scored_tokens`."""
    is_counted = valid & self.valid_groups(valid)[:, None]
    return GROUPS[self.group].scored_tokens(num_tokens, is_counted)

  def check_group_size(self, num_responses: int) -> None:
    for _, term in self.terms:
      term.check_group_size(num_responses)

  def apply(
    self, sequences: Sequences, loss_state: Any
  ) -> tuple[jax.Array, Metrics, Any]:
    """Computes the weighted sum of the terms' losses; see `Objective.apply`.

    A group counts only if all terms can read it. Metrics have "loss/NAME" of
    each term too, without its weight; the state is a tuple of the terms'.
    """
    is_valid = self.valid_groups(sequences.valid)
    # A group counts only if every term can read it.
    valid = sequences.valid & is_valid[:, None]
    sequences = dataclasses.replace(sequences, valid=valid)
    total = jnp.zeros(is_valid.shape)
    metrics: Metrics = {}
    states = []
    for (weight, term), state in zip(self.terms, loss_state, strict=True):
      per_group, term_metrics, state = term.apply(sequences, state)
      total += weight * per_group
      shown = jax.lax.stop_gradient(per_group)
      metrics = term_metrics | metrics
      metrics[f"loss/{term.name}"] = jnp.where(is_valid, shown, jnp.nan)
      states.append(state)
    return jnp.where(is_valid, total, 0.0), metrics, tuple(states)


def mean_over_groups(per_group: jax.Array, num_groups: jax.Array) -> jax.Array:
  """Share of the objective that part of a batch contributes: f32 [].

  Args:
    per_group: f32 [B] losses of the part, 0 for a group that is not valid.
    num_groups: f32 [], valid groups of the global batch.
  """
  return per_group.sum() / jnp.maximum(num_groups, 1.0)
