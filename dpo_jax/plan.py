"""Will it fit, how fast will it be, what will it cost: before a TPU is paid.

  python -m dpo_jax.plan --config=configs/hh.py --topology=v5e-64

compiles the very step of that config for that TPU, on a machine that has none
(libtpu from requirements-tpu.txt), and prints tables. Neither weights nor a TPU
are read. Where the config's data cannot be read here, --row_tokens, --rows and
--vocab_size say what they would have said.
"""

from collections.abc import Iterator, Mapping
import dataclasses
import logging
import math
import os
import re
import sys
import time
from typing import Any

from absl import app, flags
from absl import logging as absl_logging
from etils import epath
import jax
import jax.numpy as jnp
from ml_collections import config_flags

from dpo_jax import hlo, mesh, roofline, topology
from dpo_jax.metrics import format_table
from dpo_jax.models import vocabulary
from dpo_jax.run import Run, build_run, check_context, with_shardings
from dpo_jax.types import Batch

_GIB = 2**30


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
    peak: bytes of a device, XLA's count; of what it wanted if it had no room.
    fits: whether it has room.
    collectives: of the compiled step; none if it had no room.
    work: by formula.
    bounds: seconds a step, see `roofline.lower_bounds`.
    compile_seconds: how long XLA took.
  """

  run: Run
  batch: Batch
  memory: dict[str, float]
  peak: float
  fits: bool
  collectives: list[hlo.Collective]
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
  workdir = epath.Path("plan")
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

  def mask(name):
    if f"{name}_logps" not in needs:
      return None
    return shape(scored, dtype=jnp.bool_)

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
    head=mask("head"),
    sampled=mask("sampled"),
  )


def make_plan(run: Run, request: Request) -> Plan:
  """Compiles the step for the topology and measures what came out."""
  batch = abstract_batch(run, request)
  state, shardings = run.abstract_state()
  sizes = run.placement.mesh.shape
  num_rows, row_tokens = batch.tokens.shape
  scored_tokens = batch.targets.shape[1]
  memory = _known_memory(run, state, batch)
  started = time.monotonic()
  compiled, wanted = _compile(run, state, shardings, batch)
  seconds = time.monotonic() - started
  if compiled is None:
    peak, collectives = wanted, []
  else:
    peak = float(compiled.memory_analysis().peak_memory_in_bytes)
    devices = list(run.placement.mesh.devices.flat)
    collectives = hlo.collectives(
      compiled.as_text(),
      len(devices),
      lambda i: getattr(devices[i], "slice_index", None) or 0,
    )
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
    work=work,
    bounds=roofline.lower_bounds(work, moved, collectives, request.topology),
    compile_seconds=seconds,
  )


def _compile(run, state, shardings, batch) -> tuple[Any, float]:
  """The compiled step, or None and the bytes that it would have needed."""
  with jax.set_mesh(run.placement.mesh):
    step = run.placement.compile_step(run.make_train_step(), shardings)
    lowered = step.lower(state, batch)
    try:
      return lowered.compile(), 0.0
    except jax.errors.JaxRuntimeError as error:
      if "RESOURCE_EXHAUSTED" not in str(error):
        raise
      wanted = wanted_bytes(str(error), shard_bytes((state, batch)))
      return None, wanted


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


def _known_memory(run: Run, state: Any, batch: Batch) -> dict[str, float]:
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


def memory_table(plan: Plan, hbm: float) -> str:
  """By kind; what is not known from shapes is the rest of the peak."""
  known = sum(plan.memory.values())
  rest = max(plan.peak - known, 0.0)
  lines = plan.memory | {
    "activations, other": rest if not math.isnan(plan.peak) else math.nan,
    "peak": plan.peak,
    "HBM": hbm,
  }
  return format_table(
    [
      {
        "memory a device": name,
        "GiB": size / _GIB,
        "of HBM": f"{100 * size / hbm:.1f} %",
      }
      for name, size in lines.items()
    ]
  )


def collective_table(plan: Plan) -> str:
  """Calls and bytes by kind and network."""
  rows = []
  for kind in hlo.KINDS:
    for crosses in (False, True):
      chosen = [
        c for c in plan.collectives if c.kind == kind and c.crosses == crosses
      ]
      if chosen:
        received = sum(c.num_bytes * c.trips for c in chosen)
        rows.append(
          {
            "collective": kind,
            "over": "DCN" if crosses else "ICI",
            "calls": sum(c.trips for c in chosen),
            "group": str(sorted({c.group_size for c in chosen})),
            "GiB received": received / _GIB,
          }
        )
  return format_table(rows) or "no collectives"


def expected_seconds(plan: Plan, request: Request) -> float:
  """At the stated MFU, and not faster than the roofline."""
  peak = request.topology.num_chips * request.topology.chip.flops
  return max(
    plan.work.model_flops / (peak * request.mfu), *plan.bounds.values()
  )


def time_table(plan: Plan, request: Request) -> str:
  """The roofline, the bound, and what the run takes and costs."""
  slowest = max(plan.bounds, key=plan.bounds.get)
  seconds = expected_seconds(plan, request)
  config, chips = plan.run.config, request.topology.num_chips
  hours = seconds * config.total_steps / 3600
  peak = chips * request.topology.chip.flops
  rows, tokens = plan.batch.tokens.shape
  reached = plan.work.model_flops / (seconds * peak)
  lines = [
    *((f"{name} at least, s", bound) for name, bound in plan.bounds.items()),
    (f"a step at MFU {request.mfu:g}, s", seconds),
    ("MFU reached there", reached),
    ("groups a second", config.batch_size / seconds),
    ("tokens a second and chip", rows * tokens / seconds / chips),
    (f"hours for {config.total_steps} steps", hours),
  ]
  if request.price:
    lines.append(
      (f"cost at {request.price:g} a chip-hour", hours * chips * request.price)
    )
  table = format_table(
    [{"time": name, "value": f"{value:,.4g}"} for name, value in lines]
  )
  return f"{table}\nbound by {slowest}"


def work_table(plan: Plan) -> str:
  work = plan.work
  return format_table(
    [
      {"work of a step": name, "value": f"{value:,.4g}"}
      for name, value in (
        ("parameters", plan.run.policy.config.num_params()),
        ("rows x tokens", float(math.prod(plan.batch.tokens.shape))),
        ("model FLOPs", work.model_flops),
        ("executed FLOPs", work.executed_flops),
      )
    ]
  )


def remedies(plan: Plan) -> list[dict[str, Any]]:
  """What would make room, with the bytes of a device that it frees."""
  run, memory = plan.run, plan.memory
  config, model = run.config, run.policy.config
  sizes = run.placement.mesh.shape
  rest = plan.peak - sum(memory.values())
  state = memory["parameters"] + memory["optimizer state"]
  found: list[tuple[str, float]] = []
  if model.remat != "full":
    found.append(("policy.remat=full", 0.8 * rest))
  if model.compute_dtype != "bfloat16":
    found.append(("policy.compute_dtype=bfloat16", 0.5 * rest))
  if sizes["data"] > 1:
    fsdp = sizes["data"] * sizes["fsdp"]
    freed = (state + memory["gradients"]) * (1 - 1 / sizes["data"])
    found.append((f"mesh.data=1 mesh.fsdp={fsdp}", freed))
  if memory["reference"]:
    found.append(("reference.kind=cached", memory["reference"]))
  rows = plan.batch.tokens.shape[0] // run.placement.num_row_shards
  if rows > config.accumulation_steps:
    parts = config.accumulation_steps * 2
    found.append((f"accumulation_steps={parts}", 0.5 * max(rest, 0.0)))
  if model.param_dtype != "bfloat16":
    freed = 0.5 * (state + memory["gradients"])
    found.append(("policy.param_dtype=bfloat16", freed))
  if config.optimizer.name == "adamw":
    freed = 0.5 * memory["optimizer state"]
    found.append(("optimizer.name=rmsprop (or lion)", freed))
  per_row = math.prod(sizes[axis] for axis in mesh.ROW_AXES)
  if config.batch_size > per_row:
    found.append((f"batch_size={config.batch_size // 2}", 0.5 * max(rest, 0.0)))
  found.append(("a topology of twice the chips", 0.5 * state))
  return [
    {"what to change": change, "frees about, GiB": freed / _GIB}
    for change, freed in found
    if not freed <= 0
  ]


def describe(plan: Plan, request: Request) -> str:
  """All tables."""
  where = request.topology
  hbm = where.hbm_per_device
  rows, tokens = plan.batch.tokens.shape
  source = "given" if request.is_stand_in else "the config's data"
  grid = plan.run.placement.mesh
  sizes = ", ".join(f"{axis} {n}" for axis, n in grid.shape.items())
  parts = [
    f"{where.name}: {where.num_chips} chips ({where.jax_name}),"
    f" {grid.size} devices, mesh {sizes}",
    f"batch: {plan.run.config.batch_size} groups in {rows} rows of {tokens}"
    f" tokens, {plan.batch.targets.shape[1]} scored ({source}); compiled in"
    f" {plan.compile_seconds:.0f} s",
    memory_table(plan, hbm),
    "Parameters, optimizer, reference and batch are exact; gradients and logps"
    " by their shapes;\nthe peak is XLA's, and the rest of it is called"
    " activations.",
    work_table(plan),
    roofline.FLOPS_FORMULA,
  ]
  if plan.fits:
    parts += [
      collective_table(plan),
      time_table(plan, request),
      "HBM bytes: " + roofline.BYTES_FORMULA,
    ]
  else:
    parts += [
      f"It does not fit: {plan.peak / _GIB:.2f} GiB wanted, {hbm / _GIB:.2f}"
      " there.",
      format_table(remedies(plan)),
      "What frees activations is a rule of thumb: plan again with the change.",
    ]
  return "\n\n".join(parts)


def candidates(
  request: Request, limit: int
) -> Iterator[tuple[dict[str, int], Run]]:
  """Meshes worth compiling, the most promising by formula first."""
  devices = len(request.topology.devices())
  ranked = []
  for sizes in mesh.factorisations(devices):
    is_long = request.row_tokens >= 8192
    if sizes["tensor"] > 8 or (sizes["context"] > 1 and not is_long):
      continue
    try:
      run = build(request, sizes)
      batch = abstract_batch(run, request)
    except ValueError:  # does not divide the model or the batch
      continue
    rows, tokens = batch.tokens.shape
    work = roofline.count_work(
      run.policy.config,
      run.policy.abstract_params(),
      num_rows=rows,
      row_tokens=tokens,
      scored_tokens=batch.targets.shape[1],
      has_live_reference=run.has_live_reference,
    )
    memory = _known_memory(run, run.abstract_state()[0], batch)
    has_room = sum(memory.values()) <= request.topology.hbm_per_device
    received = roofline.collective_bytes(
      work, run.policy.config, sizes, num_rows=rows, row_tokens=tokens
    )
    ranked.append((not has_room, received, tuple(sizes.values()), sizes, run))
  for _, _, _, sizes, run in sorted(ranked, key=lambda row: row[:3])[:limit]:
    yield sizes, run


def sweep(request: Request, limit: int) -> list[dict[str, Any]]:
  """Compiles the likely meshes; a line for each, the best first.

  Raises:
    ValueError: no mesh divides the model and the batch.
  """
  rows = []
  for sizes, run in candidates(request, limit):
    plan = make_plan(run, request)
    seconds = expected_seconds(plan, request)
    rows.append(
      {
        "mesh": " x ".join(f"{a} {n}" for a, n in sizes.items()),
        "fits": "yes" if plan.fits else "no",
        "peak, GiB": plan.peak / _GIB,
        "received, GiB": sum(c.num_bytes * c.trips for c in plan.collectives)
        / _GIB,
        "step, s": seconds if plan.fits else math.nan,
        "bound": max(plan.bounds, key=plan.bounds.get) if plan.fits else "",
      }
    )
  if not rows:
    raise ValueError(
      f"no mesh of {request.topology.name} divides this model and batch:"
      " change batch_size, or --rows"
    )
  # Meshes that wait for the same thing are told apart by what they receive.
  rows.sort(
    key=lambda row: (row["fits"] == "no", row["step, s"], row["received, GiB"])
  )
  return rows


def main(argv: list[str]) -> None:
  if len(argv) > 1:
    raise app.UsageError(f"arguments that are no flags: {argv[1:]}")
  absl_logging.set_verbosity(absl_logging.ERROR)
  logging.getLogger("jax").setLevel(logging.ERROR)
  values = flags.FLAGS
  try:
    request = Request(
      config=values.config,
      topology=topology.parse_topology(values.topology),
      rows=values.rows,
      row_tokens=values.row_tokens,
      scored_tokens=values.scored_tokens,
      vocab_size=values.vocab_size,
      mfu=values.mfu,
      price=values.price_per_chip_hour,
    )
    if values.sweep:
      rows = sweep(request, values.sweep_limit)
      text, fits = format_table(rows), rows[0]["fits"] == "yes"
    else:
      plan = make_plan(build(request), request)
      text, fits = describe(plan, request), plan.fits
  except (ValueError, RuntimeError) as error:
    print(error, file=sys.stderr)
    raise SystemExit(1) from None
  print(text)
  if not fits:
    raise SystemExit(1)


def define_flags() -> None:
  config_flags.DEFINE_config_file("config", None, "path of a config file")
  flags.DEFINE_string("topology", None, "v5e-64, v5p-128, v5p:4x4x4, 2xv6e-256")
  flags.DEFINE_integer("rows", 0, "of a batch, where the data are not here")
  flags.DEFINE_integer("row_tokens", 0, "of a row, where they are not here")
  flags.DEFINE_integer("scored_tokens", 0, "of a row; 0: all of them")
  flags.DEFINE_integer("vocab_size", 0, "of the tokenizer; 0: 128,256")
  flags.DEFINE_float("mfu", 0.4, "model FLOPs utilisation to expect", 0.01, 1.0)
  flags.DEFINE_float("price_per_chip_hour", 0.0, "for the cost of the run")
  flags.DEFINE_bool("sweep", False, "compile the likely meshes and rank them")
  flags.DEFINE_integer("sweep_limit", 4, "meshes to compile", 1)
  flags.mark_flags_as_required(["config", "topology"])


if __name__ == "__main__":
  # The TPU is compiled for, not looked for.
  os.environ["JAX_PLATFORMS"] = "cpu"
  define_flags()
  app.run(main)
