"""Meshes compared: compiled, and the best first."""

from collections.abc import Callable, Iterator
import math
import sys
from typing import Any

from dpo_jax.parallel import mesh
from dpo_jax.planning import (
  compilation,
  roofline,
)
from dpo_jax.planning.compilation import Request
from dpo_jax.planning.report import Report, report
from dpo_jax.planning.tables import GIB, readable

# Last of all in a sweep.
_NOT_COMPILED = Report("", False, math.nan, math.nan, math.nan, "")


def candidates(request: Request, limit: int) -> Iterator[dict[str, int]]:
  """Yields the meshes worth compiling: sizes by axis, the most promising first.

  Meshes that have room by `known_memory` come first, then those that receive
  fewer bytes by `collective_bytes`. Left out are meshes that do not divide the
  model or the batch, that split tensors over more than 8 devices, or that split
  rows where `request.row_tokens` is below 8,192, as its 0 is.

  Args:
    request: request for a plan.
    limit: most meshes to yield.
  """
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


def sweep(
  request: Request,
  limit: int,
  get_report: Callable[..., Report] = report,
) -> list[dict[str, Any]]:
  """Compiles the likely meshes; a row for each, the best first.

  Args:
    request: request for a plan.
    limit: meshes to compile.
    get_report: (request, sizes) -> Report; its RuntimeError is printed to
      stderr, and the mesh counts as not compiled.

  Returns:
    "mesh", "fits" ("yes", "no" or "not compiled"), "peak, GiB",
    "received, GiB", "step, s" (seconds at the stated MFU) and "bound". A number
    that is not known is NaN or `hlo.UNREADABLE`.

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
      "peak, GiB": readable(made.peak / GIB) if made.text else math.nan,
      "received, GiB": readable(made.received / GIB) if made.fits else math.nan,
      "step, s": readable(made.seconds) if made.fits else math.nan,
      "bound": made.bound if made.fits else "",
    }
    for name, made in sorted(reports.items(), key=lambda item: _rank(item[1]))
  ]


def _rank(made: Report) -> tuple[bool, bool, float, float]:
  # Meshes with the same bound are ranked by the bytes that they receive.
  seconds, received = (
    math.inf if math.isnan(value) else value
    for value in (made.seconds, made.received)
  )
  return not made.fits, not made.text, seconds, received
