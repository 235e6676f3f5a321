"""Concatenated arrays, sliced without a copy."""

import dataclasses

import numpy as np


@dataclasses.dataclass(frozen=True)
class Chain:
  """Concatenated arrays, sliced without a copy.

  Attributes:
    parts: S arrays, [n_i] each.
    ends: i64 [S], end of each part. Slices must not cross one.
  """

  parts: tuple["np.ndarray | Chain", ...]
  ends: np.ndarray

  def __len__(self) -> int:
    return int(self.ends[-1])

  def __getitem__(self, wanted: slice) -> np.ndarray:
    part = int(np.searchsorted(self.ends, wanted.start, "right"))
    part = min(part, len(self.parts) - 1)  # an empty slice at the very end
    start = int(self.ends[part]) - len(self.parts[part])
    return self.parts[part][wanted.start - start : wanted.stop - start]
