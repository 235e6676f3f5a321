"""Tests what dpo_jax/system/compat.py expects of the installed JAX."""

import inspect
import typing

import jax
from jax._src import distributed
from jax.experimental.pallas.ops.tpu.splash_attention import (
  splash_attention_kernel as kernel_lib,
)
from jax.experimental.pallas.ops.tpu.splash_attention import (
  splash_attention_mask_info as mask_info_lib,
)
import jax.numpy as jnp
from jax.sharding import Mesh
import numpy as np
from orbax.checkpoint import multihost
import pytest

from dpo_jax.planning.topology import parse_topology
from dpo_jax.system import compat

_PRIMALS = ["q", "k", "v", "segment_ids", "sinks"]
_STATIC = [
  "save_residuals",
  "mask_value",
  "is_mqa",
  "block_sizes",
  "residual_checkpoint_name",
  "mask_function",
  "attn_logits_soft_cap",
  "interpret",
]
_MASK_INFOS = ["fwd_mask_info", "dq_mask_info", "dkv_mask_info"]


@pytest.mark.parametrize(
  ("name", "parameters"),
  [
    ("_splash_attention_forward", ["fwd_mask_info", *_PRIMALS, *_STATIC]),
    ("_splash_attention_fwd", [*_MASK_INFOS, *_PRIMALS, *_STATIC]),
    ("_splash_attention_bwd", [*_STATIC, "res", "do"]),
  ],
)
def test_splash_kernels_have_the_signatures_that_are_called(name, parameters):
  found = list(inspect.signature(getattr(kernel_lib, name)).parameters)
  assert sorted(found) == sorted(parameters), (
    f"jax {jax.__version__} has another {name}: see dpo_jax/system/compat.py"
  )


def test_the_splash_kernel_saves_the_residuals_that_are_given():
  saved = typing.get_args(kernel_lib.SplashResidualsType)
  assert len(saved) == 9, (
    f"jax {jax.__version__} has other residuals: see dpo_jax/system/compat.py"
  )


def test_splash_passes_equal_causal_attention(unoptimized):
  """One block, one head; the gradient in closed form."""
  size, depth = 128, 8
  queries, keys, values, gradient = np.random.default_rng(0).normal(
    size=(4, 1, size, depth)
  )
  is_seen = np.tril(np.ones((size, size), bool))
  scores = np.where(is_seen, queries[0] @ keys[0].T, -np.inf)
  weights = np.exp(scores - scores.max(1, keepdims=True))
  lse = np.log(weights.sum(1)) + scores.max(1)
  weights /= weights.sum(1, keepdims=True)
  out = weights @ values[0]
  pull = gradient[0] @ values[0].T - (gradient[0] * out).sum(1, keepdims=True)
  pull *= weights

  mask_info = mask_info_lib.MaskInfo(
    data_next=jnp.zeros((1, 1, 1), jnp.int32),
    mask_next=None,
    block_mask=jnp.ones((1, 1, 1), jnp.int32),
    partial_mask_blocks=None,
    q_sequence=jnp.arange(size, dtype=jnp.int32),
  )
  names = ("block_q", "block_kv", "block_kv_compute", "block_q_dkv")
  names += ("block_kv_dkv", "block_kv_dkv_compute", "block_q_dq", "block_kv_dq")
  settings = dict(
    block_sizes=kernel_lib.BlockSizes(**dict.fromkeys(names, size)),
    mask_value=float(kernel_lib.DEFAULT_MASK_VALUE),
    mask_function=lambda query, key: query >= key,
    soft_cap=None,
    interpret=True,
  )
  arrays = [jnp.asarray(x, jnp.float32) for x in (queries, keys, values)]
  found = compat.splash_forward(mask_info, *arrays, **settings)
  np.testing.assert_allclose(found[0][0], out, atol=1e-4)
  np.testing.assert_allclose(found[1][0], lse, atol=1e-4)
  gradients = compat.splash_backward(
    (mask_info, mask_info),
    *arrays,
    *found,
    jnp.asarray(gradient, jnp.float32),
    **settings,
  )
  wanted = (pull @ keys[0], pull.T @ queries[0], weights.T @ gradient[0])
  for one, other in zip(gradients, wanted, strict=True):
    np.testing.assert_allclose(one[0], other, atol=1e-3)


def test_compiled_program_reports_its_memory():
  """f32 [64, 32] in and out, and two products [64, 64] between."""

  def compute(x):
    product = jnp.sin(x @ x.T)
    return (product @ product) @ x

  x = jax.ShapeDtypeStruct((64, 32), jnp.float32)
  memory = compat.program_memory(jax.jit(compute).lower(x).compile())
  assert memory.arguments == 4 * 64 * 32
  assert 0 <= memory.temporaries - 2 * 4 * 64 * 64 < 4096
  assert 0 <= memory.peak - 2 * 4 * 64 * 32 < 4096


def test_simulated_devices_are_cores_of_one_slice():
  assert {compat.slice_index(d) for d in jax.devices()} == {0}
  assert {compat.core_on_chip(d) for d in jax.devices()} == {0}
  assert compat.mesh_platform() is None
  with jax.set_mesh(Mesh(np.array(jax.devices()), ("data",))):
    assert compat.mesh_platform() == "cpu"


def test_devices_of_a_topology_have_coordinates(libtpu):
  one = parse_topology("v5e-8").devices()
  two = parse_topology("2xv5e-4").devices()
  halves = parse_topology("v4-8").devices()
  assert [compat.slice_index(d) for d in one] == [0] * 8
  assert [compat.slice_index(d) for d in two] == [0] * 4 + [1] * 4
  assert [compat.core_on_chip(d) for d in one] == [0] * 8
  assert [compat.core_on_chip(d) for d in halves] == [0, 1] * 4
  with jax.set_mesh(Mesh(np.array(one), ("data",))):
    assert compat.mesh_platform() == "tpu"


def test_gpus_that_are_not_here_have_their_facts(cuda):
  devices = parse_topology("h100-4").devices()
  assert len(devices) == 4
  with jax.set_mesh(Mesh(np.array(devices), ("data",))):
    assert compat.mesh_platform() == "gpu"
    assert compat.compute_capability() == (9, 0)
    assert compat.device_memory() == 80 * 2**30


def test_this_machine_is_no_gpu():
  assert compat.compute_capability() is None
  assert compat.device_kind() == "cpu"
  assert compat.device_memory() == 0.0


def test_the_processes_of_a_pod_are_found(monkeypatch):
  class Pod:
    """Stands in for what JAX finds in the environment of a pod."""

    opt_in_only_method = False
    is_env_present = staticmethod(lambda: True)
    get_process_count = staticmethod(lambda: 4)
    get_process_id = staticmethod(lambda: 3)
    get_local_process_id = staticmethod(lambda: None)

    @staticmethod
    def get_coordinator_address(timeout_secs, override_coordinator_port):
      assert timeout_secs == 60 and not override_coordinator_port
      return "10.0.0.2:8476"

  monkeypatch.setattr(compat.ClusterEnv, "_cluster_types", [Pod])
  assert compat.find_processes(60.0) == ("10.0.0.2:8476", 4, 3)


def test_a_stop_is_agreed_on_by_the_caller_alone(monkeypatch):
  """Orbax, which asks with its step, is told no and changes no count."""
  asked = []

  class Manager:
    def reached_sync_point(self, call):
      asked.append(call)
      return call == 8

  jax.devices()  # with a client, JAX would start a CPU of several processes
  state = distributed.global_state
  manager = Manager()
  monkeypatch.setattr(state, "client", object())
  monkeypatch.setattr(state, "preemption_sync_manager", manager)
  with pytest.raises(KeyError), compat.stop_agreement() as is_agreed:
    assert not is_agreed(7)
    assert not multihost.reached_preemption(2)
    assert is_agreed(8)
    raise KeyError
  assert asked == [7, 8]
  assert state.preemption_sync_manager is manager
  monkeypatch.setattr(state, "preemption_sync_manager", None)
  with compat.stop_agreement() as is_agreed:
    assert is_agreed is None
