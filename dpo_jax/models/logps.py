"""Log-probs of the scored tokens, and their sums over responses.

The vocabulary projection runs on scored positions only, a chunk at a time,
and the backward pass computes a chunk's logits again: [S, V] never exists.
"""

import math
from typing import Any

import jax
import jax.numpy as jnp

from dpo_jax.losses.numerics import log1mexp
from dpo_jax.models import online_softmax, vocabulary_blocks
from dpo_jax.models.decoder import Policy, Readout
from dpo_jax.parallel import active_mesh
from dpo_jax.types import FIELDS, Batch

# Tokens of a response that are added one by one, before these sums are.
_SUMMED_TOGETHER = 64


def chunked_token_logps(
  hidden: jax.Array,
  readout: Readout,
  targets: jax.Array,
  *,
  chunk_size: int,
) -> jax.Array:
  """log softmax(logits(hidden))[target] for every position.

  Args:
    hidden: [R, S, D] states that predict.
    readout: from states to logits.
    targets: i32 [R, S].
    chunk_size: see `chunked_token_figures`.

  Returns:
    f32 [R, S], nats; the log-softmax is float32 whatever the dtype of hidden.
  """
  return chunked_token_figures(
    hidden,
    readout,
    targets,
    chunk_size=chunk_size,
    figures=frozenset({"logps"}),
  )["logps"]


@jax.named_scope("vocabulary")
def chunked_token_figures(
  hidden: jax.Array,
  readout: Readout,
  targets: jax.Array,
  *,
  chunk_size: int,
  figures: frozenset[str],
  ref_hidden: jax.Array | None = None,
  ref_readout: Readout | None = None,
  is_scored: jax.Array | None = None,
) -> dict[str, jax.Array]:
  """Everything that losses ask of the vocabulary, in one pass over it.

  Args:
    hidden: [R, S, D] states that predict.
    readout: from states to logits.
    targets: i32 [R, S].
    chunk_size: positions of a row projected at once, on a block of the
      vocabulary, see `online_softmax.token_statistics`; 0: as suits the device.
    figures: of "logps", log p(target); "ref_logps", the reference's;
      "alignment", log p(target) - log sum_v p(v)^2, without a gradient;
      "complement_logps", log(1 - p(target)); "kl", KL(pi_ref || pi) over the
      vocabulary.
    ref_hidden: as hidden, of the reference, for "ref_logps" and "kl".
    ref_readout: the reference's.
    is_scored: bool [R, S], which positions count; a chunk in which none does
      is passed over, and gives zeros. None: all count.

  Returns:
    Those figures, f32 [R, S] each, nats.
  """
  num_rows, length, _ = hidden.shape
  if not chunk_size:
    rows_a_device = num_rows // active_mesh.num_row_shards(num_rows)
    chunk_size = vocabulary_blocks.tile_sizes().chunk(rows_a_device, length)
  chunk_size = min(chunk_size, length)
  num_chunks = -(-length // chunk_size)
  padding = num_chunks * chunk_size - length

  def in_chunks(x):
    """[R, S, ...] -> [chunks, R, chunk_size, ...]: rows stay whole, since
    they are what the mesh splits."""
    x = jnp.pad(x, ((0, 0), (0, padding)) + ((0, 0),) * (x.ndim - 2))
    shape = (num_rows, num_chunks, chunk_size, *x.shape[2:])
    return x.reshape(shape).swapaxes(0, 1)

  if ref_hidden is not None:
    reference = (in_chunks(ref_hidden), ref_readout)
    reference = jax.lax.stop_gradient(reference)
  else:
    reference = None
  wanted = figures - {"complement_logps"} | {"logps"}
  if is_scored is None:
    is_used = jnp.ones(num_chunks, bool)
  else:
    is_used = in_chunks(is_scored).any((1, 2))
  out = online_softmax.token_statistics(
    in_chunks(hidden),
    readout,
    in_chunks(targets),
    reference,
    is_used,
    wanted,
  )
  out = {
    name: x.swapaxes(0, 1).reshape(num_rows, -1)[:, :length]
    for name, x in out.items()
  }
  if "complement_logps" in figures:
    out["complement_logps"] = log1mexp(out["logps"])
  return {name: out[name] for name in figures}


def sum_by_slot(
  values: jax.Array, slots: jax.Array, group_shape: tuple[int, int]
) -> jax.Array:
  """Sums figures of tokens into figures of responses.

  Args:
    values: f32 [R, S].
    slots: i32 [R, S], g * K + k, or G * K where padded.
    group_shape: (G, K).

  Returns:
    f32 [R, G, K]; 0 for a response without scored tokens.
  """
  num_slots = group_shape[0] * group_shape[1]
  num_parts = -(-values.shape[1] // _SUMMED_TOGETHER)

  def sum_row(values, slots):
    # In two levels, S tokens are rounded 64 + S / 64 times, not S times, at
    # the precision of their sum: 0.004 nats where it is 40,000 nats.
    parts = jnp.arange(len(slots)) // _SUMMED_TOGETHER
    places = parts * (num_slots + 1) + slots
    sums = jax.ops.segment_sum(values, places, num_parts * (num_slots + 1))
    return sums.reshape(num_parts, num_slots + 1).sum(0)[:num_slots]

  sums = jax.vmap(sum_row)(values, slots)
  return sums.reshape(-1, *group_shape)


def spread_by_slot(
  values: jax.Array,
  slots: jax.Array,
  group_shape: tuple[int, int],
  max_tokens: int,
) -> jax.Array:
  """Lays figures of tokens out by response and place in it.

  Args:
    values: [R, S].
    slots: i32 [R, S], g * K + k, or G * K where padded; the tokens of a
      response follow each other.
    group_shape: (G, K).
    max_tokens: M; what a response has beyond is dropped.

  Returns:
    [R, G, K, M], 0 behind a response's end.
  """
  num_slots = group_shape[0] * group_shape[1]

  def spread_row(values, slots):
    index = jnp.arange(len(slots))
    first = jax.ops.segment_min(index, slots, num_slots + 1)
    out = jnp.zeros((num_slots, max_tokens), values.dtype)
    return out.at[slots, index - first[slots]].set(values, mode="drop")

  spread = jax.vmap(spread_row)(values, slots)
  return spread.reshape(-1, *group_shape, max_tokens)


def num_tokens(batch: Batch) -> jax.Array:
  """Scored tokens of every response: f32 [R, G, K]."""
  ones = jnp.ones(batch.slots.shape, jnp.float32)
  return sum_by_slot(ones, batch.slots, batch.valid.shape[1:])


def response_logps(
  policy: Policy, params: Any, batch: Batch, *, chunk_size: int
) -> jax.Array:
  """log pi(y|x) of every response, summed over its scored tokens.

  Args:
    policy: the decoder.
    params: its parameters.
    batch: packed rows.
    chunk_size: see `chunked_token_figures`.

  Returns:
    f32 [R, G, K], nats; 0 where a slot holds no response.
  """
  return response_figures(
    policy, params, None, batch, chunk_size=chunk_size, needs=frozenset()
  )["logps"]


def response_figures(
  policy: Policy,
  params: Any,
  ref_params: Any,
  batch: Batch,
  *,
  chunk_size: int,
  needs: frozenset[str],
  max_tokens: int = 0,
) -> dict[str, jax.Array]:
  """What a loss asks of every response, from one forward pass.

  Args:
    policy: the decoder.
    params: its parameters.
    ref_params: the reference's, or None; no gradient flows into them.
    batch: packed rows.
    chunk_size: see `chunked_token_figures`.
    needs: optional fields of Sequences that are wanted besides `logps`, and
      besides `ref_logps` where there are ref_params.
    max_tokens: M, for the fields of single tokens.

  Returns:
    Fields of Sequences, f32 [R, G, K] each; 0 where a slot has no response.
    Those of single tokens are [R, G, K, M].
  """

  def states(params):
    hidden = policy.hidden_states(
      params,
      batch.tokens,
      batch.positions,
      batch.segments,
      batch.branches,
      groups_per_row=batch.valid.shape[1],
    )
    return hidden, take_positions(hidden, batch.predictors)

  hidden, predicting = states(params)
  # Sorted, so that all hosts trace the same program.
  sums = {n: FIELDS[n] for n in sorted(needs) if FIELDS[n].sums}
  ref_predicting = ref_readout = None
  if ref_params is not None:
    ref_params = jax.lax.stop_gradient(ref_params)
    with jax.named_scope("reference"):
      ref_predicting = states(ref_params)[1]
    ref_readout = policy.readout(ref_params)
    sums["ref_logps"] = FIELDS["ref_logps"]
  else:  # Without a live reference its sums come from a cache, or not at all.
    sums = {k: f for k, f in sums.items() if f.source == "policy"}
  tokens = chunked_token_figures(
    predicting,
    policy.readout(params),
    batch.targets,
    chunk_size=chunk_size,
    figures=frozenset({"logps", *(field.sums for field in sums.values())}),
    ref_hidden=ref_predicting,
    ref_readout=ref_readout,
    is_scored=batch.slots < math.prod(batch.valid.shape[1:]),
  )
  group_shape = batch.valid.shape[1:]
  figures = {"logps": sum_by_slot(tokens["logps"], batch.slots, group_shape)}
  for name, field in sums.items():
    values = tokens[field.sums]
    if field.mask:
      values = jnp.where(batch.token_masks[field.mask], values, 0.0)
    figures[name] = sum_by_slot(values, batch.slots, group_shape)
    if field.is_mean:
      figures[name] /= jnp.maximum(num_tokens(batch), 1.0)
  if "values" in needs:
    places = batch.last_tokens.reshape(batch.last_tokens.shape[0], -1)
    last = take_positions(hidden, places).astype(jnp.float32)
    values = last @ params["value_head"].astype(jnp.float32)
    figures["values"] = values.reshape(batch.valid.shape)
  if "token_logps" in needs:
    figures |= {
      name: spread_by_slot(values, batch.slots, group_shape, max_tokens)
      for name, values in _single_tokens(params, predicting, tokens, needs)
    }
  return figures


def _single_tokens(
  params: Any, predicting: jax.Array, tokens: dict[str, jax.Array], needs: Any
) -> list[tuple[str, jax.Array]]:
  """Fields of Sequences that are not summed: [R, S] each."""
  found = [
    ("token_logps", tokens["logps"]),
    ("token_mask", jnp.ones(tokens["logps"].shape, bool)),
  ]
  if "ref_logps" in tokens:
    found.append(("ref_token_logps", tokens["ref_logps"]))
  if "token_values" in needs:
    # V of the state in which the token is chosen: what has been read then.
    head = params["value_head"].astype(jnp.float32)
    found.append(("token_values", predicting.astype(jnp.float32) @ head))
  return found


def take_positions(hidden: jax.Array, places: jax.Array) -> jax.Array:
  """States at places of each row: [R, T, D], i32 [R, S] -> [R, S, D]."""
  return jnp.take_along_axis(hidden, places[..., None], axis=1)
