"""What of the mesh the models ask for."""

import math

import jax
from jax.sharding import AxisType, PartitionSpec

from dpo_jax.system import compat

# Rows of a batch are split over both of these.
ROW_AXES = ("data", "fsdp")


def free_axes() -> dict[str, int]:
  """Sizes of the mesh axes that the partitioner divides work over."""
  mesh = jax.sharding.get_abstract_mesh()
  return {
    name: mesh.shape[name]
    for name, kind in zip(mesh.axis_names, mesh.axis_types, strict=True)
    if kind is AxisType.Auto
  }


def platform() -> str:
  """Names what is compiled for, which need not be what this machine has."""
  return compat.mesh_platform() or jax.default_backend()


def num_row_shards(num_rows: int) -> int:
  """Devices among which rows are divided; 1 where they cannot be."""
  sizes = free_axes()
  size = math.prod(sizes.get(name, 1) for name in ROW_AXES)
  return size if num_rows % size == 0 else 1


def gathered(kernel: jax.Array, split: int | None) -> jax.Array:
  """A kernel with all of its axis `split`, which `fsdp` splits, if any.

  Said outright, since the partitioner of a TPU else overlaps the products on
  few chips with the gather of their kernel, piece by piece: at twice the
  bytes, for every product gathers anew.
  """
  if split is None or free_axes().get("fsdp", 1) == 1:
    return kernel
  spec = [PartitionSpec.UNCONSTRAINED] * kernel.ndim
  spec[split] = None
  return jax.lax.with_sharding_constraint(kernel, PartitionSpec(*spec))
