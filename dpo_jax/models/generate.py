"""Sampling from a policy, with a KV cache, under jit."""

from collections.abc import Sequence
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np

from dpo_jax.models.decoder import Policy
from dpo_jax.parallel import stop_signal
from dpo_jax.system import progress
from dpo_jax.trees import Params


def filter_logits(logits: jax.Array, *, top_k: int, top_p: float) -> jax.Array:
  """Sets the logits that top-k and nucleus sampling exclude to -inf.

  Nucleus sampling: Holtzman et al. 2019 (arXiv:1904.09751). The most likely
  token is always kept, and so is the token that crosses the threshold.

  Args:
    logits: f32 [B, V].
    top_k: tokens to keep; 0 keeps all.
    top_p: probability mass to keep, in (0, 1].

  Returns:
    f32 [B, V].
  """
  if 0 < top_k < logits.shape[-1]:
    threshold = jax.lax.top_k(logits, top_k)[0][:, -1:]
    logits = jnp.where(logits < threshold, -jnp.inf, logits)
  if top_p < 1.0:
    descending = -jnp.sort(-logits, axis=-1)
    probs = jax.nn.softmax(descending, axis=-1)
    mass_before = jnp.cumsum(probs, axis=-1) - probs
    kept = jnp.where(mass_before < top_p, descending, jnp.inf)
    logits = jnp.where(logits < kept.min(-1, keepdims=True), -jnp.inf, logits)
  return logits


@functools.partial(
  jax.jit,
  static_argnames=(
    "policy",
    "max_response_tokens",
    "temperature",
    "top_k",
    "top_p",
    "stop_ids",
    "rows",
  ),
)
def _sample(
  params: Params,
  prompts: jax.Array,
  lengths: jax.Array,
  keys: jax.Array,
  *,
  policy: Policy,
  max_response_tokens: int,
  temperature: float,
  top_k: int,
  top_p: float,
  stop_ids: tuple[int, ...],
  rows: jax.sharding.NamedSharding | None,
) -> jax.Array:
  """Samples responses, i32 [B, max_response_tokens]; -1 after the end."""
  batch_size, prompt_length = prompts.shape
  readout = policy.readout(params)

  def choose(hidden, index):
    logits = readout.logits(hidden)
    if temperature == 0.0:
      return jnp.argmax(logits, -1).astype(jnp.int32)
    logits = filter_logits(logits / temperature, top_k=top_k, top_p=top_p)
    step_keys = jax.vmap(jax.random.fold_in, (0, None))(keys, index)
    drawn = jax.vmap(jax.random.categorical)(step_keys, logits)
    return drawn.astype(jnp.int32)

  cache = policy.init_cache(batch_size, prompt_length + max_response_tokens)
  positions = jnp.broadcast_to(jnp.arange(prompt_length), prompts.shape)
  hidden, cache = policy.extend(params, prompts, positions, cache)
  token = choose(hidden[jnp.arange(batch_size), lengths - 1], 0)
  responses = jnp.full((batch_size, max_response_tokens), -1, jnp.int32)

  def is_running(carry):
    index, _, is_done, _, _ = carry
    return (index < max_response_tokens) & ~is_done.all()

  def step(carry):
    index, token, is_done, responses, cache = carry
    responses = responses.at[:, index].set(jnp.where(is_done, -1, token))
    is_done |= jnp.isin(token, jnp.array(stop_ids))
    hidden, cache = policy.extend(
      params, token[:, None], (lengths + index)[:, None], cache
    )
    token = choose(hidden[:, 0], index + 1)
    return index + 1, token, is_done, responses, cache

  is_done = jnp.zeros(batch_size, bool)
  carry = (0, token, is_done, responses, cache)
  responses = jax.lax.while_loop(is_running, step, carry)[3]
  if rows is None:
    return responses
  # Replicated, because every host reads all responses.
  replicated = jax.sharding.NamedSharding(
    rows.mesh, jax.sharding.PartitionSpec()
  )
  return jax.lax.with_sharding_constraint(responses, replicated)


# Over 60 lines for its 12 arguments; the body is one loop over batches.
def sample(
  policy: Policy,
  params: Params,
  prompts: Sequence[Sequence[int]],
  *,
  seed: int,
  max_response_tokens: int,
  temperature: float,
  stop_ids: Sequence[int],
  top_k: int = 0,
  top_p: float = 1.0,
  batch_size: int = 64,
  first_index: int = 0,
  rows: jax.sharding.NamedSharding | None = None,
  label: str = "",
) -> list[list[int]]:
  """Samples one response to every prompt.

  The randomness of a response depends only on `seed` and the index of its
  prompt: neither the batch size nor the other prompts change it.

  Args:
    policy: the decoder.
    params: its parameters, on any mesh.
    prompts: token ids, none empty.
    seed: seed of the whole call.
    max_response_tokens: longest response, EOS included.
    temperature: at least 0; 0 is greedy.
    stop_ids: token ids that end a response.
    top_k: number of most likely tokens to sample from; 0 is all.
    top_p: probability mass of the nucleus, in (0, 1].
    batch_size: prompts sampled at once.
    first_index: index of the first prompt, for the randomness.
    rows: sharding of a batch's prompts over the mesh of the parameters; None
      leaves it to the compiler.
    label: name of the work for `progress.track`; "" shows nothing.

  Returns:
    Token ids of every response; the last is a stop id if one was sampled.

  Raises:
    ValueError: an empty prompt, a temperature below 0, a top_p outside
      (0, 1], or prompts that leave the model no positions.
  """
  _check_settings(prompts, temperature=temperature, top_k=top_k, top_p=top_p)
  if not prompts:
    return []
  longest = max(len(prompt) for prompt in prompts)
  if longest + max_response_tokens > policy.config.max_positions:
    raise ValueError(
      f"the longest prompt ({longest} tokens) and"
      f" max_response_tokens={max_response_tokens} exceed the model's"
      f" max_positions={policy.config.max_positions}: shorten one of them"
    )
  # One shape for all batches, so that one program is compiled.
  length = -(-longest // 16) * 16
  batch_size = min(batch_size, len(prompts))
  if rows is not None:
    shards = math.prod(rows.mesh.shape[axis] for axis in rows.spec[0])
    batch_size = -(-batch_size // shards) * shards
  base = jax.random.key(seed)
  responses: list[list[int]] = []
  starts = range(0, len(prompts), batch_size)
  for start in progress.track(starts, label, total=len(starts), unit="batches"):
    stop_signal.check()
    part = prompts[start : start + batch_size]
    indices = first_index + start + np.arange(batch_size)
    keys = jax.vmap(jax.random.fold_in, (None, 0))(base, indices)
    batch = (*_pad(part, batch_size, length), keys)
    if rows is not None:
      batch = jax.device_put(batch, rows)
    out = _sample(
      params,
      *batch,
      policy=policy,
      max_response_tokens=max_response_tokens,
      temperature=temperature,
      top_k=top_k,
      top_p=top_p,
      stop_ids=tuple(stop_ids),
      rows=rows,
    )
    for row in np.asarray(out)[: len(part)]:
      responses.append(row[row >= 0].tolist())
  return responses


def _check_settings(
  prompts: Sequence[Sequence[int]],
  *,
  temperature: float,
  top_k: int,
  top_p: float,
) -> None:
  empty = [i for i, prompt in enumerate(prompts) if not len(prompt)]
  if empty:
    raise ValueError(
      f"prompts {empty[:5]} have no tokens: a model without BOS needs at least"
      " one to predict from"
    )
  if temperature < 0 or not 0 < top_p <= 1 or top_k < 0:
    raise ValueError(
      f"temperature={temperature} must be >= 0, top_p={top_p} in (0, 1] and"
      f" top_k={top_k} >= 0"
    )


def _pad(
  prompts: Sequence[Sequence[int]], batch_size: int, length: int
) -> tuple[np.ndarray, np.ndarray]:
  """Pads prompts to i32 [batch_size, length]; returns their lengths too.

  A row without a prompt has length 1.
  """
  padded = np.zeros((batch_size, length), np.int32)
  lengths = np.ones(batch_size, np.int32)
  for row, prompt in enumerate(prompts):
    padded[row, : len(prompt)] = prompt
    lengths[row] = len(prompt)
  return padded, lengths
