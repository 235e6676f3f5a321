"""Packs groups into rows.

A row of the default layout is [prompt | response_0 | response_1 | ...] of one
group, then the next group, then padding. The layout "packed" repeats the prompt
before every response; "padded" also has one group per row. All layouts give the
same numbers.
"""

from collections.abc import Sequence
import dataclasses
import heapq

import numpy as np

from dpo_jax.types import Batch

LAYOUTS = ("shared", "packed", "padded")


@dataclasses.dataclass(frozen=True)
class RowShape:
  """Capacity of a row; fixed, so that few shapes are compiled.

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
  """Counts the tokens that each group takes in a row.

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
  """Assigns groups to rows, first-fit decreasing.

  Args:
    num_tokens: i64 [B], see `group_tokens`.
    num_scored: i64 [B], scored tokens of each group.
    shape: capacity of a row.
    layout: one of LAYOUTS; "padded" gives every group a row.

  Returns:
    Rows of indices into the batch.

  Raises:
    ValueError: a group that does not fit into a row.
  """
  too_long = (num_tokens > shape.num_tokens) | (num_scored > shape.num_scored)
  if too_long.any():
    worst = int(np.argmax(np.where(too_long, num_tokens, -1)))
    raise ValueError(
      f"a group takes {num_tokens[worst]} tokens, {num_scored[worst]} of them"
      f" scored; a row holds {shape.num_tokens}, {shape.num_scored} of them"
      " scored. Raise data.row_tokens, or lower data.max_tokens"
    )
  if layout == "padded":
    return [[i] for i in range(len(num_tokens))]
  rows: list[list[int]] = []
  # For each row: tokens, scored tokens and groups that it has room for.
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
  """Deals groups to rows of about equal length.

  Each group, longest first, goes to the shortest row that is not full. If no
  row fills up, the fullest is at most 4/3 of the optimum (Graham 1969).

  Args:
    num_tokens: i64 [B], see `group_tokens`.
    num_rows: R.
    max_groups: maximum groups of a row; R times it must be at least B.

  Returns:
    R rows of indices into the batch; some may be empty.
  """
  rows: list[list[int]] = [[] for _ in range(num_rows)]
  shortest = [(0, row) for row in range(num_rows)]  # is a heap
  for i in np.argsort(-num_tokens, kind="stable"):
    filled, row = heapq.heappop(shortest)
    rows[row].append(int(i))
    if len(rows[row]) < max_groups:  # a full row leaves the heap
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
    token_masks: names of the token masks to fill, see Batch.
    scored: bool masks of each group's responses. A token that is not scored is
      attended to by later tokens, and is not a target. None scores all.

  Returns:
    A batch of numpy arrays.

  Raises:
    ValueError: a group with a response and an empty prompt, so that nothing
      predicts the response's first token.
  """
  batch = _empty_batch(
    len(rows), shape, token_masks, has_ref_logps=ref_logps is not None
  )
  parts = _lay_out(rows, groups, scored, shape, is_shared=layout == "shared")
  if not len(parts.lengths):
    return batch
  _fill_tokens(batch, parts, example_ids)
  is_response = np.flatnonzero(parts.is_response)
  row, slot = parts.row[is_response], parts.slot[is_response]
  slots = (row, *np.divmod(slot, shape.num_slots))
  last = parts.start[is_response] + parts.lengths[is_response] - 1
  batch.valid[slots] = True
  batch.last_tokens[slots] = last
  members = np.array([i for row in rows for i in row])
  row = np.repeat(np.arange(len(rows)), [len(row) for row in rows])
  at = (row, _index_in_run(row))
  batch.score[at] = scores[members]
  batch.example_ids[at] = example_ids[members]
  if ref_logps is not None and batch.ref_logps is not None:
    batch.ref_logps[at] = ref_logps[members]
  return batch


def _empty_batch(
  num_rows: int,
  shape: RowShape,
  token_masks: frozenset[str],
  *,
  has_ref_logps: bool,
) -> Batch:
  """Returns a batch without groups: `slots` are G * K, `example_ids` -1.

  All other fields are 0 or False.
  """
  per_token = (num_rows, shape.num_tokens)
  per_scored = (num_rows, shape.num_scored)
  per_slot = (num_rows, shape.num_groups, shape.num_slots)
  return Batch(
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
    ref_logps=np.zeros(per_slot, np.float32) if has_ref_logps else None,
    token_masks={name: np.zeros(per_scored, bool) for name in token_masks},
  )


@dataclasses.dataclass(frozen=True)
class _Parts:
  """The P prompts and responses of the rows, in order.

  Attributes:
    ids: token ids, P arrays.
    is_scored: P masks of those ids.
    group: i64 [P], index into the groups.
    row: i64 [P].
    segment: i64 [P].
    branch: i64 [P], 0 for a prompt.
    position: i64 [P], position of the first token.
    slot: i64 [P], g * K + k; -1 for a prompt.
    lengths: i64 [P].
    start: i64 [P], index in its row of the first token.
    prompt_end: i64 [P], index in its row of the last token of its prompt.
  """

  ids: list[np.ndarray]
  is_scored: list[np.ndarray]
  group: np.ndarray
  row: np.ndarray
  segment: np.ndarray
  branch: np.ndarray
  position: np.ndarray
  slot: np.ndarray
  lengths: np.ndarray
  start: np.ndarray
  prompt_end: np.ndarray

  @property
  def is_response(self) -> np.ndarray:
    return self.slot >= 0


def _lay_out(
  rows: Sequence[Sequence[int]],
  groups: Sequence[Sequence[np.ndarray]],
  scored: Sequence[Sequence[np.ndarray]] | None,
  shape: RowShape,
  is_shared: bool,
) -> _Parts:
  """Orders prompts and responses in rows; see `fill_rows` for the arguments."""
  ids: list[np.ndarray] = []
  masks: list[np.ndarray] = []
  labels: list[tuple[int, ...]] = []
  for r, members in enumerate(rows):
    number = 0  # of the segment
    for g, i in enumerate(members):
      prompt, *responses = groups[i]
      if not len(prompt) and any(map(len, responses)):
        raise ValueError(
          f"group {i} has an empty prompt, so nothing predicts the first token"
          " of its responses: a prompt needs at least one token, such as a BOS"
        )
      num_branches = 0
      for k, response in enumerate(responses):
        if not len(response):
          continue
        if not (num_branches and is_shared):
          number, num_branches = number + 1, 0
          ids.append(prompt)
          masks.append(np.zeros(len(prompt), bool))
          labels.append((i, r, number, 0, 0, -1))
        num_branches += 1
        ids.append(response)
        labels.append(
          (i, r, number, num_branches, len(prompt), g * shape.num_slots + k)
        )
        everything = np.ones(len(response), bool)
        masks.append(everything if scored is None else scored[i][k])
  group, row, segment, branch, position, slot = (
    np.array(labels, np.int64).reshape(-1, 6).T
  )
  lengths = np.array([len(part) for part in ids], np.int64)
  ends = np.cumsum(lengths)
  before = ends - lengths
  start = before - before[np.searchsorted(row, row)]
  prompts = np.where(slot < 0, np.arange(len(slot)), 0)
  prompts = np.maximum.accumulate(prompts)
  prompt_end = (start + lengths - 1)[prompts]
  return _Parts(
    ids=ids,
    is_scored=masks,
    group=group,
    row=row,
    segment=segment,
    branch=branch,
    position=position,
    slot=slot,
    lengths=lengths,
    start=start,
    prompt_end=prompt_end,
  )


def _fill_tokens(batch: Batch, parts: _Parts, example_ids: np.ndarray) -> None:
  """Writes all fields of a batch by token, and by scored token."""
  ids = np.concatenate(parts.ids)
  part = np.repeat(np.arange(len(parts.lengths)), parts.lengths)
  row, within = parts.row[part], _index_in_run(part)
  at = (row, parts.start[part] + within)
  batch.tokens[at] = ids
  batch.positions[at] = parts.position[part] + within
  batch.segments[at] = parts.segment[part]
  batch.branches[at] = parts.branch[part]

  is_scored = np.concatenate(parts.is_scored)
  part, row, within = part[is_scored], row[is_scored], within[is_scored]
  at = (row, _index_in_run(row))
  batch.targets[at] = ids[is_scored]
  # The prompt, not the response before, predicts the first token.
  batch.predictors[at] = np.where(
    within == 0, parts.prompt_end[part], parts.start[part] + within - 1
  )
  batch.slots[at] = parts.slot[part]
  _fill_token_masks(batch, at, part, parts, example_ids)


def _index_in_run(labels: np.ndarray) -> np.ndarray:
  """Returns 0, 1, ... within each run of equal labels, which ascend."""
  return np.arange(len(labels)) - np.searchsorted(labels, labels)


def _fill_token_masks(
  batch: Batch,
  at: tuple[np.ndarray, np.ndarray],
  part: np.ndarray,
  parts: _Parts,
  example_ids: np.ndarray,
) -> None:
  """Marks n scored tokens of each response, the count of its group's shortest.

  The mask `head` has the first n. The mask `sampled` has n at random, drawn by
  example and response, so they are the same at every step.

  Args:
    batch: its `token_masks` are filled.
    at: row and index of each of the S scored tokens.
    part: i64 [S], index of the part that each scored token is in.
    parts: prompts and responses.
    example_ids: i64 [B], see `fill_rows`.
  """
  if not batch.token_masks:
    return
  counts = np.bincount(part, minlength=len(parts.lengths))
  shortest = np.full(len(example_ids), np.iinfo(np.int64).max)
  responses = np.flatnonzero(parts.is_response)
  np.minimum.at(shortest, parts.group[responses], counts[responses])
  kept = shortest[parts.group[part]]
  if "head" in batch.token_masks:
    batch.token_masks["head"][at] = _index_in_run(part) < kept
  if "sampled" in batch.token_masks:
    ranks = np.empty(len(part), np.int64)
    ends = np.cumsum(counts)
    generators: dict[int, np.random.Generator] = {}
    for p in responses:
      i = int(parts.group[p])
      if i not in generators:
        # Independent of the step, so that a reference whose log-probs are
        # cached scored the same tokens.
        seed = (max(int(example_ids[i]), 0), int(parts.position[p]))
        generators[i] = np.random.default_rng(seed)
      order = generators[i].permutation(counts[p])
      ranks[ends[p] - counts[p] : ends[p]] = order
    batch.token_masks["sampled"][at] = ranks < kept


def padding_fraction(batch: Batch) -> float:
  """Returns the fraction of token slots that are padding."""
  return float(1.0 - np.mean(batch.segments > 0))
