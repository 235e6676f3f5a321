"""One device = eight = pmap = accumulation: the objective does not move."""

import dataclasses
import types

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from dpo_jax.config import default_config
from dpo_jax.losses import build_objective
from dpo_jax.models import partition_rules
from dpo_jax.models.config import Lora
from dpo_jax.models.layers import Projection
from dpo_jax.parallel import mesh as mesh_lib
from dpo_jax.parallel import sharding
from dpo_jax.parallel.placement import Placement
from dpo_jax.parallel.pmap import make_placement
from dpo_jax.training import gradients
from dpo_jax.training import step as step_lib
from dpo_jax.training.optimizer import build_optimizer
from dpo_jax.types import TrainState
from tests import tiny

pytestmark = pytest.mark.usefixtures("unoptimized")

MESHES = [
  {"data": 1, "fsdp": 1, "tensor": 1},
  {"data": 8, "fsdp": 1, "tensor": 1},
  {"data": 1, "fsdp": 8, "tensor": 1},
  {"data": 2, "fsdp": 2, "tensor": 2},
  {"data": 4, "fsdp": 1, "tensor": 2},
]


# All meshes of eight devices that the tiny model's two key heads allow.
FACTORISATIONS = [
  sizes
  for sizes in mesh_lib.factorisations(8)
  if sizes["tensor"] <= 2 and sizes not in ({**m, "context": 1} for m in MESHES)
]


# In one program, and its metrics have the loss of each.
LOSSES = ({"name": "dpo", "weight": 0.5}, {"name": "sft", "weight": 0.5})


def make_batch(num_rows=16):
  groups = tiny.make_groups(30)
  ref_logps = np.random.default_rng(1).normal(-30, 3, (30, 2))
  return tiny.pack(
    groups, num_rows=num_rows, ref_logps=ref_logps.astype(np.float32)
  )


def run_step(
  sizes,
  *,
  parallelism="jit",
  accumulation_steps=1,
  is_frozen=False,
  num_steps=2,
):
  """Two SGD steps: parameters and metrics on the host."""
  devices = jax.devices()[: np.prod(list(sizes.values()))]
  mesh = mesh_lib.make_mesh(sizes, devices)
  placement = make_placement(mesh, parallelism)
  policy = tiny.make_policy()
  params = tiny.make_params(policy)
  objective = build_objective(LOSSES)
  optimizer = optax.sgd(1e-2)
  state = TrainState(
    step=jnp.zeros((), jnp.int32),
    params=params,
    opt_state=optimizer.init(params),
    loss_state=objective.init(),
    ref_params=tiny.make_params(policy, seed=1) if is_frozen else None,
  )
  shardings = partition_rules.state_shardings(state, params, placement.mesh)
  state = placement.place_state(jax.device_put(state, shardings))
  step = placement.compile_step(
    step_lib.make_train_step(
      policy,
      objective,
      optimizer,
      optax.constant_schedule(1e-2),
      accumulation_steps=accumulation_steps,
      chunk_size=16,
      axis_name=placement.axis_name,
    ),
    shardings,
  )
  step = placement.bind(step)
  batch = placement.place_training_batch(make_batch())
  if is_frozen:
    batch = batch.replace(ref_logps=None)
  history = []
  for _ in range(num_steps):
    state, metrics, (sequences, _) = step(state, batch)
    logps = placement.gather_rows(sequences.logps)
    history.append({**placement.fetch(metrics), "logps": logps})
  params = jax.device_get(placement.gather_state(state).params)
  return params, history


def assert_same_run(one, other, tolerance=1e-5):
  for a, b in zip(one[1], other[1], strict=True):
    assert a.keys() == b.keys()
    for name in a:
      np.testing.assert_allclose(
        a[name], b[name], rtol=2 * tolerance, atol=tolerance, err_msg=name
      )
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(
      a, b, rtol=tolerance, atol=tolerance
    ),
    one[0],
    other[0],
  )


@pytest.fixture(scope="module")
def one_device():
  return run_step(MESHES[0])


@pytest.mark.slow
@pytest.mark.parametrize("sizes", MESHES[1:], ids=str)
def test_every_mesh_takes_the_same_steps(one_device, sizes):
  assert {"loss/dpo", "loss/sft"} <= one_device[1][0].keys()
  assert_same_run(one_device, run_step(sizes))


@pytest.mark.parametrize(
  "sizes",
  [
    pytest.param(
      sizes,
      marks=[]
      if sizes
      in (
        {"data": 2, "fsdp": 1, "tensor": 1, "context": 4},
        {"data": 1, "fsdp": 2, "tensor": 2, "context": 2},
      )
      else pytest.mark.slow,
    )
    for sizes in FACTORISATIONS
  ],
  ids=lambda sizes: "x".join(map(str, sizes.values())),
)
def test_every_factorisation_takes_the_same_steps(one_device, sizes):
  assert_same_run(one_device, run_step(sizes))


def test_pmap_takes_the_same_steps(one_device):
  assert_same_run(one_device, run_step(MESHES[1], parallelism="pmap"))


@pytest.mark.parametrize(
  ("sizes", "parallelism", "parts"),
  [(MESHES[0], "jit", 4), (MESHES[1], "jit", 2), (MESHES[1], "pmap", 2)],
)
def test_accumulation_takes_the_same_steps(
  one_device, sizes, parallelism, parts
):
  run = run_step(sizes, parallelism=parallelism, accumulation_steps=parts)
  assert_same_run(one_device, run)


@pytest.mark.slow
@pytest.mark.parametrize("parallelism", ["jit", "pmap"])
def test_a_frozen_reference_takes_the_same_steps_everywhere(parallelism):
  one = run_step(MESHES[0], is_frozen=True)
  assert_same_run(
    one, run_step(MESHES[1], is_frozen=True, parallelism=parallelism)
  )


def test_parameters_are_really_split():
  mesh = mesh_lib.make_mesh(MESHES[3])
  params = tiny.make_policy().abstract_params()
  shardings = partition_rules.param_shardings(params, mesh)
  kernel = shardings["layers"]["query"]["kernel"]
  assert kernel.shard_shape((2, 64, 4, 16)) == (2, 32, 2, 16)
  assert shardings["embedding"].shard_shape((96, 64)) == (48, 32)


def test_moments_lie_as_their_parameters_do():
  mesh = mesh_lib.make_mesh(MESHES[3])
  params = tiny.make_policy().abstract_params()
  state = jax.eval_shape(optax.adam(1e-3).init, params)
  shardings = partition_rules.state_shardings(state, params, mesh)
  wanted = partition_rules.param_shardings(params, mesh)
  assert shardings[0].mu == wanted
  assert shardings[0].count.is_fully_replicated


def test_muon_takes_the_same_step_where_its_matrices_are_split():
  config = default_config().optimizer
  config.name = "muon"
  optimizer = build_optimizer(config, optax.constant_schedule(0.1))
  update = jax.jit(optimizer.update)
  params = tiny.make_params(tiny.make_policy())
  layers = params["layers"]
  names = ("query", "attention_out")
  params = {"layers": {name: layers[name] for name in names}}
  grads = jax.tree.map(lambda x: x + 0.01, params)
  state = optimizer.init(params)
  mesh = mesh_lib.make_mesh({"data": 1, "fsdp": 4, "tensor": 2})
  split = partition_rules.param_shardings(params, mesh)
  shardings = partition_rules.state_shardings(state, params, mesh)
  placed = jax.device_put((grads, state, params), (split, shardings, split))
  wanted, _ = update(grads, state, params)
  got, state = update(*placed)
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5),
    got,
    wanted,
  )
  momentum = state[1].inner_states["muon"].inner_state[0][0].mu
  kernel = momentum["layers"]["query"]["kernel"]
  assert kernel.sharding.shard_shape(kernel.shape) == (2, 16, 2, 16)


def test_split_rows_gives_every_part_its_share():
  batch = make_batch(num_rows=16)
  parts = gradients.split_rows(batch, 4)
  assert parts.tokens.shape == (4, 4, 64)
  for part in range(4):
    np.testing.assert_array_equal(parts.tokens[part], batch.tokens[part::4])


@pytest.mark.parametrize(
  ("sizes", "message"),
  [
    ({"data": 3, "fsdp": 1, "tensor": 1}, "takes 3 devices, and there are 8"),
    ({"data": -1, "fsdp": -1, "tensor": 1}, "one of them may be -1"),
    (
      {"data": 2, "fsdp": 1, "tensor": 8},
      "Nearest: {'data': 2, 'fsdp': 1, 'tensor': 4",
    ),
    ({"data": -1, "expert": 1}, "expert must be one of data, fsdp, tensor"),
    ({"data": 0, "fsdp": 1, "tensor": 1}, "must be positive"),
  ],
)
def test_impossible_meshes_are_refused(sizes, message):
  with pytest.raises(ValueError, match=message):
    mesh_lib.make_mesh(sizes)


def test_a_mesh_that_does_not_divide_the_model_is_refused():
  mesh = mesh_lib.make_mesh({"data": 1, "fsdp": 1, "tensor": 8})
  with pytest.raises(ValueError) as error:
    partition_rules.param_shardings(tiny.make_policy().abstract_params(), mesh)
  assert "layers/key/kernel has a dimension of 2" in str(error.value)
  assert "layers/query/kernel has a dimension of 4" in str(error.value)
  assert "model: {'data': 4, 'fsdp': 1, 'tensor': 2" in str(error.value)


def test_an_axis_that_is_not_named_is_one():
  mesh = mesh_lib.make_mesh({"data": -1, "fsdp": 2})
  assert dict(mesh.shape) == {"data": 4, "fsdp": 2, "tensor": 1, "context": 1}


@dataclasses.dataclass(frozen=True)
class Device:
  """A device with the attributes that `arrange_slices` reads."""

  id: int
  slice_index: int
  process_index: int = 0
  platform: str = "none"
  device_kind: str = "none"


def test_slices_are_joined_by_data():
  devices = [Device(i, i // 4) for i in range(8)]
  shape = {"data": 2, "fsdp": 2, "tensor": 2, "context": 1}
  arranged = mesh_lib.arrange_slices(shape, devices, 2)
  assert arranged.shape == (2, 2, 2, 1)
  for index in range(2):
    assert {d.slice_index for d in arranged[index].flat} == {index}


def test_slices_are_joined_by_fsdp_where_data_is_too_small(caplog):
  devices = [Device(i, i // 4) for i in range(8)]
  shape = {"data": 1, "fsdp": 4, "tensor": 2, "context": 1}
  arranged = mesh_lib.arrange_slices(shape, devices, 2)
  assert [[d.slice_index for d in fsdp.flat] for fsdp in arranged[0]] == [
    [0, 0],
    [0, 0],
    [1, 1],
    [1, 1],
  ]
  assert "fsdp crosses the network" in caplog.text


def test_tensor_stays_within_a_slice():
  devices = [Device(i, i // 4) for i in range(8)]
  shape = {"data": 1, "fsdp": 1, "tensor": 8, "context": 1}
  with pytest.raises(ValueError, match="multiple of the 2 slices") as error:
    mesh_lib.arrange_slices(shape, devices, 2)
  assert "Nearest: {'data': 2, 'fsdp': 1, 'tensor': 4" in str(error.value)


@pytest.mark.parametrize(
  ("sizes", "share"),
  [
    ({"data": 8}, (1, 2)),
    ({"data": 2, "tensor": 4}, (1, 2)),
    ({"tensor": 8}, (0, 1)),
    ({"context": 8}, (0, 1)),
    ({"fsdp": 2, "context": 4}, (1, 2)),
  ],
  ids=str,
)
def test_processes_that_hold_the_same_rows_read_the_same(
  monkeypatch, sizes, share
):
  """As the second of two processes with four devices each."""
  shape = mesh_lib.settle_sizes(sizes, 8)
  devices = np.array([Device(i, 0, i // 4) for i in range(8)])
  mesh = types.SimpleNamespace(
    devices=devices.reshape(tuple(shape.values())), shape=shape, size=8
  )
  monkeypatch.setattr(jax, "process_index", lambda: 1)
  assert Placement(mesh).row_reader == share


def test_activations_are_split_along_the_row():
  placement = tiny.make_placement({"data": 2, "context": 4})
  batch = placement.place_rows(make_batch())
  assert batch.tokens.sharding.shard_shape((16, 64)) == (8, 16)
  assert batch.score.sharding.shard_shape((16, 8, 2)) == (8, 8, 2)
  policy = tiny.make_policy()
  hidden = mesh_lib.on_mesh(placement.mesh)(jax.jit(policy.hidden_states))(
    tiny.make_params(policy),
    batch.tokens,
    batch.positions,
    batch.segments,
    batch.branches,
  )
  assert hidden.sharding.shard_shape((16, 64, 64)) == (8, 16, 64)


def test_a_projection_gathers_the_axis_that_fsdp_splits():
  """As the partition rules have it, of kernels and adapters."""
  config = dataclasses.replace(
    tiny.make_policy().config, lora=Lora(rank=4, alpha=8.0)
  )
  for name in config.projection_shapes():
    layer = nnx.eval_shape(
      lambda name=name: Projection(name, config, rngs=nnx.Rngs(0))
    )
    for leaf, split in zip(
      ("kernel", "lora_a", "lora_b"), layer.fsdp_axes, strict=True
    ):
      spec = sharding.partition_spec(
        f"layers/{name}/{leaf}", partition_rules.PARTITION_RULES
      )
      shape = getattr(layer, leaf).shape
      axes = (*spec, *[None] * (1 + len(shape) - len(spec)))[1:]
      found = None if split is None else split % len(shape)
      assert axes.count("fsdp") == (found is not None), (name, leaf)
      assert found is None or axes[found] == "fsdp", (name, leaf)


def test_an_uncovered_parameter_is_refused():
  mesh = mesh_lib.make_mesh(MESHES[1])
  with pytest.raises(ValueError, match="router matches no partition rule"):
    partition_rules.param_shardings({"router": jnp.zeros(3)}, mesh)


def test_pmap_wants_all_devices_on_data():
  with pytest.raises(ValueError, match="must be on the mesh axis 'data'"):
    make_placement(mesh_lib.make_mesh(MESHES[3]), "pmap")
