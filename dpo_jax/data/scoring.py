"""Runs a compiled step over every group of a loader once."""

from collections.abc import Callable, Collection
from typing import Any

import jax
import numpy as np

from dpo_jax.data.loader import Loader
from dpo_jax.parallel.hosts import to_host
from dpo_jax.parallel.placement import Placement
from dpo_jax.system import progress
from dpo_jax.types import Batch


def score_all(
  step: Callable[[Batch], Any],
  loader: Loader,
  placement: Placement,
  *,
  label: str = "",
  batches: Collection[int] | None = None,
) -> tuple[np.ndarray, Any]:
  """Collects what a step gives for each group, in one order.

  Args:
    step: compiled; a batch -> tree of arrays [B, ...], replicated.
    loader: which groups; its evaluation batches hold each of them once.
    placement: mesh.
    label: name of the work for `progress.track`; "" shows nothing.
    batches: indices of the evaluation batches to run; None: all.

  Returns:
    ids: i64 [n], the groups' indices in the store, ascending.
    scores: the tree, numpy [n, ...]; the same however the groups are cut into
      batches.
  """
  if batches is None:
    batches = range(loader.num_eval_batches())
  ids, scores = [], []
  for index in progress.track(
    sorted(batches), label, total=len(batches), unit="batches"
  ):
    batch = placement.place_rows(loader.eval_batch(index))
    found = step(batch)
    its_ids = to_host(batch.example_ids).reshape(-1)
    is_group = its_ids >= 0
    scores.append(jax.tree.map(lambda x, i=is_group: to_host(x)[i], found))
    ids.append(its_ids[is_group])
  ids = np.concatenate(ids)
  order = np.argsort(ids)
  return ids[order], jax.tree.map(lambda *x: np.concatenate(x)[order], *scores)
