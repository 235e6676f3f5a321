"""Groups -> rows.

A row of the default layout is [prompt | response_0 | response_1 | ...] of one
group, then the next group, then padding. The other layouts repeat the prompt
before every response, and may keep one group to a row; all give the same
numbers, which the tests hold them to.
"""

from collections.abc import Sequence
import dataclasses
import heapq

import numpy as np

from dpo_jax.types import Batch

LAYOUTS = ("shared", "packed", "padded")


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
    token_masks: names of those to fill, see Batch.
    scored: bool masks of each group's responses. A token that is not scored
      is seen by those behind it, and is nobody's target. None scores all.

  Returns:
    A batch of numpy arrays.

  Raises:
    ValueError: a group with a response and no prompt: nothing would predict
      the response's first token.
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
    token_masks={name: np.zeros(per_scored, bool) for name in token_masks},
  )
  parts = _lay_out(rows, groups, scored, shape, is_shared=layout == "shared")
  if not len(parts.lengths):
    return batch
  ids = np.concatenate(parts.ids)
  part = np.repeat(np.arange(len(parts.lengths)), parts.lengths)
  row, within = parts.row[part], _places_within(part)
  at = (row, parts.start[part] + within)
  batch.tokens[at] = ids
  batch.positions[at] = parts.position[part] + within
  batch.segments[at] = parts.segment[part]
  batch.branches[at] = parts.branch[part]

  is_scored = np.concatenate(parts.is_scored)
  part, row, within = part[is_scored], row[is_scored], within[is_scored]
  at = (row, _places_within(row))
  batch.targets[at] = ids[is_scored]
  # The prompt, not the response before, predicts the first token.
  batch.predictors[at] = np.where(
    within == 0, parts.prompt_end[part], parts.start[part] + within - 1
  )
  batch.slots[at] = parts.slot[part]
  _mark(batch, at, part, parts, example_ids)

  mine = np.flatnonzero(parts.is_response)
  slots = (parts.row[mine], *np.divmod(parts.slot[mine], shape.num_slots))
  batch.valid[slots] = True
  batch.last_tokens[slots] = parts.start[mine] + parts.lengths[mine] - 1
  members = np.array([i for row in rows for i in row])
  counts = np.array([len(row) for row in rows])
  of_row = np.repeat(np.arange(num_rows), counts)
  at = (of_row, _places_within(of_row))
  batch.score[at] = scores[members]
  batch.example_ids[at] = example_ids[members]
  if ref_logps is not None:
    batch.ref_logps[at] = ref_logps[members]
  return batch


@dataclasses.dataclass(frozen=True)
class _Parts:
  """Prompts and responses of the rows, in order; P of them.

  Attributes:
    ids: token ids, P arrays.
    is_scored: P masks of those ids.
    group: i64 [P], index into the groups.
    row: i64 [P].
    segment: i64 [P].
    branch: i64 [P], 0 of a prompt.
    position: i64 [P], of the first token.
    slot: i64 [P], g * K + k; -1 of a prompt.
    lengths: i64 [P].
    start: i64 [P], where in its row the first token stands.
    prompt_end: i64 [P], where the last token of its prompt stands.
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
  """Who comes behind whom in each row; see `fill_rows` for the arguments."""
  ids: list[np.ndarray] = []
  masks: list[np.ndarray] = []
  labels: list[tuple[int, ...]] = []
  for r, members in enumerate(rows):
    segment = 0
    for g, i in enumerate(members):
      prompt, *responses = groups[i]
      if not len(prompt) and any(map(len, responses)):
        raise ValueError(
          f"group {i} has an empty prompt, so nothing predicts the first token"
          " of its responses: a prompt needs at least one token, such as a BOS"
        )
      branch = 0
      for k, response in enumerate(responses):
        if not len(response):
          continue
        if not (branch and is_shared):
          segment, branch = segment + 1, 0
          ids.append(prompt)
          masks.append(np.zeros(len(prompt), bool))
          labels.append((i, r, segment, 0, 0, -1))
        branch += 1
        ids.append(response)
        slot = g * shape.num_slots + k
        labels.append((i, r, segment, branch, len(prompt), slot))
        everything = np.ones(len(response), bool)
        masks.append(everything if scored is None else scored[i][k])
  columns = np.array(labels, np.int64).reshape(-1, 6).T
  lengths = np.array([len(part) for part in ids], np.int64)
  ends = np.cumsum(lengths)
  row, slot = columns[1], columns[5]
  before = ends - lengths
  start = before - before[np.searchsorted(row, row)]
  prompts = np.where(slot < 0, np.arange(len(slot)), 0)
  prompts = np.maximum.accumulate(prompts)
  prompt_end = (start + lengths - 1)[prompts]
  return _Parts(ids, masks, *columns, lengths, start, prompt_end)


def _places_within(labels: np.ndarray) -> np.ndarray:
  """0, 1, ... within each run of equal labels, which ascend."""
  return np.arange(len(labels)) - np.searchsorted(labels, labels)


def _mark(
  batch: Batch,
  at: tuple[np.ndarray, np.ndarray],
  part: np.ndarray,
  parts: _Parts,
  example_ids: np.ndarray,
) -> None:
  """Marks as many scored tokens of each response as the shortest one has.

  Args:
    batch: its `token_masks` are filled.
    at: where the scored tokens stand.
    part: i64 [S], which part each is of.
    parts: all of them.
    example_ids: of the groups.
  """
  if not batch.token_masks:
    return
  counts = np.bincount(part, minlength=len(parts.lengths))
  shortest = np.full(len(example_ids), np.iinfo(np.int64).max)
  mine = parts.is_response
  np.minimum.at(shortest, parts.group[mine], counts[mine])
  kept = shortest[parts.group[part]]
  if "head" in batch.token_masks:
    batch.token_masks["head"][at] = _places_within(part) < kept
  if "sampled" in batch.token_masks:
    ranks = np.empty(len(part), np.int64)
    ends = np.cumsum(counts)
    generators: dict[int, np.random.Generator] = {}
    for p in np.flatnonzero(mine):
      i = int(parts.group[p])
      if i not in generators:
        # Drawn once for each response, whatever the step: a reference that
        # was scored before has seen the same tokens.
        seed = (max(int(example_ids[i]), 0), int(parts.position[p]))
        generators[i] = np.random.default_rng(seed)
      ranks[ends[p] - counts[p] : ends[p]] = generators[i].permutation(
        counts[p]
      )
    batch.token_masks["sampled"][at] = ranks < kept


def padding_fraction(batch: Batch) -> float:
  """Token slots that hold no token, as a fraction of all."""
  return float(1.0 - np.mean(batch.segments > 0))
