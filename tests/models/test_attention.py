"""Blockwise and splash attention, against dense attention."""

import functools
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dpo_jax.models import attention, logps
from dpo_jax.models.attention import (
  blockwise,
  masks,
  splash,
)
from dpo_jax.parallel import active_mesh
from dpo_jax.parallel import mesh as mesh_lib
from dpo_jax.system import compat
from tests import tiny

pytestmark = pytest.mark.usefixtures("unoptimized")


def random_batch(seed, num_slots, length, layout="shared", num_groups=0):
  """Packs groups of random lengths; some prompts span several blocks."""
  rng = np.random.default_rng(seed)

  def text(low, high):
    return rng.integers(0, 90, rng.integers(low, high)).astype(np.int32)

  groups = [
    [text(1, 40), *(text(1, 30) for _ in range(num_slots))]
    for _ in range(num_groups or rng.integers(3, 8))
  ]
  return tiny.pack(groups, layout, length)


def labels_of(batch):
  return [
    jnp.asarray(x) for x in (batch.positions, batch.segments, batch.branches)
  ]


def values_and_grads(attend, batch, *, num_heads, num_kv_heads):
  """Computes outputs of real tokens, and gradients of a random sum of them."""
  keys = jax.random.split(jax.random.key(0), 4)
  shape = (*batch.tokens.shape, num_heads, 8)
  kv_shape = (*batch.tokens.shape, num_kv_heads, 8)
  is_real = (batch.segments > 0)[..., None, None]
  weights = jax.random.normal(keys[3], shape) * is_real

  def total(queries, keys, values):
    out = jnp.where(is_real, attend(queries, keys, values), 0.0)
    return (out * weights).sum(), out

  arrays = [
    jax.random.normal(key, s)
    for key, s in zip(keys, (shape, kv_shape, kv_shape), strict=False)
  ]
  (_, out), grads = jax.jit(jax.value_and_grad(total, (0, 1, 2), has_aux=True))(
    *arrays
  )
  return out, *grads


@functools.cache
def dense_case(num_slots, length, window, soft_cap, kv_heads, layout):
  """Returns a batch, settings, and what dense attention makes of them."""
  batch = random_batch(num_slots, num_slots, length, layout)
  rows = attention.make_rows(*labels_of(batch), head_dim=8, backend="dense")
  settings = dict(
    window=None if window is None else jnp.int32(window),
    scale=0.7,
    soft_cap=soft_cap,
  )
  wanted = values_and_grads(
    lambda q, k, v: attention.attend_rows(q, k, v, rows, **settings),
    batch,
    num_heads=4,
    num_kv_heads=kv_heads,
  )
  return batch, settings, wanted


def spy_on_batches(monkeypatch):
  """Returns a set of the numbers of query blocks processed in parallel."""
  seen = set()
  num_parallel = blockwise._num_parallel

  def spy(*args):
    found = num_parallel(*args)
    seen.add(found)
    return found

  monkeypatch.setattr(blockwise, "_num_parallel", spy)
  return seen


@pytest.mark.parametrize(
  ("num_slots", "length", "size", "window", "soft_cap", "kv_heads", "layout"),
  [
    (2, 256, 32, None, None, 4, "shared"),
    (2, 250, 32, 7, None, 2, "shared"),
    (3, 256, 8, 33, 5.0, 1, "shared"),
    (1, 192, 64, None, 2.0, 2, "packed"),
    (4, 256, 16, 12, None, 2, "shared"),
  ],
)
@pytest.mark.parametrize("parallel", [1, 3, 1000], ids=["one", "some", "all"])
def test_blockwise_equals_dense_attention(
  num_slots,
  length,
  size,
  window,
  soft_cap,
  kv_heads,
  layout,
  parallel,
  monkeypatch,
):
  """Query blocks one by one, as on a CPU, or in parallel, as on a GPU."""
  if parallel > 1:
    monkeypatch.setattr(active_mesh, "platform", lambda: "gpu")
    monkeypatch.setattr(
      blockwise, "_MAX_PARALLEL_SCORES", parallel * 4 * size**2
    )
  batch, settings, wanted = dense_case(
    num_slots, length, window, soft_cap, kv_heads, layout
  )
  heads = dict(num_heads=4, num_kv_heads=kv_heads)
  blocks = blockwise.make_blocks(*labels_of(batch), size)
  sizes = spy_on_batches(monkeypatch)
  got = values_and_grads(
    lambda q, k, v: blockwise.attend_blocks(q, k, v, blocks, **settings),
    batch,
    **heads,
  )
  for one, other in zip(got, wanted, strict=True):
    np.testing.assert_allclose(one, other, atol=1e-5 * np.abs(other).max())
  num_blocks = blocks.starts.size
  num_batches = -(-num_blocks // parallel)
  assert sizes == {-(-num_blocks // num_batches)}


@pytest.mark.parametrize("seed", range(12))
def test_key_blocks_cover_the_mask(seed):
  """For random groups and windows."""
  rng = np.random.default_rng(seed)
  size, window = int(rng.choice([4, 8, 16])), int(rng.integers(1, 40))
  batch = random_batch(seed, int(rng.integers(1, 5)), 256)
  labels = labels_of(batch)
  blocks = blockwise.make_blocks(*labels, size)
  mask = np.array(attention.shared_prompt_mask(*labels[1:]))
  mask &= (batch.segments > 0)[:, :, None]
  for w in (None, jnp.int32(window)):
    if w is not None:
      mask &= np.asarray(attention.in_window(labels[0], labels[0], w))
    num = mask.shape[1] // size
    needed = mask.reshape(-1, num, size, num, size).any((2, 4))
    ranges = [np.asarray(x) for x in blockwise.key_blocks(blocks, w)]
    read = np.zeros_like(needed, int)
    for r, n in np.ndindex(*ranges[0].shape):
      first_prompt, in_prompt, first_own, own = (x[r, n] for x in ranges)
      read[r, n, first_prompt : first_prompt + in_prompt] += 1
      read[r, n, first_own : first_own + own] += 1
    assert read.max() <= 1, "a block is read twice"
    assert (read >= needed).all()
    # Blocks read without need are at the edge of a window, not whole groups.
    assert read.sum() <= 1.5 * needed.sum() + num


@pytest.mark.parametrize("backend", ["xla"])
def test_no_array_of_length_squared(backend):
  length = 4096

  def total(queries, keys, values, *labels):
    rows = attention.make_rows(*labels, head_dim=8, backend=backend)
    out = attention.attend_rows(
      queries, keys, values, rows, window=None, scale=1.0, soft_cap=None
    )
    return out.sum()

  shape = jax.ShapeDtypeStruct((1, length, 2, 8), jnp.float32)
  label = jax.ShapeDtypeStruct((1, length), jnp.int32)
  compiled = (
    jax.jit(jax.grad(total, (0, 1, 2)))
    .lower(shape, shape, shape, label, label, label)
    .compile()
  )
  assert f"{length},{length}" not in compiled.as_text()
  used = compat.program_memory(compiled).temporaries
  assert used < length * length, "more than a byte for each pair of tokens"


@pytest.mark.slow
@pytest.mark.parametrize(
  ("num_slots", "window", "soft_cap", "kv_heads"),
  [(2, None, None, 4), (3, 20, None, 2), (2, None, 4.0, 1)],
)
def test_splash_equals_dense_attention(num_slots, window, soft_cap, kv_heads):
  """Interpreted, in blocks of 128."""
  batch = random_batch(num_slots, num_slots, 256)
  labels = labels_of(batch)
  rows = attention.make_rows(*labels, head_dim=8, backend="dense")
  settings = dict(
    window=None if window is None else jnp.int32(window),
    scale=0.7,
    soft_cap=soft_cap,
  )
  heads = dict(num_heads=4, num_kv_heads=kv_heads)
  wanted = values_and_grads(
    lambda q, k, v: attention.attend_rows(q, k, v, rows, **settings),
    batch,
    **heads,
  )
  got = values_and_grads(
    lambda q, k, v: splash.attend_splash(
      q, k, v, tuple(labels), **settings, block=128, interpret=True
    ),
    batch,
    **heads,
  )
  for one, other in zip(got, wanted, strict=True):
    np.testing.assert_allclose(one, other, atol=1e-5 * np.abs(other).max())


@pytest.mark.parametrize(
  ("backend", "size"),
  [("xla", 16), pytest.param("splash", 256, marks=pytest.mark.slow)],
)
def test_slices_of_queries_equal_the_whole_row(backend, size):
  """The shards of the mesh axis `context`, one after the other."""
  batch = random_batch(5, 2, 768, num_groups=24)
  labels = labels_of(batch)
  rows = attention.make_rows(*labels, head_dim=8, backend="dense")
  settings = dict(window=jnp.int32(20), scale=0.7, soft_cap=None)
  part = 384  # of 128 and of 16, and not of 256
  assert (batch.segments[:, part:] > 0).any(), "nothing but padding there"
  if backend == "xla":
    blocks = blockwise.make_blocks(*labels, size)
    attend = functools.partial(blockwise.attend_blocks, blocks=blocks)
  else:
    attend = functools.partial(
      splash.attend_splash, labels=tuple(labels), block=size, interpret=True
    )

  def in_parts(q, k, v):
    return jnp.concatenate(
      [
        attend(q[:, at : at + part], k, v, first_query=at, **settings)
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
  got = values_and_grads(in_parts, batch, **heads)
  for one, other in zip(got, wanted, strict=True):
    np.testing.assert_allclose(one, other, atol=1e-5 * np.abs(other).max())


@pytest.mark.parametrize(
  ("length", "queries"),
  [(256, 64), (192, 192)],
  ids=["whole blocks", "parts of blocks"],
)
def test_context_axis_shards_queries_between_blocks(
  length, queries, monkeypatch
):
  batch = random_batch(5, 2, length)
  labels = labels_of(batch)
  settings = dict(window=None, scale=0.7, soft_cap=None)
  heads = dict(num_heads=4, num_kv_heads=2)

  def attend(q, k, v, backend):
    rows = attention.make_rows(*labels, head_dim=8, backend=backend)
    return attention.attend_rows(q, k, v, rows, **settings)

  seen = set()
  attend_blocks = blockwise.attend_blocks

  def spy(queries, keys, *rest, **others):
    seen.add((queries.shape[1], keys.shape[1]))
    return attend_blocks(queries, keys, *rest, **others)

  wanted = values_and_grads(
    functools.partial(attend, backend="dense"), batch, **heads
  )
  monkeypatch.setattr(blockwise, "attend_blocks", spy)
  with jax.set_mesh(tiny.make_placement({"data": 2, "context": 4}).mesh):
    got = values_and_grads(
      functools.partial(attend, backend="xla"), batch, **heads
    )
  assert seen == {(queries, length)}
  for one, other in zip(got, wanted, strict=True):
    np.testing.assert_allclose(one, other, atol=1e-5 * np.abs(other).max())


def test_finished_query_block_adds_nothing(monkeypatch):
  """Its next key blocks belong to another row with the same labels."""
  groups = [
    [np.arange(64), np.arange(96), np.arange(96)],
    [np.arange(100), np.arange(56), np.arange(100)],
  ]
  batch = tiny.pack(groups, "shared", 256)
  assert batch.tokens.shape == (2, 256) and (batch.segments == 1).all()
  labels = labels_of(batch)
  rows = attention.make_rows(*labels, head_dim=8, backend="dense")
  blocks = blockwise.make_blocks(*labels, 32)
  settings = dict(window=None, scale=0.7, soft_cap=None)
  heads = dict(num_heads=4, num_kv_heads=2)
  wanted = values_and_grads(
    lambda q, k, v: attention.attend_rows(q, k, v, rows, **settings),
    batch,
    **heads,
  )
  monkeypatch.setattr(active_mesh, "platform", lambda: "gpu")
  got = values_and_grads(
    lambda q, k, v: blockwise.attend_blocks(q, k, v, blocks, **settings),
    batch,
    **heads,
  )
  for one, other in zip(got, wanted, strict=True):
    np.testing.assert_allclose(one, other, atol=1e-5 * np.abs(other).max())


def block_size(length, groups_per_row):
  label = jax.ShapeDtypeStruct((1, length), jnp.int32)
  positions = jax.eval_shape(
    lambda *labels: (
      attention.make_rows(
        *labels, head_dim=8, backend="xla", groups_per_row=groups_per_row
      ).blocks.positions
    ),
    *[label] * 3,
  )
  return positions.shape[2]


def test_long_groups_get_large_blocks():
  assert block_size(2752, 8) == 64
  assert block_size(3072, 1) == 256
  assert block_size(3072, 3) == 64
  assert block_size(12288, 1) == 512
  assert block_size(12288, 8) == 128


def test_block_size_divides_context_shards():
  with jax.set_mesh(tiny.make_placement({"data": 2, "context": 4}).mesh):
    assert block_size(3072, 1) == 256
    assert block_size(3584, 1) == 128  # 896 queries a device
    assert block_size(3328, 1) == 64
    assert block_size(12300, 1) == 512  # no size splits 3,075


def test_groups_per_row_come_from_the_batch(monkeypatch):
  batch = random_batch(0, 2, 256)
  seen = []
  make_rows = attention.make_rows

  def spy(*args, **kwargs):
    seen.append(kwargs["groups_per_row"])
    return make_rows(*args, **kwargs)

  monkeypatch.setattr(attention, "make_rows", spy)
  policy = tiny.make_policy()
  jax.eval_shape(
    lambda params: logps.response_figures(
      policy, params, None, batch, chunk_size=0, needs=frozenset()
    ),
    policy.abstract_params(),
  )
  assert seen == [batch.valid.shape[1]]


@pytest.mark.parametrize("seed", range(4))
def test_intervals_equal_the_mask(seed):
  window = int(np.random.default_rng(seed).integers(1, 40))
  batch = random_batch(seed, 3, 192)
  labels = labels_of(batch)
  is_real = batch.segments > 0
  mask = np.array(attention.shared_prompt_mask(*labels[1:]))
  mask &= is_real[:, :, None]
  places = np.arange(mask.shape[1])
  for w in (None, jnp.int32(window)):
    if w is not None:
      mask &= np.asarray(attention.in_window(labels[0], labels[0], w))
    for row in range(len(mask)):
      found = masks.intervals(tuple(x[row] for x in labels), w)
      seen = sum(
        (places >= first[:, None]) & (places < end[:, None])
        for first, end in (np.asarray(x).T for x in found)
      )
      np.testing.assert_array_equal(seen[is_real[row]], mask[row][is_real[row]])


_TPU_PROGRAM = """
import numpy as np, jax, jax.numpy as jnp
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec as P
from dpo_jax.system import compat
from dpo_jax.models import attention

mesh = Mesh(
  np.array(compat.topology_devices("v5e:2x4")).reshape(2, 1, 2, 2),
  ("data", "fsdp", "tensor", "context"),
  axis_types=(AxisType.Auto,) * 4,
)

def place(shape, dtype, *spec):
  return jax.ShapeDtypeStruct(
    shape, dtype, sharding=NamedSharding(mesh, P(*spec))
  )

def total(q, k, v, positions, segments, branches, window):
  rows = attention.make_rows(
    positions, segments, branches, head_dim=128, backend="splash"
  )
  out = attention.attend_rows(
    q, k, v, rows, window=window, scale=0.1, soft_cap=30.0
  )
  return jnp.square(out.astype(jnp.float32)).sum()

rows = ("data", "fsdp")
q, k = (
  place((2, 4096, h, 128), jnp.bfloat16, rows, None, "tensor") for h in (8, 4)
)
label = place((2, 4096), jnp.int32, rows)
with jax.set_mesh(mesh):
  compiled = (
    jax.jit(jax.grad(total, (0, 1, 2)))
    .lower(q, k, k, label, label, label, place((), jnp.int32))
    .compile()
  )
assert "4096,4096" not in compiled.as_text()
assert "custom-call" in compiled.as_text()
"""


@pytest.mark.slow
def test_splash_compiles_for_a_tpu():
  """On a mesh that shards rows, heads and queries, with windows and caps."""
  pytest.importorskip("libtpu")
  quiet = {
    "TPU_SKIP_MDS_QUERY": "1",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_ACCELERATOR_TYPE": "v5litepod-8",
    "TPU_WORKER_ID": "0",
  }
  env = {**os.environ, **quiet}
  env.pop("JAX_PLATFORMS", None)
  done = subprocess.run(
    [sys.executable, "-c", _TPU_PROGRAM],
    env=env,
    capture_output=True,
    text=True,
    check=False,
  )
  assert done.returncode == 0, done.stderr[-3000:]


def test_blockwise_attention_is_the_same_on_a_mesh():
  """Rows and heads are sharded over devices."""
  batch = random_batch(0, 2, 256)
  batch = jax.tree.map(lambda x: np.concatenate([x, x])[:2], batch)
  labels = labels_of(batch)
  settings = dict(window=None, scale=0.7, soft_cap=None)

  def attend(q, k, v):
    rows = attention.make_rows(*labels, head_dim=8, backend="xla")
    return attention.attend_rows(q, k, v, rows, **settings)

  heads = dict(num_heads=4, num_kv_heads=2)
  wanted = values_and_grads(attend, batch, **heads)
  sizes = dict.fromkeys(mesh_lib.AXES, 1) | {"data": 2, "tensor": 2}
  mesh = mesh_lib.make_mesh(sizes, jax.devices()[:4])
  with jax.set_mesh(mesh):
    got = values_and_grads(attend, batch, **heads)
  for one, other in zip(got, wanted, strict=True):
    np.testing.assert_allclose(one, other, atol=1e-5 * np.abs(other).max())
