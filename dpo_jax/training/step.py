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
from dpo_jax.types import Batch, TrainState


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
) -> Callable[[TrainState, Batch], tuple[TrainState, Metrics]]:
  """Builds (state, batch) -> (state, metrics).

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

  Returns:
    The step. Metrics are f32 scalars of the global batch, before the update.

  Raises:
    ValueError: a loss that couples the batch, under pmap.
  """
  check_coupling(objective, axis_name)
  batch_loss = BatchLoss(policy, objective, chunk_size)

  def total(tree: Any) -> Any:
    return tree if axis_name is None else jax.lax.psum(tree, axis_name)

  def train_step(state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
    counts = total(count_batch(objective, batch))
    with jax.named_scope("gradient"):
      (loss, (sums, loss_state)), grads = batch_loss.value_and_gradients(
        state, batch, counts, num_parts=accumulation_steps
      )
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
    state = _apply_gradients(state, grads, optimizer, update_reference)
    return state.replace(loss_state=loss_state), metrics

  return train_step


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
