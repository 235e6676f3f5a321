"""A config's step compiled for a TPU that is not here, and what it takes.

libtpu compiles it; neither weights nor a TPU are read.
"""

from collections.abc import Mapping
import dataclasses
import math
import re
import time
from typing import Any

import jax
import jax.numpy as jnp

from dpo_jax import compat, hlo, mesh, roofline, topology
from dpo_jax.models import vocabulary
from dpo_jax.run import Run, build_run, check_context, with_shardings
from dpo_jax.types import Batch, token_masks
from dpo_jax.workdir import Workdir


@dataclasses.dataclass(frozen=True)
class Request:
  """What to plan.

  Attributes:
    config: complete.
    topology: to compile for.
    rows: of a batch, 0: as the data say, or a row for each group.
    row_tokens: T, 0: as the data say.
    scored_tokens: S, 0: as the data say, or all of T.
    vocab_size: of the tokenizer, 0: as it says.
    mfu: model FLOPs utilisation to expect, a guess of the user.
    price: of a chip for an hour.
  """

  config: Any
  topology: topology.Topology
  rows: int = 0
  row_tokens: int = 0
  scored_tokens: int = 0
  vocab_size: int = 0
  mfu: float = 0.4
  price: float = 0.0

  @property
  def is_stand_in(self) -> bool:
    """Whether shapes are given, and data not read."""
    return bool(self.rows or self.row_tokens or self.vocab_size)


@dataclasses.dataclass(frozen=True)
class Plan:
  """A step that was compiled, or that had no room.

  Attributes:
    run: what was compiled.
    batch: abstract.
    memory: bytes of a device by kind.
    peak: bytes of a device, XLA's count; of what it wanted if it had no room,
      NaN if XLA's message does not say it in words that are known.
    fits: whether it has room.
    collectives: of the compiled step; None if it was not compiled for want of
      room, or its text is unreadable.
    unread: the words of XLA that were not read; "" if all were.
    work: by formula.
    bounds: seconds a step, see `roofline.lower_bounds`.
    compile_seconds: how long XLA took.
  """

  run: Run
  batch: Batch
  memory: dict[str, float]
  peak: float
  fits: bool
  collectives: list[hlo.Collective] | None
  unread: str
  work: roofline.Work
  bounds: dict[str, float]
  compile_seconds: float


def build(request: Request, sizes: Mapping[str, int] | None = None) -> Run:
  """The run on the topology's mesh, with its data where they are read.

  Args:
    request: what to plan.
    sizes: of the mesh, if not the config's.

  Raises:
    ValueError: what would stop the run there.
  """
  grid = mesh.make_mesh(
    sizes or request.config.mesh, request.topology.devices()
  )
  workdir = Workdir.at("plan")
  if not request.is_stand_in:
    try:
      return build_run(request.config, workdir, on=grid)
    except (OSError, ImportError) as error:
      raise ValueError(
        f"the data of this config cannot be read here ({error}): give the"
        " shapes by --row_tokens, and --rows, --scored_tokens, --vocab_size"
      ) from error
  return build_run(
    request.config, workdir, on=grid, vocab_size=request.vocab_size or 128_256
  )


def abstract_batch(run: Run, request: Request) -> Batch:
  """Shapes of a training batch, laid over the mesh."""
  if run.data is not None:
    # All rows, whichever process would read them.
    loader = dataclasses.replace(
      run.data.train, process_index=0, process_count=1
    )
    batch = jax.tree.map(
      lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), loader.batch(0)
    )
  else:
    batch = _stand_in(run, request)
  check_context(batch.tokens.shape[1], run.placement)
  if run.objective.needs_reference and not run.has_live_reference:
    logps = jax.ShapeDtypeStruct(batch.score.shape, jnp.float32)
    batch = batch.replace(ref_logps=logps)
  return with_shardings(batch, run.placement.batch_shardings(batch))


def _stand_in(run: Run, request: Request) -> Batch:
  """A batch of rows that are full."""
  config = run.config
  multiple = run.placement.num_row_shards * config.accumulation_steps
  rows = request.rows or -(-config.batch_size // multiple) * multiple
  if rows % multiple:
    raise ValueError(
      f"--rows={rows} must be a multiple of {multiple}: the devices that split"
      " rows, times accumulation_steps"
    )
  tokens = (
    request.row_tokens or config.data.row_tokens or config.data.max_tokens
  )
  scored = request.scored_tokens or tokens
  groups = -(-config.batch_size // rows)
  slots = run.objective.num_slots or 2
  needs = run.objective.needs

  def shape(*sizes, dtype=jnp.int32):
    return jax.ShapeDtypeStruct((rows, *sizes), dtype)

  return Batch(
    tokens=shape(tokens),
    positions=shape(tokens),
    segments=shape(tokens),
    branches=shape(tokens),
    targets=shape(scored),
    predictors=shape(scored),
    slots=shape(scored),
    score=shape(groups, slots, dtype=jnp.float32),
    valid=shape(groups, slots, dtype=jnp.bool_),
    example_ids=shape(groups),
    last_tokens=shape(groups, slots),
    token_masks={
      name: shape(scored, dtype=jnp.bool_) for name in token_masks(needs)
    },
  )


def make_plan(run: Run, request: Request) -> Plan:
  """Compiles the step for the topology and measures what came out."""
  batch = abstract_batch(run, request)
  state, shardings = run.abstract_state()
  sizes = run.placement.mesh.shape
  num_rows, row_tokens = batch.tokens.shape
  scored_tokens = batch.targets.shape[1]
  memory = known_memory(run, state, batch)
  started = time.monotonic()
  compiled, message = _compile(run, state, shardings, batch)
  seconds = time.monotonic() - started
  if compiled is None:
    peak, collectives = wanted_bytes(message, shard_bytes((state, batch))), None
    unread = str(hlo.UnreadableError(message)) if math.isnan(peak) else ""
  else:
    devices = list(run.placement.mesh.devices.flat)
    peak, collectives, unread = _measure(compiled, devices)
  lengths = dict(
    num_rows=num_rows, row_tokens=row_tokens, scored_tokens=scored_tokens
  )
  work = roofline.count_work(
    run.policy.config,
    run.policy.abstract_params(),
    has_live_reference=run.has_live_reference,
    **lengths,
  )
  moved = roofline.hbm_bytes(
    work,
    run.policy.config,
    sizes,
    state_bytes=memory["parameters"] + memory["optimizer state"],
    gradient_bytes=memory["parameters"],
    **lengths,
  )
  return Plan(
    run=run,
    batch=batch,
    memory=memory,
    peak=peak,
    fits=compiled is not None and peak <= request.topology.hbm_per_device,
    collectives=collectives,
    unread=unread,
    work=work,
    bounds=roofline.lower_bounds(work, moved, collectives, request.topology),
    compile_seconds=seconds,
  )


def _measure(
  compiled: Any, devices: list[Any]
) -> tuple[float, list[hlo.Collective] | None, str]:
  """Reads a compiled step's peak bytes, its collectives or None, and why."""
  peak = float(compat.program_memory(compiled).peak)
  try:
    return peak, read_collectives(compiled.as_text(), devices), ""
  except hlo.UnreadableError as error:
    return peak, None, str(error)


def read_collectives(text: str, devices: list[Any]) -> list[hlo.Collective]:
  """Reads the collectives of a compiled training step.

  Args:
    text: of the compiled step.
    devices: of the mesh.

  Raises:
    hlo.UnreadableError: see `hlo.collectives`, and where devices or slices
      seem not to communicate. Those of a training step do.
  """
  slices = [compat.slice_index(device) for device in devices]
  found = hlo.collectives(text, len(devices), slices.__getitem__)
  if len(devices) > 1 and not found:
    raise hlo.UnreadableError(f"no collective of {len(devices)} devices")
  if len(set(slices)) > 1 and not any(c.crosses for c in found):
    raise hlo.UnreadableError(f"no collective of {len(set(slices))} slices")
  return found


def _compile(run, state, shardings, batch) -> tuple[Any, str]:
  """The compiled step, or None and XLA's message that it has no room."""
  with jax.set_mesh(run.placement.mesh):
    step = run.placement.compile_step(run.make_train_step(), shardings)
    lowered = step.lower(state, batch)
    try:
      return lowered.compile(), ""
    except jax.errors.JaxRuntimeError as error:
      if "RESOURCE_EXHAUSTED" not in str(error):
        raise
      return None, str(error)


def wanted_bytes(message: str, arguments: float) -> float:
  """What a step would have needed, from XLA's message.

  Args:
    message: '... HLO temporaries (38.08G) exceeds available HBM (15.75G)', or
      '... Used 20.5G of 15.75G hbm'.
    arguments: bytes of the state and the batch, which are no temporaries.

  Returns:
    Bytes of a device; NaN if the message says neither.
  """
  scale = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}
  found = re.search(r"HLO temporaries \(([\d.]+)([KMGT]?)\)", message)
  if found:
    return float(found[1]) * scale[found[2]] + arguments
  found = re.search(r"Used ([\d.]+)([KMGT]?) of [\d.]+[KMGT]? hbm", message)
  return float(found[1]) * scale[found[2]] if found else math.nan


def shard_bytes(tree: Any) -> float:
  """Bytes of a device's part of abstract arrays."""
  return float(
    sum(
      math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize
      for x in jax.tree.leaves(tree)
    )
  )


def known_memory(run: Run, state: Any, batch: Batch) -> dict[str, float]:
  """Bytes of a device that follow from shapes and shardings alone."""
  sizes = run.placement.mesh.shape
  rows = batch.tokens.shape[0] / run.config.accumulation_steps
  rows /= math.prod(sizes[axis] for axis in mesh.ROW_AXES)
  positions = rows * batch.targets.shape[1]
  logits = positions * run.policy.config.vocab_size / sizes["tensor"]
  loops = vocabulary.ACCELERATOR
  length = batch.targets.shape[1]
  chunk = run.config.logps_chunk or loops.chunk(math.ceil(rows), length)
  at_a_time = rows * min(chunk, length)
  block = at_a_time * loops.columns(int(at_a_time))
  return {
    "parameters": shard_bytes(state.policy_params),
    "optimizer state": shard_bytes(state.opt_state),
    "reference": shard_bytes(state.ref_params),
    "batch": shard_bytes(batch),
    "gradients": shard_bytes(state.params),
    # Logits of a block and their gradient, float32.
    "logps": 2.0 * 4.0 * min(logits, block),
  }
