"""Will it fit, how fast will it be, what will it cost: before a TPU is paid.

  python -m dpo_jax.plan --config=configs/hh.py --topology=v5e-64

compiles the very step of that config for that TPU, on a machine that has none
(libtpu from requirements-tpu.txt), and prints tables. Where the config's data
cannot be read here, --row_tokens, --rows and --vocab_size say what they would
have said.
"""

from collections.abc import Callable, Iterator, Mapping
from concurrent import futures
import dataclasses
import functools
import logging
import math
import multiprocessing
import os
import sys
from typing import Any

from absl import flags
from absl import logging as absl_logging
import jax
from ml_collections import config_flags

from dpo_jax import command_line
from dpo_jax.parallel import active_mesh, mesh
from dpo_jax.planning import (
  compilation,
  hlo,
  roofline,
  topology,
)
from dpo_jax.planning.compilation import Plan, Request
from dpo_jax.records.metrics import format_table

_GIB = 2**30
# What keeping less frees of the activations, as llama3-8b on v5e-16 with a row
# of 2,048 tokens a device has them. "none" keeps more than "dots" does.
_FREED_BY_REMAT = {
  "none": (("attention", 0.65), ("full", 0.75)),
  "dots": (("attention", 0.65), ("full", 0.75)),
  "attention": (("full", 0.25),),
  "full": (),
}


@dataclasses.dataclass(frozen=True)
class Report:
  """What a plan came to, without its devices.

  Attributes:
    text: all tables.
    fits: whether it has room.
    peak: bytes of a device; NaN if it is unreadable.
    received: bytes of a device in a step, over all networks; NaN if they are
      unreadable, or the step was not compiled.
    seconds: a step, at the stated MFU; NaN where `received` is.
    bound: what it waits for.
  """

  text: str
  fits: bool
  peak: float
  received: float
  seconds: float
  bound: str


# Last of all in a sweep.
_NOT_COMPILED = Report("", False, math.nan, math.nan, math.nan, "")


def _number(value: float) -> float | str:
  return hlo.UNREADABLE if math.isnan(value) else value


def _text(value: float) -> str:
  return hlo.UNREADABLE if math.isnan(value) else f"{value:,.4g}"


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
        "GiB": _number(size / _GIB),
        "of HBM": "" if math.isnan(size) else f"{100 * size / hbm:.1f} %",
      }
      for name, size in lines.items()
    ]
  )


def collective_table(plan: Plan) -> str:
  """Calls and bytes by kind and network."""
  if plan.collectives is None:
    return f"collectives: {hlo.UNREADABLE}"
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
  """At the stated MFU, and not faster than the roofline; NaN if a bound is."""
  peak = request.topology.num_chips * request.topology.chip.flops
  seconds = (
    plan.work.model_flops / (peak * request.mfu),
    *plan.bounds.values(),
  )
  return math.nan if any(map(math.isnan, seconds)) else max(seconds)


def slowest(plan: Plan) -> str:
  """Names what a step waits for, if all bounds are known."""
  if any(map(math.isnan, plan.bounds.values())):
    return f"what is {hlo.UNREADABLE}"
  return max(plan.bounds, key=plan.bounds.get)


def time_table(plan: Plan, request: Request) -> str:
  """The roofline, the bound, and what the run takes and costs."""
  seconds = expected_seconds(plan, request)
  config, chips = plan.subject.config, request.topology.num_chips
  hours = seconds * config.total_steps / 3600
  peak = chips * request.topology.chip.flops
  rows, tokens = plan.subject.batch.tokens.shape
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
    [{"time": name, "value": _text(value)} for name, value in lines]
  )
  return f"{table}\nbound by {slowest(plan)}"


def work_table(plan: Plan) -> str:
  work = plan.work
  return format_table(
    [
      {"work of a step": name, "value": f"{value:,.4g}"}
      for name, value in (
        ("parameters", plan.subject.program.policy.config.num_params()),
        ("rows x tokens", float(math.prod(plan.subject.batch.tokens.shape))),
        ("model FLOPs", work.model_flops),
        ("executed FLOPs", work.executed_flops),
      )
    ]
  )


def remedies(plan: Plan) -> list[dict[str, Any]]:
  """What would make room, with the bytes of a device that it frees."""
  program, memory = plan.subject.program, plan.memory
  config, model = plan.subject.config, program.policy.config
  sizes = program.placement.mesh.shape
  rest = plan.peak - sum(memory.values())
  state = memory["parameters"] + memory["optimizer state"]
  found: list[tuple[str, float]] = []
  for policy, share in _FREED_BY_REMAT[model.remat]:
    found.append((f"policy.remat={policy}", share * rest))
  if model.compute_dtype != "bfloat16":
    found.append(("policy.compute_dtype=bfloat16", 0.5 * rest))
  if sizes["data"] > 1:
    fsdp = sizes["data"] * sizes["fsdp"]
    freed = (state + memory["gradients"]) * (1 - 1 / sizes["data"])
    found.append((f"mesh.data=1 mesh.fsdp={fsdp}", freed))
  if memory["reference"]:
    found.append(("reference.kind=cached", memory["reference"]))
  rows = plan.subject.batch.tokens.shape[0]
  rows //= program.placement.num_row_shards
  if rows > config.accumulation_steps:
    parts = config.accumulation_steps * 2
    found.append((f"accumulation_steps={parts}", 0.5 * max(rest, 0.0)))
  trained, frozen = program.split_params(program.policy.abstract_params())
  if frozen is not None and model.param_dtype != "bfloat16":
    share = _num_bytes(frozen) / (_num_bytes(frozen) + _num_bytes(trained))
    freed = 0.5 * share * memory["parameters"]
    found.append(("policy.param_dtype=bfloat16", freed))
  if frozen is None:
    freed = memory["optimizer state"] + memory["gradients"]
    freed += 0.5 * memory["parameters"]
    change = "lora.rank=16 policy.param_dtype=bfloat16 (adapters alone)"
    found.append((change, 0.95 * freed))
  if config.optimizer.name == "adamw":
    freed = 0.5 * memory["optimizer state"]
    found.append(("optimizer.name=rmsprop (or lion)", freed))
  if config.optimizer.name != "adafactor":
    # Its second moments are a row and a column of each matrix.
    freed = 0.98 * memory["optimizer state"]
    found.append(("optimizer.name=adafactor", freed))
  per_row = math.prod(sizes[axis] for axis in active_mesh.ROW_AXES)
  if config.batch_size > per_row:
    found.append((f"batch_size={config.batch_size // 2}", 0.5 * max(rest, 0.0)))
  found.append(("a topology of twice the chips", 0.5 * state))
  return [
    {"what to change": change, "frees about, GiB": _number(freed / _GIB)}
    for change, freed in found
    if not freed <= 0
  ]


def _num_bytes(tree: Any) -> int:
  return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(tree))


def describe(plan: Plan, request: Request) -> str:
  """All tables."""
  where = request.topology
  hbm = where.hbm_per_device
  config, batch = plan.subject.config, plan.subject.batch
  rows, tokens = batch.tokens.shape
  source = "given" if request.is_stand_in else "the config's data"
  grid = plan.subject.program.placement.mesh
  sizes = ", ".join(f"{axis} {n}" for axis, n in grid.shape.items())
  parts = [
    f"{where.name}: {where.num_chips} chips ({where.jax_name}),"
    f" {grid.size} devices, mesh {sizes}",
    f"batch: {config.batch_size} groups in {rows} rows of {tokens}"
    f" tokens, {batch.targets.shape[1]} scored ({source}); compiled in"
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
    wanted = f"{plan.peak / _GIB:.2f} GiB wanted"
    if math.isnan(plan.peak):
      wanted = f"what it wanted is {hlo.UNREADABLE}"
    parts += [
      f"It does not fit: {wanted}, {hbm / _GIB:.2f} there.",
      format_table(remedies(plan)),
      "What frees activations is a rule of thumb: plan again with the change.",
    ]
  if plan.unread:
    parts.append(plan.unread)
  return "\n\n".join(parts)


def candidates(request: Request, limit: int) -> Iterator[dict[str, int]]:
  """Meshes worth compiling, the most promising by formula first."""
  devices = len(request.topology.devices())
  ranked = []
  for sizes in mesh.factorisations(devices):
    is_long = request.row_tokens >= 8192
    if sizes["tensor"] > 8 or (sizes["context"] > 1 and not is_long):
      continue
    try:
      subject = compilation.build(request, sizes)
    except ValueError:  # does not divide the model or the batch
      continue
    program = subject.program
    lengths = dict(
      num_rows=subject.batch.tokens.shape[0],
      row_tokens=subject.batch.tokens.shape[1],
    )
    work = roofline.count_work(
      program.policy.config,
      program.policy.abstract_params(),
      scored_tokens=subject.batch.targets.shape[1],
      has_live_reference=program.has_live_reference,
      **lengths,
    )
    memory = compilation.known_memory(subject)
    has_room = sum(memory.values()) <= request.topology.hbm_per_device
    received = roofline.collective_bytes(
      work, program.policy.config, sizes, **lengths
    )
    ranked.append((not has_room, received, tuple(sizes.values()), sizes))
  for *_, sizes in sorted(ranked, key=lambda row: row[:3])[:limit]:
    yield sizes


def report(request: Request, sizes: Mapping[str, int] | None = None) -> Report:
  """Compiles a plan and reads it.

  Args:
    request: what to plan.
    sizes: of the mesh, if not the config's.

  Raises:
    ValueError: what would stop the run there.
    RuntimeError: no libtpu, or one of another version.
  """
  # Also in a process of its own, see `in_child`.
  absl_logging.set_verbosity(absl_logging.ERROR)
  logging.getLogger("jax").setLevel(logging.ERROR)
  plan = compilation.make_plan(compilation.build(request, sizes), request)
  received = math.nan
  if plan.collectives is not None:
    received = sum(c.num_bytes * c.trips for c in plan.collectives)
  return Report(
    text=describe(plan, request),
    fits=plan.fits,
    peak=plan.peak,
    received=received,
    seconds=expected_seconds(plan, request),
    bound=slowest(plan),
  )


def in_child(function: Callable[..., Any], *arguments: Any) -> Any:
  """function(*arguments) in a process of its own, which libtpu may abort.

  Raises:
    RuntimeError: the process ended without an answer.
  """
  context = multiprocessing.get_context("spawn")
  with futures.ProcessPoolExecutor(1, mp_context=context) as pool:
    try:
      return pool.submit(function, *arguments).result()
    except futures.process.BrokenProcessPool:
      raise RuntimeError(
        "the compiler ended its process: by a failed check of its own, which"
        " it printed above, or for want of memory on this machine. Other"
        " shapes may pass the check: change --row_tokens, --rows or the mesh"
      ) from None


def sweep(
  request: Request,
  limit: int,
  get_report: Callable[..., Report] = report,
) -> list[dict[str, Any]]:
  """Compiles the likely meshes; a line for each, the best first.

  Args:
    request: what to plan.
    limit: meshes to compile.
    get_report: (request, sizes) -> Report; a RuntimeError of it is a line.

  Raises:
    ValueError: no mesh divides the model and the batch.
  """
  reports = {}
  for sizes in candidates(request, limit):
    name = " x ".join(f"{axis} {n}" for axis, n in sizes.items())
    try:
      reports[name] = get_report(request, sizes)
    except RuntimeError as error:
      print(f"{name}: {error}", file=sys.stderr)
      reports[name] = _NOT_COMPILED
  if not reports:
    raise ValueError(
      f"no mesh of {request.topology.name} divides this model and batch:"
      " change batch_size, or --rows"
    )
  return [
    {
      "mesh": name,
      "fits": "yes" if made.fits else "no" if made.text else "not compiled",
      "peak, GiB": _number(made.peak / _GIB) if made.text else math.nan,
      "received, GiB": _number(made.received / _GIB) if made.fits else math.nan,
      "step, s": _number(made.seconds) if made.fits else math.nan,
      "bound": made.bound if made.fits else "",
    }
    for name, made in sorted(reports.items(), key=lambda item: _rank(item[1]))
  ]


def _rank(made: Report) -> tuple[bool, bool, float, float]:
  # Meshes that wait for the same thing are told apart by what they receive.
  seconds, received = (
    math.inf if math.isnan(value) else value
    for value in (made.seconds, made.received)
  )
  return not made.fits, not made.text, seconds, received


def main() -> None:
  values = flags.FLAGS
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
  isolated = functools.partial(in_child, report)
  if values.sweep:
    rows = sweep(request, values.sweep_limit, isolated)
    text, fits = format_table(rows), rows[0]["fits"] == "yes"
  else:
    made = isolated(request)
    text, fits = made.text, made.fits
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
  command_line.run(main)
