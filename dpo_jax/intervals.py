"""Confidence intervals of metrics."""

from collections.abc import Sequence
import math

import numpy as np

_Z95 = 1.959963984540054


def wilson_interval(fraction: float, count: float) -> tuple[float, float]:
  """Computes the 95 % interval of a fraction: Wilson 1927.

  It is the interval of every accuracy and win rate here. Values between 0 and
  1, such as ties and means of two orders, vary less around their mean than wins
  and losses do, so with them it is wider than it need be. The bootstrap is too
  narrow with few pairs, and has no width where all pairs agree.

  Args:
    fraction: observed, ties counted a half, in [0, 1].
    count: observations; see `effective_count` for those that depend on each
      other.

  Returns:
    Lower and upper bound; (0, 1) without observations.
  """
  if not count:
    return 0.0, 1.0
  z2 = _Z95**2
  centre = (fraction + z2 / (2 * count)) / (1 + z2 / count)
  spread = fraction * (1 - fraction) / count + z2 / (4 * count**2)
  half = _Z95 * math.sqrt(spread) / (1 + z2 / count)
  return max(0.0, centre - half), min(1.0, centre + half)


def effective_count(values: np.ndarray, groups: Sequence[object]) -> float:
  """Returns how many independent values have a mean as certain as this one.

  Values of one group, such as samples of one prompt, may agree. Kish 1965: the
  count is divided by the variance of the mean with groups, over that without.

  Args:
    values: f64 [n].
    groups: group of each value.

  Returns:
    A number between the number of groups and n; the number of groups for one
    group, or where all values are equal.
  """
  count = len(values)
  names = {name: i for i, name in enumerate(dict.fromkeys(groups))}
  num_groups = len(names)
  errors = values - values.mean()
  if num_groups in (1, count) or not errors.any():
    return float(num_groups)
  sums = np.zeros(num_groups)
  np.add.at(sums, [names[group] for group in groups], errors)
  clustered = num_groups / (num_groups - 1) * np.square(sums).sum()
  effect = clustered / np.square(errors).sum()
  return float(np.clip(count / effect if effect else count, num_groups, count))
