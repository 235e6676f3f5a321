"""A plan, compiled and written as tables."""

from collections.abc import Callable, Mapping
import dataclasses
import logging
import math
import multiprocessing
from multiprocessing import resource_tracker
import os
import pickle
import signal
import threading
import traceback
from typing import Any

from absl import logging as absl_logging

from dpo_jax.planning import (
  compilation,
  hlo,
  roofline,
)
from dpo_jax.planning.compilation import Plan, Request
from dpo_jax.planning.remedies import remedies
from dpo_jax.planning.tables import (
  GIB,
  collective_table,
  expected_seconds,
  memory_table,
  slowest,
  time_table,
  work_table,
)
from dpo_jax.records.metrics import format_table

_GPU_MEMORY = """\
JAX takes 75 % of a GPU's memory. For more: XLA_PYTHON_CLIENT_MEM_FRACTION=0.95.
XLA chose its algorithms without the GPU: on one it measures them first."""


@dataclasses.dataclass(frozen=True)
class Report:
  """Results of a plan, without its devices.

  Attributes:
    text: all tables.
    fits: whether the step fits into the memory.
    peak: bytes of a device; NaN if unreadable.
    received: bytes that a device receives in a step, over all networks; NaN if
      unreadable, or if the step did not compile.
    seconds: see `expected_seconds`; NaN where `received` is.
    bound: resource that limits the step, or `hlo.UNREADABLE`.
  """

  text: str
  fits: bool
  peak: float
  received: float
  seconds: float
  bound: str


def describe(plan: Plan, request: Request) -> str:
  """Returns the text of a plan: all its tables.

  They are memory and work; then collectives and time, or for a step that does
  not fit, remedies.
  """
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
      collective_table(plan, where.chip.networks),
      time_table(plan, request),
      "HBM bytes: " + roofline.BYTES_FORMULA,
    ]
  else:
    wanted = f"{plan.peak / GIB:.2f} GiB wanted"
    if math.isnan(plan.peak):
      wanted = f"what it wanted is {hlo.UNREADABLE}"
    parts += [
      f"It does not fit: {wanted}, {hbm / GIB:.2f} there.",
      format_table(remedies(plan)),
      "What frees activations is a rule of thumb: plan again with the change.",
    ]
  if where.chip.gpu:
    parts.append(_GPU_MEMORY)
  if plan.unread:
    parts.append(plan.unread)
  return "\n\n".join(parts)


def report(request: Request, sizes: Mapping[str, int] | None = None) -> Report:
  """Compiles the step of a request, and returns its tables and main results.

  Args:
    request: request for a plan.
    sizes: sizes of the mesh by axis; None: the config's.

  Raises:
    ValueError: a mistake that would stop the run.
    RuntimeError: see `Topology.devices`.
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
  """Calls a function in a new process and returns its result.

  The caller survives if libtpu ends that process. Function, arguments and
  result must be picklable.

  Raises:
    RuntimeError: the process ended without an answer. An error that the
      function raises reaches the caller.
  """
  context = multiprocessing.get_context("spawn")
  receiver, sender = context.Pipe(duplex=False)
  child = context.Process(
    target=_answer, args=(sender, function, arguments), daemon=True
  )
  # Ctrl-C is for this process; the child starts with it blocked. The tracker
  # that Python starts with a first child would unblock it.
  resource_tracker.ensure_running()
  before = signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT])
  try:
    child.start()
  finally:
    signal.pthread_sigmask(signal.SIG_SETMASK, before)
  sender.close()
  try:
    result, error = receiver.recv()
  except EOFError:
    raise RuntimeError(
      "the compiler ended its process: either a check of its own failed,"
      " printed above, or this machine ran out of memory. Other shapes may"
      " pass the check: change --row_tokens, --rows or the mesh"
    ) from None
  finally:
    child.join()
  if error is not None:
    raise error
  return result


def _answer(
  sender: Any, function: Callable[..., Any], arguments: tuple[Any, ...]
) -> None:
  """Sends a function's result and error to the parent, and ends with it."""
  threading.Thread(target=_end_with_parent, daemon=True).start()
  result, error = None, None
  try:
    result = function(*arguments)
  except Exception as raised:
    raised.add_note("".join(traceback.format_exception(raised)))
    error = _as_sent(raised)
  sender.send((result, error))


def _as_sent(error: Exception) -> Exception:
  """Returns an error as it is, if the parent can read it."""
  try:
    pickle.loads(pickle.dumps(error))
  except Exception:  # its own methods may raise anything
    other = RuntimeError(f"{type(error).__name__}: {error}")
    other.add_note("".join(error.__notes__))
    return other
  return error


def _end_with_parent() -> None:
  parent = multiprocessing.parent_process()
  assert parent is not None
  parent.join()
  os._exit(1)
