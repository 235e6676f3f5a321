"""Knob: the type, range and meaning of a value that a config may set."""

import dataclasses
import math
from typing import Any

import numpy as np

from dpo_jax.losses.rewards import DIVERGENCES

# A step computes in float32, where larger numbers would be infinite.
_LARGEST = float(np.finfo(np.float32).max)
_NAMES = {
  bool: "True or False",
  int: "a whole number",
  float: "a number",
  str: "text",
}


@dataclasses.dataclass(frozen=True)
class Knob:
  """The type and range of a value, and its meaning.

  Attributes:
    type: bool, int, float or str.
    doc: meaning and unit; errors omit it if "".
    low: smallest value; exclusive if `above`.
    high: largest value; exclusive if `below`.
    above: whether `low` itself is refused.
    below: whether `high` itself is refused.
    finite: whether infinity is refused.
    choices: values that a str may have.
  """

  type: type
  doc: str = ""
  low: float | None = None
  high: float | None = None
  above: bool = False
  below: bool = False
  finite: bool = True
  choices: tuple[str, ...] = ()

  def check(self, key: str, value: Any) -> None:
    """Checks a value.

    Args:
      key: path in the config, for errors: "loss.beta".
      value: value set there.

    Raises:
      ValueError: wrong type, none of `choices`, NaN, out of range, or a number
        that float32 cannot hold.
    """
    about = f": {self.doc}" if self.doc else ""
    wanted = int | float if self.type is float else self.type
    is_flag = isinstance(value, bool) and self.type is not bool
    if not isinstance(value, wanted) or is_flag:
      raise ValueError(f"{key}={value!r} must be {_NAMES[self.type]}{about}")
    if self.choices and value not in self.choices:
      raise ValueError(
        f"{key}={value!r} must be one of {', '.join(self.choices)}"
      )
    if not isinstance(value, int | float) or self.type is bool:
      return
    # Not shown: it may have too many digits to be printed.
    if abs(value) > _LARGEST and abs(value) != math.inf:
      raise ValueError(
        f"{key} must be at most {_LARGEST:.2e} in size, which float32 holds"
        f"{about}"
      )
    if not self._is_within(value):
      raise ValueError(f"{key}={value} is outside {self.interval}{about}")

  def _is_within(self, value: float) -> bool:
    low = -math.inf if self.low is None else self.low
    high = math.inf if self.high is None else self.high
    is_above = value > low if self.above else value >= low
    is_below = value < high if self.below else value <= high
    # NaN compares false.
    return is_above and is_below and not (self.finite and math.isinf(value))

  @property
  def interval(self) -> str:
    """Range in mathematical notation: '[0, 0.5)'."""
    is_closed_below = self.low is not None and not self.above
    is_closed_above = not self.finite if self.high is None else not self.below
    low = "-inf" if self.low is None else f"{self.low:g}"
    high = "inf" if self.high is None else f"{self.high:g}"
    opening = "[" if is_closed_below else "("
    closing = "]" if is_closed_above else ")"
    return f"{opening}{low}, {high}{closing}"


# Distances of a pair's margin from the one that its scores call for.
DISTANCES = ("backward_kl", "forward_kl", "squared")

# Hyper-parameters of the losses.
KNOBS: dict[str, Knob] = {
  "beta": Knob(
    float,
    "strength of the tie to the reference, or scale of the reward, 1/nats",
    low=0,
    above=True,
  ),
  "tau": Knob(
    float, "regularisation (ipo, 1/nats) or temperature", low=0, above=True
  ),
  "label_smoothing": Knob(
    float, "probability that a label is flipped", low=0, high=0.5, below=True
  ),
  "length_normalize": Knob(
    bool, "divide a log-ratio by the response's number of tokens"
  ),
  "delta": Knob(float, "target margin, nats", low=0),
  "sft_weight": Knob(float, "weight of the chosen response's NLL", low=0),
  "sft_per_token": Knob(
    bool, "average that NLL over the batch's chosen tokens, not its pairs"
  ),
  "gamma_over_beta": Knob(float, "target margin over beta, nats", low=0),
  "alpha": Knob(float, "see the loss's formula"),
  "odds_ratio_weight": Knob(float, "weight of the odds-ratio term", low=0),
  "penalty_weight": Knob(
    float, "weight of the penalty on a falling chosen log-ratio", low=0
  ),
  "margin_weight": Knob(
    float, "weight of a gap in score as the margin of two rewards", low=0
  ),
  "center_weight": Knob(
    float, "weight of the squared sum of a group's rewards", low=0
  ),
  "score_scale": Knob(
    float, "target margin, nats, of a gap in score of 1", low=0, above=True
  ),
  "distance": Knob(
    str, "how far a margin is from its target", choices=DISTANCES
  ),
  "shift": Knob(float, "weight of the rejected reward", low=0, high=1),
  "clip": Knob(
    float,
    "bound on a ratio's distance from 1; in chi_po, half that of the margin",
    low=0,
    above=True,
  ),
  "value_clip": Knob(
    float,
    "bound on the distance of a value from its old one",
    low=0,
    above=True,
  ),
  "value_weight": Knob(float, "weight of the value head's error", low=0),
  "divergence": Knob(str, "f-divergence", choices=DIVERGENCES),
  "token_level": Knob(
    bool, "unlikelihood of the rejected tokens, not of the whole response"
  ),
  "desirable_weight": Knob(float, "weight of desirable responses", low=0),
  "undesirable_weight": Knob(float, "weight of undesirable responses", low=0),
  "per_sequence": Knob(
    bool, "average over sequences their token means, not over all tokens"
  ),
}
