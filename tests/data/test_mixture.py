"""Mixtures: shares, epochs of each source, and stores that are joined."""

import dataclasses

import numpy as np
import pytest

from dpo_jax.data import mixture, packing
from dpo_jax.data.batch_plan import make_plan
from dpo_jax.data.loader import Loader
from dpo_jax.data.store import Store
from tests import tiny

PARTS = (np.arange(0, 7), np.arange(7, 40), np.arange(40, 60))
MIXED = mixture.Mixture(PARTS, (3.0, 1.0, 6.0))


def source_of(groups):
  return np.searchsorted([7, 40], groups, "right")


def test_each_source_has_its_share_of_a_cycle():
  drawn = MIXED.draw(np.arange(10_000), seed=1)
  assert np.bincount(source_of(drawn)).tolist() == [3000, 1000, 6000]
  # And about its share of any stretch: no source waits for the others.
  stretch = np.bincount(source_of(drawn[2000:4000]), minlength=3) / 2000
  np.testing.assert_allclose(stretch, [0.3, 0.1, 0.6], atol=0.04)


def test_source_repeats_a_group_only_after_all_others():
  drawn = MIXED.draw(np.arange(25_000), seed=1)
  for source, part in enumerate(PARTS):
    own = drawn[source_of(drawn) == source]
    epochs = own[: len(own) // len(part) * len(part)].reshape(-1, len(part))
    assert len(epochs) > 50
    assert (np.sort(epochs, 1) == part).all()
    assert len({tuple(epoch) for epoch in epochs}) > len(epochs) / 2


def test_a_draw_depends_on_its_position_and_the_seed_alone():
  whole = MIXED.draw(np.arange(9_990, 10_030), seed=3)
  parts = [MIXED.draw(np.array([i]), seed=3) for i in range(9_990, 10_030)]
  assert whole.tolist() == np.concatenate(parts).tolist()
  assert whole.tolist() != MIXED.draw(np.arange(9_990, 10_030), seed=4).tolist()


def test_shares_that_round_to_zero_are_refused():
  with pytest.raises(ValueError, match="less than one in 10,000"):
    mixture.Mixture(PARTS[:2], (1.0, 1e-6))


def make_stores():
  """A pair, and a triple some of whose tokens are not scored."""
  pairs = tiny.make_groups(5, num_slots=2, seed=0)
  triples = tiny.make_groups(4, num_slots=3, seed=1)
  stores = []
  for groups, name in ((pairs, "a"), (triples, "b")):
    score = np.tile(-np.arange(len(groups[0]) - 1), (len(groups), 1))
    store = Store.from_groups(groups, score, digest=name)
    stores.append(
      dataclasses.replace(
        store,
        report={"content": name},
        prompt_hashes=np.arange(len(groups), dtype=np.uint32),
      )
    )
  masks = np.random.default_rng(0).random(len(stores[1].tokens)) < 0.5
  stores[1] = dataclasses.replace(stores[1], scored=masks)
  return stores


def test_a_joined_store_holds_the_groups_of_its_parts():
  stores = make_stores()
  joined = Store.join(stores)
  assert (len(joined), joined.num_slots) == (9, 3)
  whole = [store.group(i) for store in stores for i in range(len(store))]
  masks = [store.masks(i) for store in stores for i in range(len(store))]
  counts = np.concatenate(
    [np.pad(stores[0].num_scored, ((0, 0), (0, 1))), stores[1].num_scored]
  )
  np.testing.assert_array_equal(joined.num_scored, counts)
  for index, (group, mask) in enumerate(zip(whole, masks, strict=True)):
    empty = [[]] * (4 - len(group))
    got = [part.tolist() for part in joined.group(index)]
    assert got == [*(part.tolist() for part in group), *empty]
    got = [part.tolist() for part in joined.masks(index)]
    assert got == [*(part.tolist() for part in mask), *empty]
  digests = {s.digest for s in (joined, Store.join(stores[::-1]), *stores)}
  assert len(digests) == 4


@pytest.mark.parametrize("layout", packing.LAYOUTS)
def test_a_plan_holds_batches_that_repeat_a_small_source(layout):
  """One long group with most of the weight fills whole batches."""
  groups = tiny.make_groups(20, num_slots=2)
  groups[0] = [np.ones(60, np.int32)] * 3
  store = Store.from_groups(groups, np.tile([0.0, -1.0], (20, 1)))
  mixed = mixture.Mixture((np.arange(1), np.arange(1, 20)), (9.0, 1.0))
  plan = make_plan(
    store,
    np.arange(20),
    batch_size=16,
    row_tokens=0,
    row_multiple=2,
    layout=layout,
    mixture=mixed,
  )
  loader = Loader(store, np.arange(20), plan, 16, seed=0, mixture=mixed)
  for step in range(30):
    ids = loader.batch(step).example_ids
    assert (
      np.sort(ids[ids >= 0]).tolist() == np.sort(loader.order(step)).tolist()
    )


def test_shapes_follow_the_weights_of_the_sources():
  """A source that is seldom drawn does not decide the usual shape."""
  groups = tiny.make_groups(200, num_slots=2)
  for i in range(100):
    groups[i] = [np.ones(100, np.int32)] * 3
  store = Store.from_groups(groups, np.tile([0.0, -1.0], (200, 1)))
  mixed = mixture.Mixture((np.arange(100), np.arange(100, 200)), (1.0, 99.0))
  shares = mixed.probabilities(np.arange(200))
  np.testing.assert_allclose(shares, np.repeat([1e-4, 99e-4], 100))

  def capacity(planned_for):
    plan = make_plan(
      store,
      np.arange(200),
      batch_size=4,
      row_tokens=0,
      row_multiple=1,
      layout="packed",
      max_shapes=3,
      mixture=planned_for,
    )
    loader = Loader(store, np.arange(200), plan, 4, seed=0, mixture=mixed)
    return sum(loader.batch(step).tokens.size for step in range(100))

  assert capacity(mixed) < 0.8 * capacity(None)
