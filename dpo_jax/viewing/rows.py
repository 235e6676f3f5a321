"""Rows of a batch as text in colour: what is read, and what is scored.

All is taken from the packed batch that a step gets, so it shows what is
trained on.
"""

from collections.abc import Iterator, Sequence
import dataclasses
import itertools

import numpy as np
from rich.text import Text

from dpo_jax.data.groups import Limits
from dpo_jax.data.tokenizers import Tokenizer
from dpo_jax.types import Batch
from dpo_jax.viewing.terminal import visible

# Styles by kind of token, and those of a special token and of a cut.
STYLES = {"prompt": "cyan", "scored": "green", "not scored": "yellow"}
SPECIAL, CUT = "reverse", "bold red"


@dataclasses.dataclass(frozen=True)
class Part:
  """A prompt, or a response, in a row.

  Attributes:
    slot: k of a response; -1 for a prompt.
    ids: i32 [n].
    is_scored: bool [n], whether the loss reads a token's log-prob.
  """

  slot: int
  ids: np.ndarray
  is_scored: np.ndarray


@dataclasses.dataclass(frozen=True)
class Group:
  """A group as it stands in a row.

  Attributes:
    row: row of the batch.
    example_id: index of the group in its store.
    parts: its prompt, and its responses with the prompt before each if the
      layout repeats it.
    scores: f32 [K].
  """

  row: int
  example_id: int
  parts: list[Part]
  scores: np.ndarray

  @property
  def prompt(self) -> Part:
    return next(part for part in self.parts if part.slot < 0)

  @property
  def responses(self) -> list[Part]:
    return [part for part in self.parts if part.slot >= 0]

  def is_prompt_at_limit(self, limits: Limits) -> bool:
    """Returns whether the prompt is as long as a cut leaves it.

    A cut leaves it the tokens that the longest response leaves of `max_tokens`,
    and `max_prompt_tokens` at least. A prompt may be that long by chance.
    """
    longest = max(len(part.ids) for part in self.responses)
    keep = max(limits.max_prompt_tokens, limits.max_tokens - longest)
    return len(self.prompt.ids) == keep


def read_groups(batch: Batch) -> Iterator[Group]:
  """Yields the groups of a batch, row by row.

  Args:
    batch: batch in numpy.
  """
  for row in range(len(batch.tokens)):
    by_group: dict[int, list[Part]] = {}
    pending: list[Part] = []  # a prompt, before the first of its responses
    for group, part in _read_parts(batch, row):
      pending.append(part)
      if group is not None:
        by_group.setdefault(group, []).extend(pending)
        pending = []
    for group, parts in by_group.items():
      example = int(batch.example_ids[row, group])
      yield Group(row, example, parts, np.asarray(batch.score[row, group]))


def _read_parts(batch: Batch, row: int) -> Iterator[tuple[int | None, Part]]:
  """Yields the parts of a row: (group of a response, or None, and the part).

  A part without a group is the prompt of the responses after it.
  """
  labels = list(zip(batch.segments[row], batch.branches[row], strict=True))
  slots = {
    int(batch.last_tokens[row, g, k]): (int(g), int(k))
    for g, k in np.argwhere(batch.valid[row])
  }
  num_slots = batch.valid.shape[2]
  is_target = batch.slots[row] < batch.valid[row].size
  start = 0
  for (segment, branch), run in itertools.groupby(labels):
    end = start + len(list(run))
    if segment:
      ids = np.asarray(batch.tokens[row, start:end])
      is_scored = np.zeros(len(ids), bool)
      group, slot = None, -1
      if branch:
        group, slot = slots[end - 1]
        mine = is_target & (batch.slots[row] == group * num_slots + slot)
        # A predictor before the response is the last token of its prompt.
        predictors = batch.predictors[row][mine]
        is_scored[np.maximum(predictors + 1 - start, 0)] = True
      yield group, Part(slot, ids, is_scored)
    start = end


def render_part(
  part: Part, tokenizer: Tokenizer, *, with_ids: bool, has_color: bool
) -> Text:
  """Renders the tokens of a part in the colour of their kind.

  A response that does not end with a stop id gets a mark that it was cut.

  Args:
    part: prompt or response.
    tokenizer: decodes it.
    with_ids: whether the id of each token stands before it.
    has_color: whether the terminal shows colours; otherwise brackets mark what
      is not scored in a response.
  """
  text = Text()
  kinds = [_kind(part, i, tokenizer) for i in range(len(part.ids))]
  ids = part.ids.tolist()
  start = 0
  for (kind, is_special), run in itertools.groupby(kinds):
    end = start + len(list(run))
    style = STYLES[kind] + (f" {SPECIAL}" if is_special else "")
    is_marked = kind == "not scored" and not has_color
    text.append("[" if is_marked else "")
    if with_ids:
      for i in ids[start:end]:
        text.append(f"{i}:", "dim").append(_spell([i], tokenizer), style)
        text.append(" ")
    elif is_special:
      text.append(_spell(ids[start:end], tokenizer), style)
    else:
      # Some tokenizers drop a space at the beginning of what they decode.
      before = len(tokenizer.decode(ids[:start]))
      text.append(visible(tokenizer.decode(ids[:end])[before:]), style)
    text.append("]" if is_marked else "")
    start = end
  if part.slot >= 0 and ids[-1] not in tokenizer.stop_ids:
    text.append(" [cut: no EOS]", CUT)
  return text


def _kind(part: Part, index: int, tokenizer: Tokenizer) -> tuple[str, bool]:
  """Returns the kind of a token, and whether it is a special one."""
  is_special = bool(tokenizer.special_token(int(part.ids[index])))
  if part.slot < 0:
    return "prompt", is_special
  return "scored" if part.is_scored[index] else "not scored", is_special


def _spell(ids: Sequence[int], tokenizer: Tokenizer) -> str:
  return visible(
    "".join(tokenizer.special_token(i) or tokenizer.decode([i]) for i in ids)
  )


def legend() -> Text:
  """Returns the kinds of tokens in their colours."""
  text = Text()
  for kind, style in STYLES.items():
    text.append(kind, style).append("  ")
  return text.append("special token", SPECIAL).append("  ").append("cut", CUT)
