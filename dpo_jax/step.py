"""One optimizer step and one evaluation step, as pure functions.

The objective is a mean over the global batch. Its denominators are counted
before the forward pass, so that the sum over devices and accumulation steps
is the objective itself: splitting a batch differently changes rounding only.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from dpo_jax.losses import Objective
from dpo_jax.models import logps as logps_lib
from dpo_jax.models.decoder import Policy
from dpo_jax.types import Batch, Sequences, TrainState

Metrics = dict[str, jax.Array]


def flatten_groups(x: jax.Array) -> jax.Array:
  """[R, G, K] -> [B, K]."""
  return x.reshape(-1, x.shape[-1])


def read_sequences(
  policy: Policy,
  params: Any,
  ref_params: Any,
  batch: Batch,
  *,
  chunk_size: int,
) -> Sequences:
  """Runs the policy, and the reference if it is on the device.

  Args:
    policy: the decoder.
    params: the policy's parameters.
    ref_params: the reference's, or None.
    batch: packed rows.
    chunk_size: see `logps.chunked_token_logps`.

  Returns:
    Sequences with B = R * G.
  """
  logps = logps_lib.response_logps(policy, params, batch, chunk_size=chunk_size)
  ref_logps = batch.ref_logps
  if ref_params is not None:
    ref_logps = logps_lib.response_logps(
      policy, jax.lax.stop_gradient(ref_params), batch, chunk_size=chunk_size
    )
  return Sequences(
    logps=flatten_groups(logps),
    num_tokens=flatten_groups(logps_lib.num_tokens(batch)),
    score=flatten_groups(batch.score),
    valid=flatten_groups(batch.valid),
    ref_logps=None if ref_logps is None else flatten_groups(ref_logps),
  )


def make_train_step(
  policy: Policy,
  objective: Objective,
  optimizer: optax.GradientTransformation,
  schedule: optax.Schedule,
  *,
  accumulation_steps: int,
  chunk_size: int,
  axis_name: str | None,
) -> Callable[[TrainState, Batch], tuple[TrainState, Metrics]]:
  """Builds (state, batch) -> (state, metrics).

  Args:
    policy: the decoder.
    objective: what to minimise.
    optimizer: optax chain.
    schedule: of the learning rate, for the metrics.
    accumulation_steps: parts that a batch's rows are split into, one after
      the other; R must be a multiple. The objective does not change.
    chunk_size: see `logps.chunked_token_logps`.
    axis_name: the axis under `jax.pmap`, else None.

  Returns:
    The step. Metrics are f32 scalars of the global batch, before the update.
  """

  def total(x: jax.Array) -> jax.Array:
    return x if axis_name is None else jax.lax.psum(x, axis_name)

  def step(state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
    valid = flatten_groups(batch.valid)
    counted = Sequences(
      logps=jnp.zeros(valid.shape),
      num_tokens=flatten_groups(logps_lib.num_tokens(batch)),
      score=flatten_groups(batch.score),
      valid=valid,
    )
    num_groups = total(objective.valid_groups(valid).sum().astype(jnp.float32))
    total_tokens = total(objective.scored_tokens(counted))
    denominator = jnp.maximum(num_groups, 1.0)

    def loss_fn(params: Any, part: Batch) -> tuple[jax.Array, Any]:
      sequences = read_sequences(
        policy, params, state.ref_params, part, chunk_size=chunk_size
      ).replace(num_groups=num_groups, total_tokens=total_tokens)
      per_group, metrics, loss_state = objective.apply(
        sequences, state.loss_state
      )
      is_valid = objective.valid_groups(sequences.valid)
      sums = {
        name: jnp.where(is_valid, figure, 0.0).sum() / denominator
        for name, figure in metrics.items()
      }
      return per_group.sum() / denominator, (sums, loss_state)

    grad_fn = jax.value_and_grad(loss_fn, has_aux=True)
    if accumulation_steps == 1:
      (loss, (metrics, loss_state)), grads = grad_fn(state.params, batch)
    else:
      parts = split_rows(batch, accumulation_steps)
      shapes = jax.eval_shape(
        grad_fn, state.params, jax.tree.map(lambda x: x[0], parts)
      )
      zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)

      def add(sums, part):
        return jax.tree.map(jnp.add, sums, grad_fn(state.params, part)), None

      ((loss, (metrics, loss_state)), grads), _ = jax.lax.scan(
        add, zeros, parts
      )
    loss, metrics, grads = total((loss, metrics, grads))
    updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
    metrics = {
      "loss": loss,
      **metrics,
      "grad_norm": optax.global_norm(grads),
      "learning_rate": jnp.asarray(schedule(state.step), jnp.float32),
    }
    new_state = state.replace(
      step=state.step + 1,
      params=optax.apply_updates(state.params, updates),
      opt_state=opt_state,
      loss_state=loss_state,
    )
    return new_state, metrics

  return step


def split_rows(batch: Batch, num_parts: int) -> Batch:
  """[R, ...] -> [num_parts, R / num_parts, ...].

  Row r goes to part r % num_parts, so that a device's block of rows gives an
  equal share to every part and no row moves between devices.
  """

  def split(x: jax.Array) -> jax.Array:
    x = x.reshape(x.shape[0] // num_parts, num_parts, *x.shape[1:])
    return jnp.moveaxis(x, 1, 0)

  return jax.tree.map(split, batch)


def make_eval_step(
  policy: Policy, objective: Objective, *, chunk_size: int
) -> Callable[..., tuple[Sequences, jax.Array, Metrics]]:
  """Builds the evaluation step.

  Returns:
    (params, ref_params, loss_state, batch, num_groups, total_tokens) ->
    (sequences, per-group loss f32 [B], per-group metrics f32 [B]).
    `num_groups` and `total_tokens` count the whole evaluation set, so that
    the sum of all losses divided by `num_groups` is exact however the set is
    cut into batches.
  """

  def step(
    params: Any,
    ref_params: Any,
    loss_state: Any,
    batch: Batch,
    num_groups: jax.Array,
    total_tokens: jax.Array,
  ) -> tuple[Sequences, jax.Array, Metrics]:
    sequences = read_sequences(
      policy, params, ref_params, batch, chunk_size=chunk_size
    ).replace(num_groups=num_groups, total_tokens=total_tokens)
    per_group, metrics, _ = objective.apply(sequences, loss_state)
    return sequences, per_group, metrics

  return step
