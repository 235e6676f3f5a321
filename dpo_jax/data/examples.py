"""One record of any known format -> Example(prompt, responses, score)."""

from collections import Counter
from collections.abc import (
  Callable,
  Generator,
  Iterable,
  Iterator,
  Mapping,
  Sequence,
)
import itertools
from typing import Any

import numpy as np

from dpo_jax.data import messages as messages_lib
from dpo_jax.data import prompts
from dpo_jax.data.dialogues import Dialogue, Example, Render
from dpo_jax.data.messages import (
  Message,
  RecordError,
  Unusable,
  as_turns,
  is_answer,
  is_messages,
)
from dpo_jax.data.reading import Reading, Seen, Shaped, shape_records

_SMALLEST_MARGIN = 1e-6
# A store holds scores in float32, where larger ones would be infinite.
_LARGEST_SCORE = float(np.finfo(np.float32).max)


def parse_record(
  record: Mapping[str, Any],
  where: str,
  render: Render | None,
  reading: Reading | None = None,
) -> Example:
  """Reads one record of any of `formats.SHAPES`.

  Args:
    record: columns by name.
    where: file and line, for errors.
    render: the tokenizer's chat template, or None if it has none.
    reading: how records are read; the defaults unless given.

  Returns:
    The example, its responses best first.

  Raises:
    RecordError: columns missing or of the wrong type, or a chat template
      that fails.
    Unusable: a record that teaches nothing, such as responses without a shared
      prompt, or an answer of messages that is empty.
  """
  reading = reading or Reading()
  shaped = shape_records([(where, record)], reading, Seen())
  [example] = parse_records(shaped, render, reading.scored_turns, Counter())
  if not isinstance(example, Example):
    raise example
  return example


def parse_records(
  records: Iterable[Shaped | Unusable | RecordError],
  render: Render | None,
  scored_turns: str,
  counts: Counter[str],
  hide: Callable[[Any, str], Any] | None = None,
) -> Generator[Example | Unusable | RecordError, None, None]:
  """Reads records, rendering their conversations one after the other.

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
    records: results of `shape_records`.
    render: the tokenizer's chat template, or None if it has none.
    scored_turns: one of SCORED_TURNS.
    counts: counters that are increased: `prompts_repeated`, records whose
      responses repeat the prompt; `messages_cut`, prompts and responses that
      were cut to MAX_CHARS; `chosen_scores_lower`, pairs whose chosen response
      has the lower score.
    hide: hides what messages spell, see `Spellings.hide`; None hides nothing.

  Yields:
    For each record, in order, its example, responses best first, or its error.

  Raises:
    TimeoutError: rendering took too long; names the record.
  """
  parsed: list[Example | Unusable | RecordError | Dialogue] = []
  for record in records:
    if not isinstance(record, Shaped):
      parsed.append(record)
      continue
    try:
      found = _parse(record, render is not None, scored_turns, counts)
      if isinstance(found, Dialogue) and hide:
        found = found.hidden(hide)
      parsed.append(found)
    except (Unusable, RecordError) as fault:
      parsed.append(fault)
  dialogues = [one for one in parsed if isinstance(one, Dialogue)]
  requests = [request for one in dialogues for request in one.requests()]
  texts = render(requests) if requests and render else iter(())
  for one in parsed:
    if not isinstance(one, Dialogue):
      yield one
      continue
    own = _texts_of(one, texts)
    try:
      result: Example | RecordError = one.finish(own)
    except RecordError as error:
      result = error
    yield result
    for _ in own:  # those after an error
      pass


def _texts_of(
  dialogue: Dialogue, texts: Iterator[str | RecordError]
) -> Iterator[str | RecordError]:
  """Yields the texts of one dialogue from those of all.

  Args:
    dialogue: conversations that were rendered.
    texts: rendered texts from this dialogue on; as many are taken as the
      dialogue has requests.

  Raises:
    TimeoutError: rendering took too long; names the record.
  """
  try:
    yield from itertools.islice(texts, len(dialogue.requests()))
  except TimeoutError as error:
    raise TimeoutError(f"{dialogue.where}: {error}") from error


def _parse(
  record: Shaped, has_template: bool, scored_turns: str, counts: Counter[str]
) -> Example | Dialogue:
  where, columns = record.where, record.columns
  prompt, responses, score = _extract(record, scored_turns)
  if score[1:] and record.kind != "ranking" and score[0] < score[1]:
    counts["chosen_scores_lower"] += 1
  order = sorted(range(len(score)), key=lambda k: -score[k])
  if record.kind != "ranking":
    order = list(range(len(score)))
  # Stable, so that ties keep the order of the file.
  responses, score = [responses[k] for k in order], [score[k] for k in order]
  truncated = _truncated(columns, len(responses), where)
  if truncated:
    truncated = tuple(truncated[k] for k in order)
  prompt, responses = prompts.settle_prompt(
    prompt, responses, where, scored_turns, counts
  )
  if record.kind in ("demonstration", "conversation"):
    prompt, responses = prompts.score_whole(prompt, responses, scored_turns)
  prompts.check_inputs(record, prompt)
  prompt = prompts.with_system(prompt, record, has_template)
  if isinstance(prompt, str):
    messages_lib.check_unicode([prompt, *responses], where)
    return Example(prompt, tuple(responses), tuple(score), truncated=truncated)
  if not has_template:
    raise RecordError(
      f"{where}: the record holds messages, and this tokenizer has no chat"
      " template: set data.chat_template to one, or use plain text"
    )
  if not prompt:
    raise Unusable("empty_prompt")
  turns = [_read_turns(response, where) for response in responses]
  prompt, *turns = _cut(prompt, turns, counts)
  return Dialogue(
    prompt,
    turns,
    tuple(score),
    where,
    messages_lib.read_extras(columns, where),
    scored_turns,
    truncated,
  )


def _extract(
  record: Shaped, scored_turns: str
) -> tuple[Any, list[Any], list[float]]:
  """Returns prompt, responses and scores as the columns hold them.

  A pair has the chosen response first. Without scores in its columns it has
  the scores 1 and 0; unpaired feedback has its label, a demonstration 1. The
  response of a conversation is its last answer; later messages are left out.

  Raises:
    RecordError: a label, score or list of the wrong type.
    Unusable: a conversation without an answer, or transcripts that share no
      prompt.
  """
  where, columns, kind = record.where, record.columns, record.kind
  if kind == "pair":
    responses = [columns["chosen"], columns["rejected"]]
    return columns["prompt"], responses, _pair_score(columns, where)
  if kind == "transcripts":
    prompt, responses = prompts.split_transcripts(record, scored_turns)
    return prompt, responses, _pair_score(columns, where)
  if kind == "unpaired":
    label = columns["label"]
    if not isinstance(label, bool | int) or label not in (0, 1):
      raise RecordError(f"{where}: label={label!r} must be true or false")
    return columns["prompt"], [columns["completion"]], [float(label)]
  if kind == "ranking":
    score = _scores(columns["responses"], columns["scores"], where)
    return columns["prompt"], list(columns["responses"]), score
  if kind == "demonstration":
    return columns["prompt"], [columns["completion"]], [1.0]
  messages = columns["messages"]
  # Nothing after the last answer is ever scored.
  last = max((i for i, m in enumerate(messages) if is_answer(m)), default=-1)
  if last < 0:
    raise Unusable("empty_response")
  return messages[:last], [[messages[last]]], [1.0]


def _number(value: Any, name: str, where: str) -> float:
  is_number = isinstance(value, int | float) and not isinstance(value, bool)
  # NaN compares false. An integer may be larger than any float.
  if not is_number or not abs(value) <= _LARGEST_SCORE:
    raise RecordError(
      f"{where}: {name}={value!r:.80} must be a finite number, and at most"
      f" {_LARGEST_SCORE:.2e} in size, which float32 holds"
    )
  return float(value)


def _pair_score(record: Mapping[str, Any], where: str) -> list[float]:
  names = ("score_chosen", "score_rejected")
  found = [name for name in names if name in record]
  if not found and record.get("margin") is not None:
    return [_margin(record["margin"], where), 0.0]
  if not found:
    return [1.0, 0.0]
  if len(found) == 1:
    raise RecordError(
      f"{where}: {found[0]} stands without the other of {names}"
    )
  return [_number(record[name], name, where) for name in names]


def _margin(value: Any, where: str) -> float:
  """Reads the column `margin` as the score of the chosen response.

  The rejected one scores 0. A margin below 1e-6 becomes 1e-6, because equal
  scores would be a tie, and the pair does have an order.

  Raises:
    RecordError: a negative margin, or one that is not a finite number.
  """
  margin = _number(value, "margin", where)
  if margin < 0:
    raise RecordError(
      f"{where}: margin={value!r} must be at least 0: swap chosen and rejected"
    )
  return max(margin, _SMALLEST_MARGIN)


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
  """Returns whether each response was cut off, from the column `truncated`.

  Args:
    record: columns by name.
    num: number of responses.
    where: file and line, for errors.

  Returns:
    `num` flags in the record's order; None if no response was cut off.

  Raises:
    RecordError: not a boolean for each response.
  """
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


def _read_turns(response: Any, where: str) -> list[Message]:
  turns = as_turns(response)
  if not is_messages(turns):
    raise RecordError(
      f"{where}: a response must be text or a list of messages, and one is"
      f" {type(response).__name__}"
    )
  if len(turns) > 1 and not is_answer(turns[-1]):
    raise RecordError(
      f"{where}: the last message of a response has the role"
      f" {turns[-1]['role']!r}, and what is scored last is the assistant's:"
      " end the response there"
    )
  return list(turns)


def _cut(
  prompt: list[Message], responses: list[list[Message]], counts: Counter[str]
) -> list[list[Message]]:
  """Cuts messages to MAX_CHARS characters before they are rendered.

  A later cut to a number of tokens would remove more.

  Args:
    prompt: messages, cut at their start.
    responses: messages of each response, cut at their end.
    counts: `messages_cut` is increased by the number of those that were cut.

  Returns:
    The prompt, and then each response.
  """
  whole = [prompt, *responses]
  cut = [messages_lib.cut_start(prompt)]
  cut += [messages_lib.cut_end(turns) for turns in responses]
  counts["messages_cut"] += sum(a != b for a, b in zip(whole, cut, strict=True))
  return cut
