"""One record of any known format -> Example(prompt, responses, score)."""

from collections.abc import Callable, Mapping, Sequence
import dataclasses
import difflib
import math
from typing import Any

Message = Mapping[str, Any]
# Renders messages; the flag asks for the header of the assistant's turn.
Render = Callable[[Sequence[Message], bool], str]

# The formats, by the columns that they need. Field names are TRL's.
FORMATS: dict[str, frozenset[str]] = {
  "pair": frozenset({"prompt", "chosen", "rejected"}),
  "pair with the prompt implicit": frozenset({"chosen", "rejected"}),
  "unpaired": frozenset({"prompt", "completion", "label"}),
  "ranking": frozenset({"prompt", "responses", "scores"}),
  "demonstration": frozenset({"prompt", "completion"}),
}
_ASSISTANT = "\n\nAssistant:"
_HUMAN = "\n\nHuman:"


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
  """

  prompt: str
  responses: tuple[str, ...]
  score: tuple[float, ...]
  is_rendered: bool = False


class RecordError(ValueError):
  """A record that is broken: stops the run, naming file and line."""


class Unusable(Exception):
  """A record that is well formed but teaches nothing; dropped and counted."""

  def __init__(self, reason: str):
    super().__init__(reason)
    self.reason = reason


def parse_record(
  record: Mapping[str, Any], where: str, render: Render | None
) -> Example:
  """Reads one record, whichever of `FORMATS` it has.

  Args:
    record: columns by name.
    where: file and line, for errors.
    render: the tokenizer's chat template, or None if it has none.

  Returns:
    The example, its responses best first.

  Raises:
    RecordError: columns missing or of the wrong type, or a chat template
      that fails.
    Unusable: no prompt that both responses share, or an empty answer.
  """
  columns = record.keys()
  kind = next((k for k, need in FORMATS.items() if need <= columns), None)
  if kind is None:
    raise RecordError(_explain_columns(set(columns), where))
  if kind == "pair":
    prompt = record["prompt"]
    responses = [record["chosen"], record["rejected"]]
    score = _pair_score(record, where)
  elif kind == "pair with the prompt implicit":
    prompt, responses = _split_prompt(
      record["chosen"], record["rejected"], where
    )
    score = _pair_score(record, where)
  elif kind in ("unpaired", "demonstration"):
    prompt, responses = record["prompt"], [record["completion"]]
    label = record.get("label", True)
    if not isinstance(label, bool | int) or label not in (0, 1):
      raise RecordError(f"{where}: label={label!r} must be true or false")
    score = [float(label)]
  else:
    prompt = record["prompt"]
    responses, score = _ranked(record["responses"], record["scores"], where)
  return _to_text(prompt, responses, score, where, render)


def _explain_columns(found: set[str], where: str) -> str:
  wanted = set().union(*FORMATS.values())
  hints = []
  for name in sorted(found - wanted):
    near = difflib.get_close_matches(name, wanted - found, n=1)
    hints += [f"{name!r} may be meant for {near[0]!r}"] if near else []
  expected = "; ".join(
    f"{kind}: {', '.join(sorted(need))}" for kind, need in FORMATS.items()
  )
  hint = f" ({'; '.join(hints)})" if hints else ""
  return (
    f"{where}: found the columns {', '.join(sorted(found)) or 'none'}{hint}."
    f" Expected one of: {expected}"
  )


def _number(value: Any, name: str, where: str) -> float:
  is_number = isinstance(value, int | float) and not isinstance(value, bool)
  if not is_number or not math.isfinite(value):
    raise RecordError(f"{where}: {name}={value!r} must be a finite number")
  return float(value)


def _pair_score(record: Mapping[str, Any], where: str) -> list[float]:
  names = ("score_chosen", "score_rejected")
  found = [name for name in names if name in record]
  if not found:
    return [1.0, 0.0]
  if len(found) == 1:
    raise RecordError(
      f"{where}: {found[0]} stands without the other of {names}"
    )
  return [_number(record[name], name, where) for name in names]


def _ranked(
  responses: Any, scores: Any, where: str
) -> tuple[list[Any], list[float]]:
  lists = isinstance(responses, Sequence) and isinstance(scores, Sequence)
  if not lists or isinstance(responses, str) or not responses:
    raise RecordError(f"{where}: responses and scores must be lists")
  if len(responses) != len(scores):
    raise RecordError(
      f"{where}: {len(responses)} responses but {len(scores)} scores"
    )
  numbers = [_number(s, "scores", where) for s in scores]
  # Stable, so that ties keep the order of the file.
  order = sorted(range(len(numbers)), key=lambda k: -numbers[k])
  return [responses[k] for k in order], [numbers[k] for k in order]


def _is_messages(value: Any) -> bool:
  return isinstance(value, Sequence) and not isinstance(value, str)


def _split_prompt(
  chosen: Any, rejected: Any, where: str
) -> tuple[Any, list[Any]]:
  """Finds the prompt that two transcripts share, at the last turn."""
  if _is_messages(chosen) and _is_messages(rejected):
    if not chosen or not rejected:
      raise Unusable("empty_response")
    if list(chosen[:-1]) != list(rejected[:-1]):
      raise Unusable("prompts_differ")
    if len(chosen) < 2:
      raise Unusable("empty_prompt")
    return chosen[:-1], [chosen[-1:], rejected[-1:]]
  if not isinstance(chosen, str) or not isinstance(rejected, str):
    raise RecordError(
      f"{where}: chosen and rejected must both be text, or both be lists of"
      f" messages, and are {type(chosen).__name__} and"
      f" {type(rejected).__name__}"
    )
  if _HUMAN not in chosen or _ASSISTANT not in chosen:
    raise RecordError(
      f"{where}: there is no prompt column, and chosen is no transcript with"
      " '\\n\\nHuman:' and '\\n\\nAssistant:' turns to split at. A shared"
      " opening is not taken for the prompt: give the prompt a column"
    )
  sides = [text.rpartition(_ASSISTANT) for text in (chosen, rejected)]
  if sides[0][0] != sides[1][0]:
    raise Unusable("prompts_differ")
  return sides[0][0] + _ASSISTANT, [sides[0][2], sides[1][2]]


def _to_text(
  prompt: Any,
  responses: Sequence[Any],
  score: Sequence[float],
  where: str,
  render: Render | None,
) -> Example:
  if isinstance(prompt, str):
    for response in responses:
      if not isinstance(response, str):
        raise RecordError(
          f"{where}: the prompt is text, so every response must be, and one is"
          f" {type(response).__name__}"
        )
    _check_unicode([prompt, *responses], where)
    return Example(prompt, tuple(responses), tuple(score))
  if not _is_messages(prompt):
    raise RecordError(
      f"{where}: prompt must be text or a list of messages, and is"
      f" {type(prompt).__name__}"
    )
  if render is None:
    raise RecordError(
      f"{where}: the record holds messages, and this tokenizer has no chat"
      " template: set data.chat_template to one, or use plain text"
    )
  if not prompt:
    raise Unusable("empty_prompt")
  check_messages(prompt, where)
  prefix = _render(render, prompt, True, where)
  texts = []
  for response in responses:
    if isinstance(response, str):
      turn = [{"role": "assistant", "content": response}]
    elif _is_messages(response):
      turn = list(response)
    else:
      raise RecordError(
        f"{where}: a response must be text or a list of messages, and one is"
        f" {type(response).__name__}"
      )
    check_messages(turn, where)
    # Rendered, an empty answer is not empty: the template ends its turn.
    if not any(_has_content(message) for message in turn):
      raise Unusable("empty_response")
    whole = _render(render, [*prompt, *turn], False, where)
    if not whole.startswith(prefix):
      raise RecordError(
        f"{where}: the chat template writes the prompt differently once an"
        f" answer follows.\n  alone: ...{prefix[-80:]!r}\n  with the answer:"
        f" {whole[: len(prefix)][-80:]!r}"
      )
    texts.append(whole[len(prefix) :])
  _check_unicode([prefix, *texts], where)
  return Example(prefix, tuple(texts), tuple(score), is_rendered=True)


def _render(
  render: Render, messages: Sequence[Message], header: bool, where: str
) -> str:
  try:
    return render(messages, header)
  except RecordError as error:
    raise RecordError(f"{where}: {error}") from error


def _has_content(message: Message) -> bool:
  values = [value for key, value in message.items() if key != "role"]
  return any(v.strip() if isinstance(v, str) else v for v in values)


def _check_unicode(texts: Sequence[str], where: str) -> None:
  """JSON can spell half of a surrogate pair, which no tokenizer takes."""
  for text in texts:
    try:
      text.encode("utf-8")
    except UnicodeEncodeError as error:
      raise RecordError(
        f"{where}: text that is not Unicode: {error}"
      ) from error


def check_messages(messages: Sequence[Any], where: str) -> None:
  """Raises RecordError unless every message has a role and content."""
  for message in messages:
    if not isinstance(message, Mapping) or not {"role", "content"} <= set(
      message
    ):
      raise RecordError(
        f"{where}: a message must have 'role' and 'content', and one is"
        f" {message!r:.80}"
      )
