"""Speeds and sizes of TPUs and GPUs, by the names that plans give them."""

import dataclasses
import re

_GIB = 2**30


@dataclasses.dataclass(frozen=True)
class GpuTarget:
  """Facts of a GPU that XLA needs to compile for one that is not here.

  Attributes:
    capability: CUDA compute capability.
    cores: streaming multiprocessors.
    lanes: float32 units of each.
    shared_bytes: shared memory that a block may have.
    l2_bytes: second-level cache.
    clock_ghz: boost clock.
  """

  capability: tuple[int, int]
  cores: int
  lanes: int
  shared_bytes: int
  l2_bytes: int
  clock_ghz: float


@dataclasses.dataclass(frozen=True)
class Chip:
  """Speed and memory of a chip: a TPU, or a GPU with its share of a host.

  Attributes:
    flops: dense bf16 FLOPs a second.
    hbm_bytes: bytes of memory.
    hbm_bandwidth: bytes a second.
    ici_links: links to neighbouring chips; 1 for all NVLinks of a GPU.
    ici_bandwidth: bytes a second over one link, one way.
    dcn_bandwidth: bytes a second out of the slice or host, a chip's share.
    cores_in_name: TensorCores that a name counts for a chip.
    devices: JAX devices that it is compiled as.
    device_kind: regular expression that JAX's name of the device matches.
    gpu: facts of a GPU; None for a TPU.
  """

  flops: float
  hbm_bytes: float
  hbm_bandwidth: float
  ici_links: int
  ici_bandwidth: float
  dcn_bandwidth: float
  cores_in_name: int = 1
  devices: int = 1
  device_kind: str = ""
  gpu: GpuTarget | None = None

  @property
  def networks(self) -> tuple[str, str]:
    """Names of the networks within a slice or host, and out of it."""
    return ("ICI", "DCN") if self.gpu is None else ("NVLink", "network")


def _gpu(
  kind: str,
  flops: float,
  hbm_gib: float,
  hbm_bandwidth: float,
  nvlink: float,
  network: float,
  target: GpuTarget,
) -> Chip:
  return Chip(
    flops,
    hbm_gib * _GIB,
    hbm_bandwidth,
    1,
    nvlink,
    network,
    device_kind=kind,
    gpu=target,
  )


# TPUs: Google's pages docs.cloud.google.com/tpu/docs/{v4,v5e,v5p,v6e,tpu7x},
# for peak compute, HBM, and inter-chip bandwidth, which they give for all links
# of a chip and both ways. DCN from the same table for v5p, v6e and tpu7x; for
# v4 and v5e from jax-ml.github.io/scaling-book (ch. 2). A v4 chip is one JAX
# device on a TPU VM, its two cores fused; compiled ahead of time it is two.
# GPUs: NVIDIA's data sheets of A100 80GB SXM, H100 SXM, H200 SXM and DGX B200;
# dense bf16, NVLink one way, and one network card a GPU, of 200 Gbit/s (A100)
# or 400. Memory as the driver counts it.
CHIPS = {
  "v4": Chip(275e12, 32 * _GIB, 1228e9, 6, 50e9, 6.25e9, 2, 2, "TPU v4"),
  "v5e": Chip(
    197e12, 16 * _GIB, 819e9, 4, 50e9, 3.125e9, device_kind="TPU v5( lite|e)"
  ),
  "v5p": Chip(
    459e12, 95 * _GIB, 2765e9, 6, 100e9, 6.25e9, 2, device_kind="TPU v5p?"
  ),
  "v6e": Chip(
    918e12, 32 * _GIB, 1638e9, 4, 100e9, 12.5e9, device_kind="TPU v6( lite|e)"
  ),
  "tpu7x": Chip(
    2307e12, 192 * _GIB, 7380e9, 6, 100e9, 12.5e9, 2, 2, "TPU7x|TPU v7x?"
  ),
  "a100": _gpu(
    "NVIDIA A100.*80GB.*",
    312e12,
    80,
    2039e9,
    300e9,
    25e9,
    GpuTarget((8, 0), 108, 64, 166_912, 40 * 2**20, 1.41),
  ),
  "h100": _gpu(
    "NVIDIA H100.*80GB.*",
    989e12,
    80,
    3350e9,
    450e9,
    50e9,
    GpuTarget((9, 0), 132, 128, 232_448, 50 * 2**20, 1.98),
  ),
  "h200": _gpu(
    "NVIDIA H200.*",
    989e12,
    140,
    4800e9,
    450e9,
    50e9,
    GpuTarget((9, 0), 132, 128, 232_448, 50 * 2**20, 1.98),
  ),
  "b200": _gpu(
    "NVIDIA B200.*",
    2250e12,
    179,
    8000e9,
    900e9,
    50e9,
    GpuTarget((10, 0), 148, 128, 232_448, 126 * 2**20, 1.97),
  ),
}


def find_chip(device_kind: str) -> Chip | None:
  """Finds the chip of a device by JAX's name of it; None if it is not here."""
  for chip in CHIPS.values():
    if re.fullmatch(chip.device_kind, device_kind):
      return chip
  return None
