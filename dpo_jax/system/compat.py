"""Names of JAX that its reference does not document, each in one function.

Any release of JAX may change them, so tests/system/test_compat.py tests each.
Their docstrings compare jax 0.10.2 and 0.12.0.
"""

from collections.abc import Callable, Iterator
import contextlib
import inspect
import re
from typing import Any, NamedTuple

import jax
from jax._src import distributed
from jax._src.clusters import ClusterEnv
from jax.experimental import topologies
from jax.experimental.pallas.ops.tpu.splash_attention import (
  splash_attention_kernel as kernel_lib,
)

from dpo_jax.system import chips
from dpo_jax.system.chips import Chip


class ProgramMemory(NamedTuple):
  """Bytes of a device that a compiled program takes.

  Attributes:
    peak: most bytes at any time; a CPU's leave temporaries out.
    temporaries: bytes that are neither arguments nor results.
    arguments: bytes of the arguments.
  """

  peak: int
  temporaries: int
  arguments: int


def program_memory(compiled: Any) -> ProgramMemory:
  """Reads `compiled.memory_analysis()`, whose structure JAX leaves open.

  The three fields are the same in both versions; 0.12.0 adds others.
  """
  found = compiled.memory_analysis()
  return ProgramMemory(
    found.peak_memory_in_bytes,
    found.temp_size_in_bytes,
    found.argument_size_in_bytes,
  )


def mesh_platform() -> str | None:
  """Reads the platform of the mesh in context; None outside a mesh.

  `AbstractMesh.abstract_device` is the same in both versions; the reference
  of `jax.sharding` has no AbstractMesh.
  """
  device = jax.sharding.get_abstract_mesh().abstract_device
  return None if device is None else device.platform


def device_kind() -> str:
  """Names the kind of device that is compiled for, such as "NVIDIA H200".

  `AbstractMesh.abstract_device` has it in both versions, see `mesh_platform`.
  """
  device = jax.sharding.get_abstract_mesh().abstract_device
  return (device or jax.local_devices()[0]).device_kind


def compute_capability() -> tuple[int, int] | None:
  """Reads the compute capability of the NVIDIA GPU that is compiled for.

  The attribute of devices is not in the reference. In both versions it is text
  such as "9.0"; an AMD GPU has the name of its architecture there. A device of
  another kind than this machine's is looked up by its kind.

  Returns:
    Major and minor number; None on another device.
  """
  mine, kind = jax.local_devices()[0], device_kind()
  if mine.platform != "gpu" or mine.device_kind != kind:
    chip = chips.find_chip(kind)
    return None if chip is None or chip.gpu is None else chip.gpu.capability
  text = str(getattr(mine, "compute_capability", ""))
  found = re.fullmatch(r"(\d+)\.(\d+)", text)
  return (int(found[1]), int(found[2])) if found else None


def device_memory() -> float:
  """Returns the bytes of memory of the kind of device that is compiled for.

  A device is not asked: what it says depends on the share of its memory that
  JAX may take. 0.0 for a kind that `chips.CHIPS` does not have.
  """
  chip = chips.find_chip(device_kind())
  return 0.0 if chip is None else chip.hbm_bytes / chip.devices


def find_processes(timeout_s: float) -> tuple[str, int, int]:
  """Finds the processes of a TPU pod, as `jax.distributed.initialize` does.

  The method is private and the same in both versions. The public function does
  not return what it found.

  Args:
    timeout_s: most seconds to wait for the coordinator's name.

  Returns:
    The coordinator's HOST:PORT, the number of processes, and the index of this
    process.
  """
  address, count, index, _ = ClusterEnv.auto_detect_unset_distributed_params(
    None, None, None, None, None, int(timeout_s)
  )
  return address, count, index


class _NoStop:
  """Stands in a block of `stop_agreement` for JAX's: no stop is asked for."""

  def reached_sync_point(self, call: int) -> bool:
    del call
    return False


@contextlib.contextmanager
def stop_agreement() -> Iterator[Callable[[int], bool] | None]:
  """Takes JAX's agreement on where to stop after SIGTERM for the caller alone.

  JAX counts the calls of each process, and all processes stop at one call more
  than the largest count. Orbax asks too, at each save, with its step for the
  number: that sets the count back, and a signal at that moment agrees on a call
  that has passed, so that no process stops. In the block Orbax is told that no
  stop is asked for. The attribute of the state is the same in both versions.

  Yields:
    number of the call, from 1 -> whether to stop at it; None where JAX's
    preemption service does not run.
  """
  state = distributed.global_state
  manager = state.preemption_sync_manager
  if manager is None:
    yield None
    return
  state.preemption_sync_manager = _NoStop()
  try:
    yield manager.reached_sync_point
  finally:
    state.preemption_sync_manager = manager


def slice_index(device: Any) -> int:
  """Reads which TPU slice a device belongs to.

  In both versions CPU devices, and those compiled for a single slice, do not
  have the attribute; they are in slice 0.
  """
  return getattr(device, "slice_index", 0)


def core_on_chip(device: Any) -> int:
  """Reads which core of its chip a TPU device is.

  In both versions only TPU devices have the attribute; others are core 0.
  """
  return getattr(device, "core_on_chip", 0)


def topology_devices(name: str, **settings: Any) -> list[Any]:
  """Makes devices of a TPU that is not here, to compile for.

  `jax.experimental.topologies` is not in the reference. The function is the
  same in both versions; libtpu defines the names and settings.

  Args:
    name: libtpu's name of a slice, such as "v5e:2x4".
    **settings: libtpu's options, such as num_slices.
  """
  return topologies.get_topology_desc(name, platform="tpu", **settings).devices


def gpu_devices(name: str, chip: Chip, count: int) -> list[Any]:
  """Makes devices of GPUs that are not here, to compile for.

  JAX's CUDA plugin takes a description of the GPU, XLA's GpuTargetConfigProto
  as text, in jax 0.10.2 and 0.11.2. Neither is in the reference.

  Args:
    name: name of the topology.
    chip: chip of CHIPS with facts of a GPU.
    count: GPUs of one host.

  Raises:
    NotImplementedError: the plugin is not installed.
  """
  gpu = chip.gpu
  assert gpu is not None
  facts = {
    "threads_per_block_limit": 1024,
    "threads_per_warp": 32,
    "shared_memory_per_block": 48 * 2**10,
    "shared_memory_per_core": gpu.shared_bytes + 2**10,
    "shared_memory_per_block_optin": gpu.shared_bytes,
    "threads_per_core_limit": 2048,
    "core_count": gpu.cores,
    "fpus_per_core": gpu.lanes,
    "block_dim_limit_x": 2**31 - 1,
    "block_dim_limit_y": 2**16 - 1,
    "block_dim_limit_z": 2**16 - 1,
    "memory_bandwidth": int(chip.hbm_bandwidth),
    "l2_cache_size": gpu.l2_bytes,
    "clock_rate_ghz": gpu.clock_ghz,
    "device_memory_size": int(chip.hbm_bytes),
    "registers_per_core_limit": 2**16,
    "registers_per_block_limit": 2**16,
  }
  lines = "\n".join(f"  {key}: {value}" for key, value in facts.items())
  major, minor = gpu.capability
  target = (
    f"gpu_device_info {{\n{lines}\n"
    f"  cuda_compute_capability {{ major: {major} minor: {minor} }}\n}}\n"
    'platform_name: "CUDA"\n'
    "dnn_version_info { major: 9 minor: 10 }\n"
    f'device_description_str: "NVIDIA {name.upper()} 80GB"\n'
  )
  # Slices, hosts and GPUs of a host.
  return topologies.get_topology_desc(
    name, platform="cuda", topology=f"1x1x{count}", target_config=target
  ).devices


def splash_forward(
  mask_info: Any,
  queries: jax.Array,
  keys: jax.Array,
  values: jax.Array,
  **settings: Any,
) -> tuple[jax.Array, jax.Array]:
  """Runs the splash kernel's forward pass.

  The public maker of the kernel returns no log-sum-exps that a gradient could
  be given. The private function has the same signature in both versions;
  `sinks` entered it in 0.7.1 (jax#31050).

  Args:
    mask_info: the kernel's MaskInfo for a pass over queries.
    queries: [H, T, D], scaled.
    keys: [num_kv_heads, T, D].
    values: [num_kv_heads, T, D].
    **settings: see `_settings`.

  Returns:
    Output [H, T, D], and f32 [H, T] log-sum-exp of the scores.
  """
  out, (lse,) = kernel_lib._splash_attention_forward(
    fwd_mask_info=mask_info,
    q=queries,
    k=keys,
    v=values,
    segment_ids=None,
    sinks=None,
    save_residuals=True,
    **_settings(**settings),
  )
  return out, lse


def splash_backward(
  mask_infos: tuple[Any, Any],
  queries: jax.Array,
  keys: jax.Array,
  values: jax.Array,
  out: jax.Array,
  lse: jax.Array,
  gradient: jax.Array,
  **settings: Any,
) -> tuple[jax.Array, jax.Array, jax.Array]:
  """Runs the splash kernel's backward pass.

  The private function has the same signature in both versions. It takes its
  residuals as a tuple, and returns a cotangent for each argument of
  `_splash_attention_fwd`.

  Args:
    mask_infos: the kernel's MaskInfos for passes over queries and over keys.
    queries: as for `splash_forward`.
    keys: as for `splash_forward`.
    values: as for `splash_forward`.
    out: [H, T, D], output of the attention.
    lse: f32 [H, T], its log-sum-exp.
    gradient: [H, T, D], of the output.
    **settings: see `_settings`.

  Returns:
    Gradients of queries, keys and values.
  """
  by_queries, by_keys = mask_infos
  cotangents = kernel_lib._splash_attention_bwd(
    save_residuals=False,
    res=(queries, keys, values, None, None, out, lse, by_queries, by_keys),
    do=gradient,
    **_settings(**settings),
  )
  primals = inspect.signature(kernel_lib._splash_attention_fwd).parameters
  found = dict(zip(primals, cotangents, strict=False))
  return found["q"], found["k"], found["v"]


def _settings(
  *,
  block_sizes: Any,
  mask_value: float,
  mask_function: Callable[[jax.Array, jax.Array], jax.Array],
  soft_cap: float | None,
  interpret: bool,
) -> dict[str, Any]:
  """Names the settings that both passes share as the kernel does.

  Args:
    block_sizes: the kernel's BlockSizes.
    mask_value: score of what is masked.
    mask_function: (a query's integer, a key's position) -> whether it is seen.
    soft_cap: see `attention.attend`.
    interpret: whether to interpret the kernel, on a machine without a TPU.
  """
  return dict(
    block_sizes=block_sizes,
    mask_value=mask_value,
    mask_function=mask_function,
    attn_logits_soft_cap=soft_cap,
    interpret=interpret,
    is_mqa=False,
    residual_checkpoint_name=None,
  )
