"""Forward passes: a batch -> Sequences, by policy and reference."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from dpo_jax.data import mismatched
from dpo_jax.losses import Objective, WeightedSum
from dpo_jax.models import logps as logps_lib
from dpo_jax.models.decoder import Policy
from dpo_jax.types import Batch, Sequences


def flatten_groups(x: jax.Array) -> jax.Array:
  """Flattens rows and groups: [R, G, K, ...] -> [B, K, ...]."""
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
    batch: packed rows. Mismatched log-probs need the slot that
      `mismatched.add_slot` adds.
    chunk_size: see `logps.chunked_token_figures`.
    needs: optional fields of Sequences to fill.
    max_tokens: M, size of the fields of single tokens; 0: that of the batch.

  Returns:
    Sequences with B = R * G.
  """
  fields = logps_lib.response_figures(
    policy,
    params,
    ref_params,
    batch,
    chunk_size=chunk_size,
    needs=needs,
    max_tokens=max_tokens or batch.max_tokens,
  )
  fields |= batch.on_policy
  if batch.ref_logps is not None:
    fields.setdefault("ref_logps", batch.ref_logps)
  fields |= {
    "num_tokens": logps_lib.num_tokens(batch),
    "score": batch.score,
    "valid": batch.valid,
  }
  fields = {name: flatten_groups(x) for name, x in fields.items()}
  if "mismatched_logps" in needs:
    fields = mismatched.take_slot(fields)
  return Sequences(**fields)


def count_batch(
  objective: Objective | WeightedSum, batch: Batch
) -> dict[str, jax.Array]:
  """Counts what the objective divides by: "num_groups" and "total_tokens".

  Both are f32 []. Groups that the loss cannot read do not count.
  """
  valid = flatten_groups(batch.valid)
  num_tokens = flatten_groups(logps_lib.num_tokens(batch))
  return {
    "num_groups": objective.valid_groups(valid).sum().astype(jnp.float32),
    "total_tokens": objective.scored_tokens(num_tokens, valid),
  }


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
