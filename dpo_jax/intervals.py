"""Confidence intervals of metrics."""

import math

_Z95 = 1.959963984540054


def wilson_interval(fraction: float, count: int) -> tuple[float, float]:
  """Computes the 95 % interval of a fraction: Wilson 1927.

  It is the interval of every accuracy and win rate here. Values between 0 and
  1, such as ties and means of two orders, vary less around their mean than wins
  and losses do, so with them it is wider than it need be. The bootstrap is too
  narrow with few pairs, and has no width where all pairs agree.

  Args:
    fraction: observed, ties counted a half, in [0, 1].
    count: observations.

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
