"""Win rate by a judge that compares two responses, asked in both orders."""

import abc
from collections.abc import Sequence
import dataclasses
import math

import numpy as np

from dpo_jax.intervals import effective_count, wilson_interval
from dpo_jax.judges.base import shorten


class JudgeError(RuntimeError):
  """A judge that does not answer, or not usably."""


class Comparer(abc.ABC):
  """A judge that compares two responses, and cannot score one alone."""

  @abc.abstractmethod
  def compare(
    self,
    prompts: Sequence[str],
    firsts: Sequence[str],
    seconds: Sequence[str],
  ) -> Sequence[float]:
    """Compares responses.

    Args:
      prompts: texts.
      firsts: responses that are shown first, one for each prompt.
      seconds: responses that are shown second.

    Returns:
      Probability that the first is better, for each prompt: 0.5 for a tie, NaN
      where the judge has no answer.

    Raises:
      JudgeError: it does not answer any more.
    """


@dataclasses.dataclass(frozen=True)
class Wins:
  """Results of responses against others, each pair shown in both orders.

  Attributes:
    shown_first: f64 [n], probability that the response is better when it is
      shown first; NaN where the judge has no answer.
    shown_second: the same when it is shown second.
  """

  shown_first: np.ndarray
  shown_second: np.ndarray

  @property
  def of_pairs(self) -> np.ndarray:
    """Averages both orders of each pair: f64 [n], NaN where one is missing."""
    return 0.5 * (self.shown_first + self.shown_second)

  def metrics(
    self, prompts: Sequence[Sequence[int]] | None = None
  ) -> dict[str, float]:
    """Computes the win rate over the pairs with two answers.

    Args:
      prompts: token ids for each pair, of which several may have one prompt;
        see `effective_count`. None: all prompts differ.

    Returns:
      `win_rate` and the bounds of its 95 % interval, `win_rate_low` and
      `win_rate_high`; `order_bias`: win rate of a response shown first minus
      that of one shown second; `left_out`: pairs without two answers.
      If all are, `win_rate` and `order_bias` are NaN, and the bounds 0 and 1.
    """
    wins = self.of_pairs
    is_counted = ~np.isnan(wins)
    count = int(is_counted.sum())
    rate = float(wins[is_counted].mean()) if count else math.nan
    certainty: float = count
    if prompts is not None and count:
      counted = np.flatnonzero(is_counted)
      groups = [tuple(prompts[i]) for i in counted]
      certainty = effective_count(wins[counted], groups)
    low, high = wilson_interval(rate, certainty)
    bias = self.shown_first - self.shown_second
    return {
      "win_rate": rate,
      "win_rate_low": low,
      "win_rate_high": high,
      "order_bias": float(bias[is_counted].mean()) if count else math.nan,
      "left_out": float(len(wins) - count),
    }


def compare_in_both_orders(
  judge: Comparer,
  prompts: Sequence[str],
  responses: Sequence[str],
  others: Sequence[str],
) -> Wins:
  """Compares responses with others by a judge that is shown two at once.

  Such a judge may favour the first response it sees. So each pair is shown in
  both orders and its result is the mean of the two: a judge that always takes
  the first gives every pair a half. Equal responses are a tie, and not shown.

  Args:
    judge: judge to ask.
    prompts: texts.
    responses: texts, one for each prompt.
    others: texts to compare them with, one for each prompt.

  Returns:
    Results of `responses`, NaN where the judge has no answer.

  Raises:
    ValueError: the judge's answer is not a probability, or NaN, for each pair.
    JudgeError: the judge does not answer any more.
  """
  pairs = list(zip(prompts, responses, others, strict=True))
  differ = [i for i, (_, ours, theirs) in enumerate(pairs) if ours != theirs]
  shown_first, shown_second = np.full((2, len(pairs)), 0.5)
  if differ:
    asked, ours, theirs = zip(*(pairs[i] for i in differ), strict=True)
    # All at once, so that a judge may answer several at a time.
    given = judge.compare([*asked, *asked], [*ours, *theirs], [*theirs, *ours])
    answers = _probabilities(given, 2 * len(differ))
    shown_first[differ] = answers[: len(differ)]
    shown_second[differ] = 1.0 - answers[len(differ) :]
  return Wins(shown_first, shown_second)


def _probabilities(given: Sequence[float], count: int) -> np.ndarray:
  """Returns a judge's answers as f64 [count], in [0, 1] or NaN.

  Raises:
    ValueError: another number of answers, or one outside [0, 1].
  """
  try:
    answers = np.asarray(given, np.float64)
  except (TypeError, ValueError):
    answers = None
  if answers is None or answers.shape != (count,):
    raise ValueError(
      f"the judge must give one probability for each of {count} pairs, and gave"
      f" {shorten(given)}"
    )
  bad = np.flatnonzero((answers < 0) | (answers > 1))
  if len(bad):
    raise ValueError(
      f"the judge gave {answers[bad[0]]:g} for pair {bad[0]}: it must be a"
      " probability in [0, 1]"
    )
  return answers
