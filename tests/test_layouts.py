"""Padded = packed = packed with shared prompts: loss and gradients."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dpo_jax.data import packing, sources, store, tokenizers
from dpo_jax.losses import build_objective
from dpo_jax.models import huggingface
from dpo_jax.models.decoder import Policy
from dpo_jax.training import forward
from tests import tiny

pytestmark = pytest.mark.usefixtures("unoptimized")

LAYOUTS = packing.LAYOUTS


def loss_and_grads(policy, params, batch):
  """DPO's objective of a batch, and its gradient."""
  objective = build_objective({"name": "dpo", "beta": 0.3})

  def loss(params):
    sequences = forward.read_sequences(
      policy, params, None, batch, chunk_size=32
    )
    per_group, _, _ = objective.apply(sequences, ())
    num_groups = objective.valid_groups(sequences.valid).sum()
    return per_group.sum() / num_groups

  return jax.jit(jax.value_and_grad(loss))(params)


def assert_same(results, tolerance=1e-5):
  first, *others = results
  for other in others:
    np.testing.assert_allclose(other[0], first[0], rtol=tolerance)
    largest = max(float(jnp.abs(x).max()) for x in jax.tree.leaves(first[1]))
    same = functools.partial(
      np.testing.assert_allclose, atol=tolerance * largest
    )
    jax.tree.map(same, first[1], other[1])


def text_groups(tokenizer, num, tmp_path, spec):
  groups = store.build_store(
    sources.open_source(spec),
    tokenizer,
    store.Limits(256, 128),
    str(tmp_path),
  )
  return [groups.group(i) for i in range(num)]


def all_layouts(groups, num_tokens, scored=None):
  rng = np.random.default_rng(0)
  ref_logps = rng.normal(-30, 3, (len(groups), 2)).astype(np.float32)
  return [
    tiny.pack(groups, layout, num_tokens, ref_logps=ref_logps, scored=scored)
    for layout in LAYOUTS
  ]


@pytest.mark.slow
def test_layouts_agree_on_the_synthetic_task(tmp_path):
  tokenizer = tokenizers.ByteTokenizer()
  groups = text_groups(tokenizer, 6, tmp_path, "synthetic:review_pairs:20")
  policy = tiny.make_policy(vocab_size=384)
  params = tiny.make_params(policy)
  batches = all_layouts(groups, 512)
  assert len({batch.tokens.shape[0] for batch in batches}) == len(batches)
  assert_same([loss_and_grads(policy, params, b) for b in batches])


@pytest.mark.slow
def test_layouts_agree_with_the_weights_of_stories(real_data, tmp_path):
  folder = str(real_data / "stories260k")
  policy = Policy(huggingface.load_config(folder))
  device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
  shardings = jax.tree.map(lambda _: device, policy.abstract_params())
  params = huggingface.load_params(folder, policy, shardings)
  tokenizer = tokenizers.HFTokenizer(folder)
  groups = text_groups(tokenizer, 5, tmp_path, "synthetic:review_pairs:20")
  batches = all_layouts(groups, 512)
  assert_same([loss_and_grads(policy, params, b) for b in batches])


@pytest.mark.slow
def test_layouts_agree_where_some_turns_are_not_scored():
  policy = tiny.make_policy()
  params = tiny.make_params(policy)
  groups = tiny.make_groups(6)
  scored = tiny.make_masks(groups)
  batches = all_layouts(groups, 64, scored)
  assert len({batch.tokens.shape[0] for batch in batches}) > 1
  results = [loss_and_grads(policy, params, b) for b in batches]
  assert_same(results)
  whole = loss_and_grads(policy, params, all_layouts(groups, 64)[0])
  assert abs(whole[0] - results[0][0]) > 1e-2


@pytest.mark.parametrize("layout", LAYOUTS)
def test_unscored_tokens_add_nothing_and_are_read(layout):
  """The rest of a response is as likely as all of it, less its beginning."""
  policy = tiny.make_policy()
  params = tiny.make_params(policy)
  groups = tiny.make_groups(6)
  cuts = [[len(r) // 2 for r in group[1:]] for group in groups]
  scored = [
    [np.arange(len(r)) >= cut for r, cut in zip(g[1:], c, strict=True)]
    for g, c in zip(groups, cuts, strict=True)
  ]
  batch = tiny.pack(groups, layout, scored=scored)
  sequences = jax.jit(
    lambda: forward.read_sequences(policy, params, None, batch, chunk_size=32)
  )()
  beginnings = [
    [g[0], *(r[:cut] for r, cut in zip(g[1:], c, strict=True))]
    for g, c in zip(groups, cuts, strict=True)
  ]
  expected = tiny.naive_logps(policy, params, groups)
  expected -= tiny.naive_logps(policy, params, beginnings)
  ids = batch.example_ids.reshape(-1)
  for name, wanted in (
    ("logps", expected),
    ("num_tokens", [[mask.sum() for mask in group] for group in scored]),
  ):
    found = np.asarray(getattr(sequences, name))[ids >= 0]
    np.testing.assert_allclose(
      found, np.array(wanted)[ids[ids >= 0]], rtol=1e-4, atol=1e-4
    )


@pytest.mark.fault(26)
def test_empty_rows_change_nothing():
  policy = tiny.make_policy()
  params = tiny.make_params(policy)
  groups = tiny.make_groups(5)
  ref_logps = np.full((5, 2), -20, np.float32)
  batches = [
    tiny.pack(groups, num_rows=rows, ref_logps=ref_logps) for rows in (4, 9)
  ]
  # Not bit for bit: another number of rows is another program.
  assert_same(
    [loss_and_grads(policy, params, batch) for batch in batches], 1e-6
  )


@pytest.mark.slow
def test_what_fills_the_padding_changes_nothing():
  """Padding tokens are never seen: other ids there give the same bits."""
  policy = tiny.make_policy()
  params = tiny.make_params(policy)
  ref_logps = np.full((5, 2), -20, np.float32)
  batch = tiny.pack(tiny.make_groups(5), ref_logps=ref_logps)
  is_padding = batch.segments == 0
  assert is_padding.any()
  filled = batch.replace(tokens=np.where(is_padding, 17, batch.tokens))
  one, other = (loss_and_grads(policy, params, b) for b in (batch, filled))
  assert one[0] == other[0]
  jax.tree.map(np.testing.assert_array_equal, one[1], other[1])


@pytest.mark.parametrize("layout", LAYOUTS)
def test_order_of_groups_changes_nothing(layout):
  policy = tiny.make_policy()
  params = tiny.make_params(policy)
  groups = tiny.make_groups(6)
  ref_logps = np.linspace(-30, -10, 12, dtype=np.float32).reshape(6, 2)
  order = np.array([4, 2, 0, 5, 1, 3])
  assert_same(
    [
      loss_and_grads(
        policy,
        params,
        tiny.pack([groups[i] for i in o], layout, ref_logps=ref_logps[o]),
      )
      for o in (np.arange(6), order)
    ]
  )
