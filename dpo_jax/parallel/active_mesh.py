"""Mesh queries used by the models: free axes, platform, row shards."""

import math

import jax
from jax.sharding import AxisType, PartitionSpec

from dpo_jax.system import compat

# Rows of a batch are split over both of these.
ROW_AXES = ("data", "fsdp")


def free_axes() -> dict[str, int]:
  """Returns the axes of the active mesh that JAX partitions over: name -> size.

  Axes that are manual in a `shard_map` are left out; {} without a mesh.
  """
  mesh = jax.sharding.get_abstract_mesh()
  return {
    name: mesh.shape[name]
    for name, kind in zip(mesh.axis_names, mesh.axis_types, strict=True)
    if kind is AxisType.Auto
  }


def platform() -> str:
  """Names the platform that is compiled for; this machine may have another."""
  return compat.mesh_platform() or jax.default_backend()


def num_row_shards(num_rows: int) -> int:
  """Counts the devices of the active mesh that rows are split over.

  It is 1 if that number does not divide `num_rows`, or if no axis of rows is
  left to the partitioner.
  """
  sizes = free_axes()
  size = math.prod(sizes.get(name, 1) for name in ROW_AXES)
  return size if num_rows % size == 0 else 1


def gathered(kernel: jax.Array, split: int | None) -> jax.Array:
  """Returns a kernel gathered over `fsdp`, which shards its axis `split`.

  A kernel whose `split` is None is returned as it is.

  Explicit, because XLA:TPU otherwise overlaps the matmuls with the all-gather
  of their kernel in pieces on few chips. Every matmul then gathers the kernel
  again: twice the bytes.
  """
  if split is None or free_axes().get("fsdp", 1) == 1:
    return kernel
  spec = [PartitionSpec.UNCONSTRAINED] * kernel.ndim
  spec[split] = None
  return jax.lax.with_sharding_constraint(kernel, PartitionSpec(*spec))
