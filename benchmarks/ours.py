"""Runs dpo_jax's own loader and compiled step on a workload.

  python -m benchmarks.ours --layout=shared

This contender reads commands from stdin and answers each with a line of JSON;
see `benchmarks.interleave`.
"""

import argparse
from collections.abc import Sequence
import contextlib
import dataclasses
import sys
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import interleave, workload
from dpo_jax.config import default_config, resolve
from dpo_jax.data import loader as loader_lib
from dpo_jax.data import packing
from dpo_jax.data.store import Store
from dpo_jax.models import partition_rules
from dpo_jax.models.config import ModelConfig
from dpo_jax.models.decoder import Policy
from dpo_jax.parallel import mesh
from dpo_jax.parallel.placement import Placement
from dpo_jax.system import compat
from dpo_jax.training import reference
from dpo_jax.training.program import build_program
from dpo_jax.types import Batch


@dataclasses.dataclass
class Data:
  """Model shape, lengths and batches that options describe; on no device.

  Attributes:
    options: parsed by `parse`.
    config: shape of the model.
    lengths: i32 [N, 3], see `workload.make_lengths`.
    store: groups of these lengths.
    loader: their batches.
  """

  options: argparse.Namespace
  config: ModelConfig
  lengths: np.ndarray
  store: Store
  loader: loader_lib.Loader

  def work(self, steps: Sequence[int]) -> dict[str, Any]:
    """Counts the work of steps, as `interleave.Stopwatch` takes it."""
    works = [
      workload.count_work(self.lengths[self.loader.order(step)], self.config)
      for step in steps
    ]
    return {
      "batch_size": self.options.batch_size,
      "tokens": [w.tokens for w in works],
      "useful_flops": [w.useful_flops for w in works],
      "shared_flops": [w.shared_flops for w in works],
    }


def make_data(options: argparse.Namespace, row_multiple: int = 1) -> Data:
  """Makes the data of a contender.

  Args:
    options: parsed by `parse`.
    row_multiple: number that the rows of a batch must divide by.
  """
  fields = dict(workload.SHAPES[options.shape])
  fields["vocab_size"] = options.vocab_size or fields["vocab_size"]
  fields["max_positions"] = options.max_tokens
  fields["remat"] = options.remat
  fields["attention"] = options.attention
  lengths = workload.read_lengths(options)
  store = workload.make_store(
    lengths, options.seed, vocab_size=fields["vocab_size"]
  )
  loader = workload.make_loader(
    store,
    batch_size=options.batch_size,
    seed=options.seed,
    layout=options.layout,
    row_tokens=options.row_tokens,
    row_multiple=row_multiple,
  )
  return Data(options, ModelConfig(**fields), lengths, store, loader)


class Trainer:
  """Trains as `dpo_jax.train` does between two measurements."""

  def __init__(self, options: argparse.Namespace, grid: Any = None):
    """Builds the program, parameters and loader.

    Args:
      options: parsed by `parse`.
      grid: mesh, or None for one of the first device.
    """
    self.options = options
    if grid is None:
      grid = mesh.make_mesh(dict.fromkeys(mesh.AXES, 1), jax.devices()[:1])
    self.placement = Placement(grid)
    self.data = make_data(options, self.placement.num_row_shards)
    self.loader = self.data.loader
    policy = Policy(self.data.config)
    self.program = build_program(_config(options), policy, self.placement)
    shardings = partition_rules.param_shardings(policy.abstract_params(), grid)
    self.params = jax.jit(
      lambda: policy.init(jax.random.key(options.seed)),
      out_shardings=shardings,
    )()

  def start(self) -> dict[str, Any]:
    """Scores the reference, compiles, and takes the first step.

    Returns:
      The answer of `run`, with "first_step_s" and "reference_s"; with --memory
      also "step_temp_mb" and "step_arguments_mb".
    """
    options = self.options
    began = time.monotonic()
    if options.reference == "cached":
      ref_logps = reference.compute_logps(
        self.program.logps_step,
        self.params,
        self.loader,
        self.placement,
      )
      self.loader = dataclasses.replace(self.loader, ref_logps=ref_logps)
    elif options.reference == "given":
      self.loader = self._with_zero_reference()
    reference_s = time.monotonic() - began
    ref_params = None
    if options.reference == "frozen":
      # The first step donates the buffers of the policy.
      ref_params = jax.tree.map(jnp.copy, self.params)
    self.state = self.program.make_state(self.params, ref_params)
    self.params = None
    self.step = mesh.on_mesh(self.placement.mesh)(self.program.train_step())
    self.next = 0
    began = time.monotonic()
    first = self.run(1)
    first["first_step_s"] = time.monotonic() - began
    first["reference_s"] = reference_s
    if options.memory:
      memory = compat.program_memory(self.compile())
      first["step_temp_mb"] = memory.temporaries / 2**20
      first["step_arguments_mb"] = memory.arguments / 2**20
    return first

  def _with_zero_reference(self) -> loader_lib.Loader:
    ref_logps = np.zeros(self.data.store.score.shape, np.float32)
    return dataclasses.replace(self.loader, ref_logps=ref_logps)

  def compile(self) -> Any:
    """Compiles a step on the first batch, and does not run it."""
    batch = self._with_zero_reference().batch(0)
    batch = self.placement.place_training_batch(batch)
    state, _ = self.program.abstract_state()
    with jax.set_mesh(self.placement.mesh):
      return self.program.train_step().lower(state, batch).compile()

  def make_batch(self, index: int) -> tuple[Any, float, tuple[int, ...]]:
    """Returns a batch on the devices, its padding fraction and its shape."""
    batch = self.loader.batch(index)
    if self.options.head == "all":
      batch = project_all(batch)
    placed = self.placement.place_training_batch(batch)
    return placed, packing.padding_fraction(batch), batch.tokens.shape

  def run(self, num_steps: int) -> dict[str, Any]:
    """Takes steps, and returns their time, work and metrics.

    Returns:
      The answer of `Stopwatch.stop`, with "loss" and "grad_norm" of the last
      step, "host_wait_s", mean "padding" and "shapes"; on a CPU also
      "matmul_flops_per_second" and "matmul_flops_per_cpu_second", on another
      device "peak_device_gib".
    """
    start, self.next = self.next, self.next + num_steps
    trace: contextlib.AbstractContextManager = contextlib.nullcontext()
    if self.options.profile and start == 1:
      trace = jax.profiler.trace(self.options.profile)
    with trace:
      return self._run(start, num_steps)

  def _run(self, start: int, num_steps: int) -> dict[str, Any]:
    watch = interleave.Stopwatch(
      self.data.work(range(start, self.next)), range(num_steps)
    )
    padding, shapes = [], set()
    waited = 0.0
    batches = loader_lib.prefetch(self.make_batch, start, self.next)
    pending = None
    while True:
      asked = time.monotonic()
      ready = next(batches, None)
      waited += time.monotonic() - asked
      if ready is None:
        break
      batch, fraction, shape = ready
      self.state, metrics, _ = self.step(self.state, batch)
      if pending is not None:
        self.placement.fetch(pending)
      pending = metrics
      padding.append(fraction)
      shapes.add(shape)
    metrics = self.placement.fetch(pending)
    answer = watch.stop(
      host_wait_s=waited,
      padding=float(np.mean(padding)),
      shapes=sorted(shapes),
      loss=float(metrics["loss"]),
      grad_norm=float(metrics["grad_norm"]),
      **_device_memory(),
    )
    if jax.default_backend() != "cpu":
      return answer
    # Measured after every turn, since a busy machine slows both.
    peak, cpu_peak = workload.matmul_rate()
    return answer | {
      "matmul_flops_per_second": peak,
      "matmul_flops_per_cpu_second": cpu_peak,
    }


def _device_memory() -> dict[str, float]:
  """Returns "peak_device_gib", the most of the first device; {} on a CPU."""
  stats = jax.devices()[0].memory_stats()
  if not stats:
    return {}
  return {"peak_device_gib": stats["peak_bytes_in_use"] / 2**30}


def _config(options: argparse.Namespace) -> Any:
  """Returns the resolved config of the program."""
  config = default_config()
  config.loss.name, config.loss.beta = "dpo", workload.BETA
  config.optimizer.name = options.optimizer
  config.optimizer.learning_rate = workload.LEARNING_RATE
  config.optimizer.warmup_steps, config.optimizer.b2 = 0, 0.999
  config.optimizer.max_grad_norm = 1e9
  config.total_steps = 1000
  config.reference.kind = (
    "cached" if options.reference == "given" else options.reference
  )
  config.logps_chunk = options.logps_chunk
  return resolve(config)


def project_all(batch: Batch) -> Batch:
  """Spreads scored positions over as many slots as there are tokens.

  The head then runs on every position, and the metrics stay the same.
  """
  num_tokens, num_scored = batch.tokens.shape[1], batch.slots.shape[1]
  if num_scored >= num_tokens:
    return batch
  positions = np.arange(num_scored) * num_tokens // num_scored

  def spread(x, fill):
    wide = np.full((len(x), num_tokens), fill, x.dtype)
    wide[:, positions] = x
    return wide

  padding = batch.valid.shape[1] * batch.valid.shape[2]
  return batch.replace(
    targets=spread(batch.targets, 0),
    predictors=spread(batch.predictors, 0),
    slots=spread(batch.slots, padding),
  )


def parse(argv: list[str]) -> argparse.Namespace:
  parser = argparse.ArgumentParser()
  workload.add_options(parser)
  parser.add_argument("--shape", default="a", choices=workload.SHAPES)
  parser.add_argument("--optimizer", default="adamw")
  parser.add_argument("--layout", default="shared")
  parser.add_argument(
    "--reference",
    default="cached",
    help="cached, frozen or none, as in a config; given: log-probs of zero"
    " that nothing computes",
  )
  parser.add_argument("--row_tokens", type=int, default=0)
  parser.add_argument(
    "--logps_chunk", type=int, default=default_config().logps_chunk
  )
  parser.add_argument("--remat", default=default_config().policy.remat)
  parser.add_argument("--attention", default="auto")
  parser.add_argument(
    "--memory", action="store_true", help="report the memory of a step"
  )
  parser.add_argument(
    "--profile", default="", help="folder for a trace of the first warm turn"
  )
  parser.add_argument(
    "--head",
    default="scored",
    choices=("scored", "all"),
    help="positions that are projected to the vocabulary",
  )
  return parser.parse_args(argv)


def main() -> None:
  interleave.serve(Trainer(parse(sys.argv[1:])))


if __name__ == "__main__":
  main()
