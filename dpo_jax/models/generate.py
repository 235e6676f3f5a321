"""Sampling from a policy, with a KV cache, under jit."""

from collections.abc import Callable, Sequence
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec
import numpy as np

from dpo_jax.models.decoder import Policy


def filter_logits(logits: jax.Array, *, top_k: int, top_p: float) -> jax.Array:
  """Sets what top-k and nucleus sampling leave out to -inf.

  Nucleus sampling: Holtzman et al. 2019 (arXiv:1904.09751). The most likely
  token always stays, and so does the token that crosses the threshold.

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
    "eos_id",
  ),
)
def _sample(
  params: Any,
  prompts: jax.Array,
  lengths: jax.Array,
  keys: jax.Array,
  *,
  policy: Policy,
  max_response_tokens: int,
  temperature: float,
  top_k: int,
  top_p: float,
  eos_id: int,
) -> jax.Array:
  """Responses i32 [B, max_response_tokens]; -1 after the end."""
  batch_size, prompt_length = prompts.shape
  rows = jnp.arange(batch_size)
  unembedding = policy.unembedding(params)

  def choose(hidden, index):
    logits = jnp.einsum(
      "bd,dv->bv", hidden, unembedding, preferred_element_type=jnp.float32
    )
    if temperature == 0.0:
      return jnp.argmax(logits, -1).astype(jnp.int32)
    logits = filter_logits(logits / temperature, top_k=top_k, top_p=top_p)
    step_keys = jax.vmap(jax.random.fold_in, (0, None))(keys, index)
    drawn = jax.vmap(jax.random.categorical)(step_keys, logits)
    return drawn.astype(jnp.int32)

  cache = policy.init_cache(batch_size, prompt_length + max_response_tokens)
  positions = jnp.broadcast_to(jnp.arange(prompt_length), prompts.shape)
  hidden, cache = policy.extend(params, prompts, positions, cache)
  token = choose(hidden[rows, lengths - 1], 0)
  responses = jnp.full((batch_size, max_response_tokens), -1, jnp.int32)

  def is_running(carry):
    index, _, is_done, _, _ = carry
    return (index < max_response_tokens) & ~is_done.all()

  def step(carry):
    index, token, is_done, responses, cache = carry
    responses = responses.at[:, index].set(jnp.where(is_done, -1, token))
    is_done |= token == eos_id
    hidden, cache = policy.extend(
      params, token[:, None], (lengths + index)[:, None], cache
    )
    token = choose(hidden[:, 0], index + 1)
    return index + 1, token, is_done, responses, cache

  is_done = jnp.zeros(batch_size, bool)
  carry = (0, token, is_done, responses, cache)
  return jax.lax.while_loop(is_running, step, carry)[3]


def sample(
  policy: Policy,
  params: Any,
  prompts: Sequence[Sequence[int]],
  *,
  seed: int,
  max_response_tokens: int,
  temperature: float,
  eos_id: int,
  top_k: int = 0,
  top_p: float = 1.0,
  batch_size: int = 64,
  first_index: int = 0,
  placement: Any = None,
) -> list[list[int]]:
  """Samples one response to every prompt.

  The randomness of a response depends on `seed` and on the index of its
  prompt alone, so neither the batch size nor the other prompts change it.

  Args:
    policy: the decoder.
    params: its parameters, on any mesh.
    prompts: token ids, none empty.
    seed: of the whole call.
    max_response_tokens: longest response, EOS included.
    temperature: 0 is greedy.
    eos_id: ends a response.
    top_k: most likely tokens to sample from; 0 is all.
    top_p: nucleus mass, in (0, 1].
    batch_size: prompts sampled at once.
    first_index: index of the first prompt, for the randomness.
    placement: a `mesh.Placement`, to split the prompts over its mesh, on which
      the parameters are; all processes give the same prompts. None leaves
      that to XLA.

  Returns:
    Token ids of every response; EOS is its last where it was reached.

  Raises:
    ValueError: an empty prompt, a temperature below 0, a top_p outside
      (0, 1], or prompts that leave the model no positions.
  """
  empty = [i for i, prompt in enumerate(prompts) if not len(prompt)]
  if empty:
    raise ValueError(
      f"prompts {empty[:5]} hold no tokens: a model without BOS needs at"
      " least one to predict from"
    )
  if temperature < 0 or not 0 < top_p <= 1 or top_k < 0:
    raise ValueError(
      f"temperature={temperature} must be >= 0, top_p={top_p} in (0, 1] and"
      f" top_k={top_k} >= 0"
    )
  if not prompts:
    return []
  # One shape for all batches: one compilation.
  longest = max(len(prompt) for prompt in prompts)
  length = -(-longest // 16) * 16
  if longest + max_response_tokens > policy.config.max_positions:
    raise ValueError(
      f"the longest prompt ({longest} tokens) and"
      f" max_response_tokens={max_response_tokens} exceed the model's"
      f" max_positions={policy.config.max_positions}: shorten one of them"
    )
  batch_size = min(batch_size, len(prompts))
  if placement is not None:
    shards = placement.num_row_shards
    batch_size = -(-batch_size // shards) * shards
  base = jax.random.key(seed)
  run = _sample if placement is None else _split_rows(placement)
  responses: list[list[int]] = []
  for start in range(0, len(prompts), batch_size):
    part = list(prompts[start : start + batch_size])
    padded = np.zeros((batch_size, length), np.int32)
    lengths = np.ones(batch_size, np.int32)
    for row, prompt in enumerate(part):
      padded[row, : len(prompt)] = prompt
      lengths[row] = len(prompt)
    indices = first_index + start + np.arange(batch_size)
    keys = jax.vmap(jax.random.fold_in, (None, 0))(base, indices)
    out = run(
      params,
      padded,
      lengths,
      keys,
      policy=policy,
      max_response_tokens=max_response_tokens,
      temperature=temperature,
      top_k=top_k,
      top_p=top_p,
      eos_id=eos_id,
    )
    for row in np.asarray(out)[: len(part)]:
      responses.append(row[row >= 0].tolist())
  return responses


@functools.lru_cache(maxsize=8)  # one program for all calls
def _split_rows(placement: Any) -> Callable[..., jax.Array]:
  """`_sample` with its rows split over the mesh; the result on all devices."""
  rows = NamedSharding(placement.mesh, PartitionSpec(("data", "fsdp")))
  gather = jax.jit(lambda x: x, out_shardings=placement.replicated)

  def run(params, *arrays, **settings):
    with jax.set_mesh(placement.mesh):
      placed = [jax.device_put(array, rows) for array in arrays]
      return gather(_sample(params, *placed, **settings))

  return run
