"""Links of rankings, the best response first: f32 [B, K] -> f32 [B].

The row of a loss in `dpo_jax.losses.catalogue` has its formula and paper.
"""

import jax
import jax.numpy as jnp

from dpo_jax.losses.links.base import Link, group_links
from dpo_jax.types import Sequences


def plackett_luce(
  rewards: jax.Array, sequences: Sequences, *, beta: float
) -> jax.Array:
  """Negative log-likelihood of the order under Plackett-Luce: f32 [B].

  It sums over responses -log of exp(z) over the sum of exp(z) of the response
  and of those ranked below it, z = beta * reward. Responses with the same score
  have no order: each competes with those ranked below both. So a tie of two has
  no gradient, K = 2 is the logistic loss, and slots without a response change
  nothing.
  """
  return _ranking_loss(beta * rewards, sequences)


def bradley_terry(
  rewards: jax.Array,
  sequences: Sequences,
  *,
  margin_weight: float,
  center_weight: float,
) -> jax.Array:
  """Ranking loss of rewards with margins, plus a term that centres them.

  The first term is `plackett_luce` at beta 1 of rewards - margin_weight *
  score: two rewards should differ by at least margin_weight times the gap in
  their scores. The second, center_weight * (sum of a group's rewards)^2, keeps
  that sum near 0: only differences enter the first.
  """
  loss = _ranking_loss(rewards - margin_weight * sequences.score, sequences)
  total = jnp.where(sequences.valid, rewards, 0.0).sum(-1)
  return loss + center_weight * jnp.square(total)


def _ranking_loss(z: jax.Array, sequences: Sequences) -> jax.Array:
  valid, score = sequences.valid, sequences.score
  num_slots = z.shape[1]
  below = jnp.triu(jnp.ones((1, num_slots, num_slots), bool), 1)
  differs = score[:, :, None] != score[:, None, :]
  competes = below & differs & valid[:, None, :] & valid[:, :, None]
  competes |= jnp.eye(num_slots, dtype=bool)[None]
  # Differences from the winner's own z keep the exponentials finite.
  gaps = jnp.where(competes, z[:, None, :] - z[:, :, None], -jnp.inf)
  return jnp.where(valid, jax.nn.logsumexp(gaps, axis=-1), 0.0).sum(-1)


LINKS: dict[str, Link] = {
  **group_links(plackett_luce),
  **group_links(bradley_terry, gap_weight="margin_weight"),
}
