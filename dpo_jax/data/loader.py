"""Batches as a pure function of (seed, step): no iterator state to save."""

from collections.abc import Callable, Iterator, Sequence
import concurrent.futures
import dataclasses
import functools
import math
from typing import TypeVar

import numpy as np

from dpo_jax.data import packing
from dpo_jax.data.addresses import find_addresses
from dpo_jax.data.batch_plan import Plan
from dpo_jax.data.mixture import Mixture, permutation
from dpo_jax.data.store import Store
from dpo_jax.types import Batch

Made = TypeVar("Made")


@dataclasses.dataclass(frozen=True)
class Loader:
  """Batches of packed rows.

  Attributes:
    store: groups.
    indices: groups to load, i64 [M].
    plan: shapes.
    batch_size: groups per step.
    seed: seed of the order.
    ref_logps: f32 [N, K] cached reference log-probs of the whole store, or
      None.
    process_index: index of this host.
    process_count: number of hosts; each fills its own block of rows.
    token_masks: names of the token masks to fill, see Batch.
    mixture: shares of several sources in training batches; None for one.

  Raises:
    ValueError: no groups to load.
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
    self, step: int, params: object, *, oldest: int
  ) -> tuple[float, dict[str, float]]:
    """Does nothing; `online.loader.OnPolicyLoader` needs it, so both have it.

    Args:
      step, params, oldest: not read.

    Returns:
      Step at which `begin` is due again: math.inf, since these batches do not
      depend on the policy. And metrics: {}.
    """
    del step, params, oldest
    return math.inf, {}

  def order(self, step: int) -> np.ndarray:
    """Returns the groups of a training step: i64 [batch_size], store indices.

    Epochs follow each other without a gap, each with its own permutation, so
    every step has exactly `batch_size` groups. Each source of a mixture has its
    own epochs.
    """
    start = step * self.batch_size
    positions = np.arange(start, start + self.batch_size)
    if self.mixture is not None:
      return self.mixture.draw(positions, self.seed)
    return self.indices[permutation((self.seed,), positions, len(self.indices))]

  def addresses(self, example_ids: Sequence[int]) -> list[str]:
    """Returns the file and line of each group, see `find_addresses`.

    Args:
      example_ids: indices of the groups in the store.
    """
    return find_addresses(self.store, example_ids)

  def batch(self, step: int) -> Batch:
    """Returns the training batch of a step: this process's rows, in numpy."""
    return self._pack(self.order(step))

  def num_tokens(self, step: int) -> int:
    """Counts the tokens of a training step, over all processes.

    Padding is not counted; a prompt counts once for each copy in a row.
    """
    lengths = self.store.lengths[self.order(step)]
    return int(packing.group_tokens(lengths, self.plan.layout).sum())

  def num_eval_batches(self) -> int:
    """Returns the number of batches that cover every group once."""
    return -(-len(self.indices) // self.batch_size)

  def eval_order(self, index: int) -> np.ndarray:
    """Returns the groups of an evaluation batch: i64, store indices.

    If groups are dealt to a fixed number of rows, every batch gets groups of
    all lengths: batches have about the same number of tokens, so they share a
    shape. Otherwise, also if `data.row_tokens` is set, a batch gets groups of
    similar length. Some batches may hold fewer groups.
    """
    if self._is_dealt:
      return self._by_length[index :: self.num_eval_batches()]
    start = index * self.batch_size
    return self._by_length[start : start + self.batch_size]

  def eval_batch(self, index: int) -> Batch:
    """Returns the index-th evaluation batch: this process's rows, in numpy.

    Each group is in exactly one of the `num_eval_batches` batches.
    """
    return self._pack(self.eval_order(index))

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
    index = {i: j for j, i in enumerate(members)}
    ids = chosen[members]
    return packing.fill_rows(
      [[index[i] for i in row] for row in rows],
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
  make: Callable[[int], Made], start: int, stop: int, *, depth: int = 2
) -> Iterator[Made]:
  """Yields make(start), ..., make(stop - 1), computed ahead in a thread.

  An exception in `make` is raised in place of its result. Calls that have not
  started are cancelled when the generator is closed.

  Args:
    make: function of an index.
    start: first index.
    stop: end of the indices, exclusive.
    depth: maximum number of results that are computed ahead.
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
