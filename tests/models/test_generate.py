"""Sampling: the cache, the filters, repeatability."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dpo_jax.models import generate, partition_rules
from dpo_jax.parallel import mesh as mesh_lib
from dpo_jax.parallel.placement import Placement
from tests import tiny

EOS = 95
SETTINGS = dict(max_response_tokens=12, temperature=1.0, stop_ids=(EOS,))


@functools.partial(jax.jit, static_argnums=0)
def all_logits(policy, params, tokens):
  positions = jnp.arange(tokens.shape[1])[None]
  hidden = policy.hidden_states(
    params, tokens, positions, jnp.ones_like(tokens), jnp.zeros_like(tokens)
  )
  return policy.readout(params).logits(hidden[0])


def next_logits(policy, params, tokens):
  """Logits after a sequence, without a cache; what follows it is not seen."""
  padded = np.zeros((1, 32), np.int32)
  padded[0, : len(tokens)] = tokens
  return np.asarray(all_logits(policy, params, padded))[len(tokens) - 1]


def sample(policy, params, prompts, *, seed=3, **kwargs):
  of_call = ("batch_size", "first_index", "rows")
  call = {name: kwargs.pop(name) for name in of_call if name in kwargs}
  settings = generate.Sampling(**{**SETTINGS, **kwargs})
  return generate.sample(policy, params, prompts, settings, seed=seed, **call)


@pytest.fixture(scope="module")
def model():
  policy = tiny.make_policy()
  return policy, tiny.make_params(policy)


PROMPTS = [[1, 2, 3], [4], [5, 6, 7, 8, 9, 10, 11], [12, 13]]


def test_greedy_with_a_cache_equals_the_uncached_forward(model):
  for prompt, response in zip(
    PROMPTS, sample(*model, PROMPTS, temperature=0.0), strict=True
  ):
    tokens = list(prompt)
    for token in response:
      assert token == next_logits(*model, tokens).argmax()
      tokens.append(token)


def test_seeded_sampling_equals_the_uncached_forward(model):
  responses = sample(*model, PROMPTS, temperature=0.7)
  base = jax.random.key(3)
  for index, (prompt, response) in enumerate(
    zip(PROMPTS, responses, strict=True)
  ):
    tokens = list(prompt)
    for place, token in enumerate(response):
      key = jax.random.fold_in(jax.random.fold_in(base, index), place)
      logits = next_logits(*model, tokens) / 0.7
      assert token == jax.random.categorical(key, logits)
      tokens.append(token)


@pytest.mark.slow
def test_batch_size_does_not_change_samples(model):
  one = sample(*model, PROMPTS, batch_size=1)
  assert one == sample(*model, PROMPTS, batch_size=3)
  assert one == sample(*model, PROMPTS, batch_size=64)
  assert one[2:] == sample(*model, PROMPTS[2:], first_index=2)


def test_seeds_differ(model):
  assert sample(*model, PROMPTS) != sample(*model, PROMPTS, seed=4)


def test_responses_stop_at_eos_and_keep_it(model):
  policy, params = model
  responses = sample(policy, params, [[1]] * 64, max_response_tokens=200)
  ended = [r for r in responses if r[-1] == EOS]
  assert ended, "an untrained model ends within 200 tokens now and then"
  assert all(EOS not in r[:-1] for r in responses)
  assert all(len(r) == 200 for r in responses if r[-1] != EOS)


def test_sampled_frequencies_are_the_softmax(model):
  policy, params = model
  responses = sample(policy, params, [[1, 2]] * 4000, max_response_tokens=1)
  counts = np.bincount([r[0] for r in responses], minlength=96)
  probs = np.asarray(jax.nn.softmax(next_logits(policy, params, [1, 2])))
  spread = np.sqrt(4000 * probs * (1 - probs))
  assert (np.abs(counts - 4000 * probs) < 5 * spread + 1).all()


def test_filters_equal_a_loop():
  rng = np.random.default_rng(0)
  logits = rng.normal(size=(6, 30)).astype(np.float32) * 3
  for top_k, top_p in ((0, 0.5), (0, 0.9), (5, 1.0), (1, 1.0), (7, 0.6)):
    kept = np.isfinite(
      generate.filter_logits(jnp.asarray(logits), top_k=top_k, top_p=top_p)
    )
    for row, mask in zip(logits, kept, strict=True):
      order = np.argsort(-row)[: top_k or None]
      probs = np.exp(row[order]) / np.exp(row[order]).sum()
      wanted, mass = set(), 0.0
      for token, prob in zip(order, probs, strict=True):
        if mass >= top_p:
          break
        wanted.add(int(token))
        mass += prob
      assert set(np.flatnonzero(mask)) == wanted


@pytest.mark.parametrize(
  ("prompts", "kwargs", "message"),
  [
    ([[1], []], {}, "have no tokens"),
    ([[1]], {"temperature": -1.0}, "temperature=-1"),
    ([[1]], {"top_p": 0.0}, "top_p=0"),
    ([[1] * 500], {"max_response_tokens": 20}, "max_positions=512"),
  ],
)
def test_bad_requests_are_refused(model, prompts, kwargs, message):
  with pytest.raises(ValueError, match=message):
    sample(*model, prompts, **kwargs)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_streamed_tokens_are_those_of_the_sample(model, temperature):
  settings = dict(temperature=temperature, top_k=40, max_response_tokens=70)
  wanted = sample(*model, PROMPTS, **settings)
  for index, prompt in enumerate(PROMPTS):
    tokens = generate.stream(
      *model,
      prompt,
      generate.Sampling(**{**SETTINGS, **settings}),
      seed=3,
      index=index,
    )
    assert list(tokens) == wanted[index]
  assert any(response[-1] == EOS for response in wanted) or not temperature


def test_a_stream_is_the_same_on_a_mesh(model):
  policy, params = model
  mesh = mesh_lib.make_mesh({"data": 2, "fsdp": 2, "tensor": 2})
  placed = jax.device_put(params, partition_rules.param_shardings(params, mesh))
  settings = generate.Sampling(**SETTINGS)
  one = generate.stream(policy, params, PROMPTS[2], settings, seed=3)
  other = generate.stream(
    policy,
    placed,
    PROMPTS[2],
    settings,
    seed=3,
    rows=Placement(mesh).row_sharding,
  )
  assert list(one) == list(other)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_samples_are_the_same_on_a_mesh(model, temperature):
  """Prompts split over devices, parameters too."""
  policy, params = model
  wanted = sample(policy, params, PROMPTS, temperature=temperature)
  mesh = mesh_lib.make_mesh({"data": 2, "fsdp": 2, "tensor": 2})
  placement = Placement(mesh)
  placed = jax.device_put(params, partition_rules.param_shardings(params, mesh))
  # Three of them, on four devices that split rows.
  got = sample(
    policy,
    placed,
    PROMPTS[:3],
    temperature=temperature,
    rows=placement.row_sharding,
  )
  assert got == wanted[:3]


def test_any_of_several_stop_ids_ends_a_response(model):
  free = sample(*model, PROMPTS, temperature=0.0, stop_ids=(EOS,))
  stop = free[0][3]
  assert stop not in free[0][:3]
  ended = sample(*model, PROMPTS, temperature=0.0, stop_ids=(EOS, stop))
  assert ended[0] == free[0][:4]
