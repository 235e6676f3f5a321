"""Links of single responses, with or without a label: f32 [B, 1] -> f32 [B].

The row of a loss in `dpo_jax.losses.catalogue` has its formula and paper.
"""

import jax
import jax.numpy as jnp

from dpo_jax.losses.links.base import Link, group_links
from dpo_jax.losses.links.running import State, init_class_means, update_mean
from dpo_jax.losses.numerics import masked_mean
from dpo_jax.types import Sequences


def is_desirable(sequences: Sequences) -> jax.Array:
  """Returns whether the response in slot 0 scores above 0.5: bool [B]."""
  return sequences.score[:, 0] > 0.5


def negative(rewards: jax.Array, sequences: Sequences) -> jax.Array:
  """Negative reward of the first response; its NLL if that reward is logps."""
  del sequences
  return -rewards[:, 0]


def anchored_unpaired(
  rewards: jax.Array, sequences: Sequences, *, beta: float
) -> jax.Array:
  """Raises a desirable reward above 0 and lowers an undesirable one below.

  With the sigmoid s it is s(-beta r) if desirable, otherwise s(beta r).
  """
  sign = jnp.where(is_desirable(sequences), -1.0, 1.0)
  return jax.nn.sigmoid(sign * beta * rewards[:, 0])


def kahneman_tversky(
  rewards: jax.Array,
  sequences: Sequences,
  *,
  beta: float,
  desirable_weight: float,
  undesirable_weight: float,
) -> jax.Array:
  """Prospect-theoretic loss of a reward, relative to the batch's KL.

  With z = beta r and the sigmoid s it is desirable_weight s(point - z) or
  undesirable_weight s(z - point). The reference point is the mean scaled
  log-ratio of the batch's mismatched prompts and responses, at least 0. No
  gradient flows through it.
  """
  z = beta * rewards[:, 0]
  mismatched = beta * (
    sequences.mismatched_logps - sequences.mismatched_ref_logps
  )
  point = jax.lax.stop_gradient(
    jax.nn.relu(masked_mean(mismatched, sequences.valid[:, 0]))
  )
  return jnp.where(
    is_desirable(sequences),
    desirable_weight * jax.nn.sigmoid(point - z),
    undesirable_weight * jax.nn.sigmoid(z - point),
  )


def binary(
  rewards: jax.Array, sequences: Sequences, state: State, *, beta: float
) -> tuple[jax.Array, State]:
  """Logistic loss of beta times a reward against a running threshold.

  A desirable reward should be above it, any other below. The threshold is
  halfway between the mean rewards of the two labels, each over the steps so far
  that had one, this step included. Until a label was seen, it is the mean of
  the other. No gradient flows through it.

  Returns:
    Loss f32 [B], and the state with this step's means.
  """
  z = beta * rewards[:, 0]
  is_good = is_desirable(sequences)
  is_valid = sequences.valid[:, 0]
  new_state: State = {}
  shift = seen = jnp.zeros(())
  for name, mask in (
    ("desirable", is_valid & is_good),
    ("undesirable", is_valid & ~is_good),
  ):
    batch_mean = masked_mean(jax.lax.stop_gradient(z), mask)
    mean, count = update_mean(
      state[name], state[f"{name}_count"], batch_mean, mask.any()
    )
    new_state |= {name: mean, f"{name}_count": count}
    shift += mean * (count > 0)
    seen += count > 0
  shift = shift / jnp.maximum(seen, 1.0)
  sign = jnp.where(is_good, 1.0, -1.0)
  return -jax.nn.log_sigmoid(sign * (z - shift)), new_state


LINKS: dict[str, Link] = {
  **group_links(negative),
  **group_links(anchored_unpaired, needs_anchor=True),
  **group_links(
    kahneman_tversky,
    is_coupled=True,
    needs_anchor=True,
    needs=("mismatched_logps", "mismatched_ref_logps"),
  ),
  **group_links(
    binary, is_coupled=True, init=init_class_means, needs_anchor=True
  ),
}
