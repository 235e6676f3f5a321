"""Cached reference log-probs are those of the reference, or are not used."""

import dataclasses
import json
import struct

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dpo_jax import trees
from dpo_jax.models import partition_rules
from dpo_jax.parallel import mesh as mesh_lib
from dpo_jax.training import logps_cache, reference
from tests import faults, tiny

KEY = "0123456789abcdef"


def flip_bit(params, name, place, bit):
  """The same parameters with one bit of one number turned."""

  def flip(path, leaf):
    if trees.path_name(path) != name:
      return leaf
    array = np.array(leaf)
    bits = array.view(f"uint{8 * array.dtype.itemsize}").reshape(-1)
    bits[place] ^= np.array(1, bits.dtype) << np.array(bit, bits.dtype)
    return jnp.asarray(array)

  return jax.tree_util.tree_map_with_path(flip, params)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_digest_changes_with_any_one_bit(dtype):
  params = tiny.make_params(tiny.make_policy(param_dtype=dtype))
  params = jax.tree.map(lambda x: x.astype(dtype), params)
  seen = {trees.params_digest(params)}
  width = 8 * jnp.dtype(dtype).itemsize
  num_flips = 0
  for path, leaf in jax.tree_util.tree_leaves_with_path(params):
    for place, bit in ((0, 0), (leaf.size // 2, 7), (-1, width - 1)):
      flipped = flip_bit(params, trees.path_name(path), place, bit)
      seen.add(trees.params_digest(flipped))
      num_flips += 1
  assert len(seen) == 1 + num_flips


def test_a_digest_changes_with_order_shape_and_name():
  base = np.array([1.0, 2.0, 3.0, 4.0], np.float32)
  variants = [
    {"a": base},
    {"b": base},
    {"a": base[[1, 0, 2, 3]]},
    {"a": base.reshape(2, 2)},
    {"a": base.reshape(2, 2).T},
    {"a": base[:3]},
    {"a": base.view(np.int32)},
    {"a": base, "b": np.zeros(0, np.float32)},
  ]
  digests = {
    trees.params_digest(jax.tree.map(jnp.asarray, t)) for t in variants
  }
  assert len(digests) == len(variants)


def test_a_digest_does_not_change_with_sharding():
  params = tiny.make_params(tiny.make_policy())
  wanted = trees.params_digest(params)
  for sizes in ((8, 1, 1, 1), (1, 8, 1, 1), (2, 2, 2, 1), (4, 1, 2, 1)):
    mesh = mesh_lib.make_mesh(dict(zip(mesh_lib.AXES, sizes, strict=True)))
    placed = jax.device_put(
      params, partition_rules.param_shardings(params, mesh)
    )
    assert trees.params_digest(placed) == wanted, sizes


@pytest.mark.fault(36)
def test_a_key_changes_with_weights_config_and_data():
  policy = tiny.make_policy()
  params = tiny.make_params(policy)
  change = dataclasses.replace

  def key(params, config, data):
    return reference.cache_key(trees.params_digest(params), config, data)

  keys = [
    key(params, policy.config, "data"),
    key(tiny.make_params(policy, 1), policy.config, "data"),
    key(params, policy.config, "other data"),
    key(params, change(policy.config, compute_dtype="bfloat16"), "data"),
    key(params, change(policy.config, rope_theta=1e6), "data"),
    key(params, change(policy.config, norm_eps=1e-6), "data"),
  ]
  assert len(set(keys)) == len(keys)
  # What only changes how they are computed does not count.
  assert keys[0] == key(params, change(policy.config, remat="full"), "data")


def compute(groups, params, policy, batch_size, sizes=None, **fields):
  placement = tiny.make_placement(sizes)
  loader = tiny.make_loader(
    groups, batch_size, row_multiple=placement.num_row_shards, **fields
  )
  step = reference.make_logps_step(policy, placement, 16)
  shardings = partition_rules.param_shardings(params, placement.mesh)
  return reference.compute_logps(
    step,
    jax.device_put(params, shardings),
    loader,
    placement,
  )


@pytest.mark.parametrize(
  ("batch_size", "sizes", "layout"),
  [
    (4, None, "shared"),
    (11, None, "padded"),
    (8, {"data": 8, "fsdp": 1, "tensor": 1}, "shared"),
    (8, {"data": 2, "fsdp": 2, "tensor": 2}, "packed"),
  ],
)
def test_cached_log_probs_are_a_direct_computation(batch_size, sizes, layout):
  policy = tiny.make_policy()
  params = tiny.make_params(policy)
  groups = tiny.make_groups(11)
  got = compute(groups, params, policy, batch_size, sizes, layout=layout)
  assert got.dtype == np.float32 and got.shape == (11, 2)
  wanted = tiny.naive_logps(policy, params, groups)
  assert wanted.min() < -20.0  # nothing trivial
  np.testing.assert_allclose(got, wanted, rtol=1e-5, atol=1e-4)


def test_groups_that_the_loader_lacks_stay_unknown():
  policy = tiny.make_policy()
  params = tiny.make_params(policy)
  got = compute(
    tiny.make_groups(6), params, policy, 2, indices=np.array([1, 4, 5])
  )
  assert np.flatnonzero(np.isnan(got).any(1)).tolist() == [0, 2, 3]
  assert np.isfinite(got[[1, 4, 5]]).all()


LOGPS = np.arange(6, dtype=np.float32).reshape(3, 2) - 0.1


def load(folder, key=KEY, shape=(3, 2)):
  return logps_cache.load_cache(folder, key, shape)


def test_a_cache_comes_back_bit_for_bit(tmp_path):
  logps_cache.write_cache(tmp_path, KEY, LOGPS, {})
  loaded = load(tmp_path)
  assert loaded.logps.dtype == np.float32
  np.testing.assert_array_equal(loaded.logps, LOGPS)
  # Nothing is left over, and the folder may be given as a string.
  names = sorted(path.name for path in tmp_path.iterdir())
  assert names == [f"{KEY}.json", f"{KEY}.npy"]
  np.testing.assert_array_equal(load(str(tmp_path)).logps, LOGPS)


def test_there_is_no_cache_of_another_key(tmp_path):
  assert load(tmp_path / "nowhere") is None
  logps_cache.write_cache(tmp_path, KEY, LOGPS, {})
  assert load(tmp_path, KEY[::-1]) is None


@pytest.mark.fault(36)
@pytest.mark.parametrize("suffix", ["npy", "json"])
def test_a_half_written_cache_is_not_used(tmp_path, suffix):
  logps_cache.write_cache(tmp_path, KEY, LOGPS, {})
  (tmp_path / f"{KEY}.{suffix}").unlink()
  assert load(tmp_path) is None
  logps_cache.write_cache(tmp_path, KEY, LOGPS, {})
  np.testing.assert_array_equal(load(tmp_path).logps, LOGPS)


@pytest.mark.fault(36)
@pytest.mark.parametrize(
  "damage",
  [
    lambda array, meta: faults.flip_byte(array, -1),
    lambda array, meta: faults.flip_byte(array, 0),
    lambda array, meta: faults.truncate(array),
    lambda array, meta: array.write_bytes(b""),
    lambda array, meta: faults.truncate(meta),
    lambda array, meta: faults.flip_byte(meta, 20),
  ],
)
def test_a_damaged_cache_is_an_error(tmp_path, damage):
  logps_cache.write_cache(tmp_path, KEY, LOGPS, {})
  damage(tmp_path / f"{KEY}.npy", tmp_path / f"{KEY}.json")
  with pytest.raises(ValueError, match=r"is damaged.*Delete both"):
    load(tmp_path)


def test_a_cache_with_one_changed_number_is_an_error(tmp_path):
  logps_cache.write_cache(tmp_path, KEY, LOGPS, {})
  path = tmp_path / f"{KEY}.npy"
  content = path.read_bytes()
  path.write_bytes(content[:-4] + struct.pack("<f", 1.0))
  assert np.load(path)[2, 1] == 1.0  # numpy sees nothing wrong with it
  with pytest.raises(ValueError, match="is damaged"):
    load(tmp_path)


@pytest.mark.fault(59)
def test_pickles_are_not_loaded(tmp_path):
  logps_cache.write_cache(tmp_path, KEY, LOGPS, {})
  path = tmp_path / f"{KEY}.npy"
  np.save(path, np.array([{"a": 1}], object), allow_pickle=True)
  digest = reference.hashlib.sha256(path.read_bytes()).hexdigest()
  (tmp_path / f"{KEY}.json").write_text(json.dumps({"sha256": digest}))
  with pytest.raises(ValueError, match="allow_pickle"):
    load(tmp_path)


@pytest.mark.parametrize("logps", [LOGPS[:2], LOGPS.astype(np.float64)])
def test_a_cache_of_another_shape_or_dtype_is_an_error(tmp_path, logps):
  logps_cache.write_cache(tmp_path, KEY, logps, {})
  with pytest.raises(ValueError, match=r"float32 \[3, 2\].*Delete it and") as e:
    load(tmp_path)
  assert f"{KEY}.npy holds {logps.dtype} {list(logps.shape)}" in str(e.value)
