"""Win rate by a judge that compares two responses, asked in both orders."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from dpo_jax.judges.base import shorten


def bootstrap_interval(
  values: Sequence[float], *, seed: int = 0, num_draws: int = 2000
) -> tuple[float, float]:
  """Computes the 95 % interval of a mean by the percentile bootstrap.

  Efron 1979; prompts are resampled.

  Args:
    values: one value for each prompt.
    seed: seed of the resampling.
    num_draws: resamples.

  Returns:
    Lower and upper bound.

  Raises:
    ValueError: no values.
  """
  values = np.asarray(values, np.float64)
  if not len(values):
    raise ValueError("an interval needs at least one value")
  rng = np.random.default_rng(seed)
  draws = rng.integers(0, len(values), (num_draws, len(values)))
  low, high = np.quantile(values[draws].mean(1), (0.025, 0.975))
  return float(low), float(high)


def compare_in_both_orders(
  compare: Callable[[str, str, str], float],
  prompts: Sequence[str],
  responses: Sequence[str],
  others: Sequence[str],
) -> dict[str, float]:
  """Computes the win rate by a judge that compares two responses at once.

  Such a judge may favour the first response it sees. So each pair is shown in
  both orders and its result is the mean of the two: a judge that always takes
  the first gives every pair a half.

  Args:
    compare: (prompt, first, second) -> probability in [0, 1] that the first
      is better.
    prompts: texts.
    responses: texts, one for each prompt.
    others: texts to compare them with, one for each prompt.

  Returns:
    `win_rate` with its 95 % bootstrap bounds, and `order_bias`: win rate of a
    response shown first minus that of one shown second.

  Raises:
    ValueError: the judge's answer is not a probability.
  """
  firsts, seconds = [], []
  for prompt, ours, theirs in zip(prompts, responses, others, strict=True):
    firsts.append(_probability(compare(prompt, ours, theirs), ours))
    seconds.append(1.0 - _probability(compare(prompt, theirs, ours), theirs))
  wins = 0.5 * (np.array(firsts) + np.array(seconds))
  low, high = bootstrap_interval(wins)
  return {
    "win_rate": float(wins.mean()),
    "win_rate_low": low,
    "win_rate_high": high,
    "order_bias": float(np.mean(firsts) - np.mean(seconds)),
  }


def _probability(value: Any, response: str) -> float:
  is_number = isinstance(value, int | float | np.floating | np.integer)
  if not is_number or not 0.0 <= value <= 1.0:  # NaN included
    raise ValueError(
      f"the judge gave {shorten(value)} for {response!r} as the first of two:"
      " it must be a probability in [0, 1]"
    )
  return float(value)
