"""One optimizer step and one evaluation step, as pure functions.

The objective is a mean over the global batch. Its denominators are counted
before the forward pass, so that the sum over devices and accumulation steps
is the objective itself: splitting a batch differently changes rounding only.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax

from dpo_jax.data import mismatched
from dpo_jax.losses import Objective, WeightedSum, mean_over_groups
from dpo_jax.models import logps as logps_lib
from dpo_jax.models.decoder import Policy
from dpo_jax.types import Batch, Sequences, TrainState

Metrics = dict[str, jax.Array]


def flatten_groups(x: jax.Array) -> jax.Array:
  """[R, G, K, ...] -> [B, K, ...]."""
  return x.reshape(-1, *x.shape[2:])


def read_sequences(
  policy: Policy,
  params: Any,
  ref_params: Any,
  batch: Batch,
  *,
  chunk_size: int,
  needs: frozenset[str] = frozenset(),
  max_tokens: int = 0,
) -> Sequences:
  """Runs the policy, and the reference if it is on the device.

  Args:
    policy: the decoder.
    params: the policy's parameters.
    ref_params: the reference's, or None.
    batch: packed rows. Where mismatched log-probs are needed, with the slot
      that `mismatched.add_slot` adds.
    chunk_size: see `logps.chunked_token_figures`.
    needs: optional fields of Sequences to fill.
    max_tokens: M of the fields of single tokens; 0: as the batch's.

  Returns:
    Sequences with B = R * G.
  """
  figures = logps_lib.response_figures(
    policy,
    params,
    ref_params,
    batch,
    chunk_size=chunk_size,
    needs=needs,
    max_tokens=max_tokens or batch.max_tokens,
  )
  figures |= batch.on_policy
  if batch.ref_logps is not None:
    figures.setdefault("ref_logps", batch.ref_logps)
  figures |= {
    "num_tokens": logps_lib.num_tokens(batch),
    "score": batch.score,
    "valid": batch.valid,
  }
  figures = {name: flatten_groups(x) for name, x in figures.items()}
  if "mismatched_logps" in needs:
    figures = mismatched.take_slot(figures)
  return Sequences(**figures)


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
    objective: what to minimise.
    optimizer: optax chain.
    schedule: of the learning rate, for the metrics.
    accumulation_steps: parts that a batch's rows are split into, one after
      the other; R must be a multiple. The objective does not change.
    chunk_size: see `logps.chunked_token_figures`.
    axis_name: the axis under `jax.pmap`, else None.
    update_reference: (ref_params, params, step) -> ref_params after a step,
      or None for a reference that stays.

  Returns:
    The step. Metrics are f32 scalars of the global batch, before the update.

  Raises:
    ValueError: a loss that couples the batch, under pmap.
  """
  check_coupling(objective, axis_name)

  def total(tree: Any) -> Any:
    return tree if axis_name is None else jax.lax.psum(tree, axis_name)

  def read(params: Any, state: TrainState, part: Batch) -> Sequences:
    return read_sequences(
      policy,
      state.replace(params=params).policy_params,
      state.reference_params,
      part,
      chunk_size=chunk_size,
      needs=objective.needs,
    )

  def loss_of(
    sequences: Sequences, loss_state: Any, counts: dict[str, jax.Array]
  ) -> tuple[jax.Array, Any]:
    """This part's share of the objective; sums of metrics; loss state."""
    with jax.named_scope("loss"):
      sequences = sequences.replace(**counts)
      per_group, metrics, loss_state = objective.apply(sequences, loss_state)
    sums = {name: sum_and_count(figure) for name, figure in metrics.items()}
    loss = mean_over_groups(per_group, counts["num_groups"])
    return loss, (sums, loss_state)

  def gradient(state: TrainState, batch: Batch, counts: Any) -> Any:
    def loss_fn(params):
      return loss_of(read(params, state, batch), state.loss_state, counts)

    return jax.value_and_grad(loss_fn, has_aux=True)(state.params)

  def accumulated_gradient(state: TrainState, batch: Batch, counts: Any) -> Any:
    return sum_over_parts(
      lambda part: gradient(state, part, counts),
      split_rows(batch, accumulation_steps),
    )

  def coupled_gradient(state: TrainState, batch: Batch, counts: Any) -> Any:
    """In two passes: what the loss sees of all parts, then each part's pull.

    The loss is a function of the whole batch's sequences, which are small. So
    they are gathered first, the loss is differentiated by them, and a second
    pass carries that gradient back into the parameters. One more forward pass
    is the price of an objective that does not depend on the parts.
    """
    parts = split_rows(batch, accumulation_steps)
    sequences = jax.lax.map(lambda p: read(state.params, state, p), parts)
    whole = jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), sequences)
    pulled, held = split_floats(whole)

    def loss_fn(pulled):
      return loss_of(join_floats(pulled, held), state.loss_state, counts)

    (loss, aux), cotangents = jax.value_and_grad(loss_fn, has_aux=True)(pulled)
    cotangents = [
      c.reshape(accumulation_steps, -1, *c.shape[1:]) for c in cotangents
    ]

    def pull(scanned):
      part, part_cotangents = scanned

      def floats(params):
        return split_floats(read(params, state, part))[0]

      return jax.vjp(floats, state.params)[1](part_cotangents)[0]

    return (loss, aux), sum_over_parts(pull, (parts, cotangents))

  if accumulation_steps == 1:
    value_and_grad = gradient
  elif objective.is_coupled:
    value_and_grad = coupled_gradient
  else:
    value_and_grad = accumulated_gradient

  def train_step(state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
    counts = total(count_batch(objective, batch))
    with jax.named_scope("gradient"):
      (loss, (sums, loss_state)), grads = value_and_grad(state, batch, counts)
    loss, sums, grads = total((loss, sums, grads))
    if not objective.is_coupled:
      loss_state = state.loss_state
    with jax.named_scope("optimizer"):
      updates, opt_state = optimizer.update(
        grads, state.opt_state, state.params
      )
      params = optax.apply_updates(state.params, updates)
    metrics = {
      "loss": loss,
      # NaN where no group of the batch has the metric.
      **{k: v / count for k, (v, count) in sums.items()},
      "grad_norm": optax.global_norm(grads),
      "learning_rate": jnp.asarray(schedule(state.step), jnp.float32),
    }
    ref_params = state.ref_params
    if update_reference is not None:
      with jax.named_scope("reference_update"):
        ref_params = update_reference(ref_params, params, state.step + 1)
    new_state = state.replace(
      step=state.step + 1,
      params=params,
      opt_state=opt_state,
      loss_state=loss_state,
      ref_params=ref_params,
    )
    return new_state, metrics

  return train_step


def check_coupling(
  objective: Objective | WeightedSum, axis_name: str | None
) -> None:
  """Raises ValueError for a batch-coupled loss under pmap."""
  if objective.is_coupled and axis_name is not None:
    raise ValueError(
      f"loss {objective.name!r} couples the groups of a batch, and under pmap a"
      " device sees only its own: set parallelism='jit'"
    )


def count_batch(
  objective: Objective | WeightedSum, batch: Batch
) -> dict[str, jax.Array]:
  """Groups and tokens that the objective divides by: f32 [] each."""
  valid = flatten_groups(batch.valid)
  num_tokens = flatten_groups(logps_lib.num_tokens(batch))
  return {
    "num_groups": objective.valid_groups(valid).sum().astype(jnp.float32),
    "total_tokens": objective.scored_tokens(num_tokens, valid),
  }


def sum_and_count(figure: jax.Array) -> tuple[jax.Array, jax.Array]:
  """Sum and number of the groups that have a figure: NaN is none."""
  is_counted = ~jnp.isnan(figure)
  return (
    jnp.where(is_counted, figure, 0.0).sum(),
    is_counted.sum().astype(jnp.float32),
  )


def sum_over_parts(function: Callable[[Any], Any], parts: Any) -> Any:
  """The sum of function(part) over the leading axis, one part at a time."""
  first = jax.tree.map(lambda x: x[0], parts)
  shapes = jax.eval_shape(function, first)
  zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)

  def add(sums, part):
    return jax.tree.map(jnp.add, sums, function(part)), None

  return jax.lax.scan(add, zeros, parts)[0]


def split_floats(tree: Any) -> tuple[list[jax.Array], Any]:
  """The leaves that a gradient can flow through, and the rest."""
  leaves, structure = jax.tree.flatten(tree)
  is_float = [jnp.issubdtype(x.dtype, jnp.floating) for x in leaves]
  pulled = [x for x, f in zip(leaves, is_float, strict=True) if f]
  others = [None if f else x for x, f in zip(leaves, is_float, strict=True)]
  return pulled, (others, structure)


def join_floats(pulled: list[jax.Array], rest: Any) -> Any:
  """Undoes `split_floats`."""
  others, structure = rest
  floats = iter(pulled)
  leaves = [next(floats) if x is None else x for x in others]
  return jax.tree.unflatten(structure, leaves)


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
  policy: Policy, *, chunk_size: int, needs: frozenset[str]
) -> Callable[[Any, Any, Batch], Sequences]:
  """Builds (params, ref_params, batch) -> sequences, forward only.

  Args:
    policy: the decoder.
    chunk_size: see `logps.chunked_token_figures`.
    needs: optional fields of Sequences to fill.
  """

  def eval_step(params: Any, ref_params: Any, batch: Batch) -> Sequences:
    return read_sequences(
      policy, params, ref_params, batch, chunk_size=chunk_size, needs=needs
    )

  return eval_step


def make_measure(
  objective: Objective | WeightedSum, others: Sequence[Objective] = ()
) -> Callable[[Sequences, Any], tuple[jax.Array, Metrics, jax.Array]]:
  """Compiles what losses make of sequences.

  Args:
    objective: what is trained.
    others: losses to measure from the same sequences.

  Returns:
    (sequences, loss_state) -> (loss f32 [B], metrics f32 [B] each, bool [B]
    groups that the objective can read). The sequences are a whole evaluation
    set, so that a loss that depends on the batch sees all of it.
  """

  @jax.jit
  def measure_all(sequences, loss_state):
    per_group, metrics, _ = objective.apply(sequences, loss_state)
    for other in others:
      metrics |= measure(other, sequences)
    is_valid = objective.valid_groups(sequences.valid)
    return per_group, metrics, is_valid

  return measure_all


def measure(objective: Objective, sequences: Sequences) -> Metrics:
  """What a loss would make of these sequences, f32 [B] each.

  Returns:
    `NAME/loss`; `NAME/margin` of a loss with one; and `NAME/gradient_weight`,
    the size of its pull on the first response: on the log-prob of a token that
    every sum it reads contains, or on the value of a reward model.
  """
  sums = {
    name: getattr(sequences, name)
    for name in ("logps", "head_logps", "sampled_logps", "values")
    if getattr(sequences, name) is not None
  }

  def total(sums):
    per_group, metrics, _ = objective.apply(
      sequences.replace(**sums), objective.init()
    )
    return per_group.sum(), (per_group, metrics)

  pulls, (per_group, metrics) = jax.grad(total, has_aux=True)(sums)
  pull = sum(pulls.values())
  is_valid = objective.valid_groups(sequences.valid)
  figures = {
    "loss": per_group,
    "gradient_weight": jnp.abs(pull[:, 0]),
  }
  figures = {
    name: jnp.where(is_valid, figure, jnp.nan)
    for name, figure in figures.items()
  }
  if "reward/margin" in metrics:
    figures["margin"] = metrics["reward/margin"]
  return {f"{objective.name}/{name}": x for name, x in figures.items()}
