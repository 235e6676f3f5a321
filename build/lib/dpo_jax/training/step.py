"""One optimizer step, as a pure function."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from dpo_jax.losses import Objective, WeightedSum
from dpo_jax.models.decoder import Policy
from dpo_jax.training.forward import count_batch
from dpo_jax.training.gradients import BatchLoss, Metrics
from dpo_jax.training.spikes import SpikeRule
from dpo_jax.types import Batch, Sequences, TrainState

# Largest absolute log-ratio of a response in a batch, nats.
LARGEST_LOG_RATIO = "log_ratio/largest"
# What a loss is computed from: sequences, and the loss state before the step.
LossInputs = tuple[Sequences, Any]


def make_train_step(
  policy: Policy,
  objective: Objective | WeightedSum,
  optimizer: optax.GradientTransformation,
  schedule: optax.Schedule,
  *,
  accumulation_steps: int,
  chunk_size: int,
  axis_name: str | None,
  update_reference: Callable[[Any, Any, jax.Array], Any] | None = None,
  skip_spikes: SpikeRule | None = None,
) -> Callable[[TrainState, Batch], tuple[TrainState, Metrics, LossInputs]]:
  """Builds (state, batch) -> (state, metrics, loss inputs).

  Args:
    policy: the decoder.
    objective: loss to minimise.
    optimizer: optax chain.
    schedule: learning rate by step, for the metrics.
    accumulation_steps: microbatches that a batch's rows are split into; R must
      be a multiple. The objective does not change.
    chunk_size: see `logps.chunked_token_figures`.
    axis_name: mapped axis of `jax.pmap`, or None.
    update_reference: (ref_params, params, step) -> ref_params after a step;
      None for a reference that does not change.
    skip_spikes: rule by which a step is skipped; None skips none.

  Returns:
    The step. Metrics are f32 scalars of the global batch, before the update.
    The loss inputs explain a loss that is not finite, and are not fetched
    otherwise; under pmap they are those of each device.

  Raises:
    ValueError: a loss that couples the batch, under pmap.
  """
  check_coupling(objective, axis_name)
  batch_loss = BatchLoss(policy, objective, chunk_size)

  def total(tree: Any) -> Any:
    return tree if axis_name is None else jax.lax.psum(tree, axis_name)

  def train_step(
    state: TrainState, batch: Batch
  ) -> tuple[TrainState, Metrics, LossInputs]:
    counts = total(count_batch(objective, batch))
    with jax.named_scope("gradient"):
      found, sequences = batch_loss.value_and_gradients(
        state, batch, counts, num_parts=accumulation_steps
      )
    (loss, (sums, loss_state)), grads = found
    loss, sums, grads = total((loss, sums, grads))
    if not objective.is_coupled:
      loss_state = state.loss_state
    metrics = {
      "loss": loss,
      # NaN where no group of the batch has the metric.
      **{name: value / count for name, (value, count) in sums.items()},
      "grad_norm": optax.global_norm(grads),
      "learning_rate": jnp.asarray(schedule(state.step), jnp.float32),
    }
    if sequences.ref_logps is not None:
      largest = _largest_log_ratio(sequences)
      if axis_name is not None:
        largest = jax.lax.pmax(largest, axis_name)
      metrics[LARGEST_LOG_RATIO] = largest
    after = _apply_gradients(state, grads, optimizer, update_reference)
    after = after.replace(loss_state=loss_state)
    if skip_spikes is not None:
      metrics["learning_rate"] = jnp.asarray(
        schedule(state.step - state.spikes.skipped_steps), jnp.float32
      )
      after, counted = skip_spikes.choose(state, after, metrics["grad_norm"])
      metrics |= counted
    return after, metrics, (sequences, state.loss_state)

  return train_step


def _largest_log_ratio(sequences: Sequences) -> jax.Array:
  log_ratios = jnp.abs(sequences.logps - sequences.ref_logps)
  return jnp.where(sequences.valid, log_ratios, 0.0).max()


def _apply_gradients(
  state: TrainState,
  grads: Any,
  optimizer: optax.GradientTransformation,
  update_reference: Callable[[Any, Any, jax.Array], Any] | None,
) -> TrainState:
  """Updates the parameters, then the reference where it follows them."""
  with jax.named_scope("optimizer"):
    updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
    params = optax.apply_updates(state.params, updates)
  ref_params = state.ref_params
  if update_reference is not None:
    with jax.named_scope("reference_update"):
      ref_params = update_reference(ref_params, params, state.step + 1)
  return state.replace(
    step=state.step + 1,
    params=params,
    opt_state=opt_state,
    ref_params=ref_params,
  )


def check_coupling(
  objective: Objective | WeightedSum, axis_name: str | None
) -> None:
  """Raises ValueError for a batch-coupled loss under pmap."""
  if objective.is_coupled and axis_name is not None:
    raise ValueError(
      f"loss {objective.name!r} couples the groups of a batch, and under pmap a"
      " device sees only its own: set parallelism='jit'"
    )
