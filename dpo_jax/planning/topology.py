"""TPU slices and GPU hosts by name, and devices to compile for without one.

Cloud's names count TensorCores for v4, v5p and tpu7x (`v5p-128` is 64 chips)
and chips for v5e (`v5litepod-256`) and v6e. These names are used here, and
`v5e-256` too. `v5p:4x4x4` gives the chips along each axis of the torus. A
prefix `2x` means two slices, joined by the data center network alone.

`h200-8` is a host with eight GPUs, joined by NVLink.
"""

import dataclasses
import math
import os
import re
from typing import Any

from dpo_jax.system.chips import CHIPS, Chip

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
_GPUS = ("1", "2", "4", "8")


def _shapes(chip: Chip) -> tuple[str, ...]:
  """Returns the known shapes of slices, or numbers of GPUs of a host."""
  if chip.gpu:
    return _GPUS
  return _FLAT if chip.ici_links == 4 else _CUBES


_SHAPES = {kind: _shapes(chip) for kind, chip in CHIPS.items()}


@dataclasses.dataclass(frozen=True)
class Topology:
  """A TPU, or a host with GPUs, to compile for.

  Attributes:
    kind: a key of CHIPS.
    shape: chips along each axis of a slice; number of GPUs of a host.
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
    """JAX devices to compile for; sets variables of the environment.

    Raises:
      RuntimeError: libtpu or JAX's CUDA plugin is not there, or of another
        version than JAX wants.
    """
    if self.chip.gpu:
      return self._gpus()
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

  def _gpus(self) -> list[Any]:
    # No GPU is looked for, and none of the libraries that only run on one.
    os.environ.setdefault("JAX_SKIP_CUDA_CONSTRAINTS_CHECK", "1")
    from dpo_jax.system import compat

    try:
      return compat.gpu_devices(self.kind, self.chip, self.num_chips)
    except NotImplementedError:
      raise RuntimeError(
        "JAX's CUDA plugin is not installed, which compiles for GPUs, also"
        " where there is none: pip install 'jax[cuda12]', or cuda13"
      ) from None


def known_names() -> str:
  """Lists all names, a line for each kind of chip."""
  return "\n".join(
    f"  {kind}: "
    + ", ".join(
      Topology(kind, _sizes(shape)).name
      + ("" if CHIPS[kind].gpu else f" ({shape})")
      for shape in shapes
    )
    for kind, shapes in _SHAPES.items()
  )


def parse_topology(name: str) -> Topology:
  """Parses 'v5e-64', 'v5litepod-64', 'v5p:4x4x4', '2xv5e-256' or 'h200-8'.

  Raises:
    ValueError: a name that is none of those; lists what is known.
  """
  matched = re.fullmatch(
    r"(?:(\d+)x)?(v\d\w*?|tpu7x|[abh]\d00)([-:])([\dx]+)", name
  )
  kind = matched and _ALIASES.get(matched[2], matched[2])
  if kind in CHIPS and not (CHIPS[kind].gpu and matched[1]):
    num_slices = int(matched[1] or 1)
    for shape in _SHAPES[kind]:
      topology = Topology(kind, _sizes(shape), num_slices)
      one = dataclasses.replace(topology, num_slices=1)
      wanted = f"{kind}{matched[3]}{matched[4]}"
      if wanted in (one.name, one.jax_name):
        return topology
    # A slice of another shape: libtpu says whether there is one.
    is_slice = matched[3] == ":" and not CHIPS[kind].gpu
    sizes = _sizes(matched[4]) if is_slice else ()
    if len(sizes) == (2 if CHIPS[kind].ici_links == 4 else 3):
      return Topology(kind, sizes, num_slices)
  raise ValueError(
    f"--topology={name!r} is unknown. Known, with chips along each axis:\n"
    f"{known_names()}\nv4, v5p and tpu7x count TensorCores, two to a chip, as"
    " Cloud does; v5litepod-N is v5e-N; 2xNAME is two slices of a TPU"
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
