"""Tables of a plan: memory, collectives, work and time."""

import math

from dpo_jax.planning import (
  hlo,
)
from dpo_jax.planning.compilation import Plan, Request
from dpo_jax.records.metrics import format_table

GIB = 2**30


def readable(value: float) -> float | str:
  return hlo.UNREADABLE if math.isnan(value) else value


def formatted(value: float) -> str:
  return hlo.UNREADABLE if math.isnan(value) else f"{value:,.4g}"


def memory_table(plan: Plan, hbm: float) -> str:
  """Formats the memory of a device as a table: GiB by kind, and the peak.

  What the kinds leave of the peak is called activations.

  Args:
    plan: plan.
    hbm: bytes of memory of the device.
  """
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
        "GiB": readable(size / GIB),
        "of HBM": "" if math.isnan(size) else f"{100 * size / hbm:.1f} %",
      }
      for name, size in lines.items()
    ]
  )


def collective_table(plan: Plan, networks: tuple[str, str]) -> str:
  """Formats collectives as a table: calls and bytes by kind and network.

  Args:
    plan: plan.
    networks: names of the network within a slice, and of that between them.
  """
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
            "over": networks[crosses],
            "calls": sum(c.trips for c in chosen),
            "group": str(sorted({c.group_size for c in chosen})),
            "GiB received": received / GIB,
          }
        )
  return format_table(rows) or "no collectives"


def expected_seconds(plan: Plan, request: Request) -> float:
  """Seconds of a step at the stated MFU, but at least its largest lower bound.

  NaN if a bound is not known.
  """
  peak = request.topology.num_chips * request.topology.chip.flops
  seconds = (
    plan.work.model_flops / (peak * request.mfu),
    *plan.bounds.values(),
  )
  return math.nan if any(map(math.isnan, seconds)) else max(seconds)


def slowest(plan: Plan) -> str:
  """Returns the name of the largest lower bound of the seconds of a step.

  `hlo.UNREADABLE` if one of the bounds is not known.
  """
  if any(map(math.isnan, plan.bounds.values())):
    return hlo.UNREADABLE
  return max(plan.bounds, key=plan.bounds.get)


def time_table(plan: Plan, request: Request) -> str:
  """Formats a run's time: lower bounds of a step, speed, hours and cost.

  Speed, hours and cost follow from `expected_seconds`, which is NaN if a bound
  is not known. The cost is left out without a price.
  """
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
    [{"time": name, "value": formatted(value)} for name, value in lines]
  )
  return f"{table}\nbound by: {slowest(plan)}"


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
