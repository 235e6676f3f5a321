"""The loader: a batch is a function of (seed, step)."""

from collections import Counter
import concurrent.futures
import dataclasses
import itertools
import math
import threading

import jax
import numpy as np
import pytest

from dpo_jax.data import batch_plan, packing
from dpo_jax.data.batch_plan import make_plan
from dpo_jax.data.loader import Loader, prefetch
from dpo_jax.data.store import Store
from tests import tiny


def make_store(groups):
  """Makes a store in memory; all scores differ."""
  shape = (len(groups), len(groups[0]) - 1)
  return Store.from_groups(groups, np.arange(math.prod(shape)).reshape(shape))


def make_loader(
  num=23,
  batch_size=5,
  seed=0,
  *,
  indices=None,
  row_tokens=64,
  row_multiple=4,
  layout="shared",
  groups=None,
  max_shapes=4,
  **fields,
):
  store = make_store(groups or tiny.make_groups(num))
  indices = np.arange(len(store)) if indices is None else np.array(indices)
  plan = make_plan(
    store,
    indices,
    batch_size=batch_size,
    row_tokens=row_tokens,
    row_multiple=row_multiple,
    layout=layout,
    max_shapes=max_shapes,
  )
  return Loader(store, indices, plan, batch_size, seed, **fields)


def groups_of(batch):
  """Returns the groups of a batch, ascending."""
  return sorted(batch.example_ids[batch.example_ids >= 0].tolist())


def assert_equal(one, other):
  leaves = zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True)
  for a, b in leaves:
    np.testing.assert_array_equal(a, b)


# batch(seed, step).


def test_a_batch_is_a_function_of_seed_and_step():
  loader, other = make_loader(seed=3), make_loader(seed=3)
  steps = [7, 0, 30, 7]
  first = {step: loader.batch(step) for step in steps}
  for step in reversed(steps):
    assert_equal(first[step], other.batch(step))
  assert groups_of(first[0]) != groups_of(first[7])


@pytest.mark.parametrize("batch_size", [5, 23, 30])
def test_every_step_has_exactly_batch_size_groups(batch_size):
  loader = make_loader(num=23, batch_size=batch_size)
  for step in range(10):
    batch = loader.batch(step)
    assert len(groups_of(batch)) == batch_size
    assert groups_of(batch) == sorted(loader.order(step).tolist())


@pytest.mark.parametrize("batch_size", [1, 4, 5, 23, 30])
def test_every_epoch_has_every_group_once(batch_size):
  """Epochs follow each other without a gap, also within a batch."""
  num = 23
  loader = make_loader(num=num, batch_size=batch_size)
  num_steps = -(-4 * num // batch_size)
  stream = np.concatenate([loader.order(s) for s in range(num_steps)])
  epochs = [stream[e * num : (e + 1) * num].tolist() for e in range(4)]
  for epoch in epochs:
    assert sorted(epoch) == list(range(num))
  assert len({tuple(epoch) for epoch in epochs}) == 4


def test_only_the_given_groups_are_used():
  indices = [3, 4, 8, 15, 16, 20]
  loader = make_loader(indices=indices, batch_size=3)
  seen = Counter(i for step in range(4) for i in loader.order(step).tolist())
  assert seen == dict.fromkeys(indices, 2)


def test_seeds_give_different_orders():
  orders = {tuple(make_loader(seed=s).order(0).tolist()) for s in range(20)}
  assert len(orders) == 20


def test_a_batch_holds_tokens_scores_and_references_of_its_groups():
  ref_logps = -np.arange(46, dtype=np.float32).reshape(23, 2)
  loader = make_loader(batch_size=6, ref_logps=ref_logps)
  batch = loader.batch(4)
  for r, g in np.argwhere(batch.example_ids >= 0):
    i = int(batch.example_ids[r, g])
    np.testing.assert_array_equal(batch.score[r, g], [2 * i, 2 * i + 1])
    np.testing.assert_array_equal(batch.ref_logps[r, g], ref_logps[i])
    for k in range(2):
      scored = batch.targets[r][batch.slots[r] == g * 2 + k]
      np.testing.assert_array_equal(scored, loader.store.group(i)[1 + k])


def test_a_loader_without_groups_is_refused():
  loader = make_loader()
  with pytest.raises(ValueError, match="at least one group"):
    dataclasses.replace(loader, indices=np.array([], int))


# Processes.


@pytest.mark.parametrize("layout", packing.LAYOUTS)
@pytest.mark.parametrize("process_count", [1, 2, 4])
def test_rows_of_all_processes_are_the_whole_batch(process_count, layout):
  fields = dict(num=23, batch_size=7, row_multiple=4, layout=layout)
  whole = make_loader(**fields)
  parts = [
    make_loader(**fields, process_index=p, process_count=process_count)
    for p in range(process_count)
  ]
  for step in (0, 1, 5):
    batches = [part.batch(step) for part in parts]
    rows = {len(batch.tokens) for batch in batches}
    assert len(rows) == 1
    joined = jax.tree.map(lambda *leaves: np.concatenate(leaves), *batches)
    assert_equal(joined, whole.batch(step))
  for index in range(whole.num_eval_batches()):
    batches = [part.eval_batch(index) for part in parts]
    joined = jax.tree.map(lambda *leaves: np.concatenate(leaves), *batches)
    assert_equal(joined, whole.eval_batch(index))


@pytest.mark.fault(52)
def test_a_process_without_groups_has_the_same_shape():
  fields = dict(num=3, batch_size=1, row_multiple=4)
  batches = [
    make_loader(**fields, process_index=p, process_count=4).batch(0)
    for p in range(4)
  ]
  assert [len(groups_of(batch)) for batch in batches] == [1, 0, 0, 0]
  assert {batch.tokens.shape for batch in batches} == {(1, 64)}


# Evaluation.


@pytest.mark.parametrize("batch_size", [1, 4, 23, 40])
def test_eval_batches_cover_every_group_once(batch_size):
  loader = make_loader(num=23, batch_size=batch_size)
  sizes, seen = [], []
  for index in range(loader.num_eval_batches()):
    found = groups_of(loader.eval_batch(index))
    sizes.append(len(found))
    seen += found
  assert sorted(seen) == list(range(23))
  assert set(sizes[:-1]) <= {batch_size}
  assert 1 <= sizes[-1] <= batch_size


def test_eval_batches_are_sorted_by_length_for_any_seed():
  loaders = [make_loader(seed=s) for s in (0, 1)]
  longest = 0
  totals = loaders[0].store.lengths.sum(1)
  for index in range(loaders[0].num_eval_batches()):
    batch, other = (loader.eval_batch(index) for loader in loaders)
    assert_equal(batch, other)
    found = totals[groups_of(batch)]
    assert found.min() >= longest
    longest = found.max()


def test_eval_batches_of_flat_rows_have_similar_token_counts():
  """Groups of all lengths are in each batch, so one shape holds nearly all."""
  loader = make_loader(num=64, batch_size=8, row_tokens=0, row_multiple=1)
  sizes = [
    (loader.eval_batch(i).segments > 0).sum()
    for i in range(loader.num_eval_batches())
  ]
  by_length = np.sort(loader.store.lengths.sum(1)).reshape(-1, 8).sum(1)
  assert np.ptp(sizes) < np.ptp(by_length) / 4


# Shapes.


@pytest.mark.parametrize("layout", packing.LAYOUTS)
@pytest.mark.parametrize("row_tokens", [0, 64])
@pytest.mark.parametrize("max_shapes", [1, 2, 4])
def test_shapes_come_from_the_plan(layout, row_tokens, max_shapes):
  loader = make_loader(
    num=60,
    batch_size=12,
    row_tokens=row_tokens,
    layout=layout,
    max_shapes=max_shapes,
  )
  shapes = loader.plan.shapes
  assert len(shapes) <= max_shapes
  known = set()
  for shape in shapes:
    assert shape.num_rows % 4 == 0
    row = shape.row
    known.add((shape.num_rows, row.num_tokens, row.num_scored, row.num_groups))
  for step in range(40):
    batch = loader.batch(step)
    assert groups_of(batch) == sorted(loader.order(step).tolist())
    num_rows, num_tokens = batch.tokens.shape
    seen = (num_rows, num_tokens, batch.targets.shape[1], batch.valid.shape[1])
    assert seen in known


@pytest.mark.parametrize("row_multiple", [1, 4])
def test_flat_rows_are_less_than_a_tenth_padding(row_multiple):
  """On lengths like those of real preference data."""
  rng = np.random.default_rng(0)
  lengths = np.exp(rng.normal(4.4, 0.6, (256, 3))).astype(int).clip(1, 400)
  groups = [[np.zeros(n, np.int32) for n in group] for group in lengths]
  loader = make_loader(
    groups=groups, batch_size=32, row_tokens=0, row_multiple=row_multiple
  )
  padding = [packing.padding_fraction(loader.batch(i)) for i in range(60)]
  assert np.mean(padding) < 0.1


@pytest.mark.parametrize("layout", packing.LAYOUTS)
@pytest.mark.parametrize("row_multiple", [1, 4])
def test_the_largest_shape_holds_the_worst_batch(layout, row_multiple):
  """Four of 300 groups are long: no trial batch holds all of them twice."""
  big = [np.full(90, 1, np.int32)] * 3
  loader = make_loader(
    groups=[*tiny.make_groups(296), *[big] * 4],
    batch_size=8,
    row_tokens=0,
    row_multiple=row_multiple,
    layout=layout,
  )
  worst = dataclasses.replace(loader, indices=np.arange(296, 300))
  assert groups_of(worst.batch(0)) == sorted([*range(296, 300)] * 2)


@pytest.mark.parametrize("seed", range(5))
def test_cheapest_ladder_is_optimal(seed):
  """Against all ladders."""
  rng = np.random.default_rng(seed)
  needs = rng.integers(1, 9, 20)
  sizes = np.unique(needs)

  def waste(ladder):
    ladder = np.array(sorted(ladder))
    return (ladder[np.searchsorted(ladder, needs)] - needs).sum()

  for num_steps in (1, 2, 3, 20):
    ladder = batch_plan._cheapest_ladder(needs, num_steps)
    assert len(ladder) <= num_steps and ladder == sorted(ladder)
    least = min(
      waste((*steps, sizes[-1]))
      for k in range(min(num_steps, len(sizes)))
      for steps in itertools.combinations(sizes[:-1], k)
    )
    assert waste(ladder) == least


def test_the_largest_row_count_holds_the_worst_batch():
  """One of fifty groups fills a row; a batch of this group alone must fit."""
  small = tiny.make_groups(49)
  big = [np.full(20, 1, np.int32)] * 3
  loader = make_loader(groups=[*small, big], batch_size=6, row_multiple=1)
  assert loader.plan.shapes[0].num_rows < 6
  worst = dataclasses.replace(loader, indices=np.full(6, 49))
  batch = worst.batch(0)
  assert groups_of(batch) == [49] * 6
  assert batch.tokens.shape[0] == loader.plan.shapes[-1].num_rows == 6


def test_plan_limits_the_groups_of_a_row():
  """A batch of the shortest groups alone would put more into a row."""
  groups = [[np.full(n, 1, np.int32)] * 3 for n in [1] * 6 + [10] * 60]
  loader = make_loader(groups=groups, batch_size=6, row_multiple=1)
  assert loader.plan.shapes[0].row.num_groups < 6
  shortest = dataclasses.replace(loader, indices=np.arange(6))
  batch = shortest.batch(0)
  assert groups_of(batch) == list(range(6))


def test_plan_has_room_for_the_groups_that_fit_a_row():
  groups = [[np.full(7, 1, np.int32)] * 3] * 20  # 21 tokens: three in 64
  loader = make_loader(groups=groups, batch_size=8, row_multiple=1)
  assert loader.plan.shapes[0].row.num_groups == 3
  assert [shape.num_rows for shape in loader.plan.shapes] == [3, 8]


@pytest.mark.parametrize("row_tokens", [0, 64])
def test_all_processes_have_the_same_batch_shapes(row_tokens):
  """Also where numpy's global generator differs between processes."""
  loaders = []
  for index in range(2):
    np.random.seed(index)
    loaders.append(
      make_loader(
        num=60,
        batch_size=12,
        row_tokens=row_tokens,
        process_index=index,
        process_count=2,
      )
    )
  assert loaders[0].plan == loaders[1].plan
  for step in range(20):
    shapes = [jax.tree.map(np.shape, loader.batch(step)) for loader in loaders]
    assert shapes[0] == shapes[1]


def test_a_plan_without_row_tokens_holds_the_longest_group():
  for layout in packing.LAYOUTS:
    loader = make_loader(row_tokens=0, layout=layout)
    taken = packing.group_tokens(loader.store.lengths, layout)
    assert loader.plan.shapes[-1].row.num_tokens >= taken.max()


def test_error_for_short_rows_suggests_a_length():
  groups = [[np.full(30, 1, np.int32)] * 3, *tiny.make_groups(5)]
  with pytest.raises(ValueError) as caught:
    make_loader(groups=groups, row_tokens=64)
  message = str(caught.value)
  assert "data.row_tokens=64" in message
  assert "takes 90 tokens" in message
  assert "set it to 128 or more" in message
  loader = make_loader(groups=groups, row_tokens=128)
  assert loader.plan.shapes[0].row.num_tokens == 128


def test_error_for_an_unknown_layout_lists_the_layouts():
  with pytest.raises(ValueError, match="'sharde' must be one of shared, pack"):
    make_loader(layout="sharde")


# prefetch.


@pytest.mark.parametrize("depth", [1, 2, 5])
@pytest.mark.parametrize(("start", "stop"), [(0, 8), (3, 4), (5, 5), (6, 2)])
def test_prefetch_keeps_the_order(start, stop, depth):
  results = list(prefetch(lambda i: i * i, start, stop, depth=depth))
  assert results == [i * i for i in range(start, stop)]


def test_prefetch_computes_ahead():
  second = threading.Event()

  def make(index):
    if index == 1:
      second.set()
    return index

  results = prefetch(make, 0, 5)
  assert next(results) == 0
  assert second.wait(10)
  results.close()


@pytest.mark.parametrize("depth", [1, 3])
def test_prefetch_computes_depth_items_ahead(depth):
  made, all_made = [], threading.Event()

  def make(index):
    made.append(index)
    if len(made) == 4 + depth:
      all_made.set()

  results = prefetch(make, 0, 100, depth=depth)
  for _ in range(4):
    next(results)
  assert all_made.wait(10)
  results.close()  # waits for the thread
  assert len(made) == 4 + depth


def test_prefetch_stops_when_closed():
  made = []
  before = set(threading.enumerate())
  results = prefetch(made.append, 0, 1000)
  for _ in results:
    break
  results.close()
  # The thread has ended, so no more can be made.
  assert set(threading.enumerate()) <= before
  assert len(made) <= 3


def test_prefetch_cancels_unstarted_work(monkeypatch):
  made, started, release = [], threading.Event(), threading.Event()

  def make(index):
    made.append(index)
    if index == 1:
      started.set()
      assert release.wait(10)

  is_cancelled = []
  cancel = concurrent.futures.Future.cancel

  def spy(future):
    is_cancelled.append(cancel(future))
    if len(is_cancelled) == 6:
      release.set()
    return is_cancelled[-1]

  results = prefetch(make, 0, 100, depth=6)
  next(results)
  assert started.wait(10)
  monkeypatch.setattr(concurrent.futures.Future, "cancel", spy)
  results.close()
  assert is_cancelled == [False] + [True] * 5
  assert made == [0, 1]


def test_prefetch_raises_in_place_of_the_result():
  def make(index):
    if index == 3:
      raise OSError("Input/output error")
    return index

  results = prefetch(make, 0, 6)
  assert [next(results) for _ in range(3)] == [0, 1, 2]
  with pytest.raises(OSError, match="Input/output error"):
    next(results)


def test_prefetched_batches_equal_the_loader_s():
  loader = make_loader()
  batches = list(prefetch(loader.batch, 2, 8))
  for step, batch in zip(range(2, 8), batches, strict=True):
    assert_equal(batch, loader.batch(step))
