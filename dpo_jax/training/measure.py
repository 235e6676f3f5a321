"""Losses and their gradient weights on held-out sequences."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from dpo_jax.losses import Objective, WeightedSum
from dpo_jax.training.gradients import Metrics
from dpo_jax.types import Sequences


def make_measure(
  objective: Objective | WeightedSum, others: Sequence[Objective] = ()
) -> Callable[[Sequences, Any], tuple[jax.Array, Metrics, jax.Array]]:
  """Compiles the measurement of losses on sequences.

  Args:
    objective: loss that is trained.
    others: losses to measure on the same sequences.

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
  """Measures a loss on sequences: f32 [B] each, NaN for groups it cannot read.

  A loss with a state is measured in its first one.

  Returns:
    `NAME/loss`; `NAME/margin` of a loss with one; and `NAME/gradient_weight`,
    the size of its gradient for the first response: for the log-prob of a token
    that every sum it reads contains, or for the value of a reward model.
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

  gradients, (per_group, metrics) = jax.grad(total, has_aux=True)(sums)
  gradient = sum(gradients.values())
  is_valid = objective.valid_groups(sequences.valid)
  columns = {
    "loss": per_group,
    "gradient_weight": jnp.abs(gradient[:, 0]),
  }
  columns = {
    name: jnp.where(is_valid, values, jnp.nan)
    for name, values in columns.items()
  }
  if "reward/margin" in metrics:
    columns["margin"] = metrics["reward/margin"]
  return {f"{objective.name}/{name}": x for name, x in columns.items()}
