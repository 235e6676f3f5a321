"""batch(step) as a pure function of the seed: nothing to save or replay."""

from collections.abc import Callable, Iterator
import concurrent.futures
import dataclasses
import functools
import math
from typing import Any

import numpy as np

from dpo_jax.data import packing
from dpo_jax.data.mixture import Mixture, permutation
from dpo_jax.data.packing import RowShape
from dpo_jax.data.store import Store
from dpo_jax.types import Batch

# Groups that trial packings may draw, and the most of those packings.
_SIMULATED_GROUPS = 2**15
_SIMULATED_BATCHES = 512


@dataclasses.dataclass(frozen=True)
class BatchShape:
  """What a step is compiled for: R rows of a capacity."""

  num_rows: int
  row: RowShape


@dataclasses.dataclass(frozen=True)
class Plan:
  """The few shapes that a run compiles.

  Attributes:
    shapes: few, ascending; the largest holds any batch.
    layout: one of packing.LAYOUTS.
    is_flat: whether every shape has the same rows, as few as the mesh allows,
      that groups are dealt out to; else rows are of one length, and a batch
      takes as many as it needs.
  """

  shapes: tuple[BatchShape, ...]
  layout: str
  is_flat: bool

  def pack(
    self, num_tokens: np.ndarray, num_scored: np.ndarray
  ) -> tuple[BatchShape, list[list[int]]]:
    """The smallest shape that holds a batch, and who goes to which row.

    Args:
      num_tokens: i64 [B], see `packing.group_tokens`.
      num_scored: i64 [B].

    Returns:
      The shape, and a list of indices into the batch for each of its rows.
    """
    largest = self.shapes[-1]
    if not self.is_flat:
      rows = packing.assign_rows(
        num_tokens, num_scored, shape=largest.row, layout=self.layout
      )
      shape = next(s for s in self.shapes if s.num_rows >= len(rows))
      return shape, rows + [[]] * (shape.num_rows - len(rows))
    rows = packing.deal_rows(
      num_tokens, largest.num_rows, max_groups=largest.row.num_groups
    )
    tokens, scored = _fullest(rows, num_tokens, num_scored)
    shape = next(
      (
        s
        for s in self.shapes
        if s.row.num_tokens >= tokens and s.row.num_scored >= scored
      ),
      largest,
    )
    return shape, rows


def make_plan(
  store: Store,
  indices: np.ndarray,
  *,
  batch_size: int,
  row_tokens: int,
  row_multiple: int,
  layout: str,
  max_shapes: int = 4,
  mixture: Mixture | None = None,
) -> Plan:
  """Chooses shapes from the lengths of the data.

  Args:
    store: groups.
    indices: which of them the run uses.
    batch_size: groups a step.
    row_tokens: T; or 0 for one row for each device and accumulation step,
      however many groups it gets, of a few lengths that trial batches show
      to pad least.
    row_multiple: number that the rows of a batch must be a multiple of
      (devices that split rows, times accumulation steps).
    layout: one of packing.LAYOUTS.
    max_shapes: that there may be; each is compiled, and fewer pad more.
    mixture: shares of several sources; None for one source.

  Returns:
    The plan; the same on every process.

  Raises:
    ValueError: rows too short for the longest group, naming the length that
      would do, or an unknown layout.
  """
  if layout not in packing.LAYOUTS:
    raise ValueError(
      f"data.layout={layout!r} must be one of {', '.join(packing.LAYOUTS)}"
    )
  lengths = store.lengths[indices]
  num_tokens = packing.group_tokens(lengths, layout)
  num_scored = store.num_scored[indices].sum(1, dtype=np.int64)
  longest = int(num_tokens.max())
  if row_tokens and row_tokens < longest:
    raise ValueError(
      f"data.row_tokens={row_tokens} is shorter than the longest group, which"
      f" takes {longest} tokens: set it to {_round_up(longest, 64)} or more,"
      " or lower data.max_tokens"
    )
  rng = np.random.default_rng(0)
  num_batches = _SIMULATED_GROUPS // batch_size
  num_batches = max(min(num_batches, _SIMULATED_BATCHES), 32)
  probabilities = None if mixture is None else mixture.probabilities(indices)
  trials = [
    rng.choice(len(indices), batch_size, p=probabilities)
    for _ in range(num_batches)
  ]
  batches = [(num_tokens[trial], num_scored[trial]) for trial in trials]
  if row_tokens:
    shapes = _equal_rows(
      batches,
      num_tokens,
      num_scored,
      row_tokens,
      row_multiple,
      layout,
      store.num_slots,
      max_shapes,
    )
  else:
    num_rows = row_multiple
    if layout == "padded":  # a group a row
      num_rows = _round_up(batch_size, row_multiple)
    # Where an epoch ends within a batch, its groups may come again.
    epoch = mixture.smallest if mixture else len(indices)
    copies = 1 + -(-batch_size // epoch)
    shapes = _flat_rows(
      batches,
      num_tokens.repeat(copies),
      num_scored.repeat(copies),
      num_rows,
      store.num_slots,
      max_shapes,
    )
  return Plan(shapes, layout, is_flat=not row_tokens)


def _fullest(
  rows: list[list[int]], num_tokens: np.ndarray, num_scored: np.ndarray
) -> tuple[int, int]:
  """Tokens of the row with most of them, and scored tokens likewise."""
  return (
    max(int(num_tokens[row].sum()) for row in rows),
    max(int(num_scored[row].sum()) for row in rows),
  )


def _flat_rows(
  batches: list[tuple[np.ndarray, np.ndarray]],
  num_tokens: np.ndarray,
  num_scored: np.ndarray,
  num_rows: int,
  num_slots: int,
  max_shapes: int,
) -> tuple[BatchShape, ...]:
  """Lengths that pad the trial batches least, and one for the worst batch."""
  batch_size = len(batches[0][0])
  mean_groups = -(-batch_size // num_rows)
  # Room for a row of short groups; what it adds to a step is nothing.
  num_groups = min(batch_size, 2 * mean_groups) if mean_groups > 1 else 1
  needs = np.array(
    [
      _fullest(
        packing.deal_rows(tokens, num_rows, max_groups=num_groups),
        tokens,
        scored,
      )
      for tokens, scored in batches
    ]
  )

  def most(counts):
    return int(np.sort(counts)[-num_groups:].sum())

  worst = (most(num_tokens), most(num_scored))
  grain = 64 if worst[0] >= 512 else 16
  ladder = _cheapest_ladder(
    np.array([_round_up(n, grain) for n in needs[:, 0]]), max_shapes - 1
  )
  shapes, below = [], 0
  for length in ladder:
    its = needs[(needs[:, 0] > below) & (needs[:, 0] <= length), 1]
    scored = min(_round_up(int(its.max()), grain), length)
    shapes.append((length, scored))
    below = length
  largest = tuple(_round_up(n, grain) for n in worst)
  if not shapes or shapes[-1][0] < largest[0] or shapes[-1][1] < largest[1]:
    shapes.append((max(largest[0], below), largest[1]))
  return tuple(
    BatchShape(num_rows, RowShape(tokens, scored, num_groups, num_slots))
    for tokens, scored in shapes
  )


def _cheapest_ladder(needs: np.ndarray, num_steps: int) -> list[int]:
  """Capacities, ascending, that waste least if each need takes the smallest
  that holds it; by dynamic programming over the distinct needs."""
  sizes, counts = np.unique(needs, return_counts=True)
  total = np.concatenate([[0], np.cumsum(counts)])
  # best[j]: the least cost of the j smallest sizes, and its ladder.
  best: list[tuple[float, list[int]]] = [(0.0, [])]
  best += [(float("inf"), [])] * len(sizes)
  for _ in range(min(num_steps, len(sizes))):
    longer = [best[0]]
    for j in range(1, len(sizes) + 1):
      longer.append(
        min(
          (
            (
              best[i][0] + float(total[j] - total[i]) * sizes[j - 1],
              [*best[i][1], int(sizes[j - 1])],
            )
            for i in range(j)
            if best[i][0] < float("inf")
          ),
          default=(float("inf"), []),
          key=lambda option: option[0],
        )
      )
    best = [
      min(a, b, key=lambda o: o[0]) for a, b in zip(best, longer, strict=True)
    ]
  return best[-1][1]


def _equal_rows(
  batches: list[tuple[np.ndarray, np.ndarray]],
  num_tokens: np.ndarray,
  num_scored: np.ndarray,
  row_tokens: int,
  row_multiple: int,
  layout: str,
  num_slots: int,
  max_shapes: int,
) -> tuple[BatchShape, ...]:
  """Rows of one length, as many as the trial batches take."""
  # Scored tokens get the share of the row that they have of the data, and
  # some: head work is done for the capacity, filled or not.
  share = num_scored.sum() / num_tokens.sum()
  scored = max(int(num_scored.max()), int(row_tokens * min(1.0, 1.1 * share)))
  shape = RowShape(
    num_tokens=row_tokens,
    num_scored=min(_round_up(scored, 32), row_tokens),
    num_groups=row_tokens,  # no limit yet: the trial packings find one
    num_slots=num_slots,
  )
  counts, most_groups = [], 1
  for tokens, trial_scored in batches:
    rows = packing.assign_rows(tokens, trial_scored, shape=shape, layout=layout)
    counts.append(len(rows))
    most_groups = max(most_groups, *map(len, rows))
  row = dataclasses.replace(shape, num_groups=most_groups)
  ladder = (int(np.median(counts)), max(counts), len(batches[0][0]))
  row_counts = sorted({_round_up(n, row_multiple) for n in ladder})[
    -max_shapes:
  ]
  return tuple(BatchShape(count, row) for count in row_counts)


def _round_up(value: int, multiple: int) -> int:
  return -(-value // multiple) * multiple


@dataclasses.dataclass(frozen=True)
class Loader:
  """Batches of packed rows.

  Attributes:
    store: groups.
    indices: which of them, i64 [M].
    plan: shapes.
    batch_size: groups a step.
    seed: of the order.
    ref_logps: f32 [N, K] cached reference log-probs of the whole store, or
      None.
    process_index: this host.
    process_count: hosts; each fills its own block of rows.
    token_masks: names of those to fill, see Batch.
    mixture: shares of several sources in training batches; None for one.
  """

  store: Store
  indices: np.ndarray
  plan: Plan
  batch_size: int
  seed: int
  ref_logps: np.ndarray | None = None
  process_index: int = 0
  process_count: int = 1
  token_masks: frozenset[str] = frozenset()
  mixture: Mixture | None = None

  def __post_init__(self):
    if not len(self.indices):
      raise ValueError("a loader needs at least one group")

  def begin(
    self, step: int, params: Any, *, oldest: int
  ) -> tuple[float, dict[str, float]]:
    """Makes the batches from `step` on known, as `online.OnPolicy.begin` does.

    Returns:
      The step at which `begin` is due again: never, math.inf, as these batches
      do not depend on the policy; and metrics, none.
    """
    del step, params, oldest
    return math.inf, {}

  def order(self, step: int) -> np.ndarray:
    """Groups of a training step: i64 [batch_size], indices into the store.

    Epochs follow each other without a gap, each a permutation of its own, so
    every step has exactly `batch_size` groups. Sources of a mixture have
    epochs of their own.
    """
    start = step * self.batch_size
    positions = np.arange(start, start + self.batch_size)
    if self.mixture is not None:
      return self.mixture.draw(positions, self.seed)
    return self.indices[permutation((self.seed,), positions, len(self.indices))]

  def batch(self, step: int) -> Batch:
    """The training batch of a step: this process's rows, numpy."""
    return self._pack(self.order(step))

  def num_tokens(self, step: int) -> int:
    """Tokens of a training step's rows, over all processes."""
    lengths = self.store.lengths[self.order(step)]
    return int(packing.group_tokens(lengths, self.plan.layout).sum())

  def num_eval_batches(self) -> int:
    """Batches that cover every group once."""
    return -(-len(self.indices) // self.batch_size)

  def eval_batch(self, index: int) -> Batch:
    """The index-th batch; each group is in one of them.

    Where rows hold many groups, batches are dealt out by length, so that all
    take about the same tokens, hence one shape; else they go by length, so
    that a batch's groups pad each other least. Some may hold fewer groups.
    """
    if self._is_dealt:
      return self._pack(self._by_length[index :: self.num_eval_batches()])
    start = index * self.batch_size
    return self._pack(self._by_length[start : start + self.batch_size])

  @property
  def _is_dealt(self) -> bool:
    return self.plan.is_flat and self.plan.layout != "padded"

  @functools.cached_property
  def _by_length(self) -> np.ndarray:
    totals = self.store.lengths[self.indices].sum(1)
    return self.indices[np.argsort(totals, kind="stable")]

  def _pack(self, chosen: np.ndarray) -> Batch:
    lengths = self.store.lengths[chosen]
    shape, rows = self.plan.pack(
      packing.group_tokens(lengths, self.plan.layout),
      self.store.num_scored[chosen].sum(1, dtype=np.int64),
    )
    mine = np.array_split(np.arange(shape.num_rows), self.process_count)
    rows = [rows[r] for r in mine[self.process_index]]
    # Only this process's groups are read.
    members = [i for row in rows for i in row]
    place = {i: j for j, i in enumerate(members)}
    ids = chosen[members]
    return packing.fill_rows(
      [[place[i] for i in row] for row in rows],
      [self.store.group(i) for i in ids],
      np.asarray(self.store.score[ids]),
      ids,
      shape=shape.row,
      layout=self.plan.layout,
      ref_logps=None if self.ref_logps is None else self.ref_logps[ids],
      token_masks=self.token_masks,
      scored=(
        None
        if self.store.scored is None
        else [self.store.masks(i) for i in ids]
      ),
    )


def prefetch(
  make: Callable[[int], Any], start: int, stop: int, *, depth: int = 2
) -> Iterator[Any]:
  """make(start), ..., make(stop - 1), computed ahead in a thread.

  An exception in `make` is raised where its result would have come.
  """
  with concurrent.futures.ThreadPoolExecutor(1) as executor:
    pending = [
      executor.submit(make, index)
      for index in range(start, min(start + depth, stop))
    ]
    try:
      for index in range(start + depth, stop + depth):
        if not pending:
          return
        ready = pending.pop(0)
        if index < stop:
          pending.append(executor.submit(make, index))
        yield ready.result()
    finally:
      for future in pending:
        future.cancel()
