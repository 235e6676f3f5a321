"""Devices -> mesh, and how arrays and steps are laid over it.

`jit` over a mesh is the default. Its axes: `data` and `fsdp` split the rows of
a batch, `fsdp` the parameters besides, `tensor` heads and features, `context`
the tokens of a row. `pmap` maps the same step over all devices, parameters
replicated.
"""

from collections.abc import Callable, Iterator, Mapping
import dataclasses
import functools
import itertools
import logging
import math
import re
from typing import Any

import jax
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
import numpy as np

from dpo_jax import compat
from dpo_jax.models.partition import ROW_AXES
from dpo_jax.types import Batch

_LOG = logging.getLogger(__name__)

AXES = ("data", "fsdp", "tensor", "context")
# Fields of a batch with a place for every token of a row.
_TOKEN_FIELDS = frozenset({"tokens", "positions", "segments", "branches"})
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
  (r"^position_embedding$", PartitionSpec(None, "fsdp")),
  (r"^layers/(query|key|value|gate|up)/bias$", PartitionSpec(None, "tensor")),
  (r"^head_bias$", PartitionSpec("tensor")),
  # Adapters lie as the axes of their kernels do.
  (
    r"^layers/(query|key|value|gate|up)/lora_a$",
    PartitionSpec(None, "fsdp", None),
  ),
  (
    r"^layers/(query|key|value|gate|up)/lora_b$",
    PartitionSpec(None, None, "tensor"),
  ),
  (r"^layers/(attention_out|down)/lora_a$", PartitionSpec(None, "tensor")),
  (
    r"^layers/(attention_out|down)/lora_b$",
    PartitionSpec(None, None, "fsdp"),
  ),
  (r"(scale|bias)$|^value_head$", PartitionSpec()),
)


def make_mesh(sizes: Mapping[str, int], devices: Any = None) -> Mesh:
  """Arranges all devices along the axes.

  Devices of several TPU slices, which only the data center network joins, are
  arranged so that `data` crosses it, and `fsdp` only where `data` is too small.

  Args:
    sizes: devices on each axis; one of them may be -1 and takes the rest, and
      an axis that is not there is 1.
    devices: what to arrange; all devices if None.

  Returns:
    The mesh.

  Raises:
    ValueError: an unknown axis, sizes that do not multiply to the number of
      devices, or that the slices do not divide.
  """
  devices = list(jax.devices() if devices is None else devices)
  shape = settle_sizes(sizes, len(devices))
  if getattr(devices[0], "device_kind", "") == "TPU v4" and any(
    compat.core_on_chip(d) for d in devices
  ):
    # Compiled ahead of time a v4 chip is two devices, which JAX's own
    # arrangement refuses; on a TPU VM it is one.
    arranged = np.array(devices).reshape(tuple(shape.values()))
    return Mesh(arranged, AXES, axis_types=(AxisType.Auto,) * len(AXES))
  num_slices = len({compat.slice_index(d) for d in devices})
  if num_slices == 1 or devices[0].platform != "tpu":
    return jax.make_mesh(
      tuple(shape.values()),
      AXES,
      axis_types=(AxisType.Auto,) * len(AXES),
      devices=devices,
    )
  arranged = arrange_slices(shape, devices, num_slices)
  return Mesh(arranged, AXES, axis_types=(AxisType.Auto,) * len(AXES))


def settle_sizes(sizes: Mapping[str, int], num_devices: int) -> dict[str, int]:
  """The size of every axis, -1 and absent ones filled in.

  Raises:
    ValueError: see `make_mesh`.
  """
  unknown = sorted(set(sizes) - set(AXES))
  if unknown:
    raise ValueError(
      f"mesh={dict(sizes)}: {', '.join(unknown)} must be one of"
      f" {', '.join(AXES)}"
    )
  shape = {axis: sizes.get(axis, 1) for axis in AXES}
  given = list(shape.values())
  if given.count(-1) > 1 or any(n < 1 and n != -1 for n in given):
    raise ValueError(
      f"mesh={dict(sizes)}: sizes must be positive, one of them may be -1"
    )
  for axis, size in shape.items():
    if size == -1:
      shape[axis] = max(num_devices // -math.prod(given), 1)
  if math.prod(shape.values()) != num_devices:
    nearest = nearest_mesh(shape, num_devices, lambda _: True)
    raise ValueError(
      f"mesh={shape} takes {math.prod(shape.values())} devices, and there are"
      f" {num_devices}: let one axis be -1, or make the product equal. Nearest:"
      f" {nearest}"
    )
  return shape


def factorisations(num_devices: int) -> Iterator[dict[str, int]]:
  """Every mesh of so many devices."""
  divisors = [n for n in range(1, num_devices + 1) if not num_devices % n]
  for sizes in itertools.product(divisors, repeat=len(AXES) - 1):
    rest, remainder = divmod(num_devices, math.prod(sizes))
    if not remainder:
      yield dict(zip(AXES, (rest, *sizes), strict=True))


def nearest_mesh(
  sizes: Mapping[str, int],
  num_devices: int,
  fits: Callable[[dict[str, int]], bool],
) -> dict[str, int] | None:
  """The mesh of `num_devices` that fits and moves the fewest factors of 2.

  Args:
    sizes: of every axis, what was asked for.
    num_devices: what the nearest one must multiply to.
    fits: whether a mesh would do.

  Returns:
    Sizes of every axis, or None if none fits.
  """

  def distance(other):
    return sum(abs(math.log2(other[a] / sizes[a])) for a in AXES)

  candidates = [m for m in factorisations(num_devices) if fits(m)]
  return min(candidates, key=distance, default=None)


def arrange_slices(
  shape: Mapping[str, int], devices: list[Any], num_slices: int
) -> np.ndarray:
  """Devices of several slices, `data` outermost over the network between.

  Args:
    shape: of every axis.
    devices: all of them, each with a slice_index.
    num_slices: how many there are.

  Returns:
    Devices in the shape of the mesh.

  Raises:
    ValueError: `data` times `fsdp` is no multiple of the slices.
  """
  over_data = math.gcd(shape["data"], num_slices)
  over_fsdp = num_slices // over_data
  if shape["fsdp"] % over_fsdp:

    def fits(mesh):
      rest = num_slices // math.gcd(mesh["data"], num_slices)
      return mesh["fsdp"] % rest == 0

    nearest = nearest_mesh(shape, len(devices), fits)
    raise ValueError(
      f"mesh={dict(shape)}: data * fsdp must be a multiple of the"
      f" {num_slices} slices, since tensor and context stay within one."
      f" Nearest: {nearest}"
    )
  if over_fsdp > 1:
    _LOG.warning(
      "the mesh axis fsdp crosses the network between slices, since data=%d is"
      " no multiple of the %d slices: parameters are gathered over it in every"
      " layer",
      shape["data"],
      num_slices,
    )
  across = {"data": over_data, "fsdp": over_fsdp}
  across = [across.get(axis, 1) for axis in AXES]
  within = [shape[axis] // n for axis, n in zip(AXES, across, strict=True)]
  return mesh_utils.create_hybrid_device_mesh(within, across, devices)


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
      does not divide; all at once, with the nearest mesh that divides.
  """
  specs = {}
  faults = []
  for path, leaf in jax.tree_util.tree_leaves_with_path(abstract_params):
    name = path_name(path)
    spec = partition_spec(name)
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


def partition_spec(name: str) -> PartitionSpec | None:
  """What the first rule that matches says, or None."""
  return next(
    (spec for rule, spec in PARTITION_RULES if re.search(rule, name)), None
  )


def _uneven(
  specs: Mapping[str, tuple[PartitionSpec, tuple[int, ...]]],
  sizes: Mapping[str, int],
) -> list[str]:
  """Dimensions of parameters that a mesh does not divide."""
  return [
    f"{name} has a dimension of {length} on the mesh axis {axis!r} of"
    f" {sizes[axis]}: nearest that divides is {math.gcd(length, sizes[axis])}"
    for name, (spec, shape) in specs.items()
    for axis, length in zip(spec, shape, strict=False)
    if axis is not None and length % sizes[axis]
  ]


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


def with_shardings(abstract: Any, shardings: Any) -> Any:
  """Adds shardings to a tree of arrays or ShapeDtypeStructs."""
  return jax.tree.map(
    lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s),
    abstract,
    shardings,
  )


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

  def check_batch_size(self, key: str, size: int) -> None:
    """Raises ValueError unless the devices divide a batch of `size` groups."""
    shards = self.num_row_shards
    if not size % shards:
      return
    below = size // shards * shards
    nearest = f"are {below} and {below + shards}" if below else f"is {shards}"
    sizes = nearest_mesh(
      self.mesh.shape,
      self.mesh.size,
      lambda m: size % math.prod(m[axis] for axis in ROW_AXES) == 0,
    )
    raise ValueError(
      f"{key}={size} must be a multiple of the {shards} devices on the mesh"
      f" axes {ROW_AXES}: nearest {nearest}, or the mesh {sizes}"
    )

  def check_row_tokens(self, row_tokens: int) -> None:
    """Raises ValueError unless the context axis divides the tokens of a row."""
    size = self.mesh.shape["context"]
    if not row_tokens % size:
      return
    enough = -(-row_tokens // size) * size
    nearest = nearest_mesh(
      self.mesh.shape,
      self.mesh.size,
      lambda m: row_tokens % m["context"] == 0,
    )
    raise ValueError(
      f"rows of {row_tokens} tokens are not divided by the {size} devices on"
      f" the mesh axis 'context': set data.row_tokens={enough}, or the mesh"
      f" {nearest}"
    )

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

  @functools.cached_property
  def row_reader(self) -> tuple[int, int]:
    """Which share of a batch's rows this process reads: (index, count).

    Processes whose devices hold the same rows, because `tensor` or `context`
    crosses from one to the other, read the same share.
    """
    blocks = self.mesh.devices.reshape(self.num_row_shards, -1)
    shards: dict[int, set[int]] = {}
    for shard, block in enumerate(blocks):
      for device in block:
        shards.setdefault(device.process_index, set()).add(shard)
    shares = sorted({tuple(sorted(shard)) for shard in shards.values()})
    if sum(map(len, shares)) != self.num_row_shards:
      raise ValueError(
        f"mesh={dict(self.mesh.shape)}: the rows of one process overlap with"
        " those of another in part. Let tensor * context divide the devices of"
        " a process, or be a multiple of them"
      )
    mine = shards.get(jax.process_index(), {0})
    return shares.index(tuple(sorted(mine))), len(shares)

  def batch_shardings(self, batch: Batch) -> Batch:
    """How a batch's arrays lie: rows over `data` and `fsdp`, the tokens of a
    row over `context`."""

    def place(path, _):
      context = "context" if path_name(path) in _TOKEN_FIELDS else None
      return NamedSharding(self.mesh, PartitionSpec(ROW_AXES, context))

    return jax.tree_util.tree_map_with_path(place, batch)

  @property
  def row_sharding(self) -> NamedSharding:
    """Of arrays whose first axis is rows, or whatever is as many."""
    return NamedSharding(self.mesh, PartitionSpec(ROW_AXES))

  def place_rows(self, batch: Batch) -> Batch:
    """Numpy rows of this process -> global arrays split over the mesh."""
    count = self.row_reader[1]
    return jax.tree.map(
      lambda x, sharding: jax.make_array_from_process_local_data(
        sharding, x, (x.shape[0] * count, *x.shape[1:])
      ),
      batch,
      self.batch_shardings(batch),
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
