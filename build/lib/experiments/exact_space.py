"""Prompts, and all responses to each: small enough to enumerate.

A response has up to `length` letters. With an end token it may have fewer, and
the longest ones are cut off before their end. So the probabilities of all
responses sum to 1.
"""

from collections.abc import Sequence
import dataclasses
import functools

import numpy as np

# Most responses to a prompt: a matrix of all pairs of them takes 0.8 GB.
MOST_RESPONSES = 10_000


def to_text(ids: Sequence[int]) -> str:
  """Returns the letters of ids; negative ids are padding."""
  return "".join(chr(ord("a") + int(i)) for i in ids if i >= 0)


@dataclasses.dataclass(frozen=True)
class Space:
  """All responses to some prompts.

  Attributes:
    num_letters: letters of the alphabet, from "a" on. With the end token they
      must fill the policy's vocabulary, which is a multiple of 8.
    length: most letters of a response.
    has_end: whether a response may have fewer letters, none included. The
      letter after the alphabet's last is then the end token.
    prompts: texts of equal length.
  """

  num_letters: int = 8
  length: int = 4
  has_end: bool = False
  prompts: tuple[str, ...] = ("ab", "cd", "ef", "gh")

  def __post_init__(self):
    if self.num_responses > MOST_RESPONSES:
      lengths = "0 to " if self.has_end else ""
      raise ValueError(
        f"num_letters={self.num_letters} and length={self.length} give"
        f" {self.num_responses:,} responses of {lengths}{self.length} letters"
        f" to each prompt, and at most {MOST_RESPONSES:,} can be enumerated:"
        " lower one of them"
      )

  @property
  def num_responses(self) -> int:
    """Number of responses to each prompt."""
    first = 0 if self.has_end else self.length
    return sum(self.num_letters**k for k in range(first, self.length + 1))

  @property
  def vocab_size(self) -> int:
    return self.num_letters + self.has_end

  @property
  def end_token(self) -> str:
    """Spelling of the end token; "" without one."""
    return chr(ord("a") + self.num_letters) if self.has_end else ""

  def prompt_ids(self) -> np.ndarray:
    """Returns the prompts: i32 [P, 2]."""
    return np.array(
      [[ord(c) - ord("a") for c in p] for p in self.prompts], np.int32
    )

  def strings(self, length: int) -> np.ndarray:
    """Returns all strings of that many letters, in order: i32 [S, length]."""
    powers = self.num_letters ** np.arange(length)[::-1]
    numbers = np.arange(self.num_letters**length)
    return (numbers[:, None] // powers % self.num_letters).astype(np.int32)

  def responses(self) -> np.ndarray:
    """Returns all responses, the shortest first: i32 [N, length].

    -1 is padding.
    """
    first = 0 if self.has_end else self.length
    parts = []
    for length in range(first, self.length + 1):
      padding = ((0, 0), (0, self.length - length))
      parts.append(np.pad(self.strings(length), padding, constant_values=-1))
    return np.concatenate(parts)

  @functools.cached_property
  def texts(self) -> list[str]:
    """Texts of all responses."""
    return [to_text(ids) for ids in self.responses()]

  @functools.cached_property
  def index(self) -> dict[str, int]:
    """Index of each text among all responses."""
    return {text: i for i, text in enumerate(self.texts)}

  @functools.cached_property
  def num_tokens(self) -> np.ndarray:
    """Tokens of each response, its end included: i64 [N]."""
    letters = (self.responses() >= 0).sum(-1)
    return np.minimum(letters + self.has_end, self.length)


# Four prompts; 4,096 responses of four letters to each.
FIXED = Space()
