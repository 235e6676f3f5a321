"""Runs a compiled step over every group of a loader once."""

from collections.abc import Callable, Collection, Iterator
from typing import Any, cast

import jax
import numpy as np

from dpo_jax.data.loader import Loader
from dpo_jax.parallel import stop_signal
from dpo_jax.parallel.hosts import to_host
from dpo_jax.parallel.placement import Placement
from dpo_jax.system import progress
from dpo_jax.types import Batch


def score_batches(
  step: Callable[[Batch], Any],
  loader: Loader,
  placement: Placement,
  *,
  label: str = "",
  batches: Collection[int] | None = None,
) -> Iterator[tuple[np.ndarray, Any]]:
  """Yields a step's output for the groups of each batch.

  Args:
    step: compiled function of a batch; returns a tree of arrays [B, ...],
      replicated.
    loader: groups; its evaluation batches hold each of them once.
    placement: mesh.
    label: name of the work for `progress.track`; "" shows nothing.
    batches: indices of the evaluation batches to run; None: all.

  Yields:
    ids: i64 [n], the groups' indices in the store, in the batch's order.
    scores: the tree, numpy [n, ...].
  """
  if batches is None:
    batches = range(loader.num_eval_batches())
  for index in progress.track(
    sorted(batches), label, total=len(batches), unit="batches"
  ):
    stop_signal.check()
    batch = placement.place_rows(loader.eval_batch(index))
    out = step(batch)
    ids = to_host(cast(jax.Array, batch.example_ids)).reshape(-1)
    is_group = ids >= 0
    yield (
      ids[is_group],
      jax.tree.map(lambda x, i=is_group: to_host(x)[i], out),
    )


def score_all(
  step: Callable[[Batch], Any],
  loader: Loader,
  placement: Placement,
  *,
  label: str = "",
  batches: Collection[int] | None = None,
) -> tuple[np.ndarray, Any]:
  """Collects a step's output for every group, in the order of their indices.

  Args:
    step, loader, placement, label, batches: see `score_batches`; at least one
      batch.

  Returns:
    ids: i64 [n], the groups' indices in the store, ascending.
    scores: the tree, numpy [n, ...]; independent of the division into batches.
  """
  found_ids, scores = zip(
    *score_batches(step, loader, placement, label=label, batches=batches),
    strict=True,
  )
  ids = np.concatenate(found_ids)
  order = np.argsort(ids)
  return ids[order], jax.tree.map(lambda *x: np.concatenate(x)[order], *scores)
