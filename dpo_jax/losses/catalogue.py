"""The table of losses: a variant is a row of data.

To add a loss, write its link (or reward) as a pure function and add a row.
Configs, the strict check of knobs and the tests read this table, so the row
is all that it takes.
"""

from collections.abc import Callable
import dataclasses
import inspect
from typing import Any

from dpo_jax.losses import links, rewards


@dataclasses.dataclass(frozen=True)
class Knob:
  """A hyper-parameter: its type, range and unit.

  Attributes:
    type: bool, float or str.
    doc: meaning and unit.
    low: smallest value; exclusive if `above`.
    high: largest value; exclusive if `below`.
    above: whether `low` itself is refused.
    below: whether `high` itself is refused.
  """

  type: type
  doc: str
  low: float | None = None
  high: float | None = None
  above: bool = False
  below: bool = False

  def check(self, name: str, value: Any) -> None:
    """Raises ValueError if `value` is of another type or out of range."""
    if self.type is float:
      is_right = isinstance(value, int | float) and not isinstance(value, bool)
    else:
      is_right = isinstance(value, self.type)
    if not is_right:
      raise ValueError(
        f"loss.{name}={value!r} must be a {self.type.__name__}: {self.doc}"
      )
    if self.type is not float:
      return
    too_low = self.low is not None and (
      value <= self.low if self.above else value < self.low
    )
    too_high = self.high is not None and (
      value >= self.high if self.below else value > self.high
    )
    if too_low or too_high or value != value:
      opening = "(" if self.above or self.low is None else "["
      closing = ")" if self.below or self.high is None else "]"
      low = "-inf" if self.low is None else f"{self.low:g}"
      high = "inf" if self.high is None else f"{self.high:g}"
      raise ValueError(
        f"loss.{name}={value} is outside {opening}{low}, {high}{closing}:"
        f" {self.doc}"
      )


KNOBS: dict[str, Knob] = {
  "beta": Knob(
    float, "strength of the tie to the reference, 1/nats", low=0, above=True
  ),
  "tau": Knob(float, "regularisation of ipo, 1/nats", low=0, above=True),
  "label_smoothing": Knob(
    float,
    "probability that a label is flipped",
    low=0,
    high=0.5,
    below=True,
  ),
  "length_normalize": Knob(
    bool, "divide a log-ratio by the response's number of tokens"
  ),
}


@dataclasses.dataclass(frozen=True)
class Loss:
  """One row: reward of a response -> link over the group.

  Attributes:
    name: what a config calls it.
    reward: Sequences -> f32 [B, K]; keyword-only arguments are knobs.
    link: f32 [B, K] -> f32 [B]; keyword-only arguments are knobs.
    defaults: a value for every knob.
    group: what a group must be: "pair" (K = 2, slot 0 chosen) or "first"
      (only slot 0 is read, so only slot 0 is packed).
    reduction: "groups", the mean over groups, or "tokens", the sum over
      groups divided by the tokens of the global batch.
    scale: knob that multiplies the reward in the metrics `reward/*`.
    formula: for the documentation.
    paper: source.
  """

  name: str
  reward: Callable[..., Any]
  link: Callable[..., Any]
  defaults: dict[str, Any]
  formula: str
  paper: str
  group: str = "pair"
  reduction: str = "groups"
  scale: str | None = "beta"

  @property
  def knobs(self) -> tuple[str, ...]:
    """Names of the hyper-parameters that this loss reads, sorted."""
    functions = (self.reward, self.link)
    return tuple(sorted({k for f in functions for k in knobs_of(f)}))

  @property
  def needs(self) -> frozenset[str]:
    """Optional fields of `Sequences` that this loss reads."""
    functions = (self.reward, self.link)
    return frozenset(n for f in functions for n in getattr(f, "needs", ()))


def knobs_of(function: Callable[..., Any]) -> tuple[str, ...]:
  """Names of a function's keyword-only parameters."""
  parameters = inspect.signature(function).parameters.values()
  return tuple(p.name for p in parameters if p.kind is p.KEYWORD_ONLY)


CATALOGUE: dict[str, Loss] = {
  row.name: row
  for row in (
    Loss(
      "dpo",
      rewards.log_ratio,
      links.logistic,
      dict(beta=0.1),
      "-log s(beta D)",
      "Rafailov et al. 2023, arXiv:2305.18290, eq. 7",
    ),
    Loss(
      "cdpo",
      rewards.log_ratio,
      links.smoothed_logistic,
      dict(beta=0.1, label_smoothing=0.1),
      "-(1 - e) log s(beta D) - e log s(-beta D)",
      "Mitchell 2023, A note on DPO with noisy preferences, eq. 3",
    ),
    Loss(
      "ipo",
      rewards.summed_or_mean_log_ratio,
      links.squared,
      dict(tau=0.1, length_normalize=False),
      "(D - 1 / (2 tau))^2",
      "Azar et al. 2023, arXiv:2310.12036, eq. 17",
      scale="tau",
    ),
    Loss(
      "hinge",
      rewards.log_ratio,
      links.hinge,
      dict(beta=0.1),
      "max(0, 1 - beta D)",
      "Liu et al. 2023, arXiv:2309.06657, eq. 10",
    ),
    Loss(
      "sft",
      rewards.logps,
      links.negative,
      dict(),
      "-lp, per token of the global batch",
      "maximum likelihood; Preferred-FT in arXiv:2305.18290, sec. 6",
      group="first",
      reduction="tokens",
      scale=None,
    ),
  )
}
