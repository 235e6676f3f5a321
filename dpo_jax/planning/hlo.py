"""Collectives of a compiled program, read from its text.

XLA's own counts take a loop's body once. Here each collective counts as often
as the loops around it run.

The text may change with any release of XLA. Unexpected text raises
UnreadableError; it never counts as 0.
"""

from collections.abc import Callable, Iterator
import dataclasses
import math
import re

import jax
import numpy as np

UNREADABLE = "unreadable by this jax"
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
# Any opcode by which devices communicate, including those not in KINDS.
_COLLECTIVE = re.compile(
  r"\s((?:ragged-)?all-[a-z-]+?|reduce-scatter|collective-[a-z-]+?)"
  r"(?:-start|-done)?\("
)
_CALLED = re.compile(
  r"(calls|to_apply|body|condition|true_computation|false_computation)="
  r"%?([\w.-]+)"
)
# Loops that XLA makes for a matmul that overlaps its all-gather count in
# unsigned integers.
_LIMIT = re.compile(r"[su](?:32|64)\[\]\S* constant\((\d+)\)")
_BRANCHES = re.compile(r"branch_computations=\{([^}]*)\}")
_ARRAY = re.compile(r"\b([a-z]\w*)\[([^\]]*)\]")


class UnreadableError(ValueError):
  """The text of a compiled program is not what this package can read."""

  def __init__(self, what: str):
    super().__init__(f"{UNREADABLE} ({jax.__version__}): {what.strip()[:300]}")


@dataclasses.dataclass(frozen=True)
class Collective:
  """One collective of a program.

  Attributes:
    kind: one of KINDS.
    num_bytes: bytes that a device receives each time, on an ideal ring:
      (n - 1) / n of an all-gather's result or a reduce-scatter's input, twice
      that for an all-reduce.
    trips: executions a step.
    group_size: n, devices of a group.
    crosses: whether a group spans several slices.
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
  """Reads every collective of a compiled module.

  Args:
    text: `compiled.as_text()`.
    num_devices: devices of the mesh, for groups that mean all.
    slice_of: partition id -> slice; None for one slice.

  Returns:
    Collectives. An asynchronous one counts once: its start, its steps and its
    end are fusions that each hold it, with one channel and shape. The channel
    alone does not identify it: all collectives of a shard_map share one.

  Raises:
    UnreadableError: instructions, groups, shapes or loops of collectives that
      are not spelled as expected.
  """
  computations, entry = _computations(text)
  times = _multiplicities(computations, entry)
  for computation in computations.keys() - times.keys():
    for instruction in computations[computation]:
      if _kind(instruction) in KINDS:
        raise UnreadableError(f"never called: {instruction.line}")
  fused = {
    dict(_CALLED.findall(instruction.line)).get("calls")
    for instructions in computations.values()
    for instruction in instructions
    if instruction.opcode == "fusion"
  }
  found: dict[str, Collective] = {}
  for computation, trips in times.items():
    for instruction in computations[computation]:
      try:
        one = _read(instruction, computation, trips, num_devices, slice_of)
      except (KeyError, ValueError) as error:
        raise UnreadableError(f"{error} of {instruction.line}") from error
      if one is None:
        continue
      key = f"{computation}/{instruction.name}"
      channel = re.search(r"channel_id=(\d+)", instruction.line)
      if channel and computation in fused:
        arrays = _ARRAY.findall(instruction.shape)
        key = f"{channel[1]} {one.kind} {arrays}"
      before = found.get(key)
      # Its steps may be in a loop that it overlaps; its start is not.
      if before is None or trips < before.trips:
        found[key] = one
  for one in found.values():
    if math.isinf(one.trips):
      raise UnreadableError(f"trips of a loop around {one.kind}")
  return list(found.values())


def _kind(instruction: _Instruction) -> str:
  return instruction.opcode.removesuffix("-start")


def _read(
  instruction: _Instruction,
  computation: str,
  trips: float,
  num_devices: int,
  slice_of: Callable[[int], int] | None,
) -> Collective | None:
  """Reads a collective; None if it is none, or of single devices.

  Raises:
    KeyError: an unknown axis or element type.
    ValueError: a line of another form.
  """
  if instruction.opcode == "recv":
    return _megascale(instruction, trips)
  kind = _kind(instruction)
  if kind not in KINDS:
    return None
  # How a TPU spells it: an all-reduce of which each keeps its part.
  if computation.startswith("all-reduce-scatter"):
    kind = "reduce-scatter"
  groups = _groups(instruction.line, num_devices)
  size = groups.shape[1]
  if size == 1:
    return None
  num_bytes = _received_bytes(instruction, kind, size)
  crosses = slice_of is not None and _crosses(groups, slice_of)
  return Collective(kind, num_bytes, trips, size, crosses)


def _megascale(instruction: _Instruction, trips: float) -> Collective:
  """Reads what a device receives from other slices, through its TPU's host.

  The compiler takes a collective over slices apart into one within the slice
  and a pair of `send` and `recv`, whose buffer is what comes in.
  """
  name = r'_xla_megascale_transfer_type="(\w+)"'
  kind = _search(name, instruction.line)[1].lower().replace("_", "-")
  kind = kind if kind in KINDS else "collective-permute"
  return Collective(kind, _first_bytes(instruction), trips, 2, crosses=True)


def _search(pattern: str, text: str) -> re.Match[str]:
  """Returns the first match of a pattern; raises ValueError without one."""
  found = re.search(pattern, text)
  if not found:
    raise ValueError(f"no {pattern!r}")
  return found


def _computations(text: str) -> tuple[dict[str, list[_Instruction]], str]:
  """Instructions by computation, and the entry's name.

  Raises:
    UnreadableError: no entry, an instruction without a computation or an
      opcode, or a collective that is none of KINDS.
  """
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
    named = _COLLECTIVE.search(line)
    is_read = named and opcode and named[0] == opcode[0] and named[1] in KINDS
    if named and not is_read:
      raise UnreadableError(line)
    if body:
      if current is None or not opcode:
        raise UnreadableError(line)
      shape = body[2][: max(opcode.start() - 1, 0)]
      current.append(_Instruction(body[1], shape, opcode[1], line))
    elif re.match(r"\}(,|$)", line):
      current = None
  if not found.get(entry):
    raise UnreadableError(f"no entry computation in {text[:200]!r}")
  return found, entry


def _multiplicities(
  computations: dict[str, list[_Instruction]], entry: str
) -> dict[str, float]:
  """Returns how often a step runs each computation, by name.

  Of several call paths to one, the most frequent counts. It is inf below a loop
  whose trips cannot be read.
  """
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
) -> Iterator[tuple[str, float]]:
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


def _trip_count(line: str, condition: list[_Instruction]) -> float:
  """Trips of a loop that counts up from 0; inf where that can't be read."""
  known = re.search(r'known_trip_count"?:\{"n":"(\d+)"', line)
  if known:
    return int(known[1])
  limits = [
    int(match[1])
    for instruction in condition
    if (match := _LIMIT.search(instruction.line))
  ]
  return max(limits, default=math.inf)


def _groups(line: str, num_devices: int) -> np.ndarray:
  """Reads the groups of devices of a collective: ids, [groups, n]."""
  if "source_target_pairs=" in line:
    pairs = _search(r"source_target_pairs=\{((?:\{\d+,\d+\},?)*)\}", line)[1]
    return np.array(_numbers(pairs)).reshape(-1, 2)
  spelled = line.partition("replica_groups=")[2]
  if not spelled or spelled.startswith("{}"):
    return np.arange(num_devices)[None]
  on_mesh = re.match(
    r"mesh\[([^\]]*)\](?:, device_ids=\((\S*)\))? \{([^}]*)\}", spelled
  )
  if on_mesh:
    return _mesh_groups(*on_mesh.groups())
  iota = re.match(r"(\[[\d,]+\])<=(\[[\d,]+\](?:T\([\d,]+\))?)", spelled)
  if iota:
    return _ids(iota[2]).reshape(_numbers(iota[1]))
  listed = _search(r"^\{((?:\{[\d,]+\},?)+)\}", spelled)[1]
  return np.array([_numbers(row) for row in listed.split("},")])


def _numbers(text: str) -> list[int]:
  return [int(number) for number in re.findall(r"\d+", text)]


def _ids(spelled: str) -> np.ndarray:
  """Ids as '1,0,3,2', or as '[4,2]T(1,0)': in that shape, and transposed."""
  shape, _, axes = spelled.partition("T")
  if not shape.startswith("["):
    return np.array(_numbers(shape))
  shape = _numbers(shape)
  ids = np.arange(math.prod(shape)).reshape(shape)
  return ids.transpose(_numbers(axes)) if axes else ids


def _mesh_groups(axes: str, order: str | None, chosen: str) -> np.ndarray:
  """Returns the groups along axes of a mesh: ids, [groups, n].

  Args:
    axes: `'a'=2,'b'=4`.
    order: ids of the mesh's devices, see `_ids`; None where they count up.
    chosen: `'b'`, or `'b':(1)2` for a part of b: the 2 after its first 1.
  """
  parts = [
    (name, int(before or 1), int(size or 0))
    for name, before, size in (
      _search(r"^'?([^':]+)'?(?::\((\d+)\)(\d+))?$", part).groups()
      for part in chosen.split(",")
      if part
    )
  ]
  dims: list[int] = []
  inside: list[int] = []
  for axis in axes.split(","):
    name, whole = _search(r"^'?([^'=]+)'?=(\d+)$", axis).groups()
    done = 1
    for _, before, size in sorted(part for part in parts if part[0] == name):
      dims += [before // done, size or int(whole)]
      inside.append(len(dims) - 1)
      done = before * dims[-1]
    dims.append(int(whole) // done)
  if len(inside) != len(parts):
    raise ValueError(f"axes {chosen} of a mesh of {axes}")
  ids = np.arange(math.prod(dims)) if order is None else _ids(order)
  outside = [axis for axis in range(len(dims)) if axis not in inside]
  group = math.prod(dims[axis] for axis in inside)
  return ids.reshape(dims).transpose(outside + inside).reshape(-1, group)


def _crosses(groups: np.ndarray, slice_of: Callable[[int], int]) -> bool:
  return any(len({slice_of(int(i)) for i in group}) > 1 for group in groups)


def _received_bytes(instruction: _Instruction, kind: str, n: int) -> float:
  """Computes the bytes that each of a group's n devices receives."""
  size = shape_bytes(instruction.shape)
  is_start = instruction.opcode.endswith("-start")
  if kind == "all-gather":
    # A start also returns its operand.
    whole = size * n / (n + 1) if is_start else size
    return whole * (n - 1) / n
  if kind == "reduce-scatter":
    is_whole = instruction.opcode.startswith("all-reduce")
    return size * (n - 1) / n if is_whole else size * (n - 1)
  if kind == "all-reduce":
    return 2.0 * size * (n - 1) / n
  if kind == "all-to-all":
    return size * (n - 1) / n
  return _first_bytes(instruction)


def _first_bytes(instruction: _Instruction) -> float:
  return shape_bytes(_search(_ARRAY.pattern, instruction.shape)[0])


def shape_bytes(shape: str) -> float:
  """Computes the bytes of 'f32[2,3]{1,0}', or of all arrays of a tuple.

  Raises:
    ValueError: no array in it, or one of another form.
    KeyError: an array of an unknown type.
  """
  arrays = _ARRAY.findall(shape)
  if not arrays:
    raise ValueError(f"no array in {shape!r}")
  return sum(
    _ITEM_BYTES[dtype] * math.prod(int(n) for n in sizes.split(",") if n)
    for dtype, sizes in arrays
  )
