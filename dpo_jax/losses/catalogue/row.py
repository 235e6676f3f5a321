"""Loss: a row of the catalogue."""

from collections.abc import Callable, Mapping
import dataclasses
import inspect
from typing import Any

from dpo_jax.losses import regularizers
from dpo_jax.losses.knobs import KNOBS, Knob
from dpo_jax.losses.links import LINKS, Link
from dpo_jax.losses.rewards import REWARDS, Reward


@dataclasses.dataclass(frozen=True)
class Loss:
  """One row: reward of a response -> link over the group + regularizers.

  Attributes:
    name: name in a config.
    reward: name in `rewards.REWARDS`.
    link: name in `links.LINKS`.
    defaults: a value for every knob.
    formula: loss of a group, for the documentation.
    paper: source, with the equation where there is one.
    regularizers: functions that are added.
    group: kind of group that it reads, a name in `groups.GROUPS`.
    scale: knob that multiplies the reward in the metrics `reward/*`.
    is_per_token: whether the mean is over tokens, unless the knob
      `per_sequence` is set.
    conditions: (what, knob, value): the knob or field `what` is read only
      where `knob` has that value.
    ranges: knobs whose range is narrower here than in KNOBS.
    peers: names of the loss in other code bases, and their deviations.
  """

  name: str
  reward: str
  link: str
  defaults: Mapping[str, Any]
  formula: str
  paper: str
  regularizers: tuple[Callable[..., Any], ...] = ()
  group: str = "pair"
  scale: str | None = "beta"
  is_per_token: bool = False
  conditions: tuple[tuple[str, str, Any], ...] = ()
  ranges: Mapping[str, Knob] = dataclasses.field(default_factory=dict)
  peers: str = ""

  @property
  def reward_row(self) -> Reward:
    return REWARDS[self.reward]

  @property
  def link_row(self) -> Link:
    return LINKS[self.link]

  @property
  def is_coupled(self) -> bool:
    """Returns whether a group's loss depends on the other groups."""
    return self.link_row.is_coupled

  @property
  def functions(self) -> tuple[Callable[..., Any], ...]:
    first = (self.reward_row.function, self.link_row.function)
    return first + self.regularizers

  @property
  def knobs(self) -> tuple[str, ...]:
    """Names of the hyper-parameters that this loss reads, sorted."""
    return tuple(sorted({k for f in self.functions for k in knobs_of(f)}))

  def needs(self, knobs: Mapping[str, Any]) -> frozenset[str]:
    """Optional fields of `Sequences` that this loss reads with these knobs."""
    fields = self.reward_row.needs | self.link_row.needs
    for regularizer in self.regularizers:
      fields |= regularizers.NEEDS.get(regularizer, frozenset())
    return frozenset(f for f in fields if self.is_read(f, knobs))

  def is_read(self, what: str, knobs: Mapping[str, Any]) -> bool:
    """Returns whether the conditions on a knob or a field hold.

    True for one without conditions, even if this loss never reads it.

    Args:
      what: name of the knob or of the field of Sequences.
      knobs: values of this loss's knobs.
    """
    return all(
      knobs[knob] == value
      for name, knob, value in self.conditions
      if name == what
    )

  def check(self, key: str, knob: str, value: Any) -> None:
    """Raises ValueError unless a knob's value is in this row's range.

    Args:
      key: name of the value in errors: "loss.beta".
      knob: a name in KNOBS.
      value: the value.
    """
    KNOBS[knob].check(key, value)
    if knob in self.ranges:
      self.ranges[knob].check(key, value)


def knobs_of(function: Callable[..., Any]) -> tuple[str, ...]:
  """Names of a function's keyword-only parameters."""
  parameters = inspect.signature(function).parameters.values()
  return tuple(p.name for p in parameters if p.kind is p.KEYWORD_ONLY)
