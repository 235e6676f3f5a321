"""Adapters: no effect at the start, merged equals unmerged; what is trained."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dpo_jax.models import logps as logps_lib
from dpo_jax.models import lora, trainable
from dpo_jax.models.config import Lora
from dpo_jax.models.partition_rules import param_shardings
from dpo_jax.parallel.mesh import make_mesh
from dpo_jax.trees import join_trees, path_name
from tests import tiny

pytestmark = pytest.mark.usefixtures("unoptimized")


def make(**fields):
  """A policy with adapters, weights and batch; the adapters do something."""
  knobs = dict(rank=3, alpha=5.0) | fields
  policy = tiny.make_policy(lora=Lora(**knobs))
  params = tiny.make_params(policy)
  leaves = jax.tree_util.tree_leaves_with_path(params)
  keys = jax.random.split(jax.random.key(7), len(leaves))
  drawn = [
    0.3 * jax.random.normal(key, x.shape)
    if path_name(path).endswith("lora_b")
    else x
    for key, (path, x) in zip(keys, leaves, strict=True)
  ]
  return policy, jax.tree.unflatten(jax.tree.structure(params), drawn)


def logps(policy, params):
  batch = tiny.pack(tiny.make_groups(4))
  return jax.jit(
    lambda p: logps_lib.response_logps(policy, p, batch, chunk_size=16)
  )(params)


def test_fresh_adapter_has_no_effect_bit_for_bit():
  policy = tiny.make_policy(lora=Lora(rank=4, alpha=16.0))
  params = policy.init(jax.random.key(0))
  base = lora.without_adapters(params)
  on, off = logps(policy, params), logps(policy, base)
  np.testing.assert_array_equal(on, off)
  np.testing.assert_array_equal(off, logps(policy.without_adapters, base))


@pytest.mark.parametrize("is_rank_stabilized", [False, True])
@pytest.mark.parametrize("targets", [".*", "query|value", "down|attention_out"])
def test_merged_equals_unmerged(targets, is_rank_stabilized):
  policy, params = make(targets=targets, is_rank_stabilized=is_rank_stabilized)
  merged = lora.merge_adapters(params, policy.config)
  assert not lora.has_adapters(merged)
  ours = logps(policy, params)
  np.testing.assert_allclose(
    logps(policy.without_adapters, merged), ours, rtol=1e-5, atol=1e-5
  )
  off = logps(policy, lora.without_adapters(params))
  assert np.abs(ours - off).max() > 0.1, "adapters that do nothing show nothing"


def test_scale_is_alpha_over_rank_or_its_root():
  policy, params = make(targets="up")
  up = params["layers"]["up"]
  merged = lora.merge_adapters(params, policy.config)["layers"]["up"]["kernel"]
  product = np.asarray(up["lora_a"][1]) @ np.asarray(up["lora_b"][1])
  np.testing.assert_allclose(
    merged[1] - up["kernel"][1], 5.0 / 3.0 * product, rtol=1e-4, atol=1e-6
  )
  assert Lora(4, 6.0, is_rank_stabilized=True).scale == pytest.approx(3.0)


def test_only_adapters_are_trained():
  _, params = make(targets="query|up")
  trained, frozen = trainable.split_params(params, "")
  names = {
    path_name(path) for path, _ in jax.tree_util.tree_leaves_with_path(trained)
  }
  assert names == {
    f"layers/{name}/lora_{side}" for name in ("query", "up") for side in "ab"
  }
  jax.tree.map(
    np.testing.assert_array_equal, join_trees(trained, frozen), params
  )


def test_freezing_by_regex_trains_the_rest():
  params = tiny.make_params(tiny.make_policy())
  trained, frozen = trainable.split_params(params, "^embedding|norm")
  assert set(frozen) == {"embedding", "final_norm", "layers"}
  assert set(frozen["layers"]) == {"attention_norm", "mlp_norm"}
  assert "query" in trained["layers"]
  jax.tree.map(
    np.testing.assert_array_equal, join_trees(trained, frozen), params
  )
  for pattern, message in (
    ("no_such", "matches none"),
    (".", "nothing to train"),
    ("(", "is not a regular expression"),
  ):
    with pytest.raises(ValueError, match=message):
      trainable.split_params(params, pattern)


def test_adapters_are_sharded_as_their_kernels():
  policy, params = make()
  mesh = make_mesh({"data": 2, "fsdp": 2, "tensor": 2})
  shardings = param_shardings(policy.abstract_params(), mesh)
  query = shardings["layers"]["query"]
  assert query["lora_a"].shard_shape((2, 64, 3)) == (2, 32, 3)
  assert query["lora_b"].shard_shape((2, 3, 4, 16)) == (2, 3, 2, 16)
  placed = jax.device_put(params, shardings)
  np.testing.assert_allclose(
    logps(policy, placed), logps(policy, params), rtol=1e-5, atol=1e-5
  )


@pytest.mark.parametrize(
  ("fields", "message"),
  [
    ({"rank": 0, "alpha": 1.0}, "rank=0"),
    ({"rank": 2, "alpha": 0.0}, "alpha=0"),
    ({"rank": 2, "alpha": 1.0, "targets": "q_proj"}, "matches none of query"),
    ({"rank": 2, "alpha": 1.0, "targets": "("}, "is not a regular expression"),
  ],
)
def test_impossible_adapters_are_refused(fields, message):
  with pytest.raises(ValueError, match=message):
    Lora(**fields)


def test_adapters_are_float32_over_a_bfloat16_base():
  policy = tiny.make_policy(
    lora=Lora(rank=2, alpha=2.0), param_dtype="bfloat16"
  )
  params = policy.abstract_params()
  assert params["layers"]["up"]["lora_a"].dtype == jnp.float32
  assert params["layers"]["up"]["kernel"].dtype == jnp.bfloat16
