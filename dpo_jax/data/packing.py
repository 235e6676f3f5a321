"""Groups -> rows.

A row of the default layout is [prompt | response_0 | response_1 | ...] of one
group, then the next group, then padding. The other layouts repeat the prompt
before every response, and may keep one group to a row; all give the same
numbers, which the tests hold them to.
"""

from collections.abc import Sequence
import dataclasses
import heapq
from typing import Any

import numpy as np

from dpo_jax.types import Batch

LAYOUTS = ("shared", "packed", "padded")
# Optional fields of Batch that mark scored tokens.
TOKEN_MASKS = ("head", "sampled")


@dataclasses.dataclass(frozen=True)
class RowShape:
  """Capacity of a row, fixed so that few shapes are compiled.

  Attributes:
    num_tokens: T.
    num_scored: S.
    num_groups: G.
    num_slots: K.
  """

  num_tokens: int
  num_scored: int
  num_groups: int
  num_slots: int


def group_tokens(lengths: np.ndarray, layout: str) -> np.ndarray:
  """Tokens that each group takes in a row.

  Args:
    lengths: i32 [N, 1 + K], prompt and responses; 0 for no response.
    layout: one of LAYOUTS.

  Returns:
    i64 [N].
  """
  responses = lengths[:, 1:]
  copies = 1 if layout == "shared" else (responses > 0).sum(1)
  return lengths[:, 0].astype(np.int64) * copies + responses.sum(1)


def assign_rows(
  num_tokens: np.ndarray,
  num_scored: np.ndarray,
  *,
  shape: RowShape,
  layout: str,
) -> list[list[int]]:
  """First-fit decreasing: which groups share a row.

  Args:
    num_tokens: i64 [B], tokens each group takes in a row.
    num_scored: i64 [B], scored tokens of each group.
    shape: capacity of a row.
    layout: one of LAYOUTS; "padded" gives every group a row.

  Returns:
    Rows of indices into the batch, as few as first fit finds.

  Raises:
    ValueError: a group that no row can hold.
  """
  too_long = (num_tokens > shape.num_tokens) | (num_scored > shape.num_scored)
  if too_long.any():
    worst = int(np.argmax(np.where(too_long, num_tokens, -1)))
    raise ValueError(
      f"a group takes {num_tokens[worst]} tokens, {num_scored[worst]} of them"
      f" scored, and a row holds {shape.num_tokens} and {shape.num_scored}:"
      " raise data.row_tokens, or lower data.max_tokens"
    )
  if layout == "padded":
    return [[i] for i in range(len(num_tokens))]
  rows: list[list[int]] = []
  # One line for each row: tokens, scored tokens and groups it can still take.
  room = np.zeros((len(num_tokens), 3), np.int64)
  for i in np.argsort(-num_tokens, kind="stable"):
    need = (num_tokens[i], num_scored[i], 1)
    fits = np.flatnonzero((room[: len(rows)] >= need).all(1))
    row = int(fits[0]) if len(fits) else len(rows)
    if row == len(rows):
      rows.append([])
      room[row] = (shape.num_tokens, shape.num_scored, shape.num_groups)
    rows[row].append(int(i))
    room[row] -= need
  return rows


def deal_rows(
  num_tokens: np.ndarray, num_rows: int, *, max_groups: int
) -> list[list[int]]:
  """Longest first, to the row that is shortest: rows of about equal length.

  Graham 1969: the fullest row is at most 4/3 of what it must be.

  Args:
    num_tokens: i64 [B], tokens each group takes in a row.
    num_rows: R.
    max_groups: of a row; R times it must be at least B.

  Returns:
    R rows of indices into the batch; some may be empty.
  """
  rows: list[list[int]] = [[] for _ in range(num_rows)]
  shortest = [(0, row) for row in range(num_rows)]  # a heap already
  for i in np.argsort(-num_tokens, kind="stable"):
    filled, row = heapq.heappop(shortest)
    rows[row].append(int(i))
    if len(rows[row]) < max_groups:  # else it takes no more
      heapq.heappush(shortest, (filled + int(num_tokens[i]), row))
  return rows


def fill_rows(
  rows: Sequence[Sequence[int]],
  groups: Sequence[Sequence[np.ndarray]],
  scores: np.ndarray,
  example_ids: np.ndarray,
  *,
  shape: RowShape,
  layout: str,
  ref_logps: np.ndarray | None,
  token_masks: frozenset[str] = frozenset(),
  scored: Sequence[Sequence[np.ndarray]] | None = None,
) -> Batch:
  """Writes groups into rows.

  Args:
    rows: indices into `groups` for each of R rows; a row may be empty.
    groups: prompt and responses of each group, i32 ids; a response without
      tokens is an empty slot.
    scores: f32 [B, K].
    example_ids: i64 [B], index of each group in its data set.
    shape: capacity of a row.
    layout: one of LAYOUTS.
    ref_logps: f32 [B, K] cached reference log-probs, or None.
    token_masks: which of TOKEN_MASKS to fill.
    scored: bool masks of each group's responses. A token that is not scored
      is seen by those behind it, and is nobody's target. None scores all.

  Returns:
    A batch of numpy arrays.
  """
  num_rows = len(rows)
  per_token = (num_rows, shape.num_tokens)
  per_scored = (num_rows, shape.num_scored)
  per_slot = (num_rows, shape.num_groups, shape.num_slots)
  batch = Batch(
    tokens=np.zeros(per_token, np.int32),
    positions=np.zeros(per_token, np.int32),
    segments=np.zeros(per_token, np.int32),
    branches=np.zeros(per_token, np.int32),
    targets=np.zeros(per_scored, np.int32),
    predictors=np.zeros(per_scored, np.int32),
    slots=np.full(per_scored, shape.num_groups * shape.num_slots, np.int32),
    score=np.zeros(per_slot, np.float32),
    valid=np.zeros(per_slot, bool),
    example_ids=np.full(per_slot[:2], -1, np.int32),
    last_tokens=np.zeros(per_slot, np.int32),
    ref_logps=None if ref_logps is None else np.zeros(per_slot, np.float32),
    **{name: np.zeros(per_scored, bool) for name in sorted(token_masks)},
  )
  for r, members in enumerate(rows):
    writer = _RowWriter(batch, r, shape, is_shared=layout == "shared")
    for g, i in enumerate(members):
      prompt, *responses = groups[i]
      places = [
        np.flatnonzero(mask)
        for mask in (scored[i] if scored else map(np.ones_like, responses))
      ]
      writer.write(g, prompt, responses, places, int(example_ids[i]))
      batch.score[r, g] = scores[i]
      batch.valid[r, g] = [len(response) > 0 for response in responses]
      batch.example_ids[r, g] = example_ids[i]
      if ref_logps is not None:
        batch.ref_logps[r, g] = ref_logps[i]
  return batch


class _RowWriter:
  """Appends groups to one row of a batch."""

  def __init__(self, batch: Batch, row: int, shape: RowShape, is_shared: bool):
    self.batch, self.row, self.shape = batch, row, shape
    self.is_shared = is_shared
    self.next_token = self.next_scored = self.segment = 0

  def write(
    self,
    group: int,
    prompt: np.ndarray,
    responses: Sequence[np.ndarray],
    places: Sequence[np.ndarray],
    example_id: int,
  ) -> None:
    """Appends a group; `places` are those of each response's scored tokens."""
    # Drawn once for each response, whatever the step: a reference that was
    # scored before has seen the same tokens.
    rng = np.random.default_rng((max(example_id, 0), len(prompt)))
    filled = zip(places, responses, strict=True)
    shortest = min((len(p) for p, r in filled if len(r)), default=0)
    is_open = False
    branch = prompt_end = 0
    for slot, response in enumerate(responses):
      if not len(response):
        continue
      if not (is_open and self.is_shared):
        self.segment += 1
        branch, is_open = 0, True
        self._append(prompt, position=0, branch=0)
        prompt_end = self.next_token - 1
      branch += 1
      start = self.next_token
      self._append(response, position=len(prompt), branch=branch)
      self.batch.last_tokens[self.row, group, slot] = self.next_token - 1
      self._mark(len(places[slot]), shortest, rng)
      self._score(response, places[slot], prompt_end, start, group, slot)

  def _append(self, ids: np.ndarray, *, position: int, branch: int) -> None:
    at = slice(self.next_token, self.next_token + len(ids))
    self.batch.tokens[self.row, at] = ids
    self.batch.positions[self.row, at] = np.arange(
      position, position + len(ids)
    )
    self.batch.segments[self.row, at] = self.segment
    self.batch.branches[self.row, at] = branch
    self.next_token = at.stop

  def _mark(self, length: int, num_kept: int, rng: Any) -> None:
    at = slice(self.next_scored, self.next_scored + length)
    if self.batch.head is not None:
      self.batch.head[self.row, at] = np.arange(length) < num_kept
    if self.batch.sampled is not None:
      ranks = rng.permutation(length)
      self.batch.sampled[self.row, at] = ranks < num_kept

  def _score(
    self,
    response: np.ndarray,
    places: np.ndarray,
    prompt_end: int,
    start: int,
    group: int,
    slot: int,
  ) -> None:
    at = slice(self.next_scored, self.next_scored + len(places))
    self.batch.targets[self.row, at] = response[places]
    # The prompt, not the response before, predicts the first token.
    self.batch.predictors[self.row, at] = np.where(
      places == 0, prompt_end, start - 1 + places
    )
    self.batch.slots[self.row, at] = group * self.shape.num_slots + slot
    self.next_scored = at.stop


def padding_fraction(batch: Batch) -> float:
  """Token slots that hold no token, as a fraction of all."""
  return float(1.0 - np.mean(batch.segments > 0))
