"""Order of training: shuffled epochs, and mixtures of several sources.

Every draw is a function of its position alone, so a resumed run has no state
to restore.
"""

import dataclasses
import functools

import numpy as np

# Positions after which the shares of the sources are exact.
_CYCLE = 10_000


def permutation(
  seed: tuple[int, ...], positions: np.ndarray, size: int
) -> np.ndarray:
  """Draws from epochs that follow each other, each shuffled on its own.

  Args:
    seed: seed of the order.
    positions: i64 [n], counted from the first draw of a run.
    size: items of an epoch.

  Returns:
    i64 [n], in [0, size).
  """
  epochs, within = np.divmod(positions, size)
  drawn = np.empty(len(positions), np.int64)
  for epoch in np.unique(epochs):
    mask = epochs == epoch
    drawn[mask] = _shuffled((*seed, int(epoch)), size)[within[mask]]
  return drawn


@functools.lru_cache(maxsize=8)
def _shuffled(seed: tuple[int, ...], size: int) -> np.ndarray:
  return np.random.default_rng(seed).permutation(size)


@dataclasses.dataclass(frozen=True)
class Mixture:
  """Several sources, each with a share of the draws.

  Attributes:
    indices: for each source, i64 [N_s], its groups.
    weights: for each source, its share; need not sum to 1.

  Raises:
    ValueError: a weight whose share is less than one in 10,000 groups.
  """

  indices: tuple[np.ndarray, ...]
  weights: tuple[float, ...]

  def __post_init__(self):
    if not self.counts.all():
      raise ValueError(
        f"data.sources: a weight among {self.weights} is a share of less than"
        f" one in {_CYCLE:,} groups: leave that source out, or raise it"
      )

  @property
  def smallest(self) -> int:
    """Number of groups of the smallest source, which repeat first."""
    return min(map(len, self.indices))

  def probabilities(self, indices: np.ndarray) -> np.ndarray:
    """Returns how often each group is drawn, as a share of all draws.

    Args:
      indices: i64 [N], groups; each is in one source.

    Returns:
      f64 [N]; sums to 1 where `indices` are the groups of all sources.
    """
    shares = np.zeros(1 + max(int(own.max()) for own in self.indices))
    for own, count in zip(self.indices, self.counts, strict=True):
      shares[own] = count / _CYCLE / len(own)
    return shares[indices]

  def keep(self, indices: np.ndarray) -> "Mixture":
    """Restricts the mixture to some of its groups, with the same weights.

    Args:
      indices: i64 [N], groups to keep.

    Raises:
      ValueError: a source would have no group left.
    """
    parts = tuple(part[np.isin(part, indices)] for part in self.indices)
    for number, part in enumerate(parts):
      if not len(part):
        raise ValueError(
          f"data.sources: no group of source {number} can be used: leave it out"
        )
    return Mixture(parts, self.weights)

  @functools.cached_property
  def counts(self) -> np.ndarray:
    """Number of draws from each source in a cycle: i64 [S].

    Shares of the weights, rounded by largest remainder.
    """
    shares = np.array(self.weights) / sum(self.weights) * _CYCLE
    counts = np.floor(shares).astype(np.int64)
    rest = np.argsort(counts - shares, kind="stable")
    counts[rest[: _CYCLE - counts.sum()]] += 1
    return counts

  def draw(self, positions: np.ndarray, seed: int) -> np.ndarray:
    """Draws groups.

    Args:
      positions: i64 [n], counted from the first draw of a run.
      seed: seed of the order.

    Returns:
      i64 [n], groups. Within a cycle of 10,000 draws each source has its
      share; each source goes through its groups in shuffled epochs.
    """
    cycles, within = np.divmod(positions, _CYCLE)
    drawn = np.empty(len(positions), np.int64)
    for cycle in np.unique(cycles):
      mask = cycles == cycle
      sources, ranks = self._cycle(seed, int(cycle))
      sources, ranks = sources[within[mask]], ranks[within[mask]]
      # Draws of its own source before each position.
      ranks = ranks + cycle * self.counts[sources]
      drawn[mask] = self._look_up(sources, ranks, seed)
    return drawn

  def _cycle(self, seed: int, cycle: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns the order of the sources in a cycle of 10,000 draws.

    Returns:
      i64 [10,000] each: source of each draw, and the number of earlier draws of
      the cycle from that source.
    """
    in_order = np.repeat(np.arange(len(self.counts)), self.counts)
    sources = in_order[_shuffled((seed, cycle, 0), _CYCLE)]
    ranks = np.empty(_CYCLE, np.int64)
    for source, count in enumerate(self.counts):
      ranks[sources == source] = np.arange(count)
    return sources, ranks

  def _look_up(
    self, sources: np.ndarray, ranks: np.ndarray, seed: int
  ) -> np.ndarray:
    groups = np.empty(len(ranks), np.int64)
    for source in np.unique(sources):
      mask, own = sources == source, self.indices[source]
      order = permutation((seed, 1, int(source)), ranks[mask], len(own))
      groups[mask] = own[order]
    return groups
