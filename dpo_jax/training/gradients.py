"""Gradients of the objective: a whole batch, microbatches, coupled losses.

The objective is a mean over the global batch. Its denominators are counted
before the forward pass, so the sum over devices and microbatches is the
objective itself: splitting a batch differently changes rounding only.
"""

from collections.abc import Callable
import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from dpo_jax.losses import Objective, WeightedSum, mean_over_groups
from dpo_jax.models.decoder import Policy
from dpo_jax.training.forward import read_sequences
from dpo_jax.types import Batch, Sequences, TrainState

Metrics = dict[str, jax.Array]

# (loss, (sums and counts of metrics, loss state)), and gradients of the
# parameters that are trained.
ValueAndGradients = tuple[tuple[jax.Array, Any], Any]
# And the sequences that the loss read.
_Found = tuple[ValueAndGradients, Sequences]


@dataclasses.dataclass(frozen=True)
class BatchLoss:
  """The objective as a function of the trained parameters and a batch.

  Attributes:
    policy: decoder.
    objective: loss to minimise.
    chunk_size: see `logps.chunked_token_figures`.
  """

  policy: Policy
  objective: Objective | WeightedSum
  chunk_size: int

  def read(self, params: Any, state: TrainState, batch: Batch) -> Sequences:
    """Runs the forward pass with other trained parameters than the state's."""
    return read_sequences(
      self.policy,
      state.replace(params=params).policy_params,
      state.reference_params,
      batch,
      chunk_size=self.chunk_size,
      needs=self.objective.needs,
    )

  def apply(
    self, sequences: Sequences, loss_state: Any, counts: dict[str, jax.Array]
  ) -> tuple[jax.Array, Any]:
    """Computes these sequences' share of the objective.

    Args:
      sequences: sequences of a batch or a microbatch.
      loss_state: state of the objective.
      counts: `forward.count_batch` of the global batch.

    Returns:
      f32 [], and (sum and count of each metric, new loss state).
    """
    with jax.named_scope("loss"):
      sequences = sequences.replace(**counts)
      per_group, metrics, loss_state = self.objective.apply(
        sequences, loss_state
      )
    sums = {name: sum_and_count(values) for name, values in metrics.items()}
    loss = mean_over_groups(per_group, counts["num_groups"])
    return loss, (sums, loss_state)

  def value_and_gradients(
    self,
    state: TrainState,
    batch: Batch,
    counts: dict[str, jax.Array],
    *,
    num_parts: int,
  ) -> _Found:
    """Computes the loss and its gradients, `num_parts` microbatches in turn.

    Returns:
      The loss and its gradients, and the sequences in the order of the batch.
    """
    if num_parts == 1:
      return self._of_batch(state, batch, counts)
    parts = split_rows(batch, num_parts)
    if self.objective.is_coupled:
      found, sequences = self._of_coupled_parts(state, parts, counts)
    else:
      found, sequences = sum_over_parts(
        lambda part: self._of_batch(state, part, counts), parts
      )
    return found, join_groups(sequences, batch.valid.shape[1])

  def _of_batch(
    self, state: TrainState, batch: Batch, counts: dict[str, jax.Array]
  ) -> _Found:
    def loss_fn(params):
      sequences = self.read(params, state, batch)
      loss, aux = self.apply(sequences, state.loss_state, counts)
      return loss, (aux, sequences)

    (loss, (aux, sequences)), grads = jax.value_and_grad(loss_fn, has_aux=True)(
      state.params
    )
    return ((loss, aux), grads), sequences

  def _of_coupled_parts(
    self, state: TrainState, parts: Batch, counts: dict[str, jax.Array]
  ) -> _Found:
    """Computes the gradients of a loss that couples all groups of a batch.

    Two passes: the first reads the sequences of all microbatches, which are
    small. The loss is differentiated with respect to them, and the second
    pass backpropagates that gradient through each microbatch. It costs one
    more forward pass, and the objective does not depend on the microbatches.

    Args:
      state: state before the step.
      parts: microbatches, [num_parts, R / num_parts, ...].
      counts: `forward.count_batch` of the global batch.

    Returns:
      The loss and its gradients; and the sequences, [num_parts, ...].
    """
    sequences = jax.lax.map(lambda p: self.read(state.params, state, p), parts)
    num_parts = jax.tree.leaves(parts)[0].shape[0]
    whole = jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), sequences)
    floats, others = split_floats(whole)

    def loss_fn(floats):
      joined = join_floats(floats, others)
      return self.apply(joined, state.loss_state, counts)

    (loss, aux), cotangents = jax.value_and_grad(loss_fn, has_aux=True)(floats)
    cotangents = [c.reshape(num_parts, -1, *c.shape[1:]) for c in cotangents]

    def backpropagate(scanned):
      part, part_cotangents = scanned

      def floats_of(params):
        return split_floats(self.read(params, state, part))[0]

      return jax.vjp(floats_of, state.params)[1](part_cotangents)[0], ()

    grads, _ = sum_over_parts(backpropagate, (parts, cotangents))
    return ((loss, aux), grads), sequences


def sum_and_count(values: jax.Array) -> tuple[jax.Array, jax.Array]:
  """Returns the sum of a metric, and the number of groups that have it.

  Both are f32 []. NaN marks the groups that do not have it.
  """
  is_counted = ~jnp.isnan(values)
  return (
    jnp.where(is_counted, values, 0.0).sum(),
    is_counted.sum().astype(jnp.float32),
  )


def sum_over_parts(
  function: Callable[[Any], tuple[Any, Any]], parts: Any
) -> tuple[Any, Any]:
  """Calls a function for each entry of the leading axis, one at a time.

  Args:
    function: part -> (what is summed, what is kept).
    parts: tree of arrays, [num_parts, ...].

  Returns:
    The sums, and what is kept, stacked: [num_parts, ...].
  """
  first = jax.tree.map(lambda x: x[0], parts)
  shapes, _ = jax.eval_shape(function, first)
  zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)

  def add(sums, part):
    terms, kept = function(part)
    return jax.tree.map(jnp.add, sums, terms), kept

  return jax.lax.scan(add, zeros, parts)


def split_floats(tree: Any) -> tuple[list[jax.Array], Any]:
  """Splits a tree into its floating-point leaves, and the rest.

  Returns:
    The leaves, which have gradients; and the rest, for `join_floats`.
  """
  leaves, structure = jax.tree.flatten(tree)
  is_float = [jnp.issubdtype(x.dtype, jnp.floating) for x in leaves]
  floats = [x for x, f in zip(leaves, is_float, strict=True) if f]
  others = [None if f else x for x, f in zip(leaves, is_float, strict=True)]
  return floats, (others, structure)


def join_floats(floats: list[jax.Array], rest: Any) -> Any:
  """Undoes `split_floats`."""
  others, structure = rest
  remaining = iter(floats)
  leaves = [next(remaining) if x is None else x for x in others]
  return jax.tree.unflatten(structure, leaves)


def split_rows(batch: Batch, num_parts: int) -> Batch:
  """Splits rows into microbatches: [R, ...] -> [num_parts, R / num_parts, ...].

  Row r goes to part r % num_parts. So each device's block of rows gives every
  part an equal share, and no row moves between devices.
  """

  def split(x: jax.Array) -> jax.Array:
    x = x.reshape(x.shape[0] // num_parts, num_parts, *x.shape[1:])
    return jnp.moveaxis(x, 1, 0)

  return jax.tree.map(split, batch)


def join_groups(parts: Any, num_groups: int) -> Any:
  """Joins arrays of the groups of microbatches, in the order of the batch.

  Args:
    parts: tree of arrays, [num_parts, R / num_parts * G, ...].
    num_groups: G, groups of a row.

  Returns:
    [R * G, ...], the rows as they were before `split_rows`.
  """

  def join(x: jax.Array) -> jax.Array:
    x = x.reshape(x.shape[0], -1, num_groups, *x.shape[2:])
    return x.swapaxes(0, 1).reshape(-1, *x.shape[3:])

  return jax.tree.map(join, parts)
