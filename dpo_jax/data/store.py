"""Content-addressed store of token ids and lengths; data are tokenized once.

The folder's name is a digest of everything that decides its content. So a store
is never stale, and runs with the same data share it. Its files have checksums,
which are verified whenever it is opened.
"""

from collections.abc import Sequence
import dataclasses
import functools
import hashlib
import json
import logging
import math
import os
from typing import Any

import numpy as np

from dpo_jax.data import checksums, store_files
from dpo_jax.data.chain import Chain
from dpo_jax.data.formats import OPTIONAL
from dpo_jax.data.groups import Groups, Limits, tokenize
from dpo_jax.data.reading import Reading
from dpo_jax.data.sources import Source
from dpo_jax.data.tokenizers import Tokenizer
from dpo_jax.system import inputs

_LOG = logging.getLogger(__name__)

# Increase it when the same input gives other arrays or another report.
FORMAT = 6


@dataclasses.dataclass(frozen=True)
class Store:
  """Token ids of N groups of up to K responses.

  Attributes:
    tokens: i32 [total], every group's prompt and then its responses.
    starts: i64 [N, 1 + K], index in `tokens` at which each part starts.
    lengths: i32 [N, 1 + K], tokens of the prompt and of each response; 0 for an
      empty slot.
    score: f32 [N, K].
    digest: digest of the content.
    report: counts of records that were read, dropped and cut.
    prompt_hashes: u32 [N], hash of each prompt's text before any cut, or None.
    scored: bool [total], whether each token is scored; None: all of responses.
    records: int [N], number of each group's record over all sources, or None.
  """

  tokens: np.ndarray | Chain
  starts: np.ndarray
  lengths: np.ndarray
  score: np.ndarray
  digest: str
  report: dict[str, Any]
  prompt_hashes: np.ndarray | None = None
  scored: np.ndarray | None = None
  records: np.ndarray | None = None

  @classmethod
  def from_groups(
    cls,
    groups: Sequence[Sequence[np.ndarray]],
    score: np.ndarray,
    *,
    digest: str = "in memory",
  ) -> "Store":
    """Makes a store in memory.

    Args:
      groups: N lists of a prompt and its K responses, i32 ids; an empty array
        for an empty slot.
      score: f32 [N, K].
      digest: identifies the content in a cache of log-probs.
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

  @classmethod
  def join(cls, stores: Sequence["Store"]) -> "Store":
    """Concatenates stores of `build_store`, without reading their tokens.

    Groups with fewer slots get empty ones. The report has theirs in "sources".
    """
    num_slots = max(store.num_slots for store in stores)
    ends = np.cumsum([len(store.tokens) for store in stores])
    offsets = ends - [len(store.tokens) for store in stores]

    def fill(x: np.ndarray, width: int) -> np.ndarray:
      return np.pad(x, ((0, 0), (0, width - x.shape[1])))

    starts = [
      fill(s.starts + offset, 1 + num_slots)
      for s, offset in zip(stores, offsets, strict=True)
    ]
    scored = None
    if any(store.scored is not None for store in stores):
      scored = np.concatenate(
        [
          np.ones(len(s.tokens), bool) if s.scored is None else s.scored
          for s in stores
        ]
      )
    records = None
    if all(store.records is not None for store in stores):
      counts = [store.report["records"] for store in stores]
      before = np.cumsum([0, *counts[:-1]])
      records = np.concatenate(
        [s.records + n for s, n in zip(stores, before, strict=True)]
      )
    digests = "/".join(store.digest for store in stores)
    contents = "/".join(store.report["content"] for store in stores)
    return cls(
      tokens=Chain(tuple(store.tokens for store in stores), ends),
      starts=np.concatenate(starts),
      lengths=np.concatenate([fill(s.lengths, 1 + num_slots) for s in stores]),
      score=np.concatenate([fill(s.score, num_slots) for s in stores]),
      digest=hashlib.sha256(digests.encode()).hexdigest()[:32],
      report={
        "content": hashlib.sha256(contents.encode()).hexdigest(),
        "sources": [store.report for store in stores],
      },
      prompt_hashes=np.concatenate([s.prompt_hashes for s in stores]),
      scored=scored,
      records=records,
    )

  def __len__(self) -> int:
    return len(self.starts)

  @property
  def num_slots(self) -> int:
    return self.score.shape[1]

  def group(self, index: int) -> list[np.ndarray]:
    """Returns prompt and responses of a group: K + 1 arrays of ids, i32."""
    parts = zip(self.starts[index], self.lengths[index], strict=True)
    return [self.tokens[start : start + length] for start, length in parts]

  @functools.cached_property
  def num_scored(self) -> np.ndarray:
    """Number of scored tokens of each response: i32 [N, K]."""
    if self.scored is None:
      return self.lengths[:, 1:]
    starts, lengths = self.starts[:, 1:], self.lengths[:, 1:]
    # Sums from each start to each end; one more byte for the last end.
    borders = np.stack([starts, starts + lengths], -1).reshape(-1)
    padded = np.append(self.scored, False).view(np.uint8)
    sums = np.add.reduceat(padded, borders, dtype=np.int32)[::2]
    return np.where(lengths > 0, sums.reshape(lengths.shape), 0)

  def masks(self, index: int) -> list[np.ndarray]:
    """Returns masks of the scored tokens of a group's K responses, bool."""
    parts = zip(self.starts[index, 1:], self.lengths[index, 1:], strict=True)
    if self.scored is None:
      return [np.ones(length, bool) for _, length in parts]
    return [self.scored[start : start + length] for start, length in parts]

  def first_slots(self, num_slots: int) -> "Store":
    """Returns a store with the first `num_slots` responses of each group."""
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
    """Returns whether each group is a pair with equal scores: bool [N]."""
    is_pair = (self.lengths[:, 1:3] > 0).all(1)
    return is_pair & (self.score[:, 0] == self.score[:, 1])

  def split_pairs(self) -> "Store":
    """Splits group i of up to two responses into groups 2 i and 2 i + 1.

    The chosen response comes first, with the label 1; the rejected one gets 0.
    A group of one response keeps its label and gets an empty second group.
    """

    def split(x: np.ndarray) -> np.ndarray:
      # [N, 1 + 2] -> [2 N, 1 + 1]: each response after the prompt.
      return np.stack([x[:, [0, 1]], x[:, [0, 2]]], 1).reshape(-1, 2)

    def twice(x: np.ndarray | None) -> np.ndarray | None:
      return None if x is None else np.repeat(x, 2)

    is_pair = self.lengths[:, 2:] > 0
    score = np.where(is_pair, np.array([[1.0, 0.0]], np.float32), self.score)
    return dataclasses.replace(
      self,
      starts=split(self.starts),
      lengths=split(self.lengths),
      score=score.reshape(-1, 1),
      digest=f"{self.digest}/split_pairs",
      prompt_hashes=twice(self.prompt_hashes),
      records=twice(self.records),
    )

  def split(self, eval_fraction: float) -> tuple[np.ndarray, np.ndarray]:
    """Returns the indices of training and held-out groups.

    A hash of the prompt decides, so a prompt is never in both, and adding other
    data does not move it.
    """
    if not 0.0 <= eval_fraction < 1.0:
      raise ValueError(f"data.eval_fraction={eval_fraction} must be in [0, 1)")
    assert self.prompt_hashes is not None
    is_eval = self.prompt_hashes < int(eval_fraction * 2**32)
    return np.flatnonzero(~is_eval), np.flatnonzero(is_eval)


def build_store(
  source: Source,
  tokenizer: Tokenizer,
  limits: Limits,
  cache_dir: str,
  reading: Reading | None = None,
  *,
  template_timeout_s: float = math.inf,
) -> Store:
  """Opens the store of a source, and tokenizes it first if there is none.

  Args:
    source: records.
    tokenizer: encodes texts.
    limits: maximum lengths.
    cache_dir: folder of stores.
    reading: how records are read; the defaults unless given.
    template_timeout_s: see `groups.tokenize`.

  Returns:
    The store, its arrays mapped from disk.

  Raises:
    RecordError: more broken records than `reading` allows.
    TimeoutError: a chat template that takes too long; names the record.
    ValueError: no usable group, or a `cache_dir` that is not local.
    OSError: a `cache_dir` that cannot be written.
  """
  if inputs.is_remote(cache_dir):
    raise ValueError(
      f"data.cache_dir={cache_dir!r} must be a local folder: stores are"
      " mapped into memory"
    )
  reading = reading or Reading()
  key = [FORMAT, source.digest, tokenizer.digest, dataclasses.astuple(limits)]
  key += [dataclasses.astuple(reading)]
  digest = hashlib.sha256(json.dumps(key).encode()).hexdigest()[:32]
  folder = os.path.join(cache_dir, digest)
  store = _open_sound(folder, limits)
  if store is None:
    store_files.prepare(cache_dir)
    groups = tokenize(
      source, tokenizer, limits, reading, template_timeout_s=template_timeout_s
    )
    _write(groups, cache_dir, folder)
    store = _open(folder, limits)
  # The same content may have been read from another path.
  report = store.report | {"source": source.spec, "content": source.digest}
  return dataclasses.replace(store, digest=digest, report=report)


def _open_sound(folder: str, limits: Limits) -> Store | None:
  """Opens and checks a token store; None if it must be made again.

  An older version is deleted. A damaged store, or one with a length above
  `limits.max_tokens`, is renamed to FOLDER.damaged.

  Raises:
    OSError: the cache cannot be written.
  """
  if not os.path.lexists(folder):
    return None
  try:
    if checksums.exist(folder) or not os.path.isdir(folder):
      store = _open(folder, limits)
      if OPTIONAL.isdisjoint(store.report.get("unread", ())):
        return store  # otherwise columns that are read now were not
    _LOG.info("%s: a store of an older version; tokenizing again", folder)
    store_files.delete(folder)
  except FileNotFoundError:  # another process has moved it aside
    pass
  except checksums.DamagedError as error:
    aside = store_files.move_aside(folder)
    _LOG.warning(
      "the token store %s is not used: %s. Moved to %s; tokenizing again",
      folder,
      error,
      aside,
    )
  return None


def _open(folder: str, limits: Limits) -> Store:
  """Opens a store and verifies it; its digest is not set.

  Raises:
    DamagedError: a file differs from its checksums, or a value is impossible.
  """
  arrays, report = store_files.read(folder)
  store = Store(**arrays, digest="", report=report)
  _check_bounds(store, limits)
  return store


def _check_bounds(store: Store, limits: Limits) -> None:
  """Raises DamagedError for values that no tokenization gives.

  A single wrong length would otherwise allocate rows of a billion tokens.
  """
  shape, tokens = store.lengths.shape, np.asarray(store.tokens)
  if store.starts.shape != shape or store.score.shape != (
    shape[0],
    shape[1] - 1,
  ):
    raise checksums.DamagedError("its arrays have different numbers of groups")
  lengths = store.lengths.astype(np.int64)
  if (lengths < 0).any() or lengths.max(initial=0) > limits.max_tokens:
    raise checksums.DamagedError("a length is outside its limits")
  if (store.starts < 0).any() or (store.starts + lengths > len(tokens)).any():
    raise checksums.DamagedError("a part is outside the tokens")
  if len(tokens) and tokens.min() < 0:
    raise checksums.DamagedError("a token id is negative")
  if not np.isfinite(store.score).all():
    raise checksums.DamagedError("a score is not finite")


def part_starts(lengths: np.ndarray) -> np.ndarray:
  """Returns starts of parts of some lengths, over all rows: i64 [N, P]."""
  ends = np.cumsum(lengths, dtype=np.int64).reshape(lengths.shape)
  return ends - lengths


def _write(groups: Groups, cache_dir: str, folder: str) -> None:
  """Writes groups as a store; see `store_files.write`."""
  lengths, scores = groups.lengths, groups.scores
  num_slots = max(len(score) for score in scores)
  padded_lengths = np.zeros((len(lengths), 1 + num_slots), np.int32)
  padded_score = np.zeros((len(lengths), num_slots), np.float32)
  for row, (length, score) in enumerate(zip(lengths, scores, strict=True)):
    padded_lengths[row, : len(length)] = length
    padded_score[row, : len(score)] = score
  arrays = {
    "tokens": np.frombuffer(groups.tokens, np.int32),
    "starts": part_starts(padded_lengths),
    "lengths": padded_lengths,
    "score": padded_score,
    "prompt_hashes": np.array(groups.hashes, np.uint32),
    "records": np.array(groups.records, np.int32),
  }
  if len(groups.scored):
    arrays["scored"] = np.frombuffer(groups.scored, bool)
  store_files.write(cache_dir, folder, arrays, groups.report)
