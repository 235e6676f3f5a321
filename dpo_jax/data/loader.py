"""batch(step) as a pure function of the seed: nothing to save or replay."""

from collections.abc import Callable, Iterator
import concurrent.futures
import dataclasses
import functools
from typing import Any

import numpy as np

from dpo_jax.data import packing
from dpo_jax.data.packing import RowShape
from dpo_jax.data.store import Store
from dpo_jax.types import Batch

_SIMULATED_BATCHES = 32
_GROUPS_A_ROW = 2


@dataclasses.dataclass(frozen=True)
class Plan:
  """The few shapes that a run compiles.

  Attributes:
    row: capacity of a row.
    row_counts: numbers of rows that a batch may have, ascending; the largest
      holds any batch.
    layout: one of packing.LAYOUTS.
  """

  row: RowShape
  row_counts: tuple[int, ...]
  layout: str


def make_plan(
  store: Store,
  indices: np.ndarray,
  *,
  batch_size: int,
  row_tokens: int,
  row_multiple: int,
  layout: str,
) -> Plan:
  """Chooses shapes from the lengths of the data.

  Args:
    store: groups.
    indices: which of them the run uses.
    batch_size: groups a step.
    row_tokens: T, or 0 for a row that holds any group, and two of mean
      length: enough to pack well, short enough for dense attention.
    row_multiple: number that the rows of a batch must be a multiple of
      (devices that split rows, times accumulation steps).
    layout: one of packing.LAYOUTS.

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
  row_tokens = row_tokens or _round_up(
    max(longest, int(_GROUPS_A_ROW * num_tokens.mean())), 64
  )
  # Scored tokens get the share of the row that they have of the data, and
  # some: head work is done for the capacity, filled or not.
  share = num_scored.sum() / num_tokens.sum()
  scored = max(int(num_scored.max()), int(row_tokens * min(1.0, 1.1 * share)))
  shape = RowShape(
    num_tokens=row_tokens,
    num_scored=min(_round_up(scored, 32), row_tokens),
    num_groups=row_tokens,  # no limit yet: the trial packings find one
    num_slots=store.num_slots,
  )
  rng = np.random.default_rng(0)
  counts, most_groups = [], 1
  for _ in range(_SIMULATED_BATCHES):
    chosen = rng.choice(len(indices), batch_size)
    rows = packing.assign_rows(
      num_tokens[chosen], num_scored[chosen], shape=shape, layout=layout
    )
    counts.append(len(rows))
    most_groups = max(most_groups, *map(len, rows))
  ladder = (int(np.median(counts)), max(counts), batch_size)
  return Plan(
    row=dataclasses.replace(shape, num_groups=most_groups),
    row_counts=tuple(sorted({_round_up(n, row_multiple) for n in ladder})),
    layout=layout,
  )


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
    token_masks: optional fields of Batch to fill, see packing.TOKEN_MASKS.
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

  def __post_init__(self):
    if not len(self.indices):
      raise ValueError("a loader needs at least one group")

  def order(self, step: int) -> np.ndarray:
    """Groups of a training step: i64 [batch_size], indices into the store.

    Epochs follow each other without a gap, each a permutation of its own, so
    every step has exactly `batch_size` groups.
    """
    start = step * self.batch_size
    places = np.arange(start, start + self.batch_size)
    epochs, within = np.divmod(places, len(self.indices))
    chosen = np.empty(self.batch_size, np.int64)
    for epoch in np.unique(epochs):
      permutation = _permutation(self.seed, int(epoch), len(self.indices))
      mask = epochs == epoch
      chosen[mask] = self.indices[permutation[within[mask]]]
    return chosen

  def batch(self, step: int) -> Batch:
    """The training batch of a step: this process's rows, numpy."""
    return self._pack(self.order(step))

  def num_eval_batches(self) -> int:
    """Batches that cover every group once."""
    return -(-len(self.indices) // self.batch_size)

  def eval_batch(self, index: int) -> Batch:
    """The index-th batch in length order; the last may hold fewer groups."""
    start = index * self.batch_size
    return self._pack(self._by_length[start : start + self.batch_size])

  @functools.cached_property
  def _by_length(self) -> np.ndarray:
    totals = self.store.lengths[self.indices].sum(1)
    return self.indices[np.argsort(totals, kind="stable")]

  def _pack(self, chosen: np.ndarray) -> Batch:
    lengths = self.store.lengths[chosen]
    rows = packing.assign_rows(
      packing.group_tokens(lengths, self.plan.layout),
      self.store.num_scored[chosen].sum(1, dtype=np.int64),
      shape=self.plan.row,
      layout=self.plan.layout,
    )
    num_rows = next(n for n in self.plan.row_counts if n >= len(rows))
    rows += [[]] * (num_rows - len(rows))
    mine = np.array_split(np.arange(num_rows), self.process_count)
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
      shape=self.plan.row,
      layout=self.plan.layout,
      ref_logps=None if self.ref_logps is None else self.ref_logps[ids],
      token_masks=self.token_masks,
      scored=(
        None
        if self.store.scored is None
        else [self.store.masks(i) for i in ids]
      ),
    )


@functools.lru_cache(maxsize=4)
def _permutation(seed: int, epoch: int, size: int) -> np.ndarray:
  return np.random.default_rng((seed, epoch)).permutation(size)


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
