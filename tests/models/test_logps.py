"""Log-probs of scored tokens, against plain loops."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dpo_jax.models import logps as logps_lib
from dpo_jax.models.decoder import Readout
from tests import tiny


@functools.partial(jax.jit, static_argnums=0)
def all_logits(policy, params, tokens):
  positions = jnp.arange(tokens.shape[1])[None]
  hidden = policy.hidden_states(
    params, tokens, positions, jnp.ones_like(tokens), jnp.zeros_like(tokens)
  )
  return policy.readout(params).logits(hidden[0])


def loop_logps(policy, params, group):
  """log pi(y|x) of each response, each run by itself without packing."""
  prompt, *responses = group
  out = []
  for response in responses:
    tokens = np.zeros((1, 32), np.int32)
    length = len(prompt) + len(response)
    tokens[0, :length] = np.concatenate([prompt, response])
    logits = np.asarray(all_logits(policy, params, tokens), np.float64)
    logits -= logits.max(-1, keepdims=True)
    log_probs = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    places = np.arange(len(prompt), length)
    out.append(log_probs[places - 1, tokens[0, places]].sum())
  return out


@pytest.mark.parametrize("layout", ["shared", "packed", "padded"])
@pytest.mark.parametrize("num_slots", [1, 2, 3])
def test_packed_log_probs_equal_separate_forwards(layout, num_slots):
  policy = tiny.make_policy()
  params = tiny.make_params(policy)
  groups = tiny.make_groups(5, num_slots)
  batch = tiny.pack(groups, layout)
  logps = jax.jit(
    lambda p: logps_lib.response_logps(policy, p, batch, chunk_size=7)
  )(params)
  wanted = {i: loop_logps(policy, params, g) for i, g in enumerate(groups)}
  ids = batch.example_ids
  for r, g in np.argwhere(ids >= 0):
    np.testing.assert_allclose(logps[r, g], wanted[ids[r, g]], rtol=1e-5)
  assert np.all(np.asarray(logps)[ids < 0] == 0.0)


@pytest.mark.parametrize("chunk_size", [1, 5, 16, 1000])
def test_chunk_size_changes_nothing(chunk_size):
  keys = jax.random.split(jax.random.key(0), 3)
  hidden = jax.random.normal(keys[0], (2, 13, 8))
  kernel = jax.random.normal(keys[1], (8, 17))
  targets = jax.random.randint(keys[2], (2, 13), 0, 17)

  def total(hidden, kernel):
    logps = logps_lib.chunked_token_logps(
      hidden, Readout(kernel), targets, chunk_size=chunk_size
    )
    return (logps * jnp.arange(13.0)[None]).sum(), logps

  def whole(hidden, kernel):
    log_probs = jax.nn.log_softmax(hidden @ kernel)
    logps = jnp.take_along_axis(log_probs, targets[..., None], -1)[..., 0]
    return (logps * jnp.arange(13.0)[None]).sum(), logps

  for ours, theirs in zip(
    jax.value_and_grad(total, (0, 1), has_aux=True)(hidden, kernel),
    jax.value_and_grad(whole, (0, 1), has_aux=True)(hidden, kernel),
    strict=True,
  ):
    jax.tree.map(
      lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-5, atol=2e-5),
      ours,
      theirs,
    )


@pytest.mark.fault(23)
def test_bfloat16_states_get_a_float32_softmax():
  keys = jax.random.split(jax.random.key(0), 3)
  hidden = 3 * jax.random.normal(keys[0], (1, 64, 16), jnp.bfloat16)
  kernel = jax.random.normal(keys[1], (16, 4096), jnp.bfloat16)
  targets = jax.random.randint(keys[2], (1, 64), 0, 4096)
  logps = logps_lib.chunked_token_logps(
    hidden, Readout(kernel), targets, chunk_size=16
  )
  assert logps.dtype == jnp.float32
  logits = np.asarray(hidden, np.float64) @ np.asarray(kernel, np.float64)
  peak = logits.max(-1, keepdims=True)
  lse = peak[..., 0] + np.log(np.exp(logits - peak).sum(-1))
  wanted = np.take_along_axis(logits, targets[..., None], -1)[..., 0] - lse
  # A log-softmax in bfloat16 is off by 0.1 and more here.
  np.testing.assert_allclose(logps, wanted, atol=2e-3)


def test_sums_by_slot_equal_a_loop_and_drop_padding():
  rng = np.random.default_rng(0)
  values = rng.normal(size=(3, 20)).astype(np.float32)
  slots = rng.integers(0, 7, (3, 20)).astype(np.int32)  # 6 is padding
  sums = logps_lib.sum_by_slot(values, slots, (3, 2))
  wanted = np.zeros((3, 6))
  for r in range(3):
    for value, slot in zip(values[r], slots[r], strict=True):
      if slot < 6:
        wanted[r, slot] += value
  np.testing.assert_allclose(sums, wanted.reshape(3, 3, 2), rtol=1e-5)


@pytest.mark.parametrize("length", [16384, 16390])
def test_sum_over_a_long_response_is_accurate(length):
  rng = np.random.default_rng(0)
  values = (-10 - rng.random((4, length))).astype(np.float32)
  slots = np.ones((4, length), np.int32)
  total = logps_lib.sum_by_slot(values, slots, (1, 2))[:, 0, 1]
  total = np.asarray(total, np.float64)
  wanted = values.astype(np.float64).sum(1)
  # Added one by one, they are off by tens of units of the last place.
  error = np.abs(total - wanted) / np.spacing(np.abs(wanted).astype(np.float32))
  assert error.max() <= 2


def test_no_array_of_all_scored_positions_times_vocabulary():
  """Neither forward nor backward holds [S, V]."""
  policy = tiny.make_policy(vocab_size=1000)
  batch = tiny.pack(tiny.make_groups(5), num_tokens=512)
  params = policy.abstract_params()

  def loss(params):
    logps = logps_lib.response_logps(policy, params, batch, chunk_size=8)
    return logps.sum()

  text = jax.jit(jax.grad(loss)).lower(params).as_text()
  assert "x512x1000x" not in text
  assert "x8x1x1000x" in text
