"""Compiles a config's step for a TPU that is not here, and measures it.

libtpu compiles it, or JAX's CUDA plugin, without weights and without a device.
"""

from collections.abc import Mapping
import dataclasses
import math
import re
import time
from typing import Any

import jax
import jax.numpy as jnp

from dpo_jax import config as config_lib
from dpo_jax import model_sources
from dpo_jax.data.loader import Loader
from dpo_jax.models import vocabulary_blocks
from dpo_jax.parallel import mesh, sharding
from dpo_jax.planning import hlo, roofline, topology
from dpo_jax.records.workdir import Workdir
from dpo_jax.system import compat
from dpo_jax.training.program import Program
from dpo_jax.training.setup import build_run, program_for
from dpo_jax.types import Batch, token_masks


@dataclasses.dataclass(frozen=True)
class Request:
  """Request for a plan.

  Attributes:
    config: complete.
    topology: topology to compile for.
    rows: rows of a stand-in's batch, see `is_stand_in`; 0: a row for each
      group, and more until the devices divide them.
    row_tokens: T of a stand-in; 0: data.row_tokens, or data.max_tokens.
    scored_tokens: S of a stand-in; 0: all of T.
    vocab_size: ids of a stand-in's tokenizer; 0: 128,256.
    mfu: model FLOPs utilisation to expect, the user's guess.
    price: price of a chip for an hour.
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
    """Whether a part of the shapes is given: then no data are read."""
    given = self.rows, self.row_tokens, self.scored_tokens, self.vocab_size
    return any(given)


@dataclasses.dataclass(frozen=True)
class Subject:
  """Subject of a plan: a program, and the shapes of its batches.

  Attributes:
    config: resolved.
    program: program on the topology's mesh.
    batch: abstract batch, placed on the mesh.
  """

  config: Any
  program: Program
  batch: Batch


@dataclasses.dataclass(frozen=True)
class Plan:
  """A step that was compiled, or that did not fit into the memory.

  Attributes:
    subject: program and batch that were compiled.
    memory: bytes of a device by kind.
    peak: bytes of a device by XLA's count; if it did not fit, the bytes that it
      needed. NaN if XLA's message cannot be read.
    fits: whether it fits.
    collectives: collectives of the compiled step; None if it did not fit, or if
      its text is unreadable.
    unread: text of XLA that could not be read; "" if all was read.
    work: work of the step by formula.
    bounds: seconds a step, see `roofline.lower_bounds`.
    compile_seconds: seconds that XLA took.
  """

  subject: Subject
  memory: dict[str, float]
  peak: float
  fits: bool
  collectives: list[hlo.Collective] | None
  unread: str
  work: roofline.Work
  bounds: dict[str, float]
  compile_seconds: float


def build(request: Request, sizes: Mapping[str, int] | None = None) -> Subject:
  """Builds the program on the topology's mesh, and a batch for it.

  Args:
    request: request for a plan.
    sizes: sizes of the mesh; None: the config's.

  Raises:
    ValueError: a mistake that would stop the run, or data that are not here.
    RuntimeError: see `Topology.devices`.
  """
  grid = mesh.make_mesh(
    sizes or request.config.mesh, request.topology.devices()
  )
  if request.is_stand_in:
    config = config_lib.resolve(request.config)
    if config.total_steps is None:
      raise ValueError(
        f"epochs={config.epochs} of data that are not read: set total_steps"
      )
    source = model_sources.parse(config.policy.init)
    program = program_for(
      config, source, vocab_size=request.vocab_size or 128_256, on=grid
    )
    batch = _stand_in(config, program, request)
  else:
    try:
      run = build_run(request.config, Workdir.at("plan"), on=grid)
    except (OSError, ImportError) as error:
      raise ValueError(
        f"the data of this config cannot be read here ({error}): give the"
        " shapes by --row_tokens, and --rows, --scored_tokens, --vocab_size"
      ) from error
    config, program = run.config, run.program
    batch = _first_batch(run.data.train)
  program.placement.check_row_tokens(batch.tokens.shape[1])
  if program.objective.needs_reference and not program.has_live_reference:
    logps = jax.ShapeDtypeStruct(batch.score.shape, jnp.float32)
    batch = batch.replace(ref_logps=logps)
  shardings = program.placement.batch_shardings(batch)
  return Subject(config, program, sharding.with_shardings(batch, shardings))


def _first_batch(loader: Loader) -> Batch:
  """Returns shapes and dtypes of batch 0, with the rows of all processes."""
  loader = dataclasses.replace(loader, process_index=0, process_count=1)
  return jax.tree.map(
    lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), loader.batch(0)
  )


def _stand_in(config: Any, program: Program, request: Request) -> Batch:
  """Returns shapes and dtypes of a batch whose rows are full.

  Raises:
    ValueError: `rows` that the devices and accumulation steps do not divide.
  """
  multiple = program.placement.num_row_shards * config.accumulation_steps
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
  slots = program.objective.num_slots or 2

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
      name: shape(scored, dtype=jnp.bool_)
      for name in token_masks(program.needs)
    },
  )


def make_plan(subject: Subject, request: Request) -> Plan:
  """Compiles the step for the topology and measures it."""
  program, batch = subject.program, subject.batch
  model = program.policy.config
  memory = known_memory(subject)
  started = time.monotonic()
  compiled, message = _compile(subject)
  seconds = time.monotonic() - started
  if compiled is None:
    state, _ = program.abstract_state()
    peak, collectives = wanted_bytes(message, shard_bytes((state, batch))), None
    unread = str(hlo.UnreadableError(message)) if math.isnan(peak) else ""
  else:
    devices = list(program.placement.mesh.devices.flat)
    peak, collectives, unread = _measure(compiled, devices)
  lengths = dict(
    num_rows=batch.tokens.shape[0],
    row_tokens=batch.tokens.shape[1],
    scored_tokens=batch.targets.shape[1],
  )
  work = roofline.count_work(
    model,
    program.policy.abstract_params(),
    has_live_reference=program.has_live_reference,
    **lengths,
  )
  moved = roofline.hbm_bytes(
    work,
    model,
    program.placement.mesh.shape,
    state_bytes=memory["parameters"] + memory["optimizer state"],
    gradient_bytes=memory["parameters"],
    **lengths,
  )
  return Plan(
    subject=subject,
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
  """Reads (peak bytes of a device, collectives, "").

  If the text is unreadable, collectives is None and the text is the reason.
  """
  peak = float(compat.program_memory(compiled).peak)
  try:
    return peak, read_collectives(compiled.as_text(), devices), ""
  except hlo.UnreadableError as error:
    return peak, None, str(error)


def read_collectives(text: str, devices: list[Any]) -> list[hlo.Collective]:
  """Reads the collectives of a compiled training step.

  Args:
    text: text of the compiled step.
    devices: devices of the mesh.

  Raises:
    hlo.UnreadableError: see `hlo.collectives`. Also if no device or slice seems
      to communicate: in a training step they do.
  """
  slices = [compat.slice_index(device) for device in devices]
  found = hlo.collectives(text, len(devices), slices.__getitem__)
  if len(devices) > 1 and not found:
    raise hlo.UnreadableError(f"no collective of {len(devices)} devices")
  if len(set(slices)) > 1 and not any(c.crosses for c in found):
    raise hlo.UnreadableError(f"no collective of {len(set(slices))} slices")
  return found


def _compile(subject: Subject) -> tuple[Any, str]:
  """Compiles the step: (compiled, ""), or (None, message) if too large."""
  program, batch = subject.program, subject.batch
  state, _ = program.abstract_state()
  with jax.set_mesh(program.placement.mesh):
    lowered = program.train_step().lower(state, batch)
    try:
      return lowered.compile(), ""
    except jax.errors.JaxRuntimeError as error:
      if "RESOURCE_EXHAUSTED" not in str(error):
        raise
      return None, str(error)


def wanted_bytes(message: str, arguments: float) -> float:
  """Reads the bytes that a step needed from XLA's message.

  Args:
    message: '... HLO temporaries (38.08G) exceeds available HBM (15.75G)', or
      '... Used 20.5G of 15.75G hbm'.
    arguments: bytes of the state and the batch, which are not temporaries.

  Returns:
    Bytes of a device; NaN for any other message.
  """
  scale = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}
  found = re.search(r"HLO temporaries \(([\d.]+)([KMGT]?)\)", message)
  if found:
    return float(found[1]) * scale[found[2]] + arguments
  found = re.search(r"Used ([\d.]+)([KMGT]?) of [\d.]+[KMGT]? hbm", message)
  return float(found[1]) * scale[found[2]] if found else math.nan


def shard_bytes(tree: Any) -> float:
  """Sums the bytes of a device's shards of abstract arrays."""
  return float(
    sum(
      math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize
      for x in jax.tree.leaves(tree)
    )
  )


def known_memory(subject: Subject) -> dict[str, float]:
  """Computes the memory of a device that follows from shapes and shardings.

  Returns:
    Bytes by kind: "parameters" of the policy, "optimizer state", "reference" (0
    if it holds none), "batch", "gradients" of the trained parameters, and
    "logps", the logits of a vocabulary block of a microbatch and their
    gradient, in float32.
  """
  program, batch = subject.program, subject.batch
  state, _ = program.abstract_state()
  sizes = program.placement.mesh.shape
  length = batch.targets.shape[1]
  rows = batch.tokens.shape[0] / program.accumulation_steps
  rows /= program.placement.num_row_shards
  logits = rows * length * program.policy.config.vocab_size / sizes["tensor"]
  with jax.set_mesh(program.placement.mesh):
    loops = vocabulary_blocks.tile_sizes()
  chunk = program.chunk_size or loops.chunk(math.ceil(rows), length)
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
