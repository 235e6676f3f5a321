"""Chooses the few batch shapes that a run compiles, from the data's lengths."""

import dataclasses

import numpy as np

from dpo_jax.data import packing
from dpo_jax.data.mixture import Mixture
from dpo_jax.data.packing import RowShape
from dpo_jax.data.store import Store

# Groups that trial packings may draw, and the maximum of those packings.
_TRIAL_GROUPS = 2**15
_TRIAL_BATCHES = 512

# Tokens and scored tokens of each of B groups: i64 [B] each.
Sizes = tuple[np.ndarray, np.ndarray]


@dataclasses.dataclass(frozen=True)
class BatchShape:
  """Shape that a step is compiled for: R rows of a capacity."""

  num_rows: int
  row: RowShape


@dataclasses.dataclass(frozen=True)
class Plan:
  """Batch shapes of a run.

  Attributes:
    shapes: a few shapes, ascending; the largest holds any batch.
    layout: one of packing.LAYOUTS.
    is_flat: whether all shapes have the same number of rows, over which groups
      are dealt out: the minimum for the mesh, or at least one for each group
      in the layout "padded". Otherwise rows have one length, and a batch takes
      as many as it needs.
  """

  shapes: tuple[BatchShape, ...]
  layout: str
  is_flat: bool

  def pack(
    self, num_tokens: np.ndarray, num_scored: np.ndarray
  ) -> tuple[BatchShape, list[list[int]]]:
    """Assigns groups to rows, in the smallest shape that holds the batch.

    Args:
      num_tokens: i64 [B], see `packing.group_tokens`.
      num_scored: i64 [B], scored tokens of each group.

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
    tokens, scored = _fullest(rows, (num_tokens, num_scored))
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
    indices: groups that the run uses, i64 [M].
    batch_size: groups per step.
    row_tokens: T; or 0 for `row_multiple` rows, or at least one for each group
      in the layout "padded". Their few lengths are those that pad trial batches
      least.
    row_multiple: divisor of the number of rows of a batch: devices that shard
      rows, times accumulation steps.
    layout: one of packing.LAYOUTS.
    max_shapes: maximum number of shapes; each is compiled, and fewer pad more.
    mixture: shares of several sources; None for one source.

  Returns:
    The plan; the same on every process.

  Raises:
    ValueError: rows too short for the longest group, or an unknown layout.
  """
  if layout not in packing.LAYOUTS:
    raise ValueError(
      f"data.layout={layout!r} must be one of {', '.join(packing.LAYOUTS)}"
    )
  sizes = (
    packing.group_tokens(store.lengths[indices], layout),
    store.num_scored[indices].sum(1, dtype=np.int64),
  )
  longest = int(sizes[0].max())
  if row_tokens and row_tokens < longest:
    raise ValueError(
      f"data.row_tokens={row_tokens} is shorter than the longest group, which"
      f" takes {longest} tokens: set it to {_round_up(longest, 64)} or more,"
      " or lower data.max_tokens"
    )
  probabilities = None if mixture is None else mixture.probabilities(indices)
  trials = _trial_batches(sizes, batch_size, probabilities)
  if row_tokens:
    shape = RowShape(
      num_tokens=row_tokens,
      num_scored=_scored_capacity(sizes, row_tokens),
      num_groups=row_tokens,  # no limit yet: the trial packings find one
      num_slots=store.num_slots,
    )
    shapes = _equal_rows(trials, shape, row_multiple, layout, max_shapes)
    return Plan(shapes, layout, is_flat=False)
  num_rows = row_multiple
  if layout == "padded":  # one group per row
    num_rows = _round_up(batch_size, row_multiple)
  # A batch that crosses the end of an epoch may hold a group more than once.
  epoch = mixture.smallest if mixture else len(indices)
  copies = 1 + -(-batch_size // epoch)
  sizes = (sizes[0].repeat(copies), sizes[1].repeat(copies))
  shapes = _flat_rows(trials, sizes, num_rows, store.num_slots, max_shapes)
  return Plan(shapes, layout, is_flat=True)


def _trial_batches(
  sizes: Sizes, batch_size: int, probabilities: np.ndarray | None
) -> list[Sizes]:
  """Draws at least 32 batches of groups at random, from a fixed seed.

  Args:
    sizes: tokens and scored tokens of each of M groups.
    batch_size: groups of a batch.
    probabilities: f64 [M], share of each group; None for equal shares.

  Returns:
    Sizes of the groups of each batch.
  """
  rng = np.random.default_rng(0)
  num_tokens, num_scored = sizes
  num_batches = max(min(_TRIAL_GROUPS // batch_size, _TRIAL_BATCHES), 32)
  trials = [
    rng.choice(len(num_tokens), batch_size, p=probabilities)
    for _ in range(num_batches)
  ]
  return [(num_tokens[trial], num_scored[trial]) for trial in trials]


def _fullest(rows: list[list[int]], sizes: Sizes) -> tuple[int, int]:
  """Returns the maximum tokens of a row, and the maximum scored tokens."""
  tokens, scored = (
    max(int(counts[row].sum()) for row in rows) for counts in sizes
  )
  return tokens, scored


def _flat_rows(
  trials: list[Sizes],
  sizes: Sizes,
  num_rows: int,
  num_slots: int,
  max_shapes: int,
) -> tuple[BatchShape, ...]:
  """Chooses capacities of rows that pad the trial batches least.

  The largest shape holds any batch of the groups.

  Args:
    trials: sizes of the groups of each trial batch.
    sizes: sizes of all groups, each as often as a batch can hold it.
    num_rows: rows of every shape.
    num_slots: K.
    max_shapes: maximum number of shapes.
  """
  batch_size = len(trials[0][0])
  mean_groups = -(-batch_size // num_rows)
  # Room for a row of short groups; unused groups cost nothing in a step.
  num_groups = min(batch_size, 2 * mean_groups) if mean_groups > 1 else 1
  needs = np.array(
    [
      _fullest(
        packing.deal_rows(trial[0], num_rows, max_groups=num_groups), trial
      )
      for trial in trials
    ]
  )
  worst = [int(np.sort(counts)[-num_groups:].sum()) for counts in sizes]
  multiple = 64 if worst[0] >= 512 else 16
  ladder = _cheapest_ladder(
    np.array([_round_up(n, multiple) for n in needs[:, 0]]), max_shapes - 1
  )
  shapes, below = [], 0
  for length in ladder:
    scored = needs[(needs[:, 0] > below) & (needs[:, 0] <= length), 1]
    capacity = min(_round_up(int(scored.max()), multiple), length)
    shapes.append((length, capacity))
    below = length
  tokens, scored = (_round_up(n, multiple) for n in worst)
  if not shapes or shapes[-1][0] < tokens or shapes[-1][1] < scored:
    shapes.append((max(tokens, below), scored))
  return tuple(
    BatchShape(num_rows, RowShape(tokens, scored, num_groups, num_slots))
    for tokens, scored in shapes
  )


def _cheapest_ladder(needs: np.ndarray, num_steps: int) -> list[int]:
  """Chooses capacities whose sum over all needs is least.

  Each need takes the smallest capacity that holds it. Dynamic programming over
  the distinct needs.

  Args:
    needs: i64 [n], tokens.
    num_steps: maximum number of capacities.

  Returns:
    Capacities, ascending; the last holds all needs. Empty if `num_steps` is 0.
  """
  sizes, counts = np.unique(needs, return_counts=True)
  total = np.concatenate([[0], np.cumsum(counts)])
  # best[j]: minimum cost of the j smallest sizes, and its capacities.
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


def _scored_capacity(sizes: Sizes, row_tokens: int) -> int:
  """Returns S, the scored tokens that a row of `row_tokens` tokens can hold.

  They get their share of the data's tokens, and a tenth more, but room for any
  one group. The vocabulary projection runs on the whole capacity, used or not.
  """
  num_tokens, num_scored = sizes
  share = num_scored.sum() / num_tokens.sum()
  scored = max(int(num_scored.max()), int(row_tokens * min(1.0, 1.1 * share)))
  return min(_round_up(scored, 32), row_tokens)


def _equal_rows(
  trials: list[Sizes],
  shape: RowShape,
  row_multiple: int,
  layout: str,
  max_shapes: int,
) -> tuple[BatchShape, ...]:
  """Chooses the numbers of rows of shapes whose rows have one length.

  They are the median and the maximum of the trial batches, and one row for each
  group, rounded up to a multiple; the largest `max_shapes` of these.

  Args:
    trials: sizes of the groups of each trial batch.
    shape: capacity of a row; its `num_groups` becomes the most that a trial
      row holds.
    row_multiple: divisor of the number of rows.
    layout: one of packing.LAYOUTS.
    max_shapes: maximum number of shapes.
  """
  counts, most_groups = [], 1
  for trial in trials:
    rows = packing.assign_rows(*trial, shape=shape, layout=layout)
    counts.append(len(rows))
    most_groups = max(most_groups, *map(len, rows))
  row = dataclasses.replace(shape, num_groups=most_groups)
  ladder = (int(np.median(counts)), max(counts), len(trials[0][0]))
  row_counts = sorted({_round_up(n, row_multiple) for n in ladder})
  return tuple(BatchShape(count, row) for count in row_counts[-max_shapes:])


def _round_up(value: int, multiple: int) -> int:
  return -(-value // multiple) * multiple
