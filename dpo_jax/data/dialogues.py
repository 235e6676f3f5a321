"""Conversations -> text, and which of its characters are scored."""

from collections.abc import Callable, Mapping, Sequence
import dataclasses
from typing import Any, NamedTuple

from dpo_jax.data.messages import (
  Message,
  RecordError,
  Unusable,
  check_unicode,
  has_content,
  is_answer,
)


class Request(NamedTuple):
  """What a chat template is asked to render.

  Attributes:
    messages: of a conversation.
    header: whether to end with the header of the assistant's turn.
    extras: further variables of the template, such as `tools`.
  """

  messages: Sequence[Message]
  header: bool
  extras: Mapping[str, Any]


# Renders conversations, with an error in the place of those that fail.
Render = Callable[[Sequence[Request]], list[str | RecordError]]


@dataclasses.dataclass(frozen=True)
class Example:
  """A prompt with its responses.

  Attributes:
    prompt: text that the policy is given.
    responses: K texts, best first.
    score: K figures, higher is better; a pair without scores of its own has
      (1, 0), unpaired feedback 1 or 0.
    is_rendered: whether a chat template made the text, so that special tokens
      are written in it; those that messages spell are hidden, see `Spellings`.
      Elsewhere such a spelling is plain text.
    scored: ranges of characters of each response that are scored, ascending;
      what is between them, a user's turn or a tool's output, is only read.
      None where every response is scored as a whole.
    truncated: which responses were cut off while they were sampled, so that
      no EOS belongs behind them; None where none was.
  """

  prompt: str
  responses: tuple[str, ...]
  score: tuple[float, ...]
  is_rendered: bool = False
  scored: tuple[tuple[tuple[int, int], ...], ...] | None = None
  truncated: tuple[bool, ...] | None = None


@dataclasses.dataclass(frozen=True)
class Dialogue:
  """A record of messages, until its chat template has rendered them."""

  prompt: list[Message]
  responses: list[list[Message]]
  score: tuple[float, ...]
  where: str
  extras: Mapping[str, Any]
  scored_turns: str
  truncated: tuple[bool, ...] | None

  def __post_init__(self):
    # Rendered, an empty answer is not empty: the template ends its turn.
    for turns in self.responses:
      scored = [turns[i] for i in self._scored(turns)]
      if not any(has_content(message) for message in scored):
        raise Unusable("empty_response")

  def hidden(self, hide: Callable[[Any, str], Any]) -> "Dialogue":
    """Returns the same, with what its messages spell hidden."""
    return dataclasses.replace(
      self,
      prompt=hide(self.prompt, self.where),
      responses=hide(self.responses, self.where),
      extras=hide(self.extras, self.where),
    )

  def _scored(self, turns: Sequence[Message]) -> list[int]:
    """Indices of the turns that are scored."""
    if self.scored_turns == "last" or len(turns) == 1:
      return list(range(len(turns)))[-1:]
    return [i for i, turn in enumerate(turns) if is_answer(turn)]

  def _borders(self, turns: Sequence[Message]) -> list[tuple[int, bool]]:
    """What to render to find the scored turns: how many turns, and header."""
    scored = self._scored(turns)
    starts = [(i, True) for i in scored if i]
    ends = [(i + 1, False) for i in scored if i + 1 < len(turns)]
    return sorted(starts + ends)

  def requests(self) -> list[Request]:
    """What to render: the prompt, then of each response all and its parts."""
    needed: list[tuple[list[Message], bool]] = [(self.prompt, True)]
    for turns in self.responses:
      needed.append((self.prompt + turns, False))
      for count, header in self._borders(turns):
        needed.append((self.prompt + turns[:count], header))
    return [Request(*one, self.extras) for one in needed]

  def finish(self, rendered: Sequence[str | RecordError]) -> Example:
    """The example of what was rendered.

    Raises:
      RecordError: the template fails, or writes a beginning differently once
        more turns follow it.
    """
    for text in rendered:
      if isinstance(text, RecordError):
        raise RecordError(f"{self.where}: {text}") from text
    whole_texts = [text for text in rendered if isinstance(text, str)]
    check_unicode(whole_texts, self.where)
    texts = iter(whole_texts)
    prefix = next(texts)
    responses, scored = [], []
    for turns in self.responses:
      whole = next(texts)
      if not whole.startswith(prefix):
        raise RecordError(
          f"{self.where}: the chat template writes the prompt differently once"
          f" an answer follows, so the policy would be trained behind another"
          f" text than it answers.\n{_show_parting(prefix, whole)}\nSet"
          " data.chat_template to a template that agrees, or what it reads in"
          " a column chat_template_kwargs"
        )
      places = {(0, True): len(prefix), (len(turns), False): len(whole)}
      for border, text in zip(self._borders(turns), texts, strict=False):
        if not whole.startswith(text):
          raise RecordError(
            f"{self.where}: the chat template writes a turn differently once"
            " others follow (templates of thinking models leave earlier"
            " thoughts out), so it cannot be scored as it was written.\n"
            f"{_show_parting(text, whole)}\nSet data.scored_turns='last', or"
            " data.chat_template to a template that keeps its turns"
          )
        places[border] = len(text)
      responses.append(whole[len(prefix) :])
      scored.append(
        tuple(
          (
            places[i, True] - len(prefix),
            places[i + 1, False] - len(prefix),
          )
          for i in self._scored(turns)
        )
      )
    return Example(
      prefix,
      tuple(responses),
      self.score,
      is_rendered=True,
      scored=tuple(scored) if any(len(t) > 1 for t in self.responses) else None,
      truncated=self.truncated,
    )


def _show_parting(alone: str, whole: str) -> str:
  """Both texts around the place where they part."""
  at = next(
    (i for i, (a, b) in enumerate(zip(alone, whole, strict=False)) if a != b),
    min(len(alone), len(whole)),
  )
  start = max(at - 40, 0)
  return (
    f"  alone: {'...' * (start > 0)}{alone[start : at + 60]!r}\n"
    f"  with what follows: {'...' * (start > 0)}{whole[start : at + 60]!r}"
  )
