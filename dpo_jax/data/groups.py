"""Tokenizes records into groups, and reports what was dropped or cut."""

import array
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
import contextlib
import dataclasses
import functools
import hashlib
import logging
import math
from typing import Any

from dpo_jax.data.dialogues import Example
from dpo_jax.data.encoding import Response, encode
from dpo_jax.data.examples import parse_records
from dpo_jax.data.messages import RecordError, Unusable
from dpo_jax.data.reading import Reading, Seen, Shaped, shape_records
from dpo_jax.data.repeats import Repeats
from dpo_jax.data.sources import Source
from dpo_jax.data.tokenizers import Tokenizer
from dpo_jax.system import progress

_LOG = logging.getLogger(__name__)
# Records that are tokenized at once, and characters after which a chunk ends.
_CHUNK = 1000
_CHUNK_CHARS = 2**24
# Counts of a report that are 0 for flawless data.
COUNTS = (
  *("broken", "prompts_cut", "responses_cut", "messages_cut"),
  *("prompts_repeated", "special_tokens", "duplicates", "contradictions"),
  *("ties", "chosen_scores_lower"),
)


@dataclasses.dataclass(frozen=True)
class Limits:
  """Maximum lengths of a prompt and its response, in tokens.

  Attributes:
    max_tokens: prompt and one response together, BOS and EOS included.
    max_prompt_tokens: tokens that a prompt keeps at least, counted from its
      end, if it and its longest response do not fit together; more if that
      leaves room. A prompt that leaves its responses room is not cut.

  Raises:
    ValueError: max_prompt_tokens not above 0 and below max_tokens.
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
  """Groups of token ids, concatenated.

  Attributes:
    tokens: i32, every group's prompt and then its responses.
    scored: a byte for each token, 1 if it is scored; empty if all tokens of
      responses are.
    lengths: for each group, tokens of the prompt and of each response.
    scores: for each group, a score for each response.
    hashes: 32 bits of a hash of each prompt's text before any cut.
    records: number of each group's record in the source, from 0.
    report: counts; see `tokenize`.
  """

  tokens: array.array
  scored: bytearray
  lengths: list[list[int]]
  scores: list[tuple[float, ...]]
  hashes: list[int]
  records: list[int]
  report: dict[str, Any]


def tokenize(
  source: Source,
  tokenizer: Tokenizer,
  limits: Limits,
  reading: Reading,
  *,
  template_timeout_s: float = math.inf,
) -> Groups:
  """Tokenizes all records of a source into groups.

  The report of the result has these entries:

  * records, and how many have each of `shapes`; `unread` columns; `groups`;
  * dropped: records that teach nothing, by reason; broken: those left out;
  * prompts_cut, responses_cut: to fit the limits; messages_cut: before that;
  * prompts_repeated: records whose responses repeated the prompt;
  * special_tokens: groups whose text spells one, which is read as letters;
  * duplicates, contradictions: see `Repeats`;
  * ties: groups whose responses score the same; chosen_scores_lower: pairs.

  Args:
    source: records.
    tokenizer: encodes texts.
    limits: maximum lengths.
    reading: how records are read.
    template_timeout_s: seconds that a chat template may take for 1,000 records.

  Raises:
    RecordError: more broken records than `reading` allows.
    TimeoutError: a chat template that takes too long; names the record.
    ValueError: no usable group, or no special tokens where they are read.
  """
  reads_tokens = reading.special_tokens == "read"
  if reads_tokens and not tokenizer.spellings.tokens:
    raise ValueError(
      "data.special_tokens='read': this tokenizer has no special tokens"
    )
  render = None
  if tokenizer.has_chat_template:
    render = functools.partial(
      tokenizer.render_batch, timeout_s=template_timeout_s
    )
  hide = None if reads_tokens else tokenizer.spellings.hide
  collected = _Collected(tokenizer, reading, seen=Seen())
  # One iterator: a second one over the progress bar would end the data early.
  records = progress.track(
    iter(source), "tokenizing", total=None, unit="records"
  )
  for chunk in _chunks(shape_records(records, reading, collected.seen)):
    parsed = parse_records(
      chunk, render, reading.scored_turns, collected.counts, hide
    )
    with contextlib.closing(parsed):  # ends the renders at an error
      found = [
        (shaped.number, example)
        for shaped, result in zip(chunk, parsed, strict=True)
        for example in collected.usable(result)
      ]
    encoded = encode([e for _, e in found], tokenizer, reads_tokens)
    for (number, example), (prompt, responses) in zip(
      found, encoded, strict=True
    ):
      try:
        prompt, responses = _fit(
          prompt, responses, limits, collected.counts, tokenizer
        )
      except Unusable as unusable:
        collected.dropped[unusable.reason] += 1
      else:
        collected.add(example, prompt, responses)
        collected.records.append(number)
  return collected.groups(source.spec)


@dataclasses.dataclass
class _Collected:
  """Groups read so far, and counts of what was not used.

  Attributes:
    tokenizer: encodes texts.
    reading: how records are read.
    seen: notes on the records.
    counts: entries of the report.
    dropped: records that teach nothing, by reason.
    repeats: groups that repeat another.
    tokens, scored, lengths, scores, hashes, records: see `Groups`.
  """

  tokenizer: Tokenizer
  reading: Reading
  seen: Seen
  counts: Counter[str] = dataclasses.field(default_factory=Counter)
  dropped: Counter[str] = dataclasses.field(default_factory=Counter)
  repeats: Repeats = dataclasses.field(default_factory=Repeats)
  tokens: array.array = dataclasses.field(
    default_factory=lambda: array.array("i")
  )
  scored: bytearray = dataclasses.field(default_factory=bytearray)
  lengths: list[list[int]] = dataclasses.field(default_factory=list)
  scores: list[tuple[float, ...]] = dataclasses.field(default_factory=list)
  hashes: list[int] = dataclasses.field(default_factory=list)
  records: list[int] = dataclasses.field(default_factory=list)

  def usable(
    self, result: Example | Unusable | RecordError
  ) -> Iterator[Example]:
    """Yields the example of a record, or counts why it has none.

    A broken record is also logged, and one without an example is left out.

    Args:
      result: example or error of one record.

    Raises:
      RecordError: more broken records than `reading` allows.
    """
    if isinstance(result, RecordError):
      self.counts["broken"] += 1
      if self.counts["broken"] > self.reading.max_broken_records:
        raise result
      _LOG.warning("left out: %s", result)
    elif isinstance(result, Unusable):
      self.dropped[result.reason] += 1
    elif any(not response.strip() for response in result.responses):
      self.dropped["empty_response"] += 1
    else:
      yield result

  def add(
    self, example: Example, prompt: list[int], responses: list[Response]
  ) -> None:
    """Adds a group, and counts it if it is tied or spells special tokens.

    The caller adds the number of its record to `records`.

    Args:
      example: texts and scores of the group.
      prompt: ids of the prompt.
      responses: ids of the responses.
    """
    self.repeats.add(example)
    if self.reading.special_tokens != "read":
      self.counts["special_tokens"] += any(
        self.tokenizer.spellings.is_spelled_in(
          text, is_rendered=example.is_rendered
        )
        for text in (example.prompt, *example.responses)
      )
    num_scores = len(set(example.score))
    self.counts["ties"] += num_scores < min(len(example.score), 2)
    self.tokens.extend(prompt)
    self.scored += bytes(len(prompt))
    for response in responses:
      self.tokens.extend(response.ids)
      self.scored += response.scored
    self.lengths.append([len(prompt), *(len(r.ids) for r in responses)])
    self.scores.append(example.score)
    self.hashes.append(_hash(example.prompt))

  def groups(self, spec: str) -> Groups:
    """Returns the groups with their report; see `tokenize`.

    Args:
      spec: spelling of the source.

    Raises:
      ValueError: no group.
    """
    counts = self.counts + Counter(self.repeats.count())
    report = {
      "source": spec,
      "records": self.seen.records,
      "groups": len(self.lengths),
      "dropped": dict(sorted(self.dropped.items())),
      **{name: counts[name] for name in COUNTS},
      "shapes": dict(sorted(self.seen.shapes.items())),
      "unread": sorted(self.seen.unread),
    }
    if not self.lengths:
      raise ValueError(
        f"{spec} holds no usable group: {self.seen.records} records read,"
        f" dropped: {report['dropped']}, broken: {counts['broken']}"
      )
    scored = self.scored
    if sum(scored) == sum(sum(length[1:]) for length in self.lengths):
      scored = bytearray()
    return Groups(
      self.tokens,
      scored,
      self.lengths,
      self.scores,
      self.hashes,
      self.records,
      report,
    )


def _hash(prompt: str) -> int:
  return int.from_bytes(hashlib.sha256(prompt.encode()).digest()[:4], "big")


def _chunks(items: Iterable[Any]) -> Iterator[list[Any]]:
  chunk, num_chars = [], 0
  for item in items:
    chunk.append(item)
    if isinstance(item, Shaped):
      num_chars += _num_chars(item.columns)
    if len(chunk) == _CHUNK or num_chars >= _CHUNK_CHARS:
      yield chunk
      chunk, num_chars = [], 0
  if chunk:
    yield chunk


def _num_chars(value: Any) -> int:
  """Counts the characters of all texts in a column, or in several."""
  if isinstance(value, Mapping):
    value = list(value.values())
  if isinstance(value, list | tuple):
    return sum(map(_num_chars, value))
  return len(value) if isinstance(value, str) else 0


def _fit(
  prompt: list[int],
  responses: list[Response],
  limits: Limits,
  counts: Counter[str],
  tokenizer: Tokenizer,
) -> tuple[list[int], list[Response]]:
  """Cuts the start of a prompt, then the ends of responses, to fit the limits.

  Args:
    prompt: ids; a BOS at its start is kept.
    responses: responses of the group.
    limits: maximum lengths.
    counts: `prompts_cut` and `responses_cut` are increased.
    tokenizer: its stop ids alone are an empty response.

  Returns:
    Prompt and responses.

  Raises:
    Unusable: an empty prompt or response, a response with no scored token
      left, or several responses that are all equal.
  """
  if not prompt:
    raise Unusable("empty_prompt")
  # Text without tokens in the tokenizer becomes an EOS alone, or nothing.
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
