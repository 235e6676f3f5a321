"""What of the mesh the models ask for."""

import jax
from jax.sharding import AxisType


def free_axes() -> dict[str, int]:
  """Sizes of the mesh axes that the partitioner divides work over."""
  mesh = jax.sharding.get_abstract_mesh()
  return {
    name: mesh.shape[name]
    for name, kind in zip(mesh.axis_names, mesh.axis_types, strict=True)
    if kind is AxisType.Auto
  }
