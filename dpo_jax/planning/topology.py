"""TPU slices by name: chips, speeds, and devices to compile for without one.

Cloud's names count TensorCores for v4, v5p and tpu7x (`v5p-128` is 64 chips)
and chips for v5e (`v5litepod-256`) and v6e. These names are used here, and
`v5e-256` too. `v5p:4x4x4` gives the chips along each axis of the torus. A
prefix `2x` means two slices, joined by the data center network alone.
"""

import dataclasses
import math
import os
import re
from typing import Any

_GIB = 2**30


@dataclasses.dataclass(frozen=True)
class Chip:
  """Speed and memory of a chip.

  Attributes:
    flops: dense bf16 FLOPs a second.
    hbm_bytes: bytes of memory.
    hbm_bandwidth: bytes a second.
    ici_links: links to neighbouring chips.
    ici_bandwidth: bytes a second over one link, one way.
    dcn_bandwidth: bytes a second out of the slice, a chip's share.
    cores_in_name: TensorCores that a name counts for a chip.
    devices: JAX devices that it is compiled as.
  """

  flops: float
  hbm_bytes: float
  hbm_bandwidth: float
  ici_links: int
  ici_bandwidth: float
  dcn_bandwidth: float
  cores_in_name: int = 1
  devices: int = 1


# Google's pages docs.cloud.google.com/tpu/docs/{v4,v5e,v5p,v6e,tpu7x}: peak
# compute, HBM, and inter-chip bandwidth, which they give for all links of a
# chip and both ways. DCN from the same table for v5p, v6e and tpu7x; for v4 and
# v5e from jax-ml.github.io/scaling-book (ch. 2). A v4 chip is one JAX device on
# a TPU VM, its two cores fused; compiled ahead of time it is two.
CHIPS = {
  "v4": Chip(275e12, 32 * _GIB, 1228e9, 6, 50e9, 6.25e9, 2, 2),
  "v5e": Chip(197e12, 16 * _GIB, 819e9, 4, 50e9, 3.125e9),
  "v5p": Chip(459e12, 95 * _GIB, 2765e9, 6, 100e9, 6.25e9, 2),
  "v6e": Chip(918e12, 32 * _GIB, 1638e9, 4, 100e9, 12.5e9),
  "tpu7x": Chip(2307e12, 192 * _GIB, 7380e9, 6, 100e9, 12.5e9, 2, 2),
}
_ALIASES = {"v5litepod": "v5e", "v5lite": "v5e", "v7x": "tpu7x"}

_FLAT = ("1x1", "2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16")
_CUBES = (
  "2x2x1",
  "2x2x2",
  "2x2x4",
  "2x4x4",
  "4x4x4",
  "4x4x8",
  "4x8x8",
  "8x8x8",
)
_SHAPES = {
  kind: _FLAT if chip.ici_links == 4 else _CUBES for kind, chip in CHIPS.items()
}


@dataclasses.dataclass(frozen=True)
class Topology:
  """A TPU to compile for.

  Attributes:
    kind: a key of CHIPS.
    shape: chips along each axis of a slice.
    num_slices: slices of that shape.
  """

  kind: str
  shape: tuple[int, ...]
  num_slices: int = 1

  @property
  def chip(self) -> Chip:
    return CHIPS[self.kind]

  @property
  def num_chips(self) -> int:
    return math.prod(self.shape) * self.num_slices

  @property
  def hbm_per_device(self) -> float:
    return self.chip.hbm_bytes / self.chip.devices

  @property
  def jax_name(self) -> str:
    """As `jax.experimental.topologies` spells it: v5e:8x8."""
    return f"{self.kind}:{'x'.join(map(str, self.shape))}"

  @property
  def name(self) -> str:
    """As Cloud counts: v5e-64 in chips, v5p-128 in TensorCores."""
    count = math.prod(self.shape) * self.chip.cores_in_name
    slices = "" if self.num_slices == 1 else f"{self.num_slices}x"
    return f"{slices}{self.kind}-{count}"

  def devices(self) -> list[Any]:
    """JAX devices to compile for.

    Raises:
      RuntimeError: libtpu is not there, or of another version than JAX wants.
    """
    settings = {}
    if math.prod(self.shape) == 1:
      settings["chips_per_host_bounds"] = [1, 1, 1]
    if self.num_slices > 1:
      settings["num_slices"] = self.num_slices
    # Without these libtpu looks for a TPU, and for its metadata server.
    quiet = {
      "TPU_SKIP_MDS_QUERY": "1",
      "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
      "TPU_WORKER_HOSTNAMES": "localhost",
      "TPU_ACCELERATOR_TYPE": "v5litepod-8",
      "TPU_WORKER_ID": "0",
    }
    for variable, value in quiet.items():
      os.environ.setdefault(variable, value)
    check_libtpu()
    # Names alone, as scripts/launch_tpu.py reads them, take no JAX.
    from dpo_jax.system import compat

    return compat.topology_devices(self.jax_name, **settings)


def known_names() -> str:
  """All names, a line for each kind of chip."""
  return "\n".join(
    f"  {kind}: "
    + ", ".join(
      f"{Topology(kind, _sizes(shape)).name} ({shape})" for shape in shapes
    )
    for kind, shapes in _SHAPES.items()
  )


def parse_topology(name: str) -> Topology:
  """'v5e-64', 'v5litepod-64', 'v5p-128', 'v5p:4x4x4', '2xv5e-256' -> Topology.

  Raises:
    ValueError: a name that is none of those; lists what is known.
  """
  matched = re.fullmatch(r"(?:(\d+)x)?(v\d\w*?|tpu7x)([-:])([\dx]+)", name)
  kind = matched and _ALIASES.get(matched[2], matched[2])
  if kind in CHIPS:
    num_slices = int(matched[1] or 1)
    for shape in _SHAPES[kind]:
      topology = Topology(kind, _sizes(shape), num_slices)
      one = dataclasses.replace(topology, num_slices=1)
      wanted = f"{kind}{matched[3]}{matched[4]}"
      if wanted in (one.name, one.jax_name):
        return topology
    # A slice of another shape: libtpu says whether there is one.
    sizes = _sizes(matched[4]) if matched[3] == ":" else ()
    if len(sizes) == (2 if CHIPS[kind].ici_links == 4 else 3):
      return Topology(kind, sizes, num_slices)
  raise ValueError(
    f"--topology={name!r} is unknown. Known, with chips along each axis:\n"
    f"{known_names()}\nv4, v5p and tpu7x count TensorCores, two to a chip, as"
    " Cloud does; v5litepod-N is v5e-N; 2xNAME is two slices"
  )


def _sizes(shape: str) -> tuple[int, ...]:
  return tuple(int(size) for size in shape.split("x") if size)


def check_libtpu() -> None:
  """Raises RuntimeError unless libtpu is the version that jax pins."""
  import importlib.metadata as metadata

  wanted = next(
    (
      re.search(r"libtpu\s*==\s*([\d.]+)", line)[1].rstrip(".")
      for line in metadata.requires("jax") or ()
      if re.match(r"libtpu\s*==", line)
    ),
    None,
  )
  try:
    found = metadata.version("libtpu")
  except metadata.PackageNotFoundError:
    found = None
  if found and (wanted is None or f"{found}.".startswith(f"{wanted}.")):
    return
  is_version = f"is {found}" if found else "is not installed"
  raise RuntimeError(
    f"libtpu {is_version}, and jax {metadata.version('jax')} compiles with"
    f" {wanted or 'its own'}: pip install -r requirements-tpu.txt"
  )
