"""Finds the prompt of a record, and splits it off the responses."""

from collections import Counter
from collections.abc import Sequence
from typing import Any

from dpo_jax.data.messages import (
  Message,
  RecordError,
  Unusable,
  as_turns,
  is_answer,
  is_messages,
)
from dpo_jax.data.reading import Shaped

_ASSISTANT = "\n\nAssistant:"
_HUMAN = "\n\nHuman:"
# Answers may begin with a prompt that is as short as "Hello!".
_MIN_REPEATED = 10


def settle_prompt(
  prompt: Any,
  responses: list[Any],
  where: str,
  scored_turns: str,
  counts: Counter[str],
) -> tuple[Any, list[Any]]:
  """Separates a prompt from responses that may repeat it.

  A prompt that all responses start with is taken off them; text must have at
  least 10 characters. A text prompt before responses of messages becomes a
  user's message; before whole conversations it is replaced by the messages that
  they share.

  Args:
    prompt, responses: as the columns hold them.
    where: file and line, for errors.
    scored_turns: one of SCORED_TURNS.
    counts: `prompts_repeated` is increased if the prompt was taken off.

  Returns:
    Text and texts; or messages, and responses that `as_turns` takes.

  Raises:
    RecordError: a prompt, or a response to text, of another type.
    Unusable: conversations that share no prompt, or another than the text.
  """
  if not isinstance(prompt, str) and not is_messages(prompt):
    raise RecordError(
      f"{where}: prompt must be text or a list of messages, and is"
      f" {type(prompt).__name__}"
    )
  if isinstance(prompt, str) and all(isinstance(r, str) for r in responses):
    is_repeated = len(prompt) >= _MIN_REPEATED and all(
      r.startswith(prompt) for r in responses
    )
    counts["prompts_repeated"] += is_repeated
    start = len(prompt) * is_repeated
    return prompt, [r[start:] for r in responses]
  if isinstance(prompt, str):
    for response in responses:
      if not is_messages(response):
        raise RecordError(
          f"{where}: the prompt is text, so every response must be text, or"
          f" every response a list, and one is {type(response).__name__}"
        )
    if not all(map(_is_conversation, responses)):
      return [{"role": "user", "content": prompt}], responses
    shared, responses = _split_conversations(responses, scored_turns)
    asked = [m.get("content") for m in shared if m["role"] == "user"]
    # Of several turns the column may hold the first or the last.
    if prompt.strip() not in [str(asked[i]).strip() for i in (0, -1)]:
      raise Unusable("prompts_differ")
    return shared, responses
  count = len(prompt)
  is_repeated = bool(prompt) and all(
    is_messages(r) and len(r) > count and list(r[:count]) == list(prompt)
    for r in responses
  )
  counts["prompts_repeated"] += is_repeated
  return prompt, [r[count:] for r in responses] if is_repeated else responses


def _is_conversation(turns: Sequence[Message]) -> bool:
  """Returns whether messages start with the user's, and more follow.

  Those of the system or developer do not count.
  """
  roles = [m["role"] for m in turns if m["role"] not in ("system", "developer")]
  return len(roles) > 1 and roles[0] == "user"


def _split_conversations(
  conversations: Sequence[Sequence[Message]], scored_turns: str
) -> tuple[list[Message], list[list[Message]]]:
  """Splits whole conversations into a shared prompt and the responses.

  Args:
    conversations: messages of each.
    scored_turns: "last" splits before the last message. "all" splits at the
      first message that differs, where it is an answer in all of them, and
      otherwise as "last" does.

  Returns:
    Messages of the prompt, and those of each response.

  Raises:
    Unusable: an empty conversation, or prompts that are empty or differ.
  """
  if not all(conversations):
    raise Unusable("empty_response")
  ends = [len(c) - 1 for c in conversations]
  if scored_turns == "all":
    turns = zip(*conversations, strict=False)
    parting = (
      i for i, (a, *rest) in enumerate(turns) if any(b != a for b in rest)
    )
    shared = next(parting, min(ends))
    if all(is_answer(c[shared]) for c in conversations):
      ends = [shared] * len(ends)
  pairs = list(zip(conversations, ends, strict=True))
  prompt, *others = (list(c[:end]) for c, end in pairs)
  if any(other != prompt for other in others):
    raise Unusable("prompts_differ")
  if not prompt:
    raise Unusable("empty_prompt")
  return prompt, [list(c[end:]) for c, end in pairs]


def split_transcripts(
  record: Shaped, scored_turns: str
) -> tuple[Any, list[Any]]:
  """Splits the columns chosen and rejected after the prompt that they share.

  Messages are split as `scored_turns` says, see `parse_records`; text after its
  last "Assistant:", with which the prompt ends.

  Returns:
    Prompt, and the chosen and the rejected response: text or messages.

  Raises:
    RecordError: text without turns, or columns of other types.
    Unusable: the prompts differ, or messages lack a prompt or a response.
  """
  both = [record.columns["chosen"], record.columns["rejected"]]
  if all(is_messages(one) for one in both):
    return _split_conversations(both, scored_turns)
  if not all(isinstance(one, str) for one in both):
    raise RecordError(
      f"{record.where}: chosen and rejected must both be text, or both be"
      f" lists of messages, and are {type(both[0]).__name__} and"
      f" {type(both[1]).__name__}"
    )
  if _HUMAN not in both[0] or _ASSISTANT not in both[0]:
    raise RecordError(
      f"{record.where}: the prompt column is missing{record.hint}, and chosen"
      " has no '\\n\\nHuman:' and '\\n\\nAssistant:' turns to split at. A"
      " shared opening is not taken for the prompt: give the prompt a column"
    )
  sides = [text.rpartition(_ASSISTANT) for text in both]
  if sides[0][0] != sides[1][0]:
    raise Unusable("prompts_differ")
  return sides[0][0] + _ASSISTANT, [sides[0][2], sides[1][2]]


def score_whole(
  prompt: Any, responses: list[Any], scored_turns: str
) -> tuple[Any, list[Any]]:
  """Moves a demonstration's earlier answers from prompt to response.

  Args:
    prompt: text or messages.
    responses: the one response, in a list.
    scored_turns: with "all" the response starts at the first answer of the
      prompt; otherwise nothing moves.

  Returns:
    Prompt and responses.
  """
  if scored_turns == "all" and is_messages(prompt):
    first = next((i for i, m in enumerate(prompt) if is_answer(m)), None)
    answer = as_turns(responses[0])
    if first is not None and is_messages(answer):
      return prompt[:first], [[*prompt[first:], *answer]]
  return prompt, responses


def check_inputs(record: Shaped, prompt: Any) -> None:
  """Checks that the prompt holds the text of all columns of input.

  Args:
    record: its `inputs` are checked.
    prompt: text or messages.

  Raises:
    RecordError: a text that is not in the prompt.
  """
  texts = [prompt]
  if not isinstance(prompt, str):
    texts = [m["content"] for m in prompt if isinstance(m.get("content"), str)]
  for name, value in sorted(record.inputs.items()):
    if not any(value.strip() in text for text in texts):
      raise RecordError(
        f"{record.where}: the column {name!r} holds input that would be left"
        f" out: {value!r:.80}. Name what it is in data.columns, such as"
        f" 'prompt={name}' or 'system={name}', write it into the prompt, or"
        f" leave it out by data.columns='{name}='"
      )


def with_system(prompt: Any, record: Shaped, has_template: bool) -> Any:
  """Puts the column `system` before a prompt, as a message.

  A text prompt becomes a user's message if `Shaped.is_chat` says that it is
  one, it was not split off transcripts, and there is a chat template. Otherwise
  it stays text.

  Returns:
    The prompt: text or messages.

  Raises:
    RecordError: a system text that is not text, has no messages to stand
      before, or differs from the system message that is there.
  """
  system = record.columns.get("system")
  if system is not None and not isinstance(system, str):
    raise RecordError(
      f"{record.where}: system must be text, and is {type(system).__name__}"
    )
  if isinstance(prompt, str):
    is_turn = record.is_chat and record.kind != "transcripts"
    if not is_turn or not has_template:
      if system:
        raise RecordError(
          f"{record.where}: the column 'system' holds {system!r:.80}, which"
          " needs messages and a chat template: set data.chat_template, or"
          " leave the column out by data.columns='system='"
        )
      return prompt
    prompt = [{"role": "user", "content": prompt}]
  if not system:
    return prompt
  first = prompt[0] if prompt else {}
  if first.get("role") not in ("system", "developer"):
    return [{"role": "system", "content": system}, *prompt]
  if first.get("content") != system:
    raise RecordError(
      f"{record.where}: the column 'system' holds {system!r:.80}, and the"
      f" messages begin with {first.get('content')!r:.80}. Leave the column"
      " out by data.columns='system='"
    )
  return prompt
