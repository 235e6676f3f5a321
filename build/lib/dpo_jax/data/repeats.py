"""Groups that say the same as another, or the opposite."""

import array
import hashlib

import numpy as np

from dpo_jax.data.dialogues import Example

# What a group says of its key: the first, or the second, in order of hashes,
# is better; a response is wanted, or is not; or none of these.
_FIRST, _SECOND, _NEITHER = 0, 1, 2


class Repeats:
  """Keeps nine bytes of every group, and counts at the end.

  A duplicate has the prompt and the responses of an earlier group, in the same
  order and with the same label. A contradiction is a pair that another group
  has the other way round, or a response that is wanted in one group and
  unwanted in another.
  """

  def __init__(self):
    self._keys = array.array("Q")
    self._sides = array.array("B")

  def add(self, example: Example) -> None:
    parts = [_hash(text) for text in example.responses]
    side = _NEITHER
    if len(parts) == 1:
      side = _FIRST if example.score[0] > 0 else _SECOND
    elif len(parts) == 2 and example.score[0] != example.score[1]:
      side = _FIRST if parts[0] <= parts[1] else _SECOND
      parts = sorted(parts)
    key = _hash(example.prompt) + b"".join(parts) + bytes([len(parts)])
    self._keys.append(int.from_bytes(_digest(key)[:8], "big"))
    self._sides.append(side)

  def count(self) -> dict[str, int]:
    """Returns how many groups are `duplicates` and `contradictions`."""
    keys = np.frombuffer(self._keys, np.uint64)
    sides = np.frombuffer(self._sides, np.uint8)
    num_distinct = sum(
      len(np.unique(keys[sides == side])) for side in np.unique(sides)
    )
    opposed = np.intersect1d(keys[sides == _FIRST], keys[sides == _SECOND])
    return {
      "duplicates": len(keys) - num_distinct,
      "contradictions": int(np.isin(keys, opposed).sum()),
    }


def _digest(value: bytes) -> bytes:
  return hashlib.sha256(value).digest()


def _hash(text: str) -> bytes:
  return _digest(text.encode())[:16]
