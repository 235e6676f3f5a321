"""Tokenize once: a content-addressed store of token ids with their lengths.

The folder's name is a digest of everything that decides its content, so a
store is never stale and runs that share data share it.
"""

import array
from collections import Counter
from collections.abc import Iterator, Sequence
import dataclasses
import functools
import hashlib
import itertools
import json
import os
import shutil
import tempfile
from typing import Any, NamedTuple

import numpy as np

from dpo_jax import progress
from dpo_jax.data.dialogues import SCORED_TURNS, Example, Unusable
from dpo_jax.data.examples import parse_records
from dpo_jax.data.sources import Record, Source
from dpo_jax.data.tokenizers import Tokenizer

FORMAT = 5  # raise it when the same input would give other arrays
_CHUNK = 1000
_ARRAYS = ("tokens", "starts", "lengths", "score", "prompt_hashes")


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
class Store:
  """Token ids of N groups of up to K responses.

  Attributes:
    tokens: i32 [total], every group's prompt and then its responses.
    starts: i64 [N, 1 + K], where each part starts in `tokens`.
    lengths: i32 [N, 1 + K], tokens of the prompt and of each response; 0
      where there is no response.
    score: f32 [N, K].
    digest: of the content.
    report: counts of what was read, dropped and cut.
    prompt_hashes: u32 [N], of each prompt's text before anything was cut;
      None for groups that are not split.
    scored: bool [total], which of `tokens` are scored; None where all tokens
      of responses are.
  """

  tokens: np.ndarray
  starts: np.ndarray
  lengths: np.ndarray
  score: np.ndarray
  digest: str
  report: dict[str, Any]
  prompt_hashes: np.ndarray | None = None
  scored: np.ndarray | None = None

  @classmethod
  def from_groups(
    cls,
    groups: Sequence[Sequence[np.ndarray]],
    score: np.ndarray,
    *,
    digest: str = "in memory",
  ) -> "Store":
    """Makes a store of ids that are in memory.

    Args:
      groups: N times a prompt and its K responses, i32 ids; an empty array
        where there is no response.
      score: f32 [N, K].
      digest: names the content where log-probs of it are cached.
    """
    lengths = np.array([[len(p) for p in g] for g in groups], np.int32)
    tokens = np.concatenate([part for group in groups for part in group])
    return cls(
      tokens=tokens.astype(np.int32, copy=False),
      starts=part_starts(lengths),
      lengths=lengths,
      score=np.asarray(score, np.float32),
      digest=digest,
      report={},
    )

  def __len__(self) -> int:
    return len(self.starts)

  @property
  def num_slots(self) -> int:
    return self.score.shape[1]

  def group(self, index: int) -> list[np.ndarray]:
    """Prompt and responses of a group: K + 1 arrays of ids, i32."""
    parts = zip(self.starts[index], self.lengths[index], strict=True)
    return [self.tokens[start : start + length] for start, length in parts]

  @functools.cached_property
  def num_scored(self) -> np.ndarray:
    """i32 [N, K], scored tokens of each response."""
    if self.scored is None:
      return self.lengths[:, 1:]
    starts, lengths = self.starts[:, 1:], self.lengths[:, 1:]
    # Sums from each start to each end; one more byte for the last end.
    borders = np.stack([starts, starts + lengths], -1).reshape(-1)
    padded = np.append(self.scored, False).view(np.uint8)
    sums = np.add.reduceat(padded, borders, dtype=np.int32)[::2]
    return np.where(lengths > 0, sums.reshape(lengths.shape), 0)

  def masks(self, index: int) -> list[np.ndarray]:
    """Which tokens of a group's K responses are scored, bool."""
    parts = zip(self.starts[index, 1:], self.lengths[index, 1:], strict=True)
    if self.scored is None:
      return [np.ones(length, bool) for _, length in parts]
    return [self.scored[start : start + length] for start, length in parts]

  def first_slots(self, num_slots: int) -> "Store":
    """The same groups with their first responses only."""
    if num_slots >= self.num_slots:
      return self
    return dataclasses.replace(
      self,
      starts=self.starts[:, : 1 + num_slots],
      lengths=self.lengths[:, : 1 + num_slots],
      score=self.score[:, :num_slots],
      digest=f"{self.digest}/first_{num_slots}",
    )

  def tied_pairs(self) -> np.ndarray:
    """bool [N], whether a group is a pair whose responses score the same."""
    is_pair = (self.lengths[:, 1:3] > 0).all(1)
    return is_pair & (self.score[:, 0] == self.score[:, 1])

  def split_pairs(self) -> "Store":
    """Every pair as two groups of one response: label 1 chosen, 0 rejected.

    A group of one response keeps its label, and the group beside it is empty.
    """

    def apart(x: np.ndarray) -> np.ndarray:
      # [N, 1 + 2] -> [2 N, 1 + 1]: each response behind the pair's prompt.
      return np.stack([x[:, [0, 1]], x[:, [0, 2]]], 1).reshape(-1, 2)

    hashes = self.prompt_hashes
    is_pair = self.lengths[:, 2:] > 0
    score = np.where(is_pair, np.float32([[1.0, 0.0]]), self.score)
    return dataclasses.replace(
      self,
      starts=apart(self.starts),
      lengths=apart(self.lengths),
      score=score.reshape(-1, 1),
      digest=f"{self.digest}/split_pairs",
      prompt_hashes=None if hashes is None else np.repeat(hashes, 2),
    )

  def split(self, eval_fraction: float) -> tuple[np.ndarray, np.ndarray]:
    """Indices of training and held-out groups.

    A group's side is decided by a hash of its prompt, so a prompt is never on
    both, and stays where it is when other data are added.
    """
    if not 0.0 <= eval_fraction < 1.0:
      raise ValueError(f"data.eval_fraction={eval_fraction} must be in [0, 1)")
    threshold = int(eval_fraction * 2**32)
    is_eval = self.prompt_hashes < threshold
    return np.flatnonzero(~is_eval), np.flatnonzero(is_eval)


def build_store(
  source: Source,
  tokenizer: Tokenizer,
  limits: Limits,
  cache_dir: str,
  scored_turns: str = "last",
) -> Store:
  """Opens the store of this data, tokenizing it first if it is not there.

  Args:
    source: records.
    tokenizer: ids.
    limits: lengths.
    cache_dir: folder of stores.
    scored_turns: one of SCORED_TURNS; see `examples.parse_records`.

  Returns:
    The store, its arrays mapped from disk.

  Raises:
    RecordError: a broken record, with its file and line.
    ValueError: no usable group; says what became of the records.
  """
  if scored_turns not in SCORED_TURNS:
    raise ValueError(
      f"data.scored_turns={scored_turns!r} must be one of"
      f" {', '.join(SCORED_TURNS)}"
    )
  key = [FORMAT, source.digest, tokenizer.digest, dataclasses.astuple(limits)]
  key += [scored_turns]
  digest = hashlib.sha256(json.dumps(key).encode()).hexdigest()[:32]
  folder = os.path.join(cache_dir, digest)
  if not os.path.exists(folder):
    parsed = _tokenize(source, tokenizer, limits, scored_turns)
    _write(*parsed, cache_dir, folder)
  with open(os.path.join(folder, "report.json"), encoding="utf-8") as file:
    # The same content may have been read from another place.
    report = json.load(file) | {
      "source": source.spec,
      "content": source.digest,
    }
  arrays = {
    # A plain view of the mapped file: slices of a memmap are slow to make.
    name: np.load(os.path.join(folder, f"{name}.npy"), mmap_mode="r").view(
      np.ndarray
    )
    for name in (*_ARRAYS, "scored")
    if name in _ARRAYS or os.path.exists(os.path.join(folder, f"{name}.npy"))
  }
  return Store(**arrays, digest=digest, report=report)


def part_starts(lengths: np.ndarray) -> np.ndarray:
  """Where parts start that lie end to end: [N, P] lengths -> i64 [N, P]."""
  ends = np.cumsum(lengths, dtype=np.int64).reshape(lengths.shape)
  return ends - lengths


def _write(
  tokens: array.array,
  scored: bytearray,
  lengths: list[list[int]],
  scores: list[tuple[float, ...]],
  hashes: list[int],
  report: dict[str, Any],
  cache_dir: str,
  folder: str,
) -> None:
  """Writes beside the final place, then renames: no half store is seen."""
  num_slots = max(len(score) for score in scores)
  padded_lengths = np.zeros((len(lengths), 1 + num_slots), np.int32)
  padded_score = np.zeros((len(lengths), num_slots), np.float32)
  for row, (length, score) in enumerate(zip(lengths, scores, strict=True)):
    padded_lengths[row, : len(length)] = length
    padded_score[row, : len(score)] = score
  os.makedirs(cache_dir, exist_ok=True)
  arrays = {
    "tokens": np.frombuffer(tokens, np.int32),
    "starts": part_starts(padded_lengths),
    "lengths": padded_lengths,
    "score": padded_score,
    "prompt_hashes": np.array(hashes, np.uint32),
  }
  if len(scored):
    arrays["scored"] = np.frombuffer(scored, bool)
  temporary = tempfile.mkdtemp(dir=cache_dir, prefix="writing_")
  try:
    for name, value in arrays.items():
      np.save(os.path.join(temporary, f"{name}.npy"), value)
    with open(
      os.path.join(temporary, "report.json"), "w", encoding="utf-8"
    ) as file:
      json.dump(report, file, indent=2)
    # Where another process was faster, its folder has the same content.
    if not os.path.exists(folder):
      os.replace(temporary, folder)
  except OSError:
    if not os.path.exists(folder):
      raise
  finally:
    shutil.rmtree(temporary, ignore_errors=True)


def _tokenize(
  source: Source, tokenizer: Tokenizer, limits: Limits, scored_turns: str
) -> Any:
  """What `_write` writes; no scored mask where every response is scored."""
  counts: Counter[str] = Counter()
  dropped: Counter[str] = Counter()
  tokens, scored = array.array("i"), bytearray()
  lengths, scores, hashes = [], [], []
  render = tokenizer.render_batch if tokenizer.has_chat_template else None
  # One iterator, made once: `_chunks` would start a list again.
  records = progress.track(
    iter(source), "tokenizing", total=None, unit="records"
  )
  for chunk in _chunks(records):
    counts["records"] += len(chunk)
    examples = []
    for example in parse_records(chunk, render, scored_turns):
      if isinstance(example, Unusable):
        dropped[example.reason] += 1
      elif any(not response.strip() for response in example.responses):
        dropped["empty_response"] += 1
      else:
        examples.append(example)
    for example, (prompt, responses) in zip(
      examples, _encode(examples, tokenizer), strict=True
    ):
      try:
        prompt, responses = _fit(prompt, responses, limits, counts, tokenizer)
      except Unusable as unusable:
        dropped[unusable.reason] += 1
        continue
      tokens.extend(prompt)
      scored += bytes(len(prompt))
      for response in responses:
        tokens.extend(response.ids)
        scored += response.scored
      lengths.append([len(prompt), *(len(r.ids) for r in responses)])
      scores.append(example.score)
      hashes.append(_hash(example.prompt))
  report = {
    "source": source.spec,
    "records": counts["records"],
    "groups": len(lengths),
    "dropped": dict(sorted(dropped.items())),
    "prompts_cut": counts["prompts_cut"],
    "responses_cut": counts["responses_cut"],
  }
  if not lengths:
    raise ValueError(
      f"{source.spec} holds no usable group: {counts['records']} records read,"
      f" dropped: {report['dropped']}"
    )
  if sum(scored) == sum(sum(length[1:]) for length in lengths):
    scored = bytearray()
  return tokens, scored, lengths, scores, hashes, report


def _hash(prompt: str) -> int:
  return int.from_bytes(hashlib.sha256(prompt.encode()).digest()[:4], "big")


def _chunks(records: Iterator[Record]) -> Iterator[list[Record]]:
  while chunk := list(itertools.islice(records, _CHUNK)):
    yield chunk


class _Response(NamedTuple):
  """Ids of a response, EOS included unless it was cut off, and a byte for
  each: 1 if scored."""

  ids: list[int]
  scored: bytes

  def first(self, count: int) -> "_Response":
    return _Response(self.ids[:count], self.scored[:count])


def _encode(
  examples: list[Example], tokenizer: Tokenizer
) -> list[tuple[list[int], list[_Response]]]:
  """Ids of the prompt, BOS included, and of the responses, EOS included
  unless they are truncated.

  A response of several turns is encoded turn by turn, as its turns would be
  sampled: no token straddles a border there either.
  """
  encoded: list[Any] = [None] * len(examples)
  for is_rendered in (False, True):
    chosen = [i for i, e in enumerate(examples) if e.is_rendered == is_rendered]
    prompts = tokenizer.encode(
      [examples[i].prompt for i in chosen],
      is_rendered=is_rendered,
      is_continuation=False,
    )
    pieces = [_pieces(examples[i]) for i in chosen]
    ids = iter(
      tokenizer.encode(
        [text for group in pieces for parts in group for text, _ in parts],
        is_rendered=is_rendered,
        is_continuation=True,
      )
    )
    ends = tokenizer.stop_ids if is_rendered else (tokenizer.eos_id,)
    for i, prompt, group in zip(chosen, prompts, pieces, strict=True):
      truncated = examples[i].truncated or [False] * len(group)
      whole = [not cut for cut in truncated]
      encoded[i] = (
        _with_bos(prompt, tokenizer),
        [
          _join([(next(ids), flag) for _, flag in parts], ends, is_whole)
          for parts, is_whole in zip(group, whole, strict=True)
        ],
      )
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
  parts: list[tuple[list[int], bool]], ends: Sequence[int], is_whole: bool
) -> _Response:
  """A response of pieces, each ended once, by the first of its `ends`.

  A chat template may have ended a turn already, and put a line break behind,
  which nobody will ever sample. In plain text no such id can occur.

  Args:
    parts: ids of the pieces, and whether they are scored.
    ends: ids that end a turn; the first is put where none does.
    is_whole: whether the last piece ends, or its sampler cut it off.
  """
  ids, scored = [], b""
  for j, (piece, is_scored) in enumerate(parts):
    is_last = j + 1 == len(parts)
    end = min((piece.index(i) + 1 for i in ends if i in piece), default=None)
    if is_last and is_whole:
      piece = [*piece, ends[0]] if end is None else piece[:end]
    elif is_last and end is not None:  # by a template that ends every turn
      piece = piece[: end - 1]
    length = len(piece) if end is None or is_last else end
    ids += piece
    scored += bytes([is_scored]) * length
    scored += bytes(len(piece) - length)
  return _Response(ids, scored)


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
  # Of several turns, those that are scored may all stand behind the cut.
  if not all(any(response.scored) for response in responses):
    raise Unusable("no_scored_turn_fits")
  if len(responses) > 1 and all(r == responses[0] for r in responses):
    raise Unusable("identical_responses")
  return prompt, responses
