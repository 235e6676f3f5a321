"""Sampling from a policy, with a KV cache, under jit."""

from collections.abc import Iterator, Sequence
import dataclasses
import functools
import math
from typing import Any, NamedTuple

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
  token is always kept, and so is the token that crosses the threshold. Top-k
  comes first. Tokens as likely as the last one kept are kept too.

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


@dataclasses.dataclass(frozen=True)
class Sampling:
  """Settings of sampling; a program is compiled for each.

  Attributes:
    max_response_tokens: longest response, EOS included.
    temperature: at least 0; 0 is greedy.
    stop_ids: token ids that end a response.
    top_k: number of most likely tokens to sample from; 0 is all.
    top_p: probability mass of the nucleus, in (0, 1].
  """

  max_response_tokens: int
  temperature: float
  stop_ids: tuple[int, ...]
  top_k: int = 0
  top_p: float = 1.0

  def __post_init__(self):
    if self.temperature < 0 or not 0 < self.top_p <= 1 or self.top_k < 0:
      raise ValueError(
        f"temperature={self.temperature} must be >= 0, top_p={self.top_p} in"
        f" (0, 1] and top_k={self.top_k} >= 0"
      )


class _State(NamedTuple):
  """Responses so far, and what their next tokens depend on.

  Attributes:
    count: tokens of each response so far.
    token: i32 [B], the tokens that follow.
    is_done: bool [B], whether a response has ended.
    responses: i32 [B, max_response_tokens], -1 where there is no token.
    lengths: i32 [B], tokens of each prompt.
    keys: [B] random keys.
    cache: KV cache.
  """

  count: jax.Array
  token: jax.Array
  is_done: jax.Array
  responses: jax.Array
  lengths: jax.Array
  keys: jax.Array
  cache: Any


def _choose(
  logits: jax.Array, keys: jax.Array, index: Any, settings: Sampling
) -> jax.Array:
  """Draws the token at an index of each response: i32 [B].

  Args:
    logits: f32 [B, V].
    keys: [B] random keys, one for each response.
    index: index in the response, folded into the keys.
    settings: temperature and filters; at temperature 0 the most likely token.
  """
  if settings.temperature == 0.0:
    return jnp.argmax(logits, -1).astype(jnp.int32)
  logits = filter_logits(
    logits / settings.temperature, top_k=settings.top_k, top_p=settings.top_p
  )
  step_keys = jax.vmap(jax.random.fold_in, (0, None))(keys, index)
  drawn = jax.vmap(jax.random.categorical)(step_keys, logits)
  return drawn.astype(jnp.int32)


def _begin(
  policy: Policy,
  settings: Sampling,
  params: Params,
  prompts: jax.Array,
  lengths: jax.Array,
  keys: jax.Array,
) -> _State:
  """Reads the prompts, and draws the first token of each response.

  Args:
    policy, settings, params: see `sample_batches`.
    prompts: i32 [B, P], padded at the end.
    lengths: i32 [B], tokens of each prompt.
    keys: [B] random keys.

  Returns:
    State with the drawn tokens in `token`, and none in `responses` yet.
  """
  batch_size, prompt_length = prompts.shape
  size = settings.max_response_tokens
  cache = policy.init_cache(batch_size, prompt_length + size)
  positions = jnp.broadcast_to(jnp.arange(prompt_length), prompts.shape)
  hidden, cache = policy.extend(params, prompts, positions, cache)
  last = hidden[jnp.arange(batch_size), lengths - 1]
  token = _choose(policy.readout(params).logits(last), keys, 0, settings)
  responses = jnp.full((batch_size, size), -1, jnp.int32)
  is_done = jnp.zeros(batch_size, bool)
  return _State(jnp.int32(0), token, is_done, responses, lengths, keys, cache)


def _advance(
  policy: Policy, settings: Sampling, params: Params, state: _State, until: Any
) -> _State:
  """Extends the responses to `until` tokens, or until all have ended."""
  readout = policy.readout(params)

  def is_running(state):
    return (state.count < until) & ~state.is_done.all()

  def step(state):
    count, token, is_done = state.count, state.token, state.is_done
    shown = jnp.where(is_done, -1, token)
    responses = state.responses.at[:, count].set(shown)
    is_done |= jnp.isin(token, jnp.array(settings.stop_ids))
    hidden, cache = policy.extend(
      params, token[:, None], (state.lengths + count)[:, None], state.cache
    )
    logits = readout.logits(hidden[:, 0])
    token = _choose(logits, state.keys, count + 1, settings)
    return _State(
      count + 1, token, is_done, responses, state.lengths, state.keys, cache
    )

  return jax.lax.while_loop(is_running, step, state)


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _sample(
  policy: Policy,
  settings: Sampling,
  rows: jax.sharding.NamedSharding | None,
  params: Params,
  prompts: jax.Array,
  lengths: jax.Array,
  keys: jax.Array,
) -> jax.Array:
  """Samples responses, i32 [B, max_response_tokens]; -1 after the end."""
  state = _begin(policy, settings, params, prompts, lengths, keys)
  size = settings.max_response_tokens
  responses = _advance(policy, settings, params, state, size).responses
  if rows is None:
    return responses
  # Replicated, because every host reads all responses.
  replicated = jax.sharding.NamedSharding(
    rows.mesh, jax.sharding.PartitionSpec()
  )
  return jax.lax.with_sharding_constraint(responses, replicated)


_begin_alone = jax.jit(_begin, static_argnums=(0, 1))
_advance_alone = jax.jit(_advance, static_argnums=(0, 1), donate_argnums=3)


def sample(
  policy: Policy,
  params: Params,
  prompts: Sequence[Sequence[int]],
  settings: Sampling,
  **options: Any,
) -> list[list[int]]:
  """Samples one response to every prompt; see `sample_batches`.

  Returns:
    Token ids of every response; the last is a stop id if one was sampled.
  """
  batches = sample_batches(policy, params, prompts, settings, **options)
  return [response for batch in batches for response in batch]


def sample_batches(
  policy: Policy,
  params: Params,
  prompts: Sequence[Sequence[int]],
  settings: Sampling,
  *,
  seed: int,
  batch_size: int = 64,
  first_index: int = 0,
  rows: jax.sharding.NamedSharding | None = None,
  label: str = "",
) -> Iterator[list[list[int]]]:
  """Samples one response to every prompt, and yields those of a batch at once.

  The randomness of a response depends only on `seed` and the index of its
  prompt: neither the batch size nor the other prompts change it.

  Args:
    policy: the decoder.
    params: its parameters, on any mesh.
    prompts: token ids, none empty.
    settings: temperature, filters and end of a response.
    seed: seed of the whole call.
    batch_size: prompts sampled at once.
    first_index: index of the first prompt, for the randomness.
    rows: sharding of a batch's prompts over the mesh of the parameters; None
      leaves it to the compiler.
    label: name of the work for `progress.track`; "" shows nothing.

  Yields:
    Token ids of the responses of a batch, as `sample` returns them.

  Raises:
    ValueError: at the first batch: an empty prompt, or prompts that leave the
      model no positions.
  """
  if not prompts:
    return
  longest = _check_prompts(policy, prompts, settings)
  # One shape for all batches, so that one program is compiled.
  length = -(-longest // 16) * 16
  batch_size = _row_multiple(min(batch_size, len(prompts)), rows)
  starts = range(0, len(prompts), batch_size)
  for start in progress.track(starts, label, total=len(starts), unit="batches"):
    stop_signal.check()
    part = prompts[start : start + batch_size]
    batch = _make_batch(
      part, batch_size, length, seed=seed, index=first_index + start, rows=rows
    )
    out = _sample(policy, settings, rows, params, *batch)
    yield [row[row >= 0].tolist() for row in np.asarray(out)[: len(part)]]


def stream(
  policy: Policy,
  params: Params,
  prompt: Sequence[int],
  settings: Sampling,
  *,
  seed: int,
  index: int = 0,
  rows: jax.sharding.NamedSharding | None = None,
) -> Iterator[int]:
  """Samples the response to one prompt, and yields each token at once.

  It is the response that `sample` gives to the prompt of that index.

  Args:
    policy: the decoder.
    params: its parameters, on a mesh of this process.
    prompt: token ids, not empty.
    settings: temperature, filters and end of a response.
    seed: see `sample_batches`.
    index: index of the prompt, for the randomness.
    rows: see `sample_batches`.

  Yields:
    Token ids; the last is a stop id if one was sampled.

  Raises:
    ValueError: see `sample_batches`.
  """
  _check_prompts(policy, [prompt], settings)
  # Few shapes, so that the next prompt of a conversation seldom compiles.
  length = max(64, 1 << (len(prompt) - 1).bit_length())
  batch = _make_batch(
    [prompt], _row_multiple(1, rows), length, seed=seed, index=index, rows=rows
  )
  state = _begin_alone(policy, settings, params, *batch)
  for count in range(1, settings.max_response_tokens + 1):
    token = int(state.token[0])
    yield token
    if token in settings.stop_ids:
      return
    state = _advance_alone(policy, settings, params, state, count)


def _check_prompts(
  policy: Policy, prompts: Sequence[Sequence[int]], settings: Sampling
) -> int:
  """Returns the length of the longest prompt.

  Raises:
    ValueError: an empty prompt, or prompts that leave the model no positions.
  """
  empty = [i for i, prompt in enumerate(prompts) if not len(prompt)]
  if empty:
    raise ValueError(
      f"prompts {empty[:5]} have no tokens: a model without BOS needs at least"
      " one to predict from"
    )
  lengths = [len(prompt) for prompt in prompts]
  longest = max(lengths)
  if longest + settings.max_response_tokens > policy.config.max_positions:
    raise ValueError(
      f"the longest prompt ({longest} tokens, number"
      f" {lengths.index(longest) + 1} of {len(prompts)}) and"
      f" max_response_tokens={settings.max_response_tokens} exceed the model's"
      f" max_positions={policy.config.max_positions}: shorten one of them"
    )
  return longest


def _row_multiple(
  num_rows: int, rows: jax.sharding.NamedSharding | None
) -> int:
  """Rounds a number of rows up to a multiple of their shards."""
  if rows is None:
    return num_rows
  shards = math.prod(rows.mesh.shape[axis] for axis in rows.spec[0])
  return -(-num_rows // shards) * shards


def _make_batch(
  prompts: Sequence[Sequence[int]],
  batch_size: int,
  length: int,
  *,
  seed: int,
  index: int,
  rows: jax.sharding.NamedSharding | None,
) -> Any:
  """Pads prompts, and derives a random key for each.

  Args:
    prompts: token ids.
    batch_size: rows; one without a prompt has length 1.
    length: tokens of a row.
    seed: see `sample_batches`.
    index: index of the first prompt.
    rows: sharding, or None.

  Returns:
    i32 [batch_size, length] padded by 0; i32 [batch_size] lengths; and
    [batch_size] keys, from `seed` and the index of each prompt.
  """
  padded = np.zeros((batch_size, length), np.int32)
  lengths = np.ones(batch_size, np.int32)
  for row, prompt in enumerate(prompts):
    padded[row, : len(prompt)] = prompt
    lengths[row] = len(prompt)
  indices = index + np.arange(batch_size)
  base = jax.random.key(seed)
  keys = jax.vmap(jax.random.fold_in, (None, 0))(base, indices)
  batch = (padded, lengths, keys)
  return batch if rows is None else jax.device_put(batch, rows)
