"""Placement: how a run lies on its devices, by jit or pmap."""

from collections.abc import Callable
import dataclasses
import functools
import math
from typing import Any

import jax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
import numpy as np

from dpo_jax.parallel.active_mesh import ROW_AXES
from dpo_jax.parallel.mesh import nearest_mesh
from dpo_jax.trees import path_name
from dpo_jax.types import Batch

# Fields of a batch with a place for every token of a row.
_TOKEN_FIELDS = frozenset({"tokens", "positions", "segments", "branches"})


PARALLELISMS = ("jit", "pmap")


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
