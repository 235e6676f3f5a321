"""Mismatched responses: how KTO estimates its KL.

Ethayarajh et al. 2024 (arXiv:2402.01306), sec. 4.1. Another group's response
rides along as the last slot of every group: `add_slot` puts it into the store,
and `take_slot` turns its log-probs into fields of Sequences.
"""

import dataclasses

import jax
import numpy as np

from dpo_jax.data.store import Store


def add_slot(store: Store, *, seed: int, max_tokens: int) -> Store:
  """Adds a slot with the first response of another group.

  A permutation drawn once from `seed` says which group, so log-probs of the
  reference can be cached. The slot's score is 0.

  Args:
    store: N groups of K responses.
    seed: seed of the draw.
    max_tokens: tokens of prompt and mismatched response together. A longer
      response is cut at its end, where all its scored tokens may be.

  Returns:
    Groups of K + 1 responses, the last one mismatched.

  Raises:
    ValueError: fewer than two groups with a response in slot 0.
  """
  # A group without a response, such as the half of a pair that is none, has
  # nothing to give: its log-ratio of 0 would bias the estimate.
  present = np.flatnonzero(store.lengths[:, 1] > 0)
  if len(present) < 2:
    raise ValueError("mismatched responses need at least two groups")
  # Along one cycle through all groups none meets itself.
  cycle = present[np.random.default_rng(seed).permutation(len(present))]
  other = np.full(len(store), cycle[0], np.int64)
  other[cycle] = np.roll(cycle, 1)
  suffix = "" if len(present) == len(store) else "_present"
  room = max_tokens - store.lengths[:, :1]
  lengths = np.minimum(store.lengths[other, 1:2], room)
  return dataclasses.replace(
    store,
    starts=np.concatenate([store.starts, store.starts[other, 1:2]], 1),
    lengths=np.concatenate([store.lengths, lengths], 1),
    score=np.pad(store.score, ((0, 0), (0, 1))),
    digest=f"{store.digest}/mismatched_{seed}_{max_tokens}{suffix}",
  )


def take_slot(fields: dict[str, jax.Array]) -> dict[str, jax.Array]:
  """Moves the log-probs of the last slot into fields of their own.

  Args:
    fields: fields of Sequences, [B, K + 1] each, including `logps` and
      `ref_logps`.

  Returns:
    All fields without the last slot, [B, K]; and `mismatched_logps` and
    `mismatched_ref_logps`, f32 [B], of that slot.
  """
  rest = {name: x[:, :-1] for name, x in fields.items()}
  return rest | {
    "mismatched_logps": fields["logps"][:, -1],
    "mismatched_ref_logps": fields["ref_logps"][:, -1],
  }
