"""From a config to the function that the step differentiates."""

from collections.abc import Mapping
import dataclasses
import difflib
from typing import Any

import jax
import jax.numpy as jnp

from dpo_jax.losses.catalogue import CATALOGUE, KNOBS, Loss, knobs_of
from dpo_jax.types import Sequences


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
  def needs_reference(self) -> bool:
    return "ref_logps" in self.loss.needs

  @property
  def num_slots(self) -> int | None:
    """Responses of a group that the loss reads; None is all of them."""
    return {"first": 1, "pair": 2}[self.loss.group]

  def init(self) -> Any:
    """State that the loss carries from step to step."""
    return ()

  def valid_groups(self, valid: jax.Array) -> jax.Array:
    """Which groups the loss can read: bool [B, K] -> bool [B]."""
    return valid[:, : self.num_slots].all(-1)

  def apply(
    self, sequences: Sequences, loss_state: Any
  ) -> tuple[jax.Array, dict[str, jax.Array], Any]:
    """Loss of every group.

    The objective is the mean over the valid groups of the global batch. Where
    `sequences` is a part of that batch, its `num_groups` and `total_tokens`
    say how large the whole is.

    Args:
      sequences: fields f32 [B, K].
      loss_state: from `init` or the step before.

    Returns:
      per_group: f32 [B] loss, 0 for a group that is not valid.
      metrics: name -> f32 [B], one figure a group, nats; only valid groups
        carry meaning.
      loss_state: for the next step.

    Raises:
      ValueError: K does not suit the loss, or the reference is missing.
    """
    self.check_group_size(sequences.valid.shape[1])
    if self.needs_reference and sequences.ref_logps is None:
      raise ValueError(
        f"loss {self.loss.name!r} compares with a reference, and ref_logps is"
        " None: set reference.kind to 'cached' or 'frozen'"
      )
    is_valid = self.valid_groups(sequences.valid)
    rewards = self.loss.reward(sequences, **self._knobs_for(self.loss.reward))
    # Inside as well as outside: an unread slot must not send NaN through the
    # gradient of the branch that `where` drops.
    rewards = jnp.where(sequences.valid, rewards, 0.0)
    per_group = self.loss.link(rewards, **self._knobs_for(self.loss.link))
    if self.loss.reduction == "tokens":
      per_group = per_group * self._groups_per_token(sequences, is_valid)
    per_group = jnp.where(is_valid, per_group, 0.0)
    return per_group, self._metrics(sequences, rewards), loss_state

  def check_group_size(self, num_responses: int) -> None:
    """Raises ValueError unless groups of that size suit the loss."""
    if num_responses < self.num_slots or (
      self.loss.group == "pair" and num_responses != 2
    ):
      raise ValueError(
        f"loss {self.loss.name!r} reads groups of {self.num_slots}"
        f" response(s), and these hold {num_responses}: choose a loss for"
        " groups of that size, or data with pairs"
      )

  def _knobs_for(self, function: Any) -> dict[str, Any]:
    return {name: self.knobs[name] for name in knobs_of(function)}

  def _groups_per_token(
    self, sequences: Sequences, is_valid: jax.Array
  ) -> jax.Array:
    """Turns the mean over groups into a mean over tokens."""
    num_groups, total_tokens = sequences.num_groups, sequences.total_tokens
    if num_groups is None:
      num_groups = is_valid.sum()
      total_tokens = self.scored_tokens(sequences)
    return num_groups / jnp.maximum(total_tokens, 1.0)

  def scored_tokens(self, sequences: Sequences) -> jax.Array:
    """Tokens that a per-token mean divides by: f32 []."""
    tokens = jnp.where(sequences.valid, sequences.num_tokens, 0.0)
    return tokens[:, : self.num_slots].sum()

  def _metrics(
    self, sequences: Sequences, rewards: jax.Array
  ) -> dict[str, jax.Array]:
    logps = jax.lax.stop_gradient(sequences.logps)
    metrics = {"logps/chosen": logps[:, 0]}
    if self.loss.group == "first":
      return metrics
    scale = self.knobs[self.loss.scale] if self.loss.scale else 1.0
    rewards = scale * jax.lax.stop_gradient(rewards)
    margin = rewards[:, 0] - rewards[:, 1]
    metrics |= {
      "logps/rejected": logps[:, 1],
      "reward/chosen": rewards[:, 0],
      "reward/rejected": rewards[:, 1],
      "reward/margin": margin,
      "reward/accuracy": 0.5 * (jnp.sign(margin) + 1.0),
    }
    if sequences.ref_logps is not None:
      log_ratios = logps - sequences.ref_logps
      metrics |= {
        "log_ratio/chosen": log_ratios[:, 0],
        "log_ratio/rejected": log_ratios[:, 1],
      }
    return metrics


def build_objective(config: Mapping[str, Any]) -> Objective:
  """Looks the loss up and fills in its defaults, strictly.

  Args:
    config: `name` and any knobs of that loss; a dict or a ConfigDict. A knob
      that is None counts as not set.

  Returns:
    The objective, every knob of its loss set.

  Raises:
    ValueError: unknown loss; a knob that does not exist, that this loss does
      not read, or whose value is out of range.
  """
  given = {k: v for k, v in config.items() if v is not None}
  name = given.pop("name", None)
  if name not in CATALOGUE:
    raise ValueError(
      f"loss.name={name!r} is not in the catalogue."
      f"{did_you_mean(str(name), CATALOGUE)} Known: {', '.join(CATALOGUE)}"
    )
  loss = CATALOGUE[name]
  for key, value in given.items():
    if key not in KNOBS:
      raise ValueError(
        f"loss.{key} is not a hyper-parameter of any loss."
        f"{did_you_mean(key, KNOBS)} {name!r} reads: {_listed(loss.knobs)}"
      )
    if key not in loss.knobs:
      raise ValueError(
        f"loss.{key}={value} is set, but loss {name!r} does not read it."
        f" It reads: {_listed(loss.knobs)}"
      )
    KNOBS[key].check(key, value)
  return Objective(loss, {**loss.defaults, **given})


def did_you_mean(name: str, known: Any) -> str:
  """' Did you mean 'x'?' for the nearest known name, or ''."""
  nearest = difflib.get_close_matches(name, list(known), n=1)
  return f" Did you mean {nearest[0]!r}?" if nearest else ""


def _listed(names: tuple[str, ...]) -> str:
  return ", ".join(names) if names else "no hyper-parameters"
