"""Conversations -> text, and which of its characters are scored."""

from collections.abc import Callable, Mapping, Sequence
import dataclasses
import json
from typing import Any, NamedTuple

Message = Mapping[str, Any]
# What of a conversation is scored.
SCORED_TURNS = ("last", "all")


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


class RecordError(ValueError):
  """A record that is broken: stops the run, naming file and line."""


class Unusable(Exception):
  """A record that is well formed but teaches nothing; dropped and counted."""

  def __init__(self, reason: str):
    super().__init__(reason)
    self.reason = reason


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
      are written in it. Elsewhere such a spelling is plain text.
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
      if not any(_has_content(message) for message in scored):
        raise Unusable("empty_response")

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
    check_unicode(rendered, self.where)
    texts = iter(rendered)
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


def read_turns(response: Any, where: str) -> list[Message]:
  turns = as_turns(response)
  if not is_messages(turns):
    raise RecordError(
      f"{where}: a response must be text or a list of messages, and one is"
      f" {type(response).__name__}"
    )
  turns = clean_messages(turns, where)
  if len(turns) > 1 and not is_answer(turns[-1]):
    raise RecordError(
      f"{where}: the last message of a response has the role"
      f" {turns[-1]['role']!r}, and what is scored last is the assistant's:"
      " end the response there"
    )
  return turns


def read_extras(record: Mapping[str, Any], where: str) -> dict[str, Any]:
  """What else a template reads: TRL's columns tools, chat_template_kwargs."""
  found: dict[str, Any] = {}
  for name, kind in (("tools", list), ("chat_template_kwargs", dict)):
    value = record.get(name)
    if isinstance(value, str):  # tables without nested columns
      try:
        value = json.loads(value) if value else None
      except json.JSONDecodeError as error:
        raise RecordError(f"{where}: {name} is no JSON: {error}") from error
    if not value:
      continue
    if not isinstance(value, kind):
      raise RecordError(
        f"{where}: {name} must be a {kind.__name__}, and is"
        f" {type(value).__name__}"
      )
    found |= {"tools": value} if name == "tools" else value
  ours = sorted(found.keys() & {"messages", "add_generation_prompt"})
  if ours:
    raise RecordError(
      f"{where}: chat_template_kwargs may not set {', '.join(ours)}"
    )
  return found


def clean_messages(messages: Sequence[Any], where: str) -> list[Message]:
  """Messages without the keys that tables fill with null.

  Args:
    messages: of one conversation. Content may be null or absent where another
      key, such as `tool_calls`, says what the turn is.
    where: file and line, for errors.

  Raises:
    RecordError: a message without a role, or with neither content nor another
      key.
  """
  clean = []
  for message in messages:
    is_whole = isinstance(message, Mapping) and "role" in message
    if is_whole and message.get("content") is None:
      is_whole = any(
        value for key, value in message.items() if key not in ("role", "name")
      )
    if not is_whole:
      raise RecordError(
        f"{where}: a message must have 'role' and 'content', or 'tool_calls'"
        f" where the content is null, and one is {message!r:.80}"
      )
    clean.append(
      {
        key: value
        for key, value in message.items()
        if key == "content" or value is not None
      }
    )
  return clean


def as_turns(response: Any) -> Any:
  if isinstance(response, str):
    return [{"role": "assistant", "content": response}]
  return response


def is_answer(message: Any) -> bool:
  return isinstance(message, Mapping) and message.get("role") == "assistant"


def is_messages(value: Any) -> bool:
  return isinstance(value, Sequence) and not isinstance(value, str)


def _has_content(message: Message) -> bool:
  values = [value for key, value in message.items() if key != "role"]
  return any(v.strip() if isinstance(v, str) else v for v in values)


def check_unicode(texts: Sequence[str], where: str) -> None:
  """JSON can spell half of a surrogate pair, which no tokenizer takes."""
  for text in texts:
    try:
      text.encode("utf-8")
    except UnicodeEncodeError as error:
      raise RecordError(
        f"{where}: text that is not Unicode: {error}"
      ) from error
