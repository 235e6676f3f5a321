"""Attention kernels of GPUs, interpreted, against dense attention."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dpo_jax.models import attention
from dpo_jax.models.attention import masks, rows, triton, triton_kernels, visits
from dpo_jax.models.attention.triton_tiles import (
  SMALL_TILES,
  TILES,
  Kernels,
  Tiles,
)
from dpo_jax.parallel import active_mesh
from dpo_jax.parallel import mesh as mesh_lib
from dpo_jax.system import compat
from tests import tiny
from tests.models.test_attention import (
  dense_case,
  labels_of,
  random_batch,
  values_and_grads,
)

pytestmark = pytest.mark.usefixtures("unoptimized")

# Small, and different in each kernel, so that rows have blocks of every kind.
_SMALL = Kernels(Tiles(32, 16, 4, 1), Tiles(16, 32, 4, 1), Tiles(32, 16, 4, 1))
_SLOW = pytest.mark.slow


def assert_close(got, wanted, tolerance=1e-5):
  for one, other in zip(got, wanted, strict=True):
    np.testing.assert_allclose(
      one, other, atol=tolerance * np.abs(other).max(), rtol=0
    )


@pytest.mark.parametrize(
  ("num_slots", "length", "window", "soft_cap", "kv_heads", "layout"),
  [
    (3, 250, 7, 5.0, 2, "shared"),
    pytest.param(2, 256, None, None, 4, "shared", marks=_SLOW),
    pytest.param(5, 384, None, 2.0, 1, "shared", marks=_SLOW),
    pytest.param(1, 192, 33, None, 2, "packed", marks=_SLOW),
    pytest.param(2, 256, 10**6, None, 2, "shared", marks=_SLOW),
  ],
)
def test_kernels_equal_dense_attention(
  num_slots, length, window, soft_cap, kv_heads, layout
):
  """Values and gradients, in float32."""
  batch, settings, wanted = dense_case(
    num_slots, length, window, soft_cap, kv_heads, layout
  )
  got = values_and_grads(
    lambda q, k, v: triton.attend_triton(
      q, k, v, tuple(labels_of(batch)), kernels=_SMALL, **settings
    ),
    batch,
    num_heads=4,
    num_kv_heads=kv_heads,
  )
  assert_close(got, wanted)


@_SLOW
def test_rows_of_one_token_attend_to_it():
  one = np.zeros((2, 1), np.int32)
  labels = (one, one + 1, one)
  queries, values = (
    jax.random.normal(jax.random.key(i), (2, 1, 4, 40)) for i in range(2)
  )
  out = triton.attend_triton(
    queries, queries, values, labels, window=None, scale=1.0, soft_cap=None
  )
  np.testing.assert_allclose(out, values, rtol=1e-6)


@_SLOW
def test_bfloat16_is_near_float32():
  """Products of bfloat16 are added in float32."""
  batch, settings, wanted = dense_case(2, 256, None, None, 4, "shared")

  def attend(*arrays):
    out = triton.attend_triton(
      *(x.astype(jnp.bfloat16) for x in arrays),
      tuple(labels_of(batch)),
      kernels=_SMALL,
      **settings,
    )
    assert out.dtype == jnp.bfloat16
    return out.astype(jnp.float32)

  got = values_and_grads(attend, batch, num_heads=4, num_kv_heads=4)
  assert_close(got, wanted, tolerance=0.02)


@_SLOW
def test_slices_of_queries_equal_the_whole_row():
  """The shards of the mesh axis `context`, one after the other."""
  batch = random_batch(5, 2, 768, num_groups=24)
  rows = attention.make_rows(*labels_of(batch), head_dim=8, backend="dense")
  settings = dict(window=jnp.int32(20), scale=0.7, soft_cap=None)
  part = 384
  assert (batch.segments[:, part:] > 0).any(), "nothing but padding there"

  def in_parts(q, k, v):
    attend = functools.partial(
      triton.attend_triton,
      labels=tuple(labels_of(batch)),
      kernels=_SMALL,
      **settings,
    )
    return jnp.concatenate(
      [
        attend(q[:, at : at + part], k, v, first_query=at)
        for at in range(0, 768, part)
      ],
      axis=1,
    )

  heads = dict(num_heads=4, num_kv_heads=2)
  wanted = values_and_grads(
    lambda q, k, v: attention.attend_rows(q, k, v, rows, **settings),
    batch,
    **heads,
  )
  assert_close(values_and_grads(in_parts, batch, **heads), wanted)


@_SLOW
@pytest.mark.parametrize("axis", ["tensor", "context"])
def test_kernels_are_the_same_on_a_mesh(axis):
  """Rows are split over two devices, and heads or queries over two."""
  batch = random_batch(0, 2, 256)
  batch = jax.tree.map(lambda x: np.concatenate([x, x])[:2], batch)
  settings = dict(window=None, scale=0.7, soft_cap=None)

  def attend(q, k, v, backend):
    rows = attention.make_rows(*labels_of(batch), head_dim=8, backend=backend)
    return attention.attend_rows(q, k, v, rows, **settings)

  heads = dict(num_heads=4, num_kv_heads=2)
  wanted = values_and_grads(
    functools.partial(attend, backend="dense"), batch, **heads
  )
  sizes = dict.fromkeys(mesh_lib.AXES, 1) | {"data": 2, axis: 2}
  with jax.set_mesh(mesh_lib.make_mesh(sizes, jax.devices()[:4])):
    got = values_and_grads(
      functools.partial(attend, backend="triton"), batch, **heads
    )
  assert_close(got, wanted)


def _visited(found, num_blocks):
  """Expands ranges: int [R, N, num_blocks], visits of each block."""
  count = np.zeros((*found.shape[:2], num_blocks), int)
  for row, block, i in np.ndindex(*found.shape[:3]):
    first, length = found[row, block, i]
    assert length >= 0
    count[row, block, first : first + length] += 1
  return count


def _in_one_part(batch, size, first):
  """Returns whether blocks are within a prompt or a response: bool [R, N]."""
  parts = batch.segments * 100 + batch.branches
  blocks = parts[:, first:].reshape(len(parts), -1, size)
  return (blocks == blocks[..., :1]).all(-1)


def _mask(batch, window, first_query, num_queries):
  labels = labels_of(batch)
  mask = np.array(attention.shared_prompt_mask(*labels[1:]))
  mask &= (batch.segments > 0)[:, :, None]
  mask |= np.eye(mask.shape[1], dtype=bool)  # padding sees itself
  if window is not None:
    mask &= np.asarray(attention.in_window(labels[0], labels[0], window))
  return mask[:, first_query : first_query + num_queries]


@pytest.mark.parametrize("seed", range(8))
def test_visits_cover_the_mask_once_and_know_what_is_whole(seed):
  """For random groups, windows, block sizes and slices of queries."""
  rng = np.random.default_rng(seed)
  queries, keys = (int(rng.choice([4, 8, 16])) for _ in range(2))
  batch = random_batch(seed, int(rng.integers(1, 6)), 256)
  labels = tuple(labels_of(batch))
  first = int(rng.choice([0, 64, 128]))
  for window in (None, int(rng.integers(1, 40)), 5000):
    size = None if window is None else jnp.int32(window)
    mask = _mask(batch, size, first, 128)
    blocks = mask.reshape(-1, 128 // queries, queries, 256 // keys, keys)
    any_seen, all_seen = blocks.any((2, 4)), blocks.all((2, 4))
    spans = visits.spans(labels, size, first, 128)
    by_queries = visits.visits_of_queries(spans, queries, keys)
    by_keys = visits.visits_of_keys(labels, size, first, 128, queries, keys)
    for found, axes in ((by_queries, (0, 1, 2)), (by_keys, (0, 2, 1))):
      needed, whole = (x.transpose(axes) for x in (any_seen, all_seen))
      num_blocks = needed.shape[2]
      in_whole = _visited(np.asarray(found.whole), num_blocks)
      in_masked = _visited(np.asarray(found.masked), num_blocks)
      total = in_whole + in_masked
      assert total.max() <= 1, "a block is visited twice"
      assert (total >= needed).all()
      assert (in_whole <= whole).all()
      if window is None:
        # Only where parts meet in a block is the mask's path taken in vain.
        one, other = (queries, keys) if axes[1] == 1 else (keys, queries)
        apart = _in_one_part(batch, one, first if axes[1] == 1 else 0)
        seen = _in_one_part(batch, other, 0 if axes[1] == 1 else first)
        known = whole & apart[:, : whole.shape[1], None]
        known &= seen[:, None, : whole.shape[2]]
        assert (in_whole[known] == 1).all()
        assert total.sum() <= 1.5 * needed.sum() + needed.shape[1]


@pytest.mark.parametrize("window", [None, 13])
def test_sight_ends_where_the_mask_ends(window):
  """The last query that sees a key, and the first that does not."""
  batch = random_batch(1, 3, 192)
  size = None if window is None else jnp.int32(window)
  mask = _mask(batch, size, 0, 192)
  ends, unbroken = (
    np.asarray(x) for x in masks.ends_of_sight(tuple(labels_of(batch)), size)
  )
  np.testing.assert_array_equal(ends, 192 - mask[:, ::-1].argmax(1))
  queries = np.arange(192)[:, None]
  is_before = (queries >= queries.T) & (queries < unbroken[:, None])
  assert mask[is_before].all()
  assert (unbroken > np.arange(192)).all()


@pytest.fixture
def h200(monkeypatch):
  """Compiles for an H200, as far as this machine can."""
  monkeypatch.setattr(active_mesh, "platform", lambda: "gpu")
  monkeypatch.setattr(compat, "compute_capability", lambda: (9, 0))


def _lower(head_dim, dtype, soft_cap):
  """Lowers values and gradients for CUDA: text of the program."""

  def total(queries, keys, values, *labels):
    rows = attention.make_rows(*labels, head_dim=head_dim)
    out = attention.attend_rows(
      queries, keys, values, rows, window=None, scale=1.0, soft_cap=soft_cap
    )
    return out.astype(jnp.float32).sum()

  length = 1000
  query, key = (
    jax.ShapeDtypeStruct((1, length, heads, head_dim), dtype)
    for heads in (8, 2)
  )
  label = jax.ShapeDtypeStruct((1, length), jnp.int32)
  # From jax 0.11 on, lowering asks for the kind of the GPU.
  gpu = jax.sharding.AbstractDevice(
    "NVIDIA H200", num_cores=132, platform="gpu"
  )
  mesh = jax.sharding.AbstractMesh((1,), ("data",), abstract_device=gpu)
  with jax.sharding.use_abstract_mesh(mesh):
    traced = jax.jit(jax.grad(total, (0, 1, 2))).trace(
      query, key, key, label, label, label
    )
    return traced.lower(lowering_platforms=("cuda",)).as_text()


@pytest.mark.parametrize(
  ("head_dim", "dtype", "soft_cap"),
  [
    (64, jnp.bfloat16, None),
    pytest.param(96, jnp.bfloat16, 30.0, marks=_SLOW),
    pytest.param(128, jnp.float32, None, marks=_SLOW),
    pytest.param(256, jnp.bfloat16, None, marks=_SLOW),
  ],
)
def test_kernels_lower_to_triton(h200, head_dim, dtype, soft_cap):
  """Without a GPU, and "auto" is the kernel there."""
  text = _lower(head_dim, dtype, soft_cap)
  for name in ("forward", "dq", "dkv"):
    assert f"shared_prompt_{name}" in text or f"_{name}_kernel" in text
  assert "1000x1000" not in text and "1024x1024" not in text


def _shared_bytes(kernels, num_bytes):
  """Returns the bytes that each kernel holds, and its blocks loaded ahead."""
  forward, dq, dkv = kernels.forward, kernels.dq, kernels.dkv
  lines = (
    forward.queries + 2 * forward.stages * forward.keys,
    2 * dq.queries + 2 * dq.stages * dq.keys,
    2 * dkv.keys + 2 * dkv.stages * dkv.queries,
  )
  return max(lines) * num_bytes


@pytest.mark.parametrize("key", TILES)
def test_tiles_divide_rows_and_fit_into_shared_memory(key):
  """The shared memory is 164 KiB, or 100 KiB; XLA keeps one of them."""
  num_bytes = math.prod(key)
  for kernels, kib in ((TILES[key], 163), (SMALL_TILES.get(key), 99)):
    kernels = kernels or TILES[key]
    for tiles in (kernels.forward, kernels.dq, kernels.dkv):
      assert 128 % tiles.queries == 0 and 128 % tiles.keys == 0
    assert _shared_bytes(kernels, num_bytes) <= kib * 2**10


def test_a_gpu_without_the_kernel_is_warned_of(monkeypatch, caplog):
  """Too old, heads too large, or a jax without the backend."""
  monkeypatch.setattr(active_mesh, "platform", lambda: "gpu")
  cases = [
    ((7, 5), 64, True, "this GPU has 7.5"),
    ((9, 0), 320, True, "up to 256 channels; got 320"),
    ((9, 0), 64, False, "no jax.experimental.pallas.triton"),
    (None, 64, True, "needs an NVIDIA GPU"),
  ]
  label = np.zeros((1, 4096), np.int32)
  for capability, head_dim, has_backend, reason in cases:
    monkeypatch.setattr(compat, "compute_capability", lambda x=capability: x)
    monkeypatch.setattr(triton_kernels, "HAS_BACKEND", has_backend)
    caplog.clear()
    attention.check_backend("auto", head_dim)
    assert reason in caplog.text and "WARNING" in caplog.text
    made = rows.make_rows(label, label, label, head_dim=head_dim)
    assert made.backend == "xla"
    with pytest.raises(ValueError, match=reason):
      attention.check_backend("triton", head_dim)


def test_heads_that_are_too_large_are_refused_by_name():
  x = jnp.zeros((1, 128, 2, 320))
  labels = (jnp.zeros((1, 128), jnp.int32),) * 3
  with pytest.raises(ValueError, match="up to 256 channels; got 320"):
    triton.attend_triton(x, x, x, labels, window=None, scale=1.0, soft_cap=None)


def test_kernels_are_interpreted_without_the_backend(monkeypatch):
  """A jax that has removed it still runs the tests on a CPU."""
  x = jax.random.normal(jax.random.key(0), (1, 128, 1, 16))
  labels = (jnp.arange(128)[None], *(jnp.ones((1, 128), jnp.int32),) * 2)

  def attend():
    return triton.attend_triton(
      x, x, x, labels, window=None, scale=0.25, soft_cap=None
    )

  with_backend = attend()
  monkeypatch.setattr(triton_kernels, "HAS_BACKEND", False)
  monkeypatch.setattr(triton_kernels, "pallas_triton", None)
  np.testing.assert_array_equal(attend(), with_backend)


def test_a_gpu_with_the_kernel_takes_it(h200, caplog):
  attention.check_backend("auto", 64)
  assert not caplog.text
  label = np.zeros((1, 4096), np.int32)
  assert rows.make_rows(label, label, label, head_dim=64).backend == "triton"


@pytest.mark.parametrize("backend", ["triton", "splash"])
def test_a_backend_of_another_device_is_refused_by_name(backend):
  with pytest.raises(ValueError, match=f"policy.attention='{backend}'"):
    attention.check_backend(backend, 64)


def test_a_run_refuses_the_kernel_before_it_compiles(tmp_path):
  from dpo_jax.records.workdir import Workdir
  from dpo_jax.training.setup import build_run

  config = tiny.make_config(policy__attention="triton")
  with pytest.raises(ValueError, match="needs an NVIDIA GPU"):
    build_run(config, Workdir.at(tmp_path))
