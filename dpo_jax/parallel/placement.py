"""Placement of a run on its devices."""

from collections.abc import Callable
import dataclasses
import functools
import math
from typing import Any

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec
import numpy as np

from dpo_jax.parallel.active_mesh import ROW_AXES
from dpo_jax.parallel.hosts import to_host
from dpo_jax.parallel.mesh import nearest_mesh, on_mesh
from dpo_jax.trees import path_name
from dpo_jax.types import Batch

# Fields of a batch with an entry for each token of a row.
_TOKEN_FIELDS = frozenset({"tokens", "positions", "segments", "branches"})


@dataclasses.dataclass(frozen=True)
class Placement:
  """Placement of batches, states and steps on a mesh, compiled by `jax.jit`.

  A state is a tree of global arrays on the mesh. `pmap.PmapPlacement` keeps it
  otherwise between steps: `place_state` and `gather_state` convert, for
  checkpoints and evaluation always use the mesh.

  Attributes:
    mesh: from `make_mesh`.
  """

  mesh: Mesh

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
    """Axis that a step must sum over by itself; None: the compiler does."""
    return None

  @property
  def replicated(self) -> NamedSharding:
    return NamedSharding(self.mesh, PartitionSpec())

  @functools.cached_property
  def row_reader(self) -> tuple[int, int]:
    """Share of a batch's rows that this process reads: (index, count).

    Processes whose devices hold the same rows, because `tensor` or `context`
    crosses from one to the other, read the same share.

    Raises:
      ValueError: rows of two processes overlap in part.
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
    """Returns the sharding of each field of a batch, as a Batch.

    Rows are split over `data` and `fsdp`, the tokens of a row over `context`.
    """

    def place(path, _):
      context = "context" if path_name(path) in _TOKEN_FIELDS else None
      return NamedSharding(self.mesh, PartitionSpec(ROW_AXES, context))

    return jax.tree_util.tree_map_with_path(place, batch)

  @property
  def row_sharding(self) -> NamedSharding:
    """Sharding of arrays whose first axis is split as rows are."""
    return NamedSharding(self.mesh, PartitionSpec(ROW_AXES))

  def place_rows(self, batch: Batch) -> Batch:
    """Turns this process's rows of a batch into global arrays on the mesh."""
    count = self.row_reader[1]
    return jax.tree.map(
      lambda x, sharding: jax.make_array_from_process_local_data(
        sharding, x, (x.shape[0] * count, *x.shape[1:])
      ),
      batch,
      self.batch_shardings(batch),
    )

  def place_training_batch(self, batch: Batch) -> Batch:
    """Turns this process's rows into an argument of the compiled step."""
    return self.place_rows(batch)

  def place_state(self, state: Any) -> Any:
    """Turns a state on the mesh into an argument of the compiled step."""
    return state

  def gather_state(self, state: Any) -> Any:
    """Turns the result of the compiled step into a state on the mesh."""
    return state

  def compile_step(
    self, step: Callable[..., Any], shardings: Any
  ) -> Callable[..., Any]:
    """Compiles a step, the state donated.

    Args:
      step: (state, batch) -> (state, metrics, (arrays of groups, scalars)),
        pure; it sums over `axis_name` itself, if there is one.
      shardings: shardings of the state on the mesh.

    Returns:
      The compiled step, to be called in `bind`. `fetch` reads its metrics and
      scalars, `gather_rows` its arrays of groups.
    """
    of_groups = (self.row_sharding, self.replicated)
    return jax.jit(
      step,
      donate_argnums=0,
      out_shardings=(shardings, self.replicated, of_groups),
    )

  def bind(self, step: Callable[..., Any]) -> Callable[..., Any]:
    """Returns a compiled step that runs with the mesh in context."""
    return on_mesh(self.mesh)(step)

  def fetch(self, metrics: Any) -> Any:
    """Waits for a step's metrics and returns them as numpy scalars."""
    return jax.tree.map(lambda x: np.asarray(x).reshape(()), metrics)

  def gather_rows(self, arrays: Any) -> Any:
    """Gathers arrays that are split by rows from all hosts, as numpy."""
    return jax.tree.map(to_host, arrays)
