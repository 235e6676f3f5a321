"""The mesh of devices.

`data` and `fsdp` split the rows of a batch, `fsdp` also the parameters,
`tensor` heads and features, `context` the tokens of a row.
"""

from collections.abc import Callable, Iterator, Mapping
import functools
import itertools
import logging
import math
from typing import Any

import jax
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh
import numpy as np

from dpo_jax.system import compat

_LOG = logging.getLogger(__name__)

AXES = ("data", "fsdp", "tensor", "context")


def make_mesh(sizes: Mapping[str, int], devices: Any = None) -> Mesh:
  """Arranges all devices along the axes.

  Devices of several TPU slices, which only the data center network joins, are
  arranged so that `data` crosses it, and `fsdp` only where `data` is too small.

  Args:
    sizes: devices on each axis; one of them may be -1 and takes the rest, and
      an axis that is not there is 1.
    devices: devices to arrange; None: all.

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
  """Fills in the size of every axis of a mesh.

  Args:
    sizes: devices on each axis. One may be -1, the devices that the others
      leave; an absent axis has 1.
    num_devices: product that the sizes must have.

  Returns:
    Size of each axis of AXES.

  Raises:
    ValueError: an unknown axis, a size below 1, several -1, or sizes whose
      product is not `num_devices`.
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
  """Yields the sizes of every mesh of `num_devices` devices."""
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
  """Finds the mesh that fits and moves the fewest factors of 2.

  Args:
    sizes: size of every axis, as the user asked for them.
    num_devices: product of the sizes of the mesh to find.
    fits: returns whether a mesh of these sizes is possible.

  Returns:
    Size of every axis, or None if no mesh fits.
  """

  def distance(other):
    return sum(abs(math.log2(other[a] / sizes[a])) for a in AXES)

  candidates = [m for m in factorisations(num_devices) if fits(m)]
  return min(candidates, key=distance, default=None)


def arrange_slices(
  shape: Mapping[str, int], devices: list[Any], num_slices: int
) -> np.ndarray:
  """Arranges several slices, with `data` outermost over their network.

  Args:
    shape: size of every axis.
    devices: all devices, each with a slice_index.
    num_slices: number of slices.

  Returns:
    Devices in the shape of the mesh.

  Raises:
    ValueError: `data` times `fsdp` is not a multiple of the slices.
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
      "the mesh axis fsdp crosses the network between slices, because data=%d"
      " is not a multiple of the %d slices: every layer gathers its parameters"
      " over that network",
      shape["data"],
      num_slices,
    )
  across = {"data": over_data, "fsdp": over_fsdp}
  across = [across.get(axis, 1) for axis in AXES]
  within = [shape[axis] // n for axis, n in zip(AXES, across, strict=True)]
  return mesh_utils.create_hybrid_device_mesh(within, across, devices)


def on_mesh(mesh: Mesh) -> Callable[[Callable], Callable]:
  """Returns a decorator that runs a function with `mesh` as JAX's context.

  Sharding constraints in the function refer to that mesh.
  """

  def wrap(function: Callable) -> Callable:
    @functools.wraps(function)
    def run(*args, **kwargs):
      with jax.set_mesh(mesh):
        return function(*args, **kwargs)

    return run

  return wrap
