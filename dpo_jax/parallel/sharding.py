"""Shardings of parameters and states, by partition rules."""

from collections.abc import Mapping, Sequence
import math
import re
from typing import Any

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from dpo_jax.parallel.mesh import nearest_mesh
from dpo_jax.trees import path_name

# Regular expressions of paths, and the axes that split each dimension.
Rules = Sequence[tuple[str, PartitionSpec]]


def partition_spec(name: str, rules: Rules) -> PartitionSpec | None:
  """Returns what the first rule that matches a path says, or None."""
  return next((spec for rule, spec in rules if re.search(rule, name)), None)


def param_shardings(abstract_params: Any, mesh: Mesh, rules: Rules) -> Any:
  """Returns a sharding for every parameter.

  Args:
    abstract_params: nested dict of things with a shape.
    mesh: from `make_mesh`.
    rules: the first that matches a parameter's path decides.

  Returns:
    The same tree of NamedShardings.

  Raises:
    ValueError: parameters that no rule covers, or dimensions that the mesh
      does not divide; all at once, with the nearest mesh that divides.
  """
  specs = {}
  faults = []
  for path, leaf in jax.tree_util.tree_leaves_with_path(abstract_params):
    name = path_name(path)
    spec = partition_spec(name, rules)
    if spec is None:
      faults.append(f"{name} matches no partition rule")
    else:
      specs[name] = (spec, leaf.shape)
  uneven = _uneven(specs, mesh.shape)
  if uneven:
    nearest = nearest_mesh(
      mesh.shape, mesh.size, lambda sizes: not _uneven(specs, sizes)
    )
    uneven.append(f"nearest mesh that divides the model: {nearest}")
  if faults or uneven:
    raise ValueError(
      "the mesh does not fit the model:\n  " + "\n  ".join(faults + uneven)
    )
  return jax.tree_util.tree_map_with_path(
    lambda path, _: NamedSharding(mesh, specs[path_name(path)][0]),
    abstract_params,
  )


def _uneven(
  specs: Mapping[str, tuple[PartitionSpec, tuple[int, ...]]],
  sizes: Mapping[str, int],
) -> list[str]:
  """Returns a message for each dimension that a mesh does not divide.

  Args:
    specs: partition spec and shape of each parameter, by name.
    sizes: devices on each axis of the mesh.
  """
  return [
    f"{name} has a dimension of {length} on the mesh axis {axis!r} of"
    f" {sizes[axis]}: nearest that divides is {math.gcd(length, sizes[axis])}"
    for name, (spec, shape) in specs.items()
    for axis, length in zip(spec, shape, strict=False)
    if axis is not None and length % sizes[axis]
  ]


def state_shardings(state: Any, params: Any, mesh: Mesh, rules: Rules) -> Any:
  """Returns the shardings of a whole train state.

  A leaf that mirrors a parameter (its path ends in the parameter's, and its
  shape is the same: Adam's moments, a reference copy) is sharded as that
  parameter is; everything else is replicated.

  Args:
    state: TrainState of arrays or ShapeDtypeStructs.
    params: nested dict of the same kind.
    mesh: from `make_mesh`.
    rules: see `param_shardings`.

  Returns:
    `state`'s tree of NamedShardings.
  """
  leaves = jax.tree_util.tree_leaves_with_path(params)
  shardings = jax.tree.leaves(param_shardings(params, mesh, rules))
  by_name = {
    path_name(path): (leaf.shape, sharding)
    for (path, leaf), sharding in zip(leaves, shardings, strict=True)
  }
  replicated = NamedSharding(mesh, PartitionSpec())

  def place(path, leaf):
    parts = path_name(path).split("/")
    for start in range(len(parts)):
      shape, sharding = by_name.get("/".join(parts[start:]), (None, None))
      if shape == leaf.shape:
        return sharding
    return replicated

  return jax.tree_util.tree_map_with_path(place, state)


def with_shardings(abstract: Any, shardings: Any) -> Any:
  """Returns a tree of ShapeDtypeStructs with shardings.

  Args:
    abstract: arrays or ShapeDtypeStructs.
    shardings: the same tree of shardings.
  """
  return jax.tree.map(
    lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s),
    abstract,
    shardings,
  )
