"""Renders conversations as text, and finds the characters that are scored."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
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
  """Request to render a conversation with a chat template.

  Attributes:
    messages: messages of the conversation.
    header: whether to end with the header of the assistant's turn.
    extras: further variables of the template, such as `tools`.
  """

  messages: Sequence[Message]
  header: bool
  extras: Mapping[str, Any]


# Renders conversations; gives an error in place of each that fails.
Render = Callable[[Sequence[Request]], Iterator[str | RecordError]]


@dataclasses.dataclass(frozen=True)
class Example:
  """Prompt with its responses.

  Attributes:
    prompt: text that the policy is given.
    responses: K texts, best first.
    score: K scores, higher is better; a pair without scores of its own has
      (1, 0), unpaired feedback 1 or 0.
    is_rendered: whether a chat template made the text, so that it spells
      special tokens; those that messages spell are hidden, see `Spellings`. In
      other text such a spelling is plain text.
    scored: ranges of characters of each response that are scored, ascending.
      Text between them, a user's turn or a tool's output, is not scored. None
      if all responses are scored as a whole.
    truncated: for each response, whether its sampler cut it off, so that it
      gets no EOS; None if none was cut off.
  """

  prompt: str
  responses: tuple[str, ...]
  score: tuple[float, ...]
  is_rendered: bool = False
  scored: tuple[tuple[tuple[int, int], ...], ...] | None = None
  truncated: tuple[bool, ...] | None = None


@dataclasses.dataclass(frozen=True)
class Dialogue:
  """Record of messages that its chat template has not rendered yet.

  Attributes:
    prompt: messages, at least one.
    responses: messages of each of K responses, best first.
    score, truncated: see `Example`.
    where: file and line, for errors.
    extras: further variables of the template.
    scored_turns: "last" or "all", see `examples.parse_records`.

  Raises:
    Unusable: a response whose scored turns have no content.
  """

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
    """Returns a copy in which special tokens that messages spell are hidden.

    Args:
      hide: see `Spellings.hide`; it is applied to `extras` too.
    """
    return dataclasses.replace(
      self,
      prompt=hide(self.prompt, self.where),
      responses=hide(self.responses, self.where),
      extras=hide(self.extras, self.where),
    )

  def _scored(self, turns: Sequence[Message]) -> list[int]:
    """Returns the indices of a response's turns that are scored."""
    if self.scored_turns == "last" or len(turns) == 1:
      return list(range(len(turns)))[-1:]
    return [i for i, turn in enumerate(turns) if is_answer(turn)]

  def _borders(self, turns: Sequence[Message]) -> list[tuple[int, bool]]:
    """Returns the prefixes that bound the scored turns.

    Each is a number of turns, and whether the assistant's header follows. The
    empty prefix and the whole response are not among them.
    """
    scored = self._scored(turns)
    starts = [(i, True) for i in scored if i]
    ends = [(i + 1, False) for i in scored if i + 1 < len(turns)]
    return sorted(starts + ends)

  def requests(self) -> list[Request]:
    """Returns what to render: prompt, then each response and its prefixes."""
    needed: list[tuple[list[Message], bool]] = [(self.prompt, True)]
    for turns in self.responses:
      needed.append((self.prompt + turns, False))
      for count, header in self._borders(turns):
        needed.append((self.prompt + turns[:count], header))
    return [Request(*one, self.extras) for one in needed]

  def finish(self, rendered: Iterable[str | RecordError]) -> Example:
    """Makes the example from the rendered texts.

    Args:
      rendered: texts of `requests`; none is read after an error.

    Raises:
      RecordError: the template fails, renders a prefix differently if more
        turns follow, or writes text that is not Unicode.
    """
    whole_texts = []
    for text in rendered:
      if isinstance(text, RecordError):
        raise RecordError(f"{self.where}: {text}") from text
      whole_texts.append(text)
    check_unicode(whole_texts, self.where)
    texts = iter(whole_texts)
    prefix = next(texts)
    responses, scored = [], []
    for turns in self.responses:
      whole = next(texts)
      if not whole.startswith(prefix):
        raise RecordError(
          f"{self.where}: the chat template writes the prompt differently once"
          " an answer follows, so the policy would be trained on another prompt"
          f" than it answers.\n{_show_parting(prefix, whole)}\nSet"
          " data.chat_template to a template that agrees, or what it reads in"
          " a column chat_template_kwargs"
        )
      borders = {(0, True): len(prefix), (len(turns), False): len(whole)}
      for border, text in zip(self._borders(turns), texts, strict=False):
        if not whole.startswith(text):
          raise RecordError(
            f"{self.where}: the chat template writes a turn differently once"
            " others follow (templates of thinking models leave earlier"
            " thoughts out), so it cannot be scored as it was written.\n"
            f"{_show_parting(text, whole)}\nSet data.scored_turns='last', or"
            " data.chat_template to a template that keeps its turns"
          )
        borders[border] = len(text)
      responses.append(whole[len(prefix) :])
      scored.append(
        tuple(
          (
            borders[i, True] - len(prefix),
            borders[i + 1, False] - len(prefix),
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
  """Returns two lines for an error: both texts around the first difference.

  Args:
    alone: a prefix, rendered alone.
    whole: the text in which more turns follow.
  """
  at = next(
    (i for i, (a, b) in enumerate(zip(alone, whole, strict=False)) if a != b),
    min(len(alone), len(whole)),
  )
  start = max(at - 40, 0)
  return (
    f"  alone: {'...' * (start > 0)}{alone[start : at + 60]!r}\n"
    f"  with what follows: {'...' * (start > 0)}{whole[start : at + 60]!r}"
  )
