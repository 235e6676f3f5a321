"""Records -> groups of token ids, and a report of what became of them."""

import array
from collections import Counter
from collections.abc import Iterator
import dataclasses
import hashlib
import itertools
import logging
from typing import Any, NamedTuple

from dpo_jax.data.dialogues import Example
from dpo_jax.data.examples import parse_records
from dpo_jax.data.messages import RecordError, Unusable
from dpo_jax.data.reading import Reading, Seen, shape_records
from dpo_jax.data.repeats import Repeats
from dpo_jax.data.sources import Source
from dpo_jax.data.tokenizers import Tokenizer
from dpo_jax.system import progress

_LOG = logging.getLogger(__name__)
_CHUNK = 1000
# Counts of a report that are above 0 where something is amiss.
COUNTS = (
  *("broken", "prompts_cut", "responses_cut", "messages_cut"),
  *("prompts_repeated", "special_tokens", "duplicates", "contradictions"),
  *("ties", "chosen_scores_lower"),
)


@dataclasses.dataclass(frozen=True)
class Limits:
  """How long a prompt and its response may be, in tokens.

  Attributes:
    max_tokens: prompt and one response together, BOS and EOS included.
    max_prompt_tokens: what a prompt keeps, counted from its end, where prompt
      and response do not fit together. A prompt that leaves its responses
      room is not cut.
  """

  max_tokens: int
  max_prompt_tokens: int

  def __post_init__(self):
    if not 0 < self.max_prompt_tokens < self.max_tokens:
      raise ValueError(
        f"data.max_prompt_tokens={self.max_prompt_tokens} must be above 0 and"
        f" below data.max_tokens={self.max_tokens}"
      )


@dataclasses.dataclass(frozen=True)
class Groups:
  """Groups of ids, end to end.

  Attributes:
    tokens: i32, every group's prompt and then its responses.
    scored: a byte for each token, 1 if it is scored; empty where all tokens
      of responses are.
    lengths: of each group, tokens of the prompt and of each response.
    scores: of each group, a score for each response.
    hashes: 32 bits of each prompt's text before anything was cut.
    report: counts; see `tokenize`.
  """

  tokens: array.array
  scored: bytearray
  lengths: list[list[int]]
  scores: list[tuple[float, ...]]
  hashes: list[int]
  report: dict[str, Any]


def tokenize(
  source: Source, tokenizer: Tokenizer, limits: Limits, reading: Reading
) -> Groups:
  """Reads a source whole.

  The report says of the source:

  * records, and how many have each of `shapes`; `unread` columns; `groups`;
  * dropped: records that teach nothing, by reason; broken: those left out;
  * prompts_cut, responses_cut: to fit the limits; messages_cut: before that;
  * prompts_repeated: records whose responses held the prompt again;
  * special_tokens: groups with a special token that is spelled, as letters;
  * duplicates, contradictions: see `Repeats`;
  * ties: groups whose responses score the same; chosen_scores_lower: pairs.

  Args:
    source: records.
    tokenizer: ids.
    limits: lengths.
    reading: how records are read.

  Raises:
    RecordError: one more broken record than `reading` allows.
    ValueError: no usable group; says what became of the records.
  """
  counts: Counter[str] = Counter()
  dropped: Counter[str] = Counter()
  seen, repeats = Seen(), Repeats()
  tokens, scored = array.array("i"), bytearray()
  lengths, scores, hashes = [], [], []
  render = tokenizer.render_batch if tokenizer.has_chat_template else None
  reads_tokens = reading.special_tokens == "read"
  if reads_tokens and not tokenizer.spellings.tokens:
    raise ValueError(
      "data.special_tokens='read': this tokenizer has no special tokens"
    )
  hide = None if reads_tokens else tokenizer.spellings.hide
  # One iterator, made once: a new one over the bar would end the data early.
  records = progress.track(
    iter(source), "tokenizing", total=None, unit="records"
  )
  shaped = shape_records(records, reading, seen)
  for chunk in _chunks(shaped):
    examples = []
    for example in parse_records(
      chunk, render, reading.scored_turns, counts, hide
    ):
      if isinstance(example, RecordError):
        counts["broken"] += 1
        if counts["broken"] > reading.max_broken_records:
          raise example
        _LOG.warning("left out: %s", example)
      elif isinstance(example, Unusable):
        dropped[example.reason] += 1
      elif any(not response.strip() for response in example.responses):
        dropped["empty_response"] += 1
      else:
        examples.append(example)
    for example, (prompt, responses) in zip(
      examples, _encode(examples, tokenizer, reads_tokens), strict=True
    ):
      try:
        prompt, responses = _fit(prompt, responses, limits, counts, tokenizer)
      except Unusable as unusable:
        dropped[unusable.reason] += 1
        continue
      repeats.add(example)
      counts["special_tokens"] += not reads_tokens and any(
        tokenizer.spellings.is_spelled_in(t, is_rendered=example.is_rendered)
        for t in (example.prompt, *example.responses)
      )
      counts["ties"] += len(set(example.score)) < min(len(example.score), 2)
      tokens.extend(prompt)
      scored += bytes(len(prompt))
      for response in responses:
        tokens.extend(response.ids)
        scored += response.scored
      lengths.append([len(prompt), *(len(r.ids) for r in responses)])
      scores.append(example.score)
      hashes.append(_hash(example.prompt))
  counts.update(repeats.count())
  report = {
    "source": source.spec,
    "records": seen.records,
    "groups": len(lengths),
    "dropped": dict(sorted(dropped.items())),
    **{name: counts[name] for name in COUNTS},
    "shapes": dict(sorted(seen.shapes.items())),
    "unread": sorted(seen.unread),
  }
  if not lengths:
    raise ValueError(
      f"{source.spec} holds no usable group: {seen.records} records read,"
      f" dropped: {report['dropped']}, broken: {counts['broken']}"
    )
  if sum(scored) == sum(sum(length[1:]) for length in lengths):
    scored = bytearray()
  return Groups(tokens, scored, lengths, scores, hashes, report)


def _hash(prompt: str) -> int:
  return int.from_bytes(hashlib.sha256(prompt.encode()).digest()[:4], "big")


def _chunks(items: Iterator[Any]) -> Iterator[list[Any]]:
  while chunk := list(itertools.islice(items, _CHUNK)):
    yield chunk


class _Response(NamedTuple):
  """Ids of a response, EOS included unless it was cut off, and a byte for
  each: 1 if scored."""

  ids: list[int]
  scored: bytes

  def first(self, count: int) -> "_Response":
    return _Response(self.ids[:count], self.scored[:count])


def _encode(
  examples: list[Example], tokenizer: Tokenizer, reads_tokens: bool
) -> list[tuple[list[int], list[_Response]]]:
  """Encodes prompts, with their BOS, and responses, with their EOS.

  A response that is truncated gets no EOS. A response of several turns is
  encoded turn by turn, as its turns would be sampled: no token straddles a
  border there either.

  Args:
    examples: texts.
    tokenizer: ids.
    reads_tokens: whether special tokens that plain text spells are meant.
  """
  encoded: list[Any] = [None] * len(examples)
  for is_rendered in (False, True):
    chosen = [i for i, e in enumerate(examples) if e.is_rendered == is_rendered]
    has_tokens = is_rendered or reads_tokens
    prompts = tokenizer.encode(
      [examples[i].prompt for i in chosen],
      is_rendered=has_tokens,
      is_continuation=False,
    )
    pieces = [_pieces(examples[i]) for i in chosen]
    ids = iter(
      tokenizer.encode(
        [text for group in pieces for parts in group for text, _ in parts],
        is_rendered=has_tokens,
        is_continuation=True,
      )
    )
    for i, prompt, group in zip(chosen, prompts, pieces, strict=True):
      truncated = examples[i].truncated or [False] * len(group)
      responses = []
      for parts, is_cut in zip(group, truncated, strict=True):
        found = [(next(ids), flag) for _, flag in parts]
        responses.append(_join(found, tokenizer, has_tokens, not is_cut))
      encoded[i] = _with_bos(prompt, tokenizer), responses
  return encoded


def _pieces(example: Example) -> list[list[tuple[str, bool]]]:
  """Each response in pieces that are scored, or are only read."""
  if example.scored is None:
    return [[(text, True)] for text in example.responses]
  found = []
  for text, ranges in zip(example.responses, example.scored, strict=True):
    parts, at = [], 0
    for start, end in ranges:
      parts += [(text[at:start], False), (text[start:end], True)]
      at = end
    found.append([part for part in parts if any(part)])
  return found


def _join(
  parts: list[tuple[list[int], bool]],
  tokenizer: Tokenizer,
  has_tokens: bool,
  is_whole: bool,
) -> _Response:
  """Joins a response of pieces, each ended once.

  A chat template may have ended a turn already, and put a line break after it,
  which no policy samples.

  Args:
    parts: ids of the pieces, and whether they are scored.
    tokenizer: whose EOS ends a piece that has no end.
    has_tokens: whether the ids may hold special tokens.
    is_whole: whether the last piece ends, or its sampler cut it off.
  """
  ids, scored = [], b""
  for j, (piece, is_scored) in enumerate(parts):
    is_last = j + 1 == len(parts)
    end = _find_end(piece, tokenizer) if has_tokens else None
    if is_last and is_whole:
      piece = [*piece, tokenizer.eos_id] if end is None else piece[:end]
    elif is_last and end is not None:  # by a template that ends every turn
      piece = piece[: end - 1]
    length = len(piece) if end is None or is_last else end
    ids += piece
    scored += bytes([is_scored]) * length
    scored += bytes(len(piece) - length)
  return _Response(ids, scored)


def _find_end(ids: list[int], tokenizer: Tokenizer) -> int | None:
  """Finds where a turn ends: a stop id that no text follows.

  Returns:
    How many ids there are, with the stop id; None where no stop id ends it.
  """
  for i, token in enumerate(ids):
    if token in tokenizer.stop_ids and not tokenizer.decode(ids[i:]).strip():
      return i + 1
  return None


def _with_bos(prompt: list[int], tokenizer: Tokenizer) -> list[int]:
  if tokenizer.bos_id is None or prompt[:1] == [tokenizer.bos_id]:
    return prompt
  return [tokenizer.bos_id, *prompt]


def _fit(
  prompt: list[int],
  responses: list[_Response],
  limits: Limits,
  counts: Counter[str],
  tokenizer: Tokenizer,
) -> tuple[list[int], list[_Response]]:
  """Cuts a prompt's beginning, then responses' ends, where they do not fit."""
  if not prompt:
    raise Unusable("empty_prompt")
  # Text that the tokenizer has no tokens for leaves an EOS alone, or nothing.
  if any(set(r.ids) <= set(tokenizer.stop_ids) for r in responses):
    raise Unusable("empty_response")
  longest = max(len(response.ids) for response in responses)
  keep = max(limits.max_prompt_tokens, limits.max_tokens - longest)
  if len(prompt) > keep:
    counts["prompts_cut"] += 1
    start = prompt[:1] if prompt[0] == tokenizer.bos_id else []
    prompt = start + prompt[len(prompt) - keep + len(start) :]
  room = limits.max_tokens - len(prompt)
  counts["responses_cut"] += sum(len(r.ids) > room for r in responses)
  responses = [response.first(room) for response in responses]
  # Of several turns, the scored ones may all come after the cut.
  if not all(any(response.scored) for response in responses):
    raise Unusable("no_scored_turn_fits")
  if len(responses) > 1 and all(r == responses[0] for r in responses):
    raise Unusable("identical_responses")
  return prompt, responses
