"""Packing: every token once, and every layout sees the same contexts."""

from collections import Counter

import hypothesis
from hypothesis import strategies as st
import numpy as np
import pytest

from dpo_jax.data import packing
from dpo_jax.data.packing import LAYOUTS, RowShape
from dpo_jax.types import FIELDS, token_masks
from tests import tiny

MASKS = sorted(token_masks(frozenset(FIELDS)))

EXAMPLES = hypothesis.settings(max_examples=60, deadline=None, derandomize=True)


def scored_contexts(batch):
  """Finds the context of each scored token by plain loops.

  Returns:
    (group, slot, context, target) of every scored token, counted. A context
    is what the hidden state at the predictor has seen: tokens up to it, of
    its segment, in the prompt or in its own branch.
  """
  num_slots = batch.score.shape[2]
  found = Counter()
  for r in range(len(batch.tokens)):
    for target, predictor, slot in zip(
      batch.targets[r], batch.predictors[r], batch.slots[r], strict=True
    ):
      if slot == batch.score.shape[1] * num_slots:
        continue
      group, k = divmod(int(slot), num_slots)
      context = []
      for j in range(predictor + 1):
        is_same = batch.segments[r, j] == batch.segments[r, predictor]
        in_sight = batch.branches[r, j] in (0, batch.branches[r, predictor])
        if is_same and in_sight:
          # Positions count what is seen, without gaps.
          assert batch.positions[r, j] == len(context)
          context.append(int(batch.tokens[r, j]))
      found[
        int(batch.example_ids[r, group]), k, tuple(context), int(target)
      ] += 1
  return found


def expected_contexts(groups, scored=None):
  found = Counter()
  for i, (prompt, *responses) in enumerate(groups):
    for k, response in enumerate(responses):
      text = [*map(int, prompt), *map(int, response)]
      for t in range(len(prompt), len(text)):
        if scored is None or scored[i][k][t - len(prompt)]:
          found[i, k, tuple(text[:t]), text[t]] += 1
  return found


@st.composite
def group_lists(draw):
  """Groups of up to 3 responses, some empty but never all."""
  num_slots = draw(st.integers(1, 3))
  groups = []
  for _ in range(draw(st.integers(1, 6))):
    sizes = draw(
      st.lists(st.integers(0, 5), min_size=num_slots, max_size=num_slots)
    )
    if not any(sizes):
      sizes[0] = 1
    sizes = [draw(st.integers(1, 6)), *sizes]
    # Few ids, so that texts repeat within and across groups.
    ids = draw(
      st.lists(st.integers(0, 3), min_size=sum(sizes), max_size=sum(sizes))
    )
    ends = np.cumsum(sizes)[:-1]
    groups.append(np.split(np.array(ids, np.int32), ends))
  return groups


@EXAMPLES
@hypothesis.given(groups=group_lists(), layout=st.sampled_from(LAYOUTS))
def test_every_scored_token_sees_its_prompt_and_its_response(groups, layout):
  batch = tiny.pack(groups, layout, num_tokens=40)
  assert scored_contexts(batch) == expected_contexts(groups)


@EXAMPLES
@hypothesis.given(
  groups=group_lists(), layout=st.sampled_from(LAYOUTS), data=st.data()
)
def test_tokens_that_are_not_scored_are_seen_and_are_no_targets(
  groups, layout, data
):
  sizes = [[len(response) for response in group[1:]] for group in groups]
  flags = st.lists(st.booleans(), min_size=5, max_size=5)
  scored = [
    [np.array(data.draw(flags)[:size], bool) for size in group]
    for group in sizes
  ]
  batch = tiny.pack(groups, layout, num_tokens=40, scored=scored)
  assert scored_contexts(batch) == expected_contexts(groups, scored)
  whole = tiny.pack(groups, layout, num_tokens=40)
  for name in ("tokens", "positions", "segments", "branches", "last_tokens"):
    np.testing.assert_array_equal(getattr(batch, name), getattr(whole, name))
  np.testing.assert_array_equal(batch.valid, whole.valid)


@EXAMPLES
@hypothesis.given(groups=group_lists(), layout=st.sampled_from(LAYOUTS))
def test_every_token_lands_exactly_once(groups, layout):
  batch = tiny.pack(groups, layout, num_tokens=40)
  expected = Counter()
  for prompt, *responses in groups:
    filled = [response for response in responses if len(response)]
    copies = 1 if layout == "shared" else len(filled)
    for part in (*[prompt] * copies, *filled):
      expected.update(map(int, part))
  assert Counter(batch.tokens[batch.segments > 0].tolist()) == expected
  is_padding = batch.segments == 0
  for field in (batch.tokens, batch.positions, batch.branches):
    assert not field[is_padding].any()
  lengths = np.array([[len(p) for p in g] for g in groups])
  taken = packing.group_tokens(lengths, layout)
  assert taken.sum() == (~is_padding).sum() == expected.total()


@EXAMPLES
@hypothesis.given(
  sizes=st.lists(
    st.tuples(st.integers(1, 8), st.integers(1, 5)), min_size=8, max_size=25
  ),
  num_groups=st.integers(1, 5),
  layout=st.sampled_from(LAYOUTS),
)
def test_every_group_has_one_row_and_no_row_overflows(
  sizes, num_groups, layout
):
  num_tokens, num_scored = np.array(sizes).T
  shape = RowShape(20, 12, num_groups, 2)
  rows = packing.assign_rows(num_tokens, num_scored, shape=shape, layout=layout)
  assert sorted(i for row in rows for i in row) == list(range(len(sizes)))
  for row in rows:
    assert 0 < len(row) <= (1 if layout == "padded" else num_groups)
    assert num_tokens[row].sum() <= 20
    assert num_scored[row].sum() <= 12


def test_a_row_takes_as_many_groups_as_it_has_room_for():
  """Four groups of a token, two to a row."""
  ones = np.ones(4, np.int64)
  rows = packing.assign_rows(
    ones, ones, shape=RowShape(10, 10, 2, 2), layout="shared"
  )
  assert rows == [[0, 1], [2, 3]]


def test_first_fit_decreasing_by_hand():
  num_tokens = np.array([4, 8, 3, 5, 7, 1])
  rows = packing.assign_rows(
    num_tokens,
    np.ones(6, np.int64),
    shape=RowShape(10, 10, 10, 2),
    layout="shared",
  )
  # 8 | 7 | 5 | 4 joins 5 | 3 joins 7 | 1 joins 8.
  assert rows == [[1, 5], [4, 2], [3, 0]]


# A row by hand: one pair and one group whose second response is missing.
GROUPS = [
  [np.array([10, 11, 12]), np.array([20, 21]), np.array([30])],
  [np.array([13]), np.array([40, 41]), np.array([], int)],
]
BY_HAND = {
  "shared": {
    "tokens": [10, 11, 12, 20, 21, 30, 13, 40, 41, 0, 0, 0],
    "positions": [0, 1, 2, 3, 4, 3, 0, 1, 2, 0, 0, 0],
    "segments": [1, 1, 1, 1, 1, 1, 2, 2, 2, 0, 0, 0],
    "branches": [0, 0, 0, 1, 1, 2, 0, 1, 1, 0, 0, 0],
    "predictors": [2, 3, 2, 6, 7, 0],
    "last_tokens": [[4, 5], [8, 0], [0, 0]],
  },
  "packed": {
    "tokens": [10, 11, 12, 20, 21, 10, 11, 12, 30, 13, 40, 41],
    "positions": [0, 1, 2, 3, 4, 0, 1, 2, 3, 0, 1, 2],
    "segments": [1, 1, 1, 1, 1, 2, 2, 2, 2, 3, 3, 3],
    "branches": [0, 0, 0, 1, 1, 0, 0, 0, 1, 0, 1, 1],
    "predictors": [2, 3, 7, 9, 10, 0],
    "last_tokens": [[4, 8], [11, 0], [0, 0]],
  },
}


@pytest.mark.parametrize("layout", BY_HAND)
def test_a_row_by_hand(layout):
  ref_logps = np.array([[-1.0, -2.0], [-3.0, 0.0]], np.float32)
  batch = packing.fill_rows(
    [[0, 1]],
    GROUPS,
    np.array([[1, 0], [0.5, 0]], np.float32),
    np.array([7, 9]),
    shape=RowShape(12, 6, 3, 2),
    layout=layout,
    ref_logps=ref_logps,
  )
  expected = BY_HAND[layout] | {
    "targets": [20, 21, 30, 40, 41, 0],
    "slots": [0, 0, 1, 2, 2, 6],
    "score": [[1, 0], [0.5, 0], [0, 0]],
    "valid": [[True, True], [True, False], [False, False]],
    "example_ids": [7, 9, -1],
    "ref_logps": [[-1, -2], [-3, 0], [0, 0]],
  }
  for name, value in expected.items():
    field = getattr(batch, name)
    np.testing.assert_array_equal(field, [value], err_msg=name)
  types = {str(getattr(batch, name).dtype) for name in expected}
  assert types == {"int32", "float32", "bool"}


@pytest.mark.parametrize("layout", BY_HAND)
def test_a_row_with_unscored_tokens_by_hand(layout):
  batch = tiny.pack(
    GROUPS,
    layout,
    num_tokens=12,
    scored=[
      [np.array([False, True]), np.array([True])],
      [np.array([True, False]), np.array([], bool)],
    ],
  )
  predictors = {"shared": [3, 2, 6], "packed": [3, 7, 9]}[layout]
  assert batch.targets[0, :4].tolist() == [21, 30, 40, 0]
  assert batch.predictors[0, :3].tolist() == predictors
  assert batch.slots[0, :4].tolist() == [0, 1, 2, 16]
  assert batch.last_tokens[0, 0].tolist() == BY_HAND[layout]["last_tokens"][0]


def marked(groups, layout, name, scored=None):
  """Places among its scored tokens of each (group, slot)'s marked ones."""
  lengths = np.array([[len(part) for part in group] for group in groups])
  shape = RowShape(64, 64, 8, 2)
  rows = packing.assign_rows(
    packing.group_tokens(lengths, layout),
    lengths[:, 1:].sum(1),
    shape=shape,
    layout=layout,
  )
  batch = packing.fill_rows(
    rows,
    groups,
    np.zeros((len(groups), 2), np.float32),
    np.arange(len(groups)),
    shape=shape,
    layout=layout,
    ref_logps=None,
    token_masks=frozenset({name}),
    scored=scored,
  )
  mask = batch.token_masks[name]
  assert not mask[batch.slots == 16].any()
  return {
    (int(batch.example_ids[r, g]), k): np.flatnonzero(
      mask[r][batch.slots[r] == g * 2 + k]
    ).tolist()
    for r, g, k in np.argwhere(batch.valid)
  }


@pytest.mark.parametrize("name", MASKS)
def test_masks_count_scored_tokens(name):
  groups = tiny.make_groups(12)
  scored = tiny.make_masks(groups)
  by_layout = [marked(groups, layout, name, scored) for layout in LAYOUTS]
  assert by_layout[0] == by_layout[1] == by_layout[2]
  assert len(by_layout[0]) == 24
  for (i, k), places in by_layout[0].items():
    shortest = min(mask.sum() for mask in scored[i])
    assert len(places) == shortest
    if name == "head" or scored[i][k].sum() == shortest:
      assert places == list(range(shortest))


@pytest.mark.parametrize("name", MASKS)
def test_masks_mark_as_many_tokens_as_the_shortest_response_has(name):
  groups = tiny.make_groups(12)
  by_layout = [marked(groups, layout, name) for layout in LAYOUTS]
  assert by_layout[0] == by_layout[1] == by_layout[2]
  for (i, k), places in by_layout[0].items():
    shortest = min(len(groups[i][1]), len(groups[i][2]))
    assert len(places) == shortest
    if name == "head" or len(groups[i][1 + k]) == shortest:
      assert places == list(range(shortest))
  if name == "sampled":
    gaps = [places[-1] >= len(places) for places in by_layout[0].values()]
    assert sum(gaps) >= 6


def test_masks_that_nothing_asks_for_are_absent():
  batch = tiny.pack(tiny.make_groups(3))
  assert batch.token_masks == {}


def test_padded_rows_hold_one_group_each():
  batch = tiny.pack(tiny.make_groups(5), "padded")
  assert batch.tokens.shape[0] == 5
  assert sorted(batch.example_ids[:, 0].tolist()) == list(range(5))
  assert (batch.example_ids[:, 1:] == -1).all()


def test_a_missing_first_response_leaves_its_slot_empty():
  groups = [[np.array([5, 6]), np.array([], int), np.array([7, 8])]]
  batch = tiny.pack(groups, num_tokens=8)
  assert scored_contexts(batch) == {
    (0, 1, (5, 6), 7): 1,
    (0, 1, (5, 6, 7), 8): 1,
  }
  assert batch.valid[0, 0].tolist() == [False, True]


def test_empty_rows_hold_nothing():
  groups = tiny.make_groups(3)
  batch = tiny.pack(groups, num_rows=4)
  empty = batch.segments.sum(1) == 0
  assert empty.sum() >= 1
  assert not batch.valid[empty].any()
  assert (batch.example_ids[empty] == -1).all()
  assert (batch.slots[empty] == batch.valid[0].size).all()
  assert scored_contexts(batch) == expected_contexts(groups)


def test_rows_without_any_group_are_still_rows():
  batch = packing.fill_rows(
    [[], []],
    [],
    np.zeros((0, 2), np.float32),
    np.zeros(0, np.int64),
    shape=RowShape(6, 4, 2, 2),
    layout="shared",
    ref_logps=None,
  )
  assert batch.tokens.shape == (2, 6)
  assert not batch.valid.any()
  assert batch.ref_logps is None


@pytest.mark.parametrize(
  ("num_tokens", "num_scored", "message"),
  [
    ([5, 11, 8], [1, 1, 1], "takes 11 tokens, 1 of them scored"),
    # The group that is too long for its scored tokens, not the longest.
    ([9, 7, 8], [2, 6, 3], "takes 7 tokens, 6 of them scored"),
  ],
)
def test_a_group_that_no_row_can_hold_is_named(num_tokens, num_scored, message):
  with pytest.raises(ValueError) as caught:
    packing.assign_rows(
      np.array(num_tokens),
      np.array(num_scored),
      shape=RowShape(10, 5, 4, 2),
      layout="shared",
    )
  assert message in str(caught.value)
  assert "a row holds 10, 5 of them" in str(caught.value)


def test_padding_fraction_counts_the_slots_without_tokens():
  batch = tiny.pack(GROUPS, num_tokens=12)  # 9 tokens
  assert packing.padding_fraction(batch) == pytest.approx(3 / 12)


def test_a_group_without_a_prompt_is_refused():
  groups = tiny.make_groups(3)
  groups[1][0] = groups[1][0][:0]
  with pytest.raises(ValueError, match="group 1 has an empty prompt"):
    tiny.pack(groups)
  # A slot without responses may stay empty.
  groups[1] = [part[:0] for part in groups[1]]
  assert tiny.pack(groups).valid.sum() == 4
