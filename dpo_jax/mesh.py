"""Devices -> mesh, and how arrays and steps are laid over it.

`jit` over a mesh with the axes `data`, `fsdp` and `tensor` is the default.
`pmap` maps the same step over all devices, parameters replicated.
"""

from collections.abc import Callable, Mapping
import dataclasses
import functools
import math
import re
from typing import Any

import jax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
import numpy as np

from dpo_jax.types import Batch

AXES = ("data", "fsdp", "tensor")
# Rows of a batch are split over both of these.
ROW_AXES = ("data", "fsdp")
PARALLELISMS = ("jit", "pmap")

# First match wins; every parameter must match one. The leading axis of a
# layer's parameter is the layer.
PARTITION_RULES: tuple[tuple[str, PartitionSpec], ...] = (
  (r"^embedding$", PartitionSpec("tensor", "fsdp")),
  (r"^head$", PartitionSpec("fsdp", "tensor")),
  (
    r"^layers/(query|key|value)/kernel$",
    PartitionSpec(None, "fsdp", "tensor", None),
  ),
  (r"^layers/(gate|up)/kernel$", PartitionSpec(None, "fsdp", "tensor")),
  (
    r"^layers/attention_out/kernel$",
    PartitionSpec(None, "tensor", None, "fsdp"),
  ),
  (r"^layers/down/kernel$", PartitionSpec(None, "tensor", "fsdp")),
  (r"scale$|^value_head$", PartitionSpec()),
)


def make_mesh(sizes: Mapping[str, int], devices: Any = None) -> Mesh:
  """Arranges all devices along `data`, `fsdp` and `tensor`.

  Args:
    sizes: devices on each axis; one of them may be -1 and takes the rest.
    devices: what to arrange; all devices if None.

  Returns:
    The mesh.

  Raises:
    ValueError: an unknown axis, or sizes that do not multiply to the number
      of devices.
  """
  devices = jax.devices() if devices is None else devices
  unknown = sorted(set(sizes) - set(AXES))
  if unknown or set(AXES) - set(sizes):
    raise ValueError(f"mesh={dict(sizes)} must give {', '.join(AXES)}")
  shape = [sizes[axis] for axis in AXES]
  if shape.count(-1) > 1 or any(size < 1 and size != -1 for size in shape):
    raise ValueError(
      f"mesh={dict(sizes)}: sizes must be positive, one of them may be -1"
    )
  if -1 in shape:
    rest = -math.prod(shape)
    shape[shape.index(-1)] = max(len(devices) // rest, 1)
  if math.prod(shape) != len(devices):
    raise ValueError(
      f"mesh={dict(zip(AXES, shape, strict=True))} takes {math.prod(shape)}"
      f" devices, and there are {len(devices)}: let one axis be -1, or make"
      " the product equal"
    )
  return jax.make_mesh(
    tuple(shape),
    AXES,
    axis_types=(AxisType.Auto,) * len(AXES),
    devices=devices,
  )


def path_name(path: Any) -> str:
  """'layers/query/kernel' from a key path."""
  parts = []
  for key in path:
    for attribute in ("key", "name", "idx"):
      if hasattr(key, attribute):
        parts.append(str(getattr(key, attribute)))
        break
  return "/".join(parts)


def param_shardings(abstract_params: Any, mesh: Mesh) -> Any:
  """A sharding for every parameter, by PARTITION_RULES.

  Args:
    abstract_params: nested dict of things with a shape.
    mesh: from `make_mesh`.

  Returns:
    The same tree of NamedShardings.

  Raises:
    ValueError: parameters that no rule covers, or dimensions that the mesh
      does not divide; all at once.
  """
  faults = []

  def place(path, leaf):
    name = path_name(path)
    spec = next(
      (spec for rule, spec in PARTITION_RULES if re.search(rule, name)), None
    )
    if spec is None:
      faults.append(f"{name} matches no partition rule")
      return None
    for axis, size in zip(spec, leaf.shape, strict=False):
      if axis is not None and size % mesh.shape[axis]:
        faults.append(
          f"{name} has a dimension of {size} on the mesh axis {axis!r} of"
          f" {mesh.shape[axis]}: nearest that divides is"
          f" {math.gcd(size, mesh.shape[axis])}"
        )
    return NamedSharding(mesh, spec)

  shardings = jax.tree_util.tree_map_with_path(place, abstract_params)
  if faults:
    raise ValueError(
      "the mesh does not fit the model:\n  " + "\n  ".join(faults)
    )
  return shardings


def state_shardings(state: Any, params: Any, mesh: Mesh) -> Any:
  """Shardings of a whole train state.

  A leaf that mirrors a parameter (its path ends in the parameter's, and its
  shape is the same: Adam's moments, a reference copy) lies as that parameter
  does; everything else is replicated.

  Args:
    state: TrainState of arrays or ShapeDtypeStructs.
    params: nested dict of the same kind.
    mesh: from `make_mesh`.

  Returns:
    `state`'s tree of NamedShardings.
  """
  leaves = jax.tree_util.tree_leaves_with_path(params)
  shardings = jax.tree.leaves(param_shardings(params, mesh))
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


@dataclasses.dataclass(frozen=True)
class Placement:
  """How a run lies on its devices.

  Between steps of `jit` a state is a tree of global arrays on the mesh. Under
  `pmap` it has a leading device axis; `gather_state` takes that off again for
  checkpoints and evaluation, which always use the mesh.
  """

  mesh: Mesh
  parallelism: str

  def __post_init__(self):
    if self.parallelism not in PARALLELISMS:
      raise ValueError(
        f"parallelism={self.parallelism!r} must be one of"
        f" {', '.join(PARALLELISMS)}"
      )
    if self.parallelism == "pmap" and self.mesh.shape["data"] != self.mesh.size:
      raise ValueError(
        "parallelism='pmap' replicates the parameters: all devices must be on"
        f" the mesh axis 'data', and the mesh is {dict(self.mesh.shape)}"
      )

  @property
  def num_row_shards(self) -> int:
    """Devices that the rows of a batch are split over."""
    return math.prod(self.mesh.shape[axis] for axis in ROW_AXES)

  @property
  def axis_name(self) -> str | None:
    """Axis that a step must sum over by itself."""
    return "data" if self.parallelism == "pmap" else None

  @property
  def replicated(self) -> NamedSharding:
    return NamedSharding(self.mesh, PartitionSpec())

  @property
  def _stacked(self) -> NamedSharding:
    """Of arrays with pmap's leading device axis.

    On the mesh that pmap makes for itself: the first step would else be
    traced and compiled for ours, and the second for its own.
    """
    mesh = Mesh(np.array(jax.devices()), ("data",), axis_types=(AxisType.Auto,))
    return NamedSharding(mesh, PartitionSpec("data"))

  def place_rows(self, batch: Batch) -> Batch:
    """Numpy rows of this process -> global arrays split over the mesh."""
    sharding = NamedSharding(self.mesh, PartitionSpec(ROW_AXES))
    return jax.tree.map(
      lambda x: jax.make_array_from_process_local_data(sharding, x), batch
    )

  def place_training_batch(self, batch: Batch) -> Batch:
    """As `place_rows`, with pmap's leading device axis where it needs one."""
    if self.parallelism == "jit":
      return self.place_rows(batch)
    count = jax.local_device_count()
    return jax.tree.map(
      lambda x: jax.make_array_from_process_local_data(
        self._stacked, x.reshape(count, -1, *x.shape[1:])
      ),
      batch,
    )

  def place_state(self, state: Any) -> Any:
    """A state on the mesh -> what the compiled step takes."""
    if self.parallelism == "jit":
      return state
    return jax.tree.map(self._stack, state)

  def gather_state(self, state: Any) -> Any:
    """What the compiled step gives -> a state on the mesh."""
    if self.parallelism == "jit":
      return state
    return jax.tree.map(self._unstack, state)

  def _stack(self, x: jax.Array) -> jax.Array:
    return jax.make_array_from_single_device_arrays(
      (self.mesh.size, *x.shape),
      self._stacked,
      [shard.data[None] for shard in x.addressable_shards],
    )

  def _unstack(self, x: jax.Array) -> jax.Array:
    return jax.make_array_from_single_device_arrays(
      x.shape[1:],
      self.replicated,
      [shard.data[0] for shard in x.addressable_shards],
    )

  def compile_step(
    self, step: Callable[..., Any], shardings: Any
  ) -> Callable[..., Any]:
    """Compiles (state, batch) -> (state, metrics), the state donated.

    Args:
      step: pure; under pmap it sums over `axis_name` itself.
      shardings: of the state on the mesh.

    Returns:
      The compiled step. Metrics come back replicated; under pmap with a
      leading device axis, which `fetch` takes off.
    """
    if self.parallelism == "pmap":
      return jax.pmap(step, axis_name=self.axis_name, donate_argnums=0)
    return jax.jit(
      step, donate_argnums=0, out_shardings=(shardings, self.replicated)
    )

  def fetch(self, metrics: Any) -> Any:
    """Waits for a step's metrics and gives them as numpy scalars."""
    if self.parallelism == "pmap":
      metrics = jax.tree.map(lambda x: x.addressable_shards[0].data, metrics)
    return jax.tree.map(lambda x: np.asarray(x).reshape(()), metrics)


def on_mesh(mesh: Mesh) -> Callable[[Callable], Callable]:
  """Runs a function with `mesh` as the context that constraints refer to."""

  def wrap(function: Callable) -> Callable:
    @functools.wraps(function)
    def run(*args, **kwargs):
      with jax.set_mesh(mesh):
        return function(*args, **kwargs)

    return run

  return wrap
