"""One record of any known format -> Example(prompt, responses, score)."""

from collections.abc import Iterable, Mapping, Sequence
import difflib
import itertools
import math
from typing import Any

from dpo_jax.data.dialogues import (
  Dialogue,
  Example,
  RecordError,
  Render,
  Unusable,
  as_turns,
  check_unicode,
  clean_messages,
  is_answer,
  is_messages,
  read_extras,
  read_turns,
)

# The formats, by the columns that they need. Field names are TRL's.
FORMATS: dict[str, frozenset[str]] = {
  "pair": frozenset({"prompt", "chosen", "rejected"}),
  "pair with the prompt implicit": frozenset({"chosen", "rejected"}),
  "unpaired": frozenset({"prompt", "completion", "label"}),
  "ranking": frozenset({"prompt", "responses", "scores"}),
  "demonstration": frozenset({"prompt", "completion"}),
  "conversation": frozenset({"messages"}),
}
_ASSISTANT = "\n\nAssistant:"
_HUMAN = "\n\nHuman:"


def parse_record(
  record: Mapping[str, Any],
  where: str,
  render: Render | None,
  scored_turns: str = "last",
) -> Example:
  """Reads one record, whichever of `FORMATS` it has.

  Args:
    record: columns by name.
    where: file and line, for errors.
    render: the tokenizer's chat template, or None if it has none.
    scored_turns: see `parse_records`.

  Returns:
    The example, its responses best first.

  Raises:
    RecordError: columns missing or of the wrong type, or a chat template
      that fails.
    Unusable: no prompt that both responses share, or an empty answer.
  """
  [example] = parse_records([(where, record)], render, scored_turns)
  if isinstance(example, Unusable):
    raise example
  return example


def parse_records(
  records: Iterable[tuple[str, Mapping[str, Any]]],
  render: Render | None,
  scored_turns: str = "last",
) -> list[Example | Unusable]:
  """Reads records, rendering their conversations all at once.

  Which of the assistant's turns are scored is `scored_turns`:

  * "last": the last turn of every response. Earlier messages of a response,
    such as a call and the output of its tool, are read and not scored.
  * "all": every assistant turn of a response. Turns in the prompt are shared
    by the responses, so they can tell none from another, and are not scored;
    two transcripts without a prompt column are split where they part rather
    than at the last turn. A demonstration has one response and nothing to
    share: its response starts at the first assistant turn, so the whole
    conversation is learnt.

  Plain text has no turns, and is scored whole.

  Any format may have a column `truncated`: a list with a boolean for each
  response in the record's order, or a boolean where there is one. A response
  that its sampler cut off gets no EOS, which would teach to stop there.

  Args:
    records: file and line, for errors, and columns by name.
    render: the tokenizer's chat template, or None if it has none.
    scored_turns: one of SCORED_TURNS.

  Returns:
    Examples, responses best first; where a record teaches nothing, why.

  Raises:
    RecordError: a broken record, or a chat template that fails on it.
  """
  parsed: list[Example | Unusable | Dialogue] = []
  for where, record in records:
    try:
      parsed.append(_parse(record, where, render is not None, scored_turns))
    except Unusable as unusable:
      parsed.append(unusable)
  dialogues = [one for one in parsed if isinstance(one, Dialogue)]
  requests = [one.requests() for one in dialogues]
  texts = iter(render(list(itertools.chain(*requests))) if dialogues else [])
  for i, one in enumerate(parsed):
    if isinstance(one, Dialogue):
      mine = itertools.islice(texts, len(one.requests()))
      parsed[i] = one.finish(list(mine))
  return parsed


def _parse(
  record: Mapping[str, Any], where: str, has_template: bool, scored_turns: str
) -> "Example | Dialogue":
  columns = record.keys()
  kind = next((k for k, need in FORMATS.items() if need <= columns), None)
  if kind is None:
    raise RecordError(_explain_columns(set(columns), where))
  score, order = [1.0], None
  if kind == "pair":
    prompt = record["prompt"]
    responses = [record["chosen"], record["rejected"]]
    score = _pair_score(record, where)
  elif kind == "pair with the prompt implicit":
    prompt, responses = _split_prompt(
      record["chosen"], record["rejected"], where, scored_turns
    )
    score = _pair_score(record, where)
  elif kind == "unpaired":
    prompt, responses = record["prompt"], [record["completion"]]
    label = record["label"]
    if not isinstance(label, bool | int) or label not in (0, 1):
      raise RecordError(f"{where}: label={label!r} must be true or false")
    score = [float(label)]
  elif kind == "ranking":
    prompt, responses = record["prompt"], record["responses"]
    score = _scores(responses, record["scores"], where)
    # Stable, so that ties keep the order of the file.
    order = sorted(range(len(score)), key=lambda k: -score[k])
    responses, score = [responses[k] for k in order], [score[k] for k in order]
  else:
    prompt, responses = _demonstration(record, where, scored_turns)
  truncated = _truncated(record, len(responses), where)
  if truncated and order:
    truncated = tuple(truncated[k] for k in order)
  if isinstance(prompt, str):
    for response in responses:
      if not isinstance(response, str):
        raise RecordError(
          f"{where}: the prompt is text, so every response must be, and one is"
          f" {type(response).__name__}"
        )
    check_unicode([prompt, *responses], where)
    return Example(prompt, tuple(responses), tuple(score), truncated=truncated)
  if not is_messages(prompt):
    raise RecordError(
      f"{where}: prompt must be text or a list of messages, and is"
      f" {type(prompt).__name__}"
    )
  if not has_template:
    raise RecordError(
      f"{where}: the record holds messages, and this tokenizer has no chat"
      " template: set data.chat_template to one, or use plain text"
    )
  if not prompt:
    raise Unusable("empty_prompt")
  return Dialogue(
    clean_messages(prompt, where),
    [read_turns(response, where) for response in responses],
    tuple(score),
    where,
    read_extras(record, where),
    scored_turns,
    truncated,
  )


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


def _scores(responses: Any, scores: Any, where: str) -> list[float]:
  lists = isinstance(responses, Sequence) and isinstance(scores, Sequence)
  if not lists or isinstance(responses, str) or not responses:
    raise RecordError(f"{where}: responses and scores must be lists")
  if len(responses) != len(scores):
    raise RecordError(
      f"{where}: {len(responses)} responses but {len(scores)} scores"
    )
  return [_number(s, "scores", where) for s in scores]


def _truncated(
  record: Mapping[str, Any], num: int, where: str
) -> tuple[bool, ...] | None:
  """The column `truncated`, in the record's order; None where all is whole."""
  value = record.get("truncated")
  if value is None:
    return None
  flags = [value] if isinstance(value, bool) else value
  is_list = isinstance(flags, Sequence) and not isinstance(flags, str)
  if (
    not is_list
    or len(flags) != num
    or not all(isinstance(flag, bool) for flag in flags)
  ):
    raise RecordError(
      f"{where}: truncated={value!r:.80} must be a list of {num} booleans, one"
      " for each response, or a boolean where there is one"
    )
  return tuple(flags) if any(flags) else None


def _demonstration(
  record: Mapping[str, Any], where: str, scored_turns: str
) -> tuple[Any, list[Any]]:
  """The prompt of a demonstration, and its one response."""
  if "completion" not in record:
    messages = record["messages"]
    if not is_messages(messages):
      raise RecordError(
        f"{where}: messages must be a list, and is {type(messages).__name__}"
      )
    # Nothing behind the last answer is ever scored.
    last = max((i for i, m in enumerate(messages) if is_answer(m)), default=-1)
    if last < 0:
      raise Unusable("empty_response")
    prompt, completion = list(messages[:last]), [messages[last]]
  else:
    prompt, completion = record["prompt"], record["completion"]
  if scored_turns == "all" and is_messages(prompt) and prompt:
    first = next((i for i, m in enumerate(prompt) if is_answer(m)), None)
    if first is not None:
      answer = as_turns(completion)
      whole = [*prompt, *answer] if is_messages(answer) else answer
      prompt, completion = prompt[:first], whole[first:]
  return prompt, [completion]


def _split_prompt(
  chosen: Any, rejected: Any, where: str, scored_turns: str
) -> tuple[Any, list[Any]]:
  """Finds the prompt that two transcripts share: see `parse_records`."""
  if is_messages(chosen) and is_messages(rejected):
    if not chosen or not rejected:
      raise Unusable("empty_response")
    at = (len(chosen) - 1, len(rejected) - 1)
    if scored_turns == "all":
      shared = next(
        (
          i
          for i, (a, b) in enumerate(zip(chosen, rejected, strict=False))
          if a != b
        ),
        min(at),
      )
      if is_answer(chosen[shared]) and is_answer(rejected[shared]):
        at = (shared, shared)
    if list(chosen[: at[0]]) != list(rejected[: at[1]]):
      raise Unusable("prompts_differ")
    if not at[0]:
      raise Unusable("empty_prompt")
    return chosen[: at[0]], [chosen[at[0] :], rejected[at[1] :]]
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
