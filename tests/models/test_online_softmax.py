"""Online softmax over blocks of the vocabulary, against a full softmax."""

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec
import numpy as np
import pytest

from dpo_jax.models import logps as logps_lib
from dpo_jax.models import vocabulary_blocks
from dpo_jax.models.decoder import Readout
from dpo_jax.parallel import active_mesh
from dpo_jax.parallel import mesh as mesh_lib
from dpo_jax.planning import hlo
from dpo_jax.system import compat

FIGURES = frozenset(
  {"logps", "ref_logps", "alignment", "complement_logps", "kl"}
)


def inputs(
  num_rows=2,
  length=13,
  depth=8,
  vocab_size=1003,
  spread=1.0,
  has_bias=False,
  soft_cap=None,
):
  keys = jax.random.split(jax.random.key(0), 7)
  shape = (num_rows, length, depth)

  def readout(key, bias_key):
    bias = jax.random.normal(bias_key, (vocab_size,)) if has_bias else None
    kernel = spread * jax.random.normal(key, (depth, vocab_size))
    return Readout(kernel, bias, soft_cap)

  return dict(
    hidden=jax.random.normal(keys[0], shape),
    readout=readout(keys[1], keys[5]),
    targets=jax.random.randint(keys[2], shape[:2], 0, vocab_size),
    ref_hidden=jax.random.normal(keys[3], shape),
    ref_readout=readout(keys[4], keys[6]),
  )


def whole_vocabulary(x):
  """Computes the statistics from full log-softmaxes, by definition."""

  def log_probs(hidden, readout):
    logits = jnp.einsum("rsd,dv->rsv", hidden, readout.kernel)
    if readout.bias is not None:
      logits = logits + readout.bias
    if readout.soft_cap is not None:
      logits = readout.soft_cap * jnp.tanh(logits / readout.soft_cap)
    return jax.nn.log_softmax(logits)

  def take(log_probs):
    return jnp.take_along_axis(log_probs, x["targets"][..., None], -1)[..., 0]

  ours = log_probs(x["hidden"], x["readout"])
  reference = log_probs(x["ref_hidden"], x["ref_readout"])
  collision = jnp.log((jnp.exp(ours) ** 2).sum(-1))
  return {
    "logps": take(ours),
    "ref_logps": take(reference),
    "alignment": jax.lax.stop_gradient(take(ours) - collision),
    "complement_logps": jnp.log1p(-jnp.exp(take(ours))),
    "kl": (jnp.exp(reference) * (reference - ours)).sum(-1),
  }


def blocked_vocabulary(x, chunk_size):
  return logps_lib.chunked_token_figures(
    **x, chunk_size=chunk_size, figures=FIGURES
  )


def with_gradients(function, x, names=FIGURES):
  """Each statistic, and the gradients of a weighted sum of it."""
  weights = jnp.linspace(-1.0, 2.0, x["targets"].size)
  weights = weights.reshape(x["targets"].shape)

  def total(hidden, readout, is_summed):
    figures = function(x | dict(hidden=hidden, readout=readout))
    sums = [is_summed[n] * (figures[n] * weights).sum() for n in is_summed]
    return sum(sums), figures

  gradient = jax.jit(jax.grad(total, (0, 1), has_aux=True))
  found = {}
  for name in sorted(names):
    is_summed = {n: jnp.float32(n == name) for n in sorted(names)}
    grads, figures = gradient(x["hidden"], x["readout"], is_summed)
    found[name] = [figures[name], *jax.tree.leaves(grads)]
  return found


def assert_close(got, wanted, tolerance=2e-5):
  assert got.keys() == wanted.keys()
  for name in got:
    for one, other in zip(got[name], wanted[name], strict=True):
      scale = max(float(jnp.abs(other).max()), 1e-3)
      np.testing.assert_allclose(
        one, other, atol=tolerance * scale, err_msg=name
      )


@pytest.mark.parametrize("chunk_size", [5, 100])
def test_blocks_equal_the_whole_vocabulary(chunk_size, monkeypatch):
  """1003 columns: three blocks of 256 and a rest."""
  monkeypatch.setattr(
    vocabulary_blocks, "CPU", vocabulary_blocks.TileSizes(256, 1)
  )
  x = inputs()
  got = with_gradients(lambda x: blocked_vocabulary(x, chunk_size), x)
  assert_close(got, with_gradients(whole_vocabulary, x))


@pytest.mark.parametrize(
  ("gib", "side"), [(0, 2048), (16, 2048), (80, 4096), (140, 8192)]
)
def test_tiles_take_a_share_of_the_devices_memory(gib, side, monkeypatch):
  """0: a device that does not say how much it has."""
  monkeypatch.setattr(active_mesh, "platform", lambda: "gpu")
  monkeypatch.setattr(compat, "device_memory", lambda: gib * 2.0**30)
  sizes = vocabulary_blocks.tile_sizes()
  assert sizes == vocabulary_blocks.TileSizes(side, side**2)
  assert 4 * sizes.logits <= max(gib, 8) * 2**30 / 512
  monkeypatch.setattr(active_mesh, "platform", lambda: "cpu")
  assert vocabulary_blocks.tile_sizes() == vocabulary_blocks.CPU


def test_accelerator_layout_gives_the_same_values(monkeypatch):
  monkeypatch.setattr(active_mesh, "platform", lambda: "gpu")
  monkeypatch.setattr(
    vocabulary_blocks,
    "tile_sizes",
    lambda: vocabulary_blocks.TileSizes(256, 1),
  )
  x = inputs(has_bias=True)
  wanted = with_gradients(whole_vocabulary, x)
  assert_close(with_gradients(lambda x: blocked_vocabulary(x, 5), x), wanted)


@pytest.mark.parametrize("soft_cap", [None, 1.5])
def test_logits_include_bias_and_soft_cap(soft_cap, monkeypatch):
  monkeypatch.setattr(
    vocabulary_blocks, "CPU", vocabulary_blocks.TileSizes(256, 1)
  )
  x = inputs(has_bias=True, soft_cap=soft_cap)
  got = with_gradients(lambda x: blocked_vocabulary(x, 5), x)
  assert {len(arrays) for arrays in got.values()} == {4}
  assert_close(got, with_gradients(whole_vocabulary, x))


def test_large_logits_stay_finite(monkeypatch):
  monkeypatch.setattr(
    vocabulary_blocks, "CPU", vocabulary_blocks.TileSizes(256, 1)
  )
  x, names = inputs(spread=60.0), ("logps", "kl")
  got = with_gradients(lambda x: blocked_vocabulary(x, 100), x, names)
  for arrays in got.values():
    assert all(np.isfinite(array).all() for array in arrays)
  assert_close(got, with_gradients(whole_vocabulary, x, names))


def on_mesh(x, mesh):
  """Shards rows over the row axes, and kernels over fsdp and tensor."""

  def place(array, *axes):
    sharding = NamedSharding(mesh, PartitionSpec(*axes))
    try:
      sharding.shard_shape(array.shape)
    except ValueError:  # not divided: on every device
      sharding = NamedSharding(mesh, PartitionSpec())
    return jax.device_put(array, sharding)

  def place_readout(readout):
    bias = None if readout.bias is None else place(readout.bias, "tensor")
    return readout.replace(
      kernel=place(readout.kernel, "fsdp", "tensor"), bias=bias
    )

  return {
    name: place_readout(array)
    if isinstance(array, Readout)
    else place(array, active_mesh.ROW_AXES)
    for name, array in x.items()
  }


@pytest.mark.slow
@pytest.mark.parametrize(
  ("sizes", "num_rows", "vocab_size"),
  [
    ((1, 1, 4), 4, 2048),
    ((2, 2, 2), 4, 2600),  # a rest of 20 columns in each part
    ((1, 4, 1), 4, 2048),
    ((2, 2, 2), 3, 2048),  # rows that the mesh does not divide
    ((1, 2, 2), 4, 1003),  # a vocabulary that it does not divide
  ],
  ids=str,
)
def test_sharded_vocabulary_gives_the_same_values(
  sizes, num_rows, vocab_size, monkeypatch
):
  monkeypatch.setattr(
    vocabulary_blocks, "CPU", vocabulary_blocks.TileSizes(256, 1)
  )
  axes = dict(zip(("data", "fsdp", "tensor"), sizes, strict=True))
  axes = {axis: axes.get(axis, 1) for axis in mesh_lib.AXES}
  mesh = mesh_lib.make_mesh(axes, jax.devices()[: int(np.prod(sizes))])
  x = inputs(
    num_rows=num_rows, vocab_size=vocab_size, has_bias=True, soft_cap=1.5
  )
  wanted = with_gradients(whole_vocabulary, x)
  with jax.set_mesh(mesh):
    placed = on_mesh(x, mesh)
    got = with_gradients(lambda x: blocked_vocabulary(x, 5), placed)
  assert_close(got, wanted)


@pytest.mark.parametrize("axis", ["data", "fsdp", "tensor"])
def test_communication_is_independent_of_the_chunks(axis, monkeypatch):
  """Each column's gradient is summed once, and gathered once a pass."""
  monkeypatch.setattr(
    vocabulary_blocks, "CPU", vocabulary_blocks.TileSizes(256, 1)
  )
  sizes = dict.fromkeys(mesh_lib.AXES, 1) | {axis: 2}
  mesh = mesh_lib.make_mesh(sizes, jax.devices()[:2])
  x = inputs(num_rows=4, length=256, depth=32, vocab_size=4096)

  def total(hidden, readout, targets):
    figures = logps_lib.chunked_token_figures(
      hidden, readout, targets, chunk_size=64, figures=frozenset({"logps"})
    )
    return figures["logps"].sum()

  with jax.set_mesh(mesh):
    placed = on_mesh(x, mesh)
    arguments = [placed[name] for name in ("hidden", "readout", "targets")]
    gradient = jax.jit(
      jax.grad(total, (0, 1)),
      out_shardings=jax.tree.map(lambda x: x.sharding, tuple(arguments[:2])),
    )
    text = gradient.lower(*arguments).compile().as_text()
  received = sum(c.num_bytes * c.trips for c in hlo.collectives(text, 2))
  kernel, hidden = x["readout"].kernel.nbytes, x["hidden"].nbytes
  whole = {"data": kernel, "fsdp": 2 * kernel, "tensor": hidden}[axis]
  # The rest are a few values of each position.
  assert whole <= received < 1.3 * whole


def test_chunks_are_of_equal_size():
  sizes = vocabulary_blocks.TileSizes(positions=256, logits=2**20)
  assert sizes.chunk(num_rows=1, length=100) == 100
  assert sizes.chunk(num_rows=1, length=512) == 256
  assert sizes.chunk(num_rows=1, length=600) == 200
  assert sizes.chunk(num_rows=8, length=600) == 32
  assert sizes.columns(256) == 4096
  assert sizes.columns(10**6) == vocabulary_blocks.MIN_COLUMNS


def temporary_bytes(depth, length, vocab_size):
  """Temporary memory of the statistics and their gradient."""
  shape = jax.ShapeDtypeStruct
  hidden = shape((1, length, depth), jnp.float32)
  kernel = shape((depth, vocab_size), jnp.float32)

  def total(hidden, kernel, ref_hidden, ref_kernel, targets):
    figures = logps_lib.chunked_token_figures(
      hidden,
      Readout(kernel),
      targets,
      chunk_size=4096,
      figures=FIGURES,
      ref_hidden=ref_hidden,
      ref_readout=Readout(ref_kernel),
    )
    return sum(figure.sum() for figure in figures.values())

  compiled = (
    jax.jit(jax.grad(total, (0, 1)))
    .lower(hidden, kernel, hidden, kernel, shape((1, length), jnp.int32))
    .compile()
  )
  assert f"{length},1,{vocab_size}" not in compiled.as_text()
  return compat.program_memory(compiled).temporaries


def test_no_buffer_of_positions_times_vocabulary():
  """In the compiled program, for the policy and a live reference."""
  # Blocks of logits have 4 MiB; the whole would have 307 MB.
  assert temporary_bytes(16, 1536, 50_000) < 40e6


@pytest.mark.parametrize(
  ("small", "large", "most"),
  # A last, narrower block has buffers of its own, of 4 MiB each.
  [(3 * 2**14, 12 * 2**14, 1e6), (50_000, 200_000, 10e6)],
  ids=["whole_blocks", "a_rest"],
)
def test_larger_vocabulary_needs_no_other_memory(small, large, most):
  """No copy of a kernel or of its gradient, of 38 MB more each."""
  grown = temporary_bytes(64, 512, large) - temporary_bytes(64, 512, small)
  assert grown < most


def test_chunks_without_scored_positions_are_skipped():
  x = inputs(length=12)
  is_scored = np.zeros((2, 12), bool)
  is_scored[0, :3] = is_scored[1, :6] = True

  def ours(x):
    return logps_lib.chunked_token_figures(
      **x, chunk_size=4, figures=FIGURES, is_scored=is_scored
    )

  def masked(x):
    kept = np.arange(12) < 8  # the chunks with a scored position
    return {
      name: jnp.where(kept, figure, 0.0)
      for name, figure in whole_vocabulary(x).items()
    }

  names = ("logps", "kl")
  assert_close(with_gradients(ours, x, names), with_gradients(masked, x, names))
