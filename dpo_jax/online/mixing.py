"""Hybrid batches: pairs that the policy samples, and groups of the data."""

from collections.abc import Iterable, Sequence
import dataclasses

import numpy as np

from dpo_jax.data.loader import Loader


@dataclasses.dataclass(frozen=True, kw_only=True)
class MixedLoader(Loader):
  """Batches of `batch_size` sampled groups and `num_offline` of the data.

  Attributes:
    indices: i64 [M], sampled groups.
    offline: i64 [steps * num_offline], groups of the data, those of the first
      step first.
    num_offline: groups of the data in a batch.
  """

  offline: np.ndarray
  num_offline: int

  def order(self, step: int) -> np.ndarray:
    """Returns the groups of a step, sampled ones first: i64 [B]."""
    start = step * self.num_offline
    read = self.offline[start : start + self.num_offline]
    return np.concatenate([super().order(step), read])


def mix(
  loader: Loader, num_sampled: int, *, num_own: int, num_offline: int
) -> Loader:
  """Returns a loader of mixed batches of a loader's groups.

  Args:
    loader: sampled groups, then groups of the data.
    num_sampled: number of sampled groups.
    num_own: sampled groups in a batch.
    num_offline: groups of the data in a batch; 0 returns the loader itself.
  """
  if not num_offline:
    return loader
  names = [field.name for field in dataclasses.fields(loader)]
  settings = {name: getattr(loader, name) for name in names}
  own, offline = np.split(loader.indices, [num_sampled])
  settings |= {"indices": own, "batch_size": num_own}
  return MixedLoader(**settings, offline=offline, num_offline=num_offline)


def add_groups(
  source: Loader,
  steps: Iterable[int],
  prompts: np.ndarray,
  responses: np.ndarray,
  score: np.ndarray,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
  """Adds the groups of the data that some steps read to sampled groups.

  Args:
    source: loader of the data.
    steps: steps whose groups it adds.
    prompts: i64 [n], groups of the data whose prompts the samples have.
    responses: i32 [n, K, M] samples, -1 after the end.
    score: f32 [n, K].

  Returns:
    The three arrays with the groups of the data after the sampled ones. A
    shorter response ends with -1, and an empty slot is all -1.

  Raises:
    ValueError: some response tokens of the data are not scored.
  """
  store = source.store
  if store.scored is not None:
    raise ValueError(
      "online.offline_fraction is set, and some response tokens of the data are"
      " not scored, which a sampled response cannot have: choose data with one"
      " answer a response, or unset it"
    )
  read = np.concatenate([source.order(step) for step in steps])
  lengths = store.lengths[read, 1:]
  theirs = np.full((*lengths.shape, lengths.max()), -1, np.int32)
  for group, index in zip(theirs, read, strict=True):
    for row, tokens in zip(group, store.group(index)[1:], strict=True):
      row[: len(tokens)] = tokens
  return (
    np.concatenate([prompts, read]),
    _stack([responses, theirs], blank=-1),
    _stack([score, store.score[read]], blank=0),
  )


def sample_weights(
  responses: np.ndarray, num_sampled: int, share: float
) -> np.ndarray:
  """Returns `Sequences.sample_weight` of all groups: f32 [n, K].

  0.5 / share for both responses of a sampled pair, 0 for all others.

  Args:
    responses: i32 [n, K, M], sampled pairs, then groups of the data.
    num_sampled: number of sampled pairs.
    share: fraction of a batch's groups that are sampled.
  """
  weights = np.zeros(responses.shape[:2], np.float32)
  weights[:num_sampled, :2] = 0.5 / share
  return weights


def larger(lengths: np.ndarray, others: np.ndarray) -> np.ndarray:
  """Returns the larger of two arrays of lengths, slot by slot.

  Args:
    lengths: i32 [n, K1].
    others: i32 [n, K2].

  Returns:
    i32 [n, max(K1, K2)]; a slot that one array lacks has length 0 there.
  """
  width = max(lengths.shape[1], others.shape[1])
  return np.maximum(*(_widen(x, (width,), 0) for x in (lengths, others)))


def _stack(parts: Sequence[np.ndarray], *, blank: int) -> np.ndarray:
  """Concatenates arrays [n, ...], padded with `blank` to the largest shape."""
  shape = tuple(np.max([part.shape[1:] for part in parts], 0))
  return np.concatenate([_widen(part, shape, blank) for part in parts])


def _widen(
  values: np.ndarray, shape: tuple[int, ...], blank: int
) -> np.ndarray:
  """Pads all axes but the first with `blank`, up to the sizes in `shape`."""
  missing = zip(shape, values.shape[1:], strict=True)
  widths = [(0, 0), *((0, most - now) for most, now in missing)]
  return np.pad(values, widths, constant_values=blank)
