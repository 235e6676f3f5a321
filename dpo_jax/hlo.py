"""Collectives of a compiled program, read from its text.

XLA's own counts take a loop's body once, so they are taken here: each
collective times the trips of the loops that it is in.
"""

from collections.abc import Callable, Iterator
import dataclasses
import math
import re

import numpy as np

_ITEM_BYTES = {
  "pred": 1,
  "s4": 0.5,
  "u4": 0.5,
  "s8": 1,
  "u8": 1,
  "s16": 2,
  "u16": 2,
  "f16": 2,
  "bf16": 2,
  "s32": 4,
  "u32": 4,
  "f32": 4,
  "s64": 8,
  "u64": 8,
  "f64": 8,
}
KINDS = (
  "all-gather",
  "reduce-scatter",
  "all-reduce",
  "all-to-all",
  "collective-permute",
)
_OPCODE = re.compile(r"\s([a-z][a-z0-9-]*)\(")
_CALLED = re.compile(
  r"(calls|to_apply|body|condition|true_computation|false_computation)="
  r"%?([\w.-]+)"
)
# Loops that XLA makes itself, of a matmul that overlaps its gather, count in
# unsigned integers.
_LIMIT = re.compile(r"[su](?:32|64)\[\]\S* constant\((\d+)\)")
_BRANCHES = re.compile(r"branch_computations=\{([^}]*)\}")
_ARRAY = re.compile(r"\b([a-z]+\d*)\[([\d,]*)\]")


@dataclasses.dataclass(frozen=True)
class Collective:
  """One collective of a program.

  Attributes:
    kind: one of KINDS.
    num_bytes: that a device receives each time, on the best ring there is:
      (n - 1) / n of what a gather gives or a scatter takes, twice that of an
      all-reduce.
    trips: times a step.
    group_size: n, devices that take part together.
    crosses: whether a group has devices of several slices.
  """

  kind: str
  num_bytes: float
  trips: int
  group_size: int
  crosses: bool = False


@dataclasses.dataclass(frozen=True)
class _Instruction:
  name: str
  shape: str
  opcode: str
  line: str


def collectives(
  text: str,
  num_devices: int,
  slice_of: Callable[[int], int] | None = None,
) -> list[Collective]:
  """Every collective of a compiled module.

  Args:
    text: `compiled.as_text()`.
    num_devices: of the mesh, for groups that mean all.
    slice_of: partition id -> slice; None for one slice.

  Returns:
    Collectives, those that run asynchronously once: a start, its steps and
    its end are fusions that each hold it, of one channel and shape. A channel
    alone does not tell: all that `jax.lax` writes in a shard_map have one.
  """
  computations, entry = _computations(text)
  fused = {
    dict(_CALLED.findall(instruction.line)).get("calls")
    for instructions in computations.values()
    for instruction in instructions
    if instruction.opcode == "fusion"
  }
  found: dict[str, Collective] = {}
  for computation, trips in _multiplicities(computations, entry).items():
    for instruction in computations[computation]:
      across = _megascale(instruction, trips)
      if across is not None:
        found[f"{computation}/{instruction.name}"] = across
      kind = instruction.opcode.removesuffix("-start")
      if kind not in KINDS:
        continue
      # How a TPU spells it: an all-reduce of which each keeps its part.
      if computation.startswith("all-reduce-scatter"):
        kind = "reduce-scatter"
      groups = _groups(instruction.line, num_devices)
      size = groups.shape[1]
      if size == 1:
        continue
      one = Collective(
        kind,
        _received_bytes(instruction, kind, size),
        trips,
        size,
        slice_of is not None and _crosses(groups, slice_of),
      )
      key = f"{computation}/{instruction.name}"
      channel = re.search(r"channel_id=(\d+)", instruction.line)
      if channel and computation in fused:
        arrays = _ARRAY.findall(instruction.shape)
        key = f"{channel[1]} {kind} {arrays}"
      before = found.get(key)
      # Its steps may be in a loop that it overlaps; its start is not.
      if before is None or trips < before.trips:
        found[key] = one
  return list(found.values())


def _megascale(instruction: _Instruction, trips: int) -> Collective | None:
  """What a device receives from other slices; a TPU sends that by its host.

  The compiler takes a collective over slices apart into one within the slice
  and a pair of `send` and `recv`, whose buffer is what comes in.
  """
  found = re.search(r'_xla_megascale_transfer_type="(\w+)"', instruction.line)
  if instruction.opcode != "recv" or not found:
    return None
  kind = found[1].lower().replace("_", "-")
  kind = kind if kind in KINDS else "collective-permute"
  size = shape_bytes(_ARRAY.search(instruction.shape)[0])
  return Collective(kind, size, trips, 2, crosses=True)


def _computations(text: str) -> tuple[dict[str, list[_Instruction]], str]:
  """Instructions by computation, and the entry's name."""
  found: dict[str, list[_Instruction]] = {}
  entry, current = "", None
  for line in text.splitlines():
    header = re.match(r"(ENTRY )?%?([\w.-]+) \(.*\{$", line)
    if header:
      current = found.setdefault(header[2], [])
      entry = header[2] if header[1] else entry
      continue
    body = re.match(r"\s+(?:ROOT )?%?([\w.-]+) = (.*)", line)
    opcode = body and _OPCODE.search(f" {body[2]}")
    if current is not None and opcode:
      shape = body[2][: max(opcode.start() - 1, 0)]
      current.append(_Instruction(body[1], shape, opcode[1], line))
  return found, entry


def _multiplicities(
  computations: dict[str, list[_Instruction]], entry: str
) -> dict[str, int]:
  """How often a step runs each computation; callers come before callees."""
  times = {entry: 1}
  waiting = [entry]
  while waiting:
    name = waiting.pop()
    for called, trips in _calls(computations, name):
      total = times[name] * trips
      if called in computations and times.get(called, 0) < total:
        times[called] = total
        waiting.append(called)
  return times


def _calls(
  computations: dict[str, list[_Instruction]], name: str
) -> Iterator[tuple[str, int]]:
  for instruction in computations[name]:
    called = dict(_CALLED.findall(instruction.line))
    trips = 1
    if instruction.opcode == "while":
      trips = _trip_count(
        instruction.line, computations.get(called.get("condition", ""), [])
      )
    for computation in called.values():
      yield computation, trips
    branches = _BRANCHES.search(instruction.line)
    if branches:
      for computation in branches[1].split(","):
        yield computation.strip().lstrip("%"), 1


def _trip_count(line: str, condition: list[_Instruction]) -> int:
  """Trips of a loop that counts up from 0; 1 where that can't be read."""
  known = re.search(r'known_trip_count"?:\{"n":"(\d+)"', line)
  if known:
    return int(known[1])
  limits = [
    int(match[1])
    for instruction in condition
    if (match := _LIMIT.search(instruction.line))
  ]
  return max(limits, default=1)


def _groups(line: str, num_devices: int) -> np.ndarray:
  """Partition ids of each group: [groups, n]."""
  everyone = np.arange(num_devices)[None]
  if "source_target_pairs=" in line:
    pairs = re.search(r"source_target_pairs=\{(.*?)\}\}?", line)[1]
    ids = [int(i) for i in re.findall(r"\d+", pairs)]
    return np.array(ids).reshape(-1, 2)
  on_mesh = re.search(r"replica_groups=mesh\[([^\]]*)\] \{([^}]*)\}", line)
  if on_mesh:
    return _mesh_groups(on_mesh[1], on_mesh[2])
  iota = re.search(
    r"replica_groups=\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", line
  )
  if iota:
    shape, dims = (
      [int(i) for i in part.split(",")] for part in (iota[1], iota[2])
    )
    ids = np.arange(math.prod(dims)).reshape(dims)
    if iota[3]:
      ids = ids.transpose([int(i) for i in iota[3].split(",")])
    return ids.reshape(shape)
  listed = re.search(r"replica_groups=\{(\{.*?\})\}", line)
  if listed:
    rows = re.findall(r"\{([\d,]+)\}", listed[1])
    return np.array([[int(i) for i in row.split(",")] for row in rows])
  return everyone


def _mesh_groups(axes: str, chosen: str) -> np.ndarray:
  """Groups along axes of a mesh: `'a'=2,'b'=4` and `'b'`, or `'b':(1)2` for
  a part of b: the 2 that come after its first 1."""
  sizes = {name: int(n) for name, n in re.findall(r"'([^']+)'=(\d+)", axes)}
  dims: list[int] = []
  inside: list[int] = []
  parts = {
    name: (int(before or 1), int(size) if size else sizes[name])
    for name, before, size in re.findall(
      r"'([^']+)'(?::\((\d+)\)(\d+))?", chosen
    )
  }
  for name, size in sizes.items():
    before, part = parts.get(name, (size, 1))
    if name in parts:
      inside.append(len(dims) + 1)
    dims += [before, part, size // (before * part)]
  ids = np.arange(math.prod(dims)).reshape(dims)
  outside = [axis for axis in range(len(dims)) if axis not in inside]
  group = math.prod(dims[axis] for axis in inside)
  return ids.transpose(outside + inside).reshape(-1, group)


def _crosses(groups: np.ndarray, slice_of: Callable[[int], int]) -> bool:
  return any(len({slice_of(int(i)) for i in group}) > 1 for group in groups)


def _received_bytes(instruction: _Instruction, kind: str, n: int) -> float:
  """Bytes that come in over the network."""
  size = shape_bytes(instruction.shape)
  is_start = instruction.opcode.endswith("-start")
  if kind == "all-gather":
    # A start gives its operand back besides.
    whole = size * n / (n + 1) if is_start else size
    return whole * (n - 1) / n
  if kind == "reduce-scatter":
    is_whole = instruction.opcode.startswith("all-reduce")
    return size * (n - 1) / n if is_whole else size * (n - 1)
  if kind == "all-reduce":
    return 2.0 * size * (n - 1) / n
  if kind == "all-to-all":
    return size * (n - 1) / n
  return shape_bytes(_ARRAY.search(instruction.shape)[0])


def shape_bytes(shape: str) -> float:
  """Bytes of 'f32[2,3]{1,0}', or of all arrays of a tuple."""
  return sum(
    _ITEM_BYTES.get(dtype, 0) * math.prod(int(n) for n in sizes.split(",") if n)
    for dtype, sizes in _ARRAY.findall(shape)
  )
