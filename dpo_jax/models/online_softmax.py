"""Statistics of a softmax over the vocabulary, by an online softmax.

Milakov and Gimelshein 2018 (arXiv:1805.02867), over blocks of the vocabulary.
Neither an array of positions x vocabulary nor one of chunk x vocabulary exists.
The vocabulary is the outer loop, so that each block of the kernel is gathered
once, and its gradient is summed over devices once.

  forward:                                  # m, s: running_max, running_sum
    for block in blocks of the vocabulary:
      for chunk in chunks of positions that hold a scored one:
        logits = hidden[chunk] @ kernel[block]
        new_m  = max(m, max(logits))
        s      = s * exp(m - new_m) + sum(exp(logits - new_m))     # rescale
        m      = new_m
        target_logit += logits[target], if the target is in the block
    lse = m + log(s);  logps = target_logit - lse                  # log-sum-exp

  backward:
    for block in blocks of the vocabulary:
      for chunk in chunks of positions that hold a scored one:
        logits  = hidden[chunk] @ kernel[block]                    # recomputed
        dlogits = dlogps * (one_hot(target) - exp(logits - lse))
        dkernel[block] += hidden[chunk].T @ dlogits
        dhidden[chunk] += dlogits @ kernel[block].T
"""

import functools

import jax
import jax.numpy as jnp

from dpo_jax.models.decoder import Readout
from dpo_jax.models.vocabulary_blocks import (
  VocabularyBlocks,
  by_row_shard,
  constrain,
)
from dpo_jax.parallel import active_mesh
from dpo_jax.parallel.active_mesh import ROW_AXES

# Initial running max; finite, so that a difference of two is not NaN.
_INITIAL_MAX = -0.4 * float(jnp.finfo(jnp.float32).max)

# Running values of positions, by name.
_Running = dict[str, jax.Array]

# Running sums of exp(logits - max) to a power: the max, and the power.
_SUMS = {
  "sum": ("max", 1),
  "sum_squares": ("max", 2),
  "ref_sum": ("ref_max", 1),
  "ref_gap": ("ref_max", 1),
}


@functools.partial(jax.custom_vjp, nondiff_argnums=(5,))
def token_statistics(
  hidden: jax.Array,
  readout: Readout,
  targets: jax.Array,
  reference: tuple[jax.Array, Readout] | None,
  is_used: jax.Array,
  names: frozenset[str],
) -> dict[str, jax.Array]:
  """Computes `logps.chunked_token_figures` of C chunks of positions.

  Args:
    hidden: [C, R, S, D] states that predict.
    readout: projection to V logits; V may be sharded over the mesh axis
      `tensor`.
    targets: i32 [C, R, S].
    reference: the reference's hidden and readout, which get no gradient, or
      None.
    is_used: bool [C], chunks to compute; the others give zeros.
    names: "logps", and any of "ref_logps", "alignment" and "kl".

  Returns:
    Those statistics, f32 [C, R, S] each, nats. Gradients flow through "logps"
    and "kl" into hidden and readout.
  """
  return _forward(hidden, readout, targets, reference, is_used, names)[0]


def _logits(hidden: jax.Array, block: Readout) -> jax.Array:
  """Computes the logits of a block: [R, S, D] -> f32 [R, S, P, size]."""
  logits = jnp.einsum(
    "rsd,dpv->rspv", hidden, block.kernel, preferred_element_type=jnp.float32
  )
  logits = block.finish(logits)
  return constrain(logits, ROW_AXES, None, "tensor", None)


def _rescale(running: _Running, maxima: _Running) -> _Running:
  """Replaces the running maxima, and rescales the sums to the new ones."""
  out = {**running, **maxima}
  for name, (which, power) in _SUMS.items():
    if name in running:
      shift = power * (running[which] - maxima[which])
      out[name] = running[name] * jnp.exp(shift)
  return out


def _update(chunk, running, ids, block, ref_block) -> _Running:
  """Adds a block to a chunk's running values, f32 [R, S, P] each.

  Args:
    chunk: hidden [R, S, D], targets i32 [R, S], and the reference's hidden or
      None.
    running: values so far, from `_initial`.
    ids: i32 [P, size], token ids of the block.
    block, ref_block: output projections of policy and reference.
  """
  hidden, targets, ref_hidden = chunk
  is_target = ids == targets[..., None, None]

  def pick(logits):
    return jnp.where(is_target, logits, 0.0).sum(-1)

  logits = _logits(hidden, block)
  maxima = {"max": jnp.maximum(running["max"], logits.max(-1))}
  if ref_block is not None:
    ref_logits = _logits(ref_hidden, ref_block)
    maxima["ref_max"] = jnp.maximum(running["ref_max"], ref_logits.max(-1))
  running = _rescale(running, maxima)
  running["target"] += pick(logits)
  weights = jnp.exp(logits - maxima["max"][..., None])
  running["sum"] += weights.sum(-1)
  if "sum_squares" in running:
    running["sum_squares"] += jnp.square(weights).sum(-1)
  if ref_block is not None:
    running["ref_target"] += pick(ref_logits)
    ref_weights = jnp.exp(ref_logits - maxima["ref_max"][..., None])
    running["ref_sum"] += ref_weights.sum(-1)
  if "ref_gap" in running:
    running["ref_gap"] += (ref_weights * (ref_logits - logits)).sum(-1)
  return running


def _initial(targets, num_shards, has_reference, names) -> _Running:
  """Returns running values before the first block, f32 [C, R, S, P] each.

  Every shard of the vocabulary has running values of its own, so that shards
  communicate once, not once a block.

  Args:
    targets: i32 [C, R, S].
    num_shards: P.
    has_reference: whether there are values named "ref_...".
    names: see `token_statistics`; "alignment" and "kl" need further sums.
  """
  keys = ["max", "target", "sum"] + ["sum_squares"] * ("alignment" in names)
  if has_reference:
    keys += ["ref_max", "ref_target", "ref_sum"] + ["ref_gap"] * ("kl" in names)
  zeros = jnp.zeros((*targets.shape, num_shards), jnp.float32)
  zeros = constrain(zeros, None, ROW_AXES, None, "tensor")
  lowest = jnp.full_like(zeros, _INITIAL_MAX)
  return {key: lowest if "max" in key else zeros for key in keys}


def _join_shards(running: _Running) -> _Running:
  """Combines the shards' running maxima and sums of exponentials.

  Each has a last axis of the P vocabulary shards, which is reduced:
  [..., P] -> [...].
  """
  maxima = {name: x.max(-1) for name, x in running.items() if "max" in name}
  running = _rescale(running, {k: x[..., None] for k, x in maxima.items()})
  return {name: x.sum(-1) for name, x in running.items()} | maxima


def _forward(hidden, readout, targets, reference, is_used, names):
  """Computes `token_statistics`, and what its backward pass needs.

  Returns:
    The statistics by name, and (lse, ref_lse): log-sum-exps of the logits, f32
    [C, R, S] each, without a meaning in chunks that are not used. ref_lse is
    None without a reference.
  """
  blocks = VocabularyBlocks(readout, targets)
  ref_hidden, ref_readout = reference or (None, None)

  def visit_block(running, _, ids, *block_pair):
    def visit_chunk(_, scanned):
      used, *chunk_and_running = scanned
      return None, jax.lax.cond(
        used,
        lambda chunk, running: _update(chunk, running, ids, *block_pair),
        lambda _, running: running,
        *chunk_and_running,
      )

    chunks = (hidden, targets, ref_hidden)
    return jax.lax.scan(visit_chunk, None, (is_used, chunks, running))[1]

  running = _initial(targets, blocks.num_shards, reference is not None, names)
  running = blocks.scan(visit_block, running, readout, ref_readout)
  running = _join_shards(running)
  # Chunks that were skipped stay finite here, and are set to 0 below.
  used = is_used[:, None, None]
  running = {name: jnp.where(used, x, 1.0) for name, x in running.items()}
  lse = running["max"] + jnp.log(running["sum"])
  out = {"logps": running["target"] - lse}
  if "alignment" in names:
    collision = 2 * running["max"] + jnp.log(running["sum_squares"]) - 2 * lse
    out["alignment"] = out["logps"] - collision
  ref_lse = None
  if reference is not None:
    ref_lse = running["ref_max"] + jnp.log(running["ref_sum"])
    out["ref_logps"] = running["ref_target"] - ref_lse
    if "kl" in names:
      out["kl"] = running["ref_gap"] / running["ref_sum"] - ref_lse + lse
  # Sorted, so that all hosts trace the same program.
  out = {name: jnp.where(used, out[name], 0.0) for name in sorted(names)}
  return out, (lse, ref_lse)


def _token_statistics_fwd(hidden, readout, targets, reference, is_used, names):
  out, lses = _forward(hidden, readout, targets, reference, is_used, names)
  return out, (hidden, readout, targets, reference, is_used, lses)


def _logits_gradient(chunk, ref_chunk, ids, block, ref_block):
  """Computes the gradient of a chunk's logits in a block, f32 [R, S, P, size].

  Args:
    chunk: hidden [R, S, D], targets i32 [R, S], log-sum-exps f32 [R, S], and
      gradients of "logps" f32 [R, S].
    ref_chunk: hidden and log-sum-exps of the reference, and gradients of "kl";
      None without "kl".
    ids: i32 [P, size], token ids of the block.
    block, ref_block: output projections of policy and reference.
  """
  hidden, targets, lse, logps_gradient = chunk
  logits = _logits(hidden, block)
  probs = jnp.exp(logits - lse[..., None, None])
  is_target = ids == targets[..., None, None]
  gradient = jnp.where(is_target, 1.0 - probs, -probs)
  gradient *= logps_gradient[..., None, None]
  if ref_chunk is not None:
    ref_hidden, ref_lse, kl_gradient = ref_chunk
    ref_logits = _logits(ref_hidden, ref_block)
    ref_probs = jnp.exp(ref_logits - ref_lse[..., None, None])
    gradient += (probs - ref_probs) * kl_gradient[..., None, None]
  if block.soft_cap is not None:
    gradient *= 1.0 - jnp.square(logits / block.soft_cap)
  return gradient


def _zero_block_gradient(num_rows, depth, ids, has_bias):
  """Returns a zero gradient of a block for each of N shards of the rows.

  The shards are summed once a block, not once a chunk.

  Args:
    num_rows: R.
    depth: D.
    ids: i32 [P, size], token ids of the block.
    has_bias: whether the projection has a bias.

  Returns:
    Readout with a kernel [N, D, P, size] and a bias [N, P, size] or None.
  """
  num_shards = active_mesh.num_row_shards(num_rows)
  kernel = jnp.zeros((num_shards, depth, *ids.shape), jnp.float32)
  bias = None
  if has_bias:
    bias = jnp.zeros((num_shards, *ids.shape), jnp.float32)
    bias = constrain(bias, ROW_AXES, "tensor", None)
  return Readout(constrain(kernel, ROW_AXES, None, "tensor", None), bias)


def _accumulate(
  block_gradient, hidden_gradient, hidden, logits_gradient, transposed
):
  """Adds a chunk's share to the gradients of a block and of its hidden states.

  Args:
    block_gradient: Readout, as `_zero_block_gradient`.
    hidden_gradient: f32 [P, R, S, D].
    hidden: [R, S, D].
    logits_gradient: f32 [R, S, P, size].
    transposed: kernel of the block, [P, size, D].

  Returns:
    The two gradients.
  """
  product = functools.partial(jnp.einsum, preferred_element_type=jnp.float32)
  sharded = by_row_shard(logits_gradient, "tensor", None)
  kernel, bias = block_gradient.kernel, block_gradient.bias
  kernel += product(
    "nrsd,nrspv->ndpv", by_row_shard(hidden, None), sharded.astype(hidden.dtype)
  )
  if bias is not None:
    bias += sharded.sum((1, 2))
  logits_gradient = logits_gradient.astype(hidden.dtype)
  hidden_gradient += product("rspv,pvd->prsd", logits_gradient, transposed)
  return Readout(kernel, bias), hidden_gradient


def _block_backward(hidden_gradient, is_used, chunks, ids, block, ref_block):
  """Computes the gradient of a block, summed over the chunks.

  Args:
    hidden_gradient: f32 [C, P, R, S, D], sum over the blocks before.
    is_used: bool [C].
    chunks: arguments of `_logits_gradient`, with a leading axis C.
    ids: i32 [P, size], token ids of the block.
    block: output projection of the policy.
    ref_block: output projection of the reference, or None.

  Returns:
    Gradient of the block, a Readout, and of the hidden states with its share.
  """
  # Transposed once a block: otherwise a CPU transposes it for every chunk.
  transposed = block.kernel.transpose(1, 2, 0)

  def accumulate(block_gradient, chunk_gradient, chunk, ref_chunk):
    logits_gradient = _logits_gradient(chunk, ref_chunk, ids, block, ref_block)
    return _accumulate(
      block_gradient, chunk_gradient, chunk[0], logits_gradient, transposed
    )

  def visit_chunk(carry, scanned):
    block_gradient, hidden_gradient = carry
    index, used, *chunk = scanned
    block_gradient, chunk_gradient = jax.lax.cond(
      used,
      accumulate,
      lambda *operands: operands[:2],
      block_gradient,
      hidden_gradient[index],
      *chunk,
    )
    hidden_gradient = jax.lax.dynamic_update_index_in_dim(
      hidden_gradient, chunk_gradient, index, 0
    )
    return (block_gradient, hidden_gradient), None

  num_chunks, _, num_rows, _, depth = hidden_gradient.shape
  zeros = _zero_block_gradient(num_rows, depth, ids, block.bias is not None)
  (block_gradient, hidden_gradient), _ = jax.lax.scan(
    visit_chunk,
    (zeros, hidden_gradient),
    (jnp.arange(num_chunks), is_used, *chunks),
  )
  block_gradient = jax.tree.map(lambda x: x.sum(0), block_gradient)
  kernel = constrain(block_gradient.kernel, "fsdp", "tensor", None)
  return block_gradient.replace(kernel=kernel), hidden_gradient


def _token_statistics_bwd(names, saved, gradients):
  hidden, readout, targets, reference, is_used, (lse, ref_lse) = saved
  blocks = VocabularyBlocks(readout, targets)
  ref_chunks = ref_readout = None
  if "kl" in names:
    ref_hidden, ref_readout = reference
    ref_chunks = (ref_hidden, ref_lse, gradients["kl"])
  chunks = ((hidden, targets, lse, gradients["logps"]), ref_chunks)

  def visit_block(carry, start, ids, *block_pair):
    readout_gradient, hidden_gradient = carry
    block_gradient, hidden_gradient = _block_backward(
      hidden_gradient, is_used, chunks, ids, *block_pair
    )
    readout_gradient = blocks.write_block(
      readout_gradient, block_gradient, start
    )
    return readout_gradient, hidden_gradient

  zeros = blocks.zeros(readout)
  # [C, P, R, S, D]: a gradient for each shard of the vocabulary, summed once.
  hidden_zeros = jnp.zeros(
    (len(hidden), blocks.num_shards, *hidden.shape[1:]), jnp.float32
  )
  hidden_zeros = constrain(hidden_zeros, None, "tensor", ROW_AXES, None, None)
  readout_gradient, hidden_gradient = blocks.scan(
    visit_block, (zeros, hidden_zeros), readout, ref_readout
  )
  readout_gradient = readout_gradient.replace(soft_cap=readout.soft_cap)
  readout_gradient = jax.tree.map(
    lambda total, x: total.reshape(x.shape).astype(x.dtype),
    readout_gradient,
    readout,
  )
  hidden_gradient = hidden_gradient.sum(1).astype(hidden.dtype)
  return hidden_gradient, readout_gradient, None, None, None


token_statistics.defvjp(_token_statistics_fwd, _token_statistics_bwd)
