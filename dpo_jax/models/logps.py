"""Log-probs of the scored tokens, and their sums over responses.

The vocabulary projection runs on scored positions only, a chunk at a time. The
backward pass recomputes the logits of a chunk, so [S, V] never exists.
"""

import functools
import math

import jax
import jax.numpy as jnp

from dpo_jax.losses.numerics import log1mexp
from dpo_jax.models import online_softmax, vocabulary_blocks
from dpo_jax.models.decoder import Policy, Readout
from dpo_jax.parallel import active_mesh
from dpo_jax.trees import Params
from dpo_jax.types import FIELDS, Batch, Field

# Consecutive tokens that are summed first; then these partial sums are summed.
_TOKENS_PER_SUM = 64


def chunked_token_logps(
  hidden: jax.Array,
  readout: Readout,
  targets: jax.Array,
  *,
  chunk_size: int,
) -> jax.Array:
  """Computes log softmax(logits(hidden))[target] at every position.

  Args:
    hidden: [R, S, D] states that predict.
    readout: projection of states to logits.
    targets: i32 [R, S].
    chunk_size: see `chunked_token_figures`.

  Returns:
    f32 [R, S], nats; the log-softmax is float32 for any dtype of hidden.
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
  """Computes statistics of the scored tokens in one pass over the vocabulary.

  Args:
    hidden: [R, S, D] states that predict.
    readout: projection of states to logits.
    targets: i32 [R, S].
    chunk_size: positions of a row projected at once onto a block of the
      vocabulary, see `online_softmax`; 0 chooses it by the device.
    figures: names of the statistics: "logps", log p(target); "ref_logps", the
      reference's; "alignment", log p(target) - log sum_v p(v)^2, without a
      gradient; "complement_logps", log(1 - p(target)), at least -13.8; "kl",
      KL(pi_ref || pi) over the vocabulary.
    ref_hidden: as hidden, of the reference, for "ref_logps" and "kl".
    ref_readout: projection of the reference.
    is_scored: bool [R, S], positions that count; the values of others have no
      meaning, as chunks without one are skipped. None: all count.

  Returns:
    Those statistics by name, f32 [R, S] each, nats.
  """
  num_rows, length, _ = hidden.shape
  if not chunk_size:
    rows_per_device = num_rows // active_mesh.num_row_shards(num_rows)
    chunk_size = vocabulary_blocks.tile_sizes().chunk(rows_per_device, length)
  split = functools.partial(_in_chunks, chunk_size=min(chunk_size, length))
  reference = None
  if ref_hidden is not None:
    reference = jax.lax.stop_gradient((split(ref_hidden), ref_readout))
  targets = split(targets)
  if is_scored is None:
    is_used = jnp.ones(len(targets), bool)
  else:
    is_used = split(is_scored).any((1, 2))
  out = online_softmax.token_statistics(
    split(hidden),
    readout,
    targets,
    reference,
    is_used,
    figures - {"complement_logps"} | {"logps"},
  )
  out = {
    name: x.swapaxes(0, 1).reshape(num_rows, -1)[:, :length]
    for name, x in out.items()
  }
  if "complement_logps" in figures:
    out["complement_logps"] = log1mexp(out["logps"])
  return {name: out[name] for name in figures}


def _in_chunks(x: jax.Array, *, chunk_size: int) -> jax.Array:
  """Splits rows into chunks: [R, S, ...] -> [chunks, R, chunk_size, ...].

  Every chunk has all rows, since the mesh shards rows. The last one is padded
  by zeros.
  """
  num_rows, length = x.shape[:2]
  num_chunks = -(-length // chunk_size)
  padding = num_chunks * chunk_size - length
  x = jnp.pad(x, ((0, 0), (0, padding)) + ((0, 0),) * (x.ndim - 2))
  shape = (num_rows, num_chunks, chunk_size, *x.shape[2:])
  return x.reshape(shape).swapaxes(0, 1)


def sum_by_slot(
  values: jax.Array, slots: jax.Array, group_shape: tuple[int, int]
) -> jax.Array:
  """Sums values of tokens over responses.

  Args:
    values: f32 [R, S].
    slots: i32 [R, S], g * K + k, or G * K where padded.
    group_shape: (G, K).

  Returns:
    f32 [R, G, K]; 0 for a response without scored tokens.
  """
  num_slots = group_shape[0] * group_shape[1]
  num_parts = -(-values.shape[1] // _TOKENS_PER_SUM)

  def sum_row(values, slots):
    # In two levels, the sum of S tokens is rounded 64 + S / 64 times, not S
    # times, each time to the precision of the sum: 0.004 nats at 40,000 nats.
    parts = jnp.arange(len(slots)) // _TOKENS_PER_SUM
    segments = parts * (num_slots + 1) + slots
    sums = jax.ops.segment_sum(values, segments, num_parts * (num_slots + 1))
    return sums.reshape(num_parts, num_slots + 1).sum(0)[:num_slots]

  sums = jax.vmap(sum_row)(values, slots)
  return sums.reshape(-1, *group_shape)


def spread_by_slot(
  values: jax.Array,
  slots: jax.Array,
  group_shape: tuple[int, int],
  max_tokens: int,
) -> jax.Array:
  """Arranges values of tokens by response and index in the response.

  Args:
    values: [R, S].
    slots: i32 [R, S], g * K + k, or G * K where padded; the tokens of a
      response are consecutive.
    group_shape: (G, K).
    max_tokens: M; later tokens of a response are dropped.

  Returns:
    [R, G, K, M], 0 after a response's end.
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
  """Counts the scored tokens of every response: f32 [R, G, K]."""
  ones = jnp.ones(batch.slots.shape, jnp.float32)
  return sum_by_slot(ones, batch.slots, batch.valid.shape[1:])


def response_logps(
  policy: Policy, params: Params, batch: Batch, *, chunk_size: int
) -> jax.Array:
  """Computes log pi(y|x) of every response, summed over its scored tokens.

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
  params: Params,
  ref_params: Params | None,
  batch: Batch,
  *,
  chunk_size: int,
  needs: frozenset[str],
  max_tokens: int = 0,
) -> dict[str, jax.Array]:
  """Computes the fields of Sequences that a loss reads, in one forward pass.

  Args:
    policy: the decoder.
    params: its parameters.
    ref_params: parameters of the reference, which get no gradient, or None.
    batch: packed rows.
    chunk_size: see `chunked_token_figures`.
    needs: optional fields of Sequences to compute. `logps` is always computed,
      and `ref_logps` if there are ref_params; without them no field of the
      reference is. Those of single tokens are only with `token_logps`. Fields
      that need more than a forward pass, such as `advantages`, are left out.
    max_tokens: M, for the fields of single tokens.

  Returns:
    Fields of Sequences, f32 [R, G, K] each; 0 where a slot has no response,
    except in `values`. Those of single tokens are [R, G, K, M], `token_mask`
    bool.
  """
  hidden, predicting = _hidden_states(policy, params, batch)
  # Sorted, so that all hosts trace the same program.
  sums = {name: FIELDS[name] for name in sorted(needs) if FIELDS[name].sums}
  ref_predicting = ref_readout = None
  if ref_params is not None:
    ref_params = jax.lax.stop_gradient(ref_params)
    with jax.named_scope("reference"):
      _, ref_predicting = _hidden_states(policy, ref_params, batch)
    ref_readout = policy.readout(ref_params)
    sums["ref_logps"] = FIELDS["ref_logps"]
  else:  # The reference's sums come from a cache, or are not needed.
    sums = {k: f for k, f in sums.items() if f.source == "policy"}
  group_shape = batch.valid.shape[1:]
  tokens = chunked_token_figures(
    predicting,
    policy.readout(params),
    batch.targets,
    chunk_size=chunk_size,
    figures=frozenset({"logps", *(field.sums for field in sums.values())}),
    ref_hidden=ref_predicting,
    ref_readout=ref_readout,
    is_scored=batch.slots < math.prod(group_shape),
  )
  figures = {"logps": sum_by_slot(tokens["logps"], batch.slots, group_shape)}
  for name, field in sums.items():
    figures[name] = _sum_field(field, tokens[field.sums], batch)
  if "values" in needs:
    figures["values"] = _values(params, hidden, batch)
  if "token_logps" in needs:
    figures |= {
      name: spread_by_slot(values, batch.slots, group_shape, max_tokens)
      for name, values in _single_tokens(params, predicting, tokens, needs)
    }
  return figures


def _hidden_states(
  policy: Policy, params: Params, batch: Batch
) -> tuple[jax.Array, jax.Array]:
  """Computes hidden states [R, T, D], and those that predict, [R, S, D]."""
  hidden = policy.hidden_states(
    params,
    batch.tokens,
    batch.positions,
    batch.segments,
    batch.branches,
    groups_per_row=batch.valid.shape[1],
  )
  return hidden, take_positions(hidden, batch.predictors)


def _sum_field(field: Field, values: jax.Array, batch: Batch) -> jax.Array:
  """Computes a field of Sequences from its values at tokens: f32 [R, G, K].

  Args:
    field: says which tokens are summed, and whether the result is a mean.
    values: f32 [R, S].
    batch: packed rows.
  """
  if field.mask:
    values = jnp.where(batch.token_masks[field.mask], values, 0.0)
  total = sum_by_slot(values, batch.slots, batch.valid.shape[1:])
  if field.is_mean:
    total /= jnp.maximum(num_tokens(batch), 1.0)
  return total


def _values(params: Params, hidden: jax.Array, batch: Batch) -> jax.Array:
  """Applies the value head at the last token of every response: [R, G, K]."""
  indices = batch.last_tokens.reshape(batch.last_tokens.shape[0], -1)
  last = take_positions(hidden, indices).astype(jnp.float32)
  values = last @ params["value_head"].astype(jnp.float32)
  return values.reshape(batch.valid.shape)


def _single_tokens(
  params: Params,
  predicting: jax.Array,
  tokens: dict[str, jax.Array],
  needs: frozenset[str],
) -> list[tuple[str, jax.Array]]:
  """Returns (name, [R, S]) of the fields of Sequences that are not summed.

  They are "token_logps" and "token_mask"; "ref_token_logps" with a reference;
  and "token_values" if needed.

  Args:
    params: parameters with a value head, if "token_values" is needed.
    predicting: [R, S, D] states that predict.
    tokens: from `chunked_token_figures`.
    needs: optional fields to compute.
  """
  found = [
    ("token_logps", tokens["logps"]),
    ("token_mask", jnp.ones(tokens["logps"].shape, bool)),
  ]
  if "ref_logps" in tokens:
    found.append(("ref_token_logps", tokens["ref_logps"]))
  if "token_values" in needs:
    # V of the state in which the token is chosen, before it is read.
    head = params["value_head"].astype(jnp.float32)
    found.append(("token_values", predicting.astype(jnp.float32) @ head))
  return found


def take_positions(hidden: jax.Array, indices: jax.Array) -> jax.Array:
  """Takes states of each row: [R, T, D], i32 [R, S] -> [R, S, D]."""
  return jnp.take_along_axis(hidden, indices[..., None], axis=1)
