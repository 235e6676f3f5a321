"""Data parallelism by `jax.pmap`: the parameters are on every device."""

from collections.abc import Callable
import dataclasses
from typing import Any

import jax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
import numpy as np

from dpo_jax.parallel.placement import Placement
from dpo_jax.types import Batch

PARALLELISMS = ("jit", "pmap")


@dataclasses.dataclass(frozen=True)
class PmapPlacement(Placement):
  """Placement whose step `jax.pmap` maps over all devices.

  Between steps a state has a leading device axis.
  """

  def __post_init__(self):
    if self.mesh.shape["data"] != self.mesh.size:
      raise ValueError(
        "parallelism='pmap' replicates the parameters: all devices must be on"
        f" the mesh axis 'data', and the mesh is {dict(self.mesh.shape)}"
      )

  @property
  def axis_name(self) -> str:
    return "data"

  @property
  def _stacked(self) -> NamedSharding:
    """Sharding of arrays with a leading device axis.

    It is on the mesh that pmap itself makes. With any other mesh the step is
    compiled once for that one, and again at the second step for pmap's.
    """
    mesh = Mesh(np.array(jax.devices()), ("data",), axis_types=(AxisType.Auto,))
    return NamedSharding(mesh, PartitionSpec("data"))

  def place_training_batch(self, batch: Batch) -> Batch:
    count = jax.local_device_count()
    return jax.tree.map(
      lambda x: jax.make_array_from_process_local_data(
        self._stacked, x.reshape(count, -1, *x.shape[1:])
      ),
      batch,
    )

  def place_state(self, state: Any) -> Any:
    return jax.tree.map(self._stack, state)

  def gather_state(self, state: Any) -> Any:
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
    del shardings  # replicated
    return jax.pmap(step, axis_name=self.axis_name, donate_argnums=0)

  def bind(self, step: Callable[..., Any]) -> Callable[..., Any]:
    return step

  def fetch(self, metrics: Any) -> Any:
    one = jax.tree.map(lambda x: x.addressable_shards[0].data, metrics)
    return super().fetch(one)

  def gather_rows(self, arrays: Any) -> Any:
    stacked = super().gather_rows(jax.tree.map(self._of_all_hosts, arrays))
    return jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), stacked)

  def _of_all_hosts(self, x: jax.Array) -> jax.Array:
    """Makes a global array of the results that pmap has on each host."""
    return jax.make_array_from_single_device_arrays(
      (self.mesh.size, *x.shape[1:]),
      self._stacked,
      [shard.data for shard in x.addressable_shards],
    )


def make_placement(mesh: Mesh, parallelism: str) -> Placement:
  """Returns the placement that `config.parallelism` names.

  Args:
    mesh: from `make_mesh`.
    parallelism: one of PARALLELISMS.

  Raises:
    ValueError: another name, or a mesh that pmap cannot map over.
  """
  if parallelism not in PARALLELISMS:
    raise ValueError(
      f"parallelism={parallelism!r} must be one of {', '.join(PARALLELISMS)}"
    )
  return (PmapPlacement if parallelism == "pmap" else Placement)(mesh)
