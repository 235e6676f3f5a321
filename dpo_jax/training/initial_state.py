"""The state that a run starts from: its latest checkpoint, or a fresh one."""

from typing import Any

import jax

from dpo_jax import model_sources
from dpo_jax.models import lora
from dpo_jax.parallel.hosts import to_host
from dpo_jax.records.checkpoint import Checkpoints
from dpo_jax.system.files import write_atomically
from dpo_jax.training import start
from dpo_jax.training.setup import EvalRun, Run
from dpo_jax.trees import params_digest
from dpo_jax.types import Batch, TrainState


def load_params(run: EvalRun, init: str) -> Any:
  """Loads all parameters of a model source onto the mesh of a run.

  Args:
    run: run that they are for.
    init: model source, such as `run.config.policy.init`.
  """
  return model_sources.parse(init).load(
    run.program.policy, run.program.placement.mesh, seed=run.config.seed
  )


def load_state(run: Run, checkpoints: Checkpoints) -> TrainState:
  """Returns the state of the latest checkpoint, or a fresh one.

  For a fresh state with frozen parameters, it writes their digest to
  WORKDIR/frozen.txt.

  Raises:
    ValueError: frozen parameters that have changed since the run began.
  """
  program, init = run.program, run.config.policy.init
  target, _ = program.abstract_state()
  state = checkpoints.restore(target)
  if state is not None:
    return with_frozen(run, state)
  ref_params = None
  if program.has_live_reference:
    # Loaded a second time: the first step donates the policy's buffers.
    ref_params = load_params(run, run.reference_init)
  state = program.make_state(load_params(run, init), ref_params)
  if state.frozen_params is not None and run.is_writer:
    digest = params_digest(state.frozen_params)
    write_atomically(run.workdir.frozen_digest, digest + "\n")
  return state


def with_frozen(run: EvalRun, state: TrainState) -> TrainState:
  """Returns a restored state with its frozen parameters.

  No checkpoint holds them, so they are loaded from `policy.init`. The state of
  a run without frozen parameters is returned as it is.

  Raises:
    ValueError: the frozen parameters have changed since the run began.
  """
  init = run.config.policy.init
  target, _ = run.program.abstract_state()
  if target.frozen_params is None:
    return state
  frozen = run.program.split_params(load_params(run, init))[1]
  model_sources.check_frozen(frozen, run.workdir, init)
  return state.replace(frozen_params=frozen)


def reference_params(run: EvalRun, state: TrainState) -> Any:
  """Returns the parameters that the reference began with.

  They are loaded again where the devices do not hold them.
  """
  kind = run.config.reference.kind
  if state.ref_params is not None and kind in ("frozen", "adapter_off"):
    return state.reference_params
  has_adapters = run.program.policy.config.lora is not None
  if has_adapters and run.starts_as_reference:
    return lora.without_adapters(state.policy_params)
  return lora.without_adapters(load_params(run, run.reference_init))


def check_first_loss(run: Run, state: TrainState, batch: Batch) -> None:
  """Checks on the first batch that the policy starts as its reference.

  Args:
    run: run; one that reads no reference, or does not start as it, is not
      checked.
    state: first state, on the mesh.
    batch: first training batch, this process's rows.

  Raises:
    StartError: see `start.check_first_batch`.
  """
  program = run.program
  if not (program.objective.needs_reference and run.starts_as_reference):
    return
  sequences = jax.tree.map(
    to_host,
    program.eval_step(
      state.policy_params,
      state.reference_params,
      program.placement.place_rows(batch),
    ),
  )
  loss_state = jax.tree.map(to_host, state.loss_state)
  per_group, _, is_valid = program.measure(sequences, loss_state)
  start.check_first_batch(
    sequences,
    float(per_group.sum() / max(is_valid.sum(), 1)),
    dtype=program.policy.config.compute_dtype,
    is_live=program.has_live_reference,
  )
