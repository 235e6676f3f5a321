"""A contender: dpo_jax's own loader and compiled step on a workload.

  python -m benchmarks.ours --layout=shared

reads commands from stdin and answers each with a line of JSON, see
`benchmarks.interleave`.
"""

import argparse
import dataclasses
import resource
import sys
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import interleave, workload
from dpo_jax.config import default_config
from dpo_jax.data import batch_plan, packing
from dpo_jax.data import loader as loader_lib
from dpo_jax.losses import build_objective
from dpo_jax.models import partition_rules
from dpo_jax.models.config import ModelConfig
from dpo_jax.models.decoder import Policy
from dpo_jax.parallel import mesh
from dpo_jax.parallel.placement import Placement
from dpo_jax.system import compat
from dpo_jax.training import optimizer, reference
from dpo_jax.training.program import Program
from dpo_jax.types import Batch


class Trainer:
  """Steps of `train.py` between two readings of its metrics."""

  def __init__(self, options: argparse.Namespace, grid: Any = None):
    """Builds model, data and loader on a mesh, or on the first device."""
    self.options = options
    fields = dict(workload.SHAPES[options.shape])
    fields["vocab_size"] = options.vocab_size or fields["vocab_size"]
    fields["max_positions"] = options.max_tokens
    fields["remat"] = options.remat
    fields["attention"] = options.attention
    policy = Policy(ModelConfig(**fields))
    self.lengths = workload.read_lengths(options)
    self.store = workload.make_store(
      self.lengths, options.seed, vocab_size=fields["vocab_size"]
    )
    if grid is None:
      grid = mesh.make_mesh(dict.fromkeys(mesh.AXES, 1), jax.devices()[:1])
    self.placement = Placement(grid)
    self.program = _build_program(options, policy, self.placement)
    shardings = partition_rules.param_shardings(policy.abstract_params(), grid)
    self.params = jax.jit(
      lambda: policy.init(jax.random.key(options.seed)),
      out_shardings=shardings,
    )()
    indices = np.arange(len(self.store))
    self.loader = loader_lib.Loader(
      self.store,
      indices,
      batch_plan.make_plan(
        self.store,
        indices,
        batch_size=options.batch_size,
        row_tokens=options.row_tokens,
        row_multiple=self.placement.num_row_shards,
        layout=options.layout,
      ),
      options.batch_size,
      options.seed,
    )

  def start(self) -> dict[str, Any]:
    """Scores the reference, compiles, and takes the first step."""
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
    reference_s = time.monotonic() - began
    ref_params = None
    if options.reference == "frozen":
      # Its own buffers: the first step donates the policy's.
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

  def compile(self) -> Any:
    """Returns the executable of a step on the first batch, not run."""
    ref_logps = np.zeros(self.store.score.shape, np.float32)
    loader = dataclasses.replace(self.loader, ref_logps=ref_logps)
    batch = self.placement.place_training_batch(loader.batch(0))
    state, _ = self.program.abstract_state()
    with jax.set_mesh(self.placement.mesh):
      return self.program.train_step().lower(state, batch).compile()

  def mean_work(self) -> workload.Work:
    """Returns the mean work of the first ten batches."""
    lengths = [self.lengths[self.loader.order(i)] for i in range(10)]
    works = [
      workload.count_work(x, self.program.policy.config) for x in lengths
    ]
    return workload.Work(
      *(
        float(np.mean([getattr(w, field.name) for w in works]))
        for field in dataclasses.fields(workload.Work)
      )
    )

  def make_batch(self, index: int) -> tuple[Any, float]:
    batch = self.loader.batch(index)
    if self.options.head == "all":
      batch = project_all(batch)
    placed = self.placement.place_training_batch(batch)
    return placed, packing.padding_fraction(batch), batch.tokens.shape

  def run(self, num_steps: int) -> dict[str, Any]:
    """Takes steps; what they were, and the seconds they took."""
    start, stop = self.next, self.next + num_steps
    works = [
      workload.count_work(
        self.lengths[self.loader.order(i)], self.program.policy.config
      )
      for i in range(start, stop)
    ]
    padding, shapes = [], set()
    waited = 0.0
    began, cpu_began = time.monotonic(), time.process_time()
    batches = loader_lib.prefetch(self.make_batch, start, stop)
    pending = None
    while True:
      asked = time.monotonic()
      ready = next(batches, None)
      waited += time.monotonic() - asked
      if ready is None:
        break
      batch, fraction, shape = ready
      self.state, metrics = self.step(self.state, batch)
      if pending is not None:
        self.placement.fetch(pending)
      pending = metrics
      padding.append(fraction)
      shapes.add(shape)
    metrics = self.placement.fetch(pending)
    seconds = time.monotonic() - began
    cpu_seconds = time.process_time() - cpu_began
    self.next = stop
    # With every turn, since a busy machine slows both.
    peak, cpu_peak = workload.matmul_rate()
    return {
      "matmul_flops_per_second": peak,
      "matmul_flops_per_cpu_second": cpu_peak,
      "seconds": seconds,
      "cpu_seconds": cpu_seconds,
      "host_wait_s": waited,
      "steps": num_steps,
      "pairs": num_steps * self.options.batch_size,
      "tokens": sum(w.tokens for w in works),
      "useful_flops": sum(w.useful_flops for w in works),
      "shared_flops": sum(w.shared_flops for w in works),
      "padding": float(np.mean(padding)),
      "shapes": sorted(shapes),
      "loss": float(metrics["loss"]),
      "grad_norm": float(metrics["grad_norm"]),
      "peak_rss_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
    }


def _build_program(
  options: argparse.Namespace, policy: Policy, placement: Placement
) -> Program:
  settings = default_config().optimizer
  settings.name = options.optimizer
  settings.learning_rate = workload.LEARNING_RATE
  settings.warmup_steps, settings.b2 = 0, 0.999
  settings.max_grad_norm = 1e9
  schedule = optimizer.build_schedule(settings, 1000)
  return Program(
    policy=policy,
    objective=build_objective({"name": "dpo", "beta": workload.BETA}),
    optimizer=optimizer.build_optimizer(settings, schedule),
    schedule=schedule,
    placement=placement,
    reference_kind=options.reference,
    chunk_size=options.logps_chunk,
  )


def project_all(batch: Batch) -> Batch:
  """The batch with as many scored places as tokens, spread among each other,
  so that the head runs on every position and the figures stay."""
  num_tokens, num_scored = batch.tokens.shape[1], batch.slots.shape[1]
  if num_scored >= num_tokens:
    return batch
  places = np.arange(num_scored) * num_tokens // num_scored

  def spread(x, fill):
    wide = np.full((len(x), num_tokens), fill, x.dtype)
    wide[:, places] = x
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
  parser.add_argument("--reference", default="cached")
  parser.add_argument("--row_tokens", type=int, default=0)
  parser.add_argument(
    "--logps_chunk", type=int, default=default_config().logps_chunk
  )
  parser.add_argument("--remat", default=default_config().policy.remat)
  parser.add_argument("--attention", default="auto")
  parser.add_argument("--memory", action="store_true")
  parser.add_argument("--head", default="scored")  # or "all" positions
  return parser.parse_args(argv)


def main() -> None:
  interleave.serve(Trainer(parse(sys.argv[1:])))


if __name__ == "__main__":
  main()
