"""Minima of losses, compared with closed forms where all completions are known.

The population is pairs y, y' drawn from the reference and labelled by
Bradley-Terry on a reward. Its expected loss is a sum over all pairs, so the
objective itself is minimised, without sampling noise.
"""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from dpo_jax.losses import build_objective
from dpo_jax.models import logps as logps_lib
from dpo_jax.models.config import ModelConfig
from dpo_jax.models.decoder import Policy
from dpo_jax.types import Sequences
from tests import tiny

NUM = 12


def make_task(num=NUM, seed=0):
  """Returns log-probs of a reference, and rewards: f64 [num] each."""
  rng = np.random.default_rng(seed)
  ref_logps = rng.normal(0, 1, num)
  ref_logps -= np.log(np.exp(ref_logps).sum())
  return ref_logps, rng.normal(0, 1, num)


def population_loss(objective, logps, ref_logps, rewards, flips=0.0):
  """Computes the expected loss over ordered pairs of different completions."""
  num = logps.shape[0]
  first, second = np.nonzero(~np.eye(num, dtype=bool))
  sequences = Sequences(
    logps=jnp.stack([logps[first], logps[second]], 1),
    ref_logps=jnp.stack([ref_logps[first], ref_logps[second]], 1),
    num_tokens=jnp.ones((len(first), 2)),
    score=jnp.tile(jnp.array([[1.0, 0.0]]), (len(first), 1)),
    valid=jnp.ones((len(first), 2), bool),
  )
  wins = jax.nn.sigmoid(rewards[first] - rewards[second])
  wins = (1 - flips) * wins + flips * (1 - wins)
  weight = jnp.exp(ref_logps[first] + ref_logps[second]) * wins
  per_group, _, _ = objective.apply(sequences, objective.init())
  return (weight * per_group).sum()


def minimise(objective, ref_logps, rewards, flips=0.0):
  """Returns a softmax policy's probabilities at the minimum: f64 [N]."""
  with jax.enable_x64(True):
    ref_logps, rewards = jnp.asarray(ref_logps), jnp.asarray(rewards)

    def loss(logits):
      logps = jax.nn.log_softmax(logits)
      return population_loss(objective, logps, ref_logps, rewards, flips)

    optimizer = optax.lbfgs()
    value_and_grad = optax.value_and_grad_from_state(loss)

    @jax.jit
    def step(carry, _):
      logits, state = carry
      value, grad = value_and_grad(logits, state=state)
      updates, state = optimizer.update(
        grad, state, logits, value=value, grad=grad, value_fn=loss
      )
      return (optax.apply_updates(logits, updates), state), value

    carry = (ref_logps, optimizer.init(ref_logps))
    (logits, _), _ = jax.lax.scan(step, carry, None, length=200)
    return np.asarray(jax.nn.softmax(logits))


def total_variation(p, q):
  return 0.5 * np.abs(p - q).sum()


def tilted(ref_logps, scores):
  """Returns pi_ref exp(scores) / Z."""
  logits = ref_logps + scores
  weights = np.exp(logits - logits.max())
  return weights / weights.sum()


@pytest.mark.parametrize("beta", [0.3, 1.0, 3.0])
def test_dpo_finds_the_optimum_of_the_rlhf_objective(beta):
  ref_logps, rewards = make_task()
  found = minimise(
    build_objective({"name": "dpo", "beta": beta}), ref_logps, rewards
  )
  assert total_variation(found, tilted(ref_logps, rewards / beta)) < 1e-3


def bisect(function, low, high):
  for _ in range(200):
    middle = 0.5 * (low + high)
    low, high = (middle, high) if function(middle) > 0 else (low, middle)
  return 0.5 * (low + high)


@pytest.mark.parametrize(
  ("divergence", "inverse"),
  [
    ("reverse_kl", lambda t: np.exp(t)),
    ("forward_kl", lambda t: -1 / t),
    ("jensen_shannon", lambda t: np.exp(t) / (2 - np.exp(t))),
    ("alpha", lambda t: (1 - 0.5 * t) ** -2.0),
  ],
)
def test_f_dpo_finds_its_closed_form(divergence, inverse):
  """pi = pi_ref (f')^-1((r - lambda) / beta), lambda from sum pi = 1."""
  beta = 1.0
  ref_logps, rewards = make_task()
  ref = np.exp(ref_logps)
  top = {
    "reverse_kl": 700.0,
    "forward_kl": 0.0,
    "jensen_shannon": math.log(2),
    "alpha": 2.0,
  }[divergence]

  def excess(shift):
    t = (rewards - shift) / beta
    return (ref * inverse(t)).sum() - 1.0

  low = rewards.max() - beta * top + 1e-9
  shift = bisect(excess, low, rewards.max() + 50.0)
  wanted = ref * inverse((rewards - shift) / beta)
  assert wanted.sum() == pytest.approx(1.0, abs=1e-6)
  found = minimise(
    build_objective({"name": "f_dpo", "divergence": divergence, "beta": beta}),
    ref_logps,
    rewards,
  )
  assert total_variation(found, wanted) < 2e-3


@pytest.mark.parametrize("tau", [0.2, 1.0])
def test_ipo_finds_its_population_optimum(tau):
  """pi proportional to pi_ref exp(E_y'[P(y beats y')] / tau).

  Azar et al. 2023, eq. 9 with the identity; y' from the reference. A pair of
  the same completion is a tie, which adds 1/2 and moves no difference.
  """
  ref_logps, rewards = make_task()
  wins = 1 / (1 + np.exp(rewards[None] - rewards[:, None]))
  preference = wins @ np.exp(ref_logps)
  found = minimise(
    build_objective({"name": "ipo", "tau": tau}), ref_logps, rewards
  )
  assert total_variation(found, tilted(ref_logps, preference / tau)) < 1e-3


def test_ipo_has_a_finite_optimum_where_dpo_has_none():
  """Two completions, one always preferred, uniform reference.

  Azar et al. 2023, sec. 5: IPO gives it sigmoid(1 / (2 tau)), whereas DPO's
  loss has no minimum.
  """
  ref_logps = np.log(np.array([0.5, 0.5]))
  rewards = np.array([60.0, 0.0])  # wins with probability 1 - 1e-26
  for tau in (0.25, 1.0):
    ipo = minimise(
      build_objective({"name": "ipo", "tau": tau}), ref_logps, rewards
    )
    assert ipo[0] == pytest.approx(1 / (1 + math.exp(-0.5 / tau)), abs=1e-6)
    dpo = minimise(
      build_objective({"name": "dpo", "beta": tau}), ref_logps, rewards
    )
    assert dpo[0] > 0.9999


def test_only_robust_dpo_finds_the_optimum_under_flips():
  """The rate of flips is 20 %; the optimum is that of clean labels."""
  e, beta = 0.2, 1.0
  ref_logps, rewards = make_task()
  clean = tilted(ref_logps, rewards / beta)
  regret = {}
  for name in ("dpo", "cdpo", "robust_dpo"):
    config = {"name": name, "beta": beta}
    if name != "dpo":
      config["label_smoothing"] = e
    found = minimise(build_objective(config), ref_logps, rewards, flips=e)
    regret[name] = beta * (found * np.log(found / clean)).sum()
  assert regret["robust_dpo"] < 1e-5
  assert regret["robust_dpo"] < regret["dpo"] < regret["cdpo"]


def test_expected_robust_loss_under_flips_is_the_clean_loss():
  e = 0.3
  ref_logps, rewards = (jnp.asarray(x, jnp.float32) for x in make_task())
  logps = jax.nn.log_softmax(ref_logps + jnp.linspace(-1, 1, NUM))
  robust = build_objective({"name": "robust_dpo", "label_smoothing": e})
  flipped = population_loss(robust, logps, ref_logps, rewards, flips=e)
  clean = population_loss(
    build_objective({"name": "dpo"}), logps, ref_logps, rewards
  )
  assert float(flipped) == pytest.approx(float(clean), rel=1e-5)


@pytest.mark.slow
def test_a_decoder_approaches_the_optimum_of_dpo():
  """All 64 completions of two tokens share one prompt in a row."""
  beta = 0.5
  policy = Policy(
    ModelConfig(
      vocab_size=8,
      d_model=32,
      num_layers=1,
      num_heads=2,
      num_kv_heads=2,
      head_dim=16,
      d_ff=64,
      max_positions=8,
    )
  )
  completions = np.stack(np.meshgrid(np.arange(8), np.arange(8)), -1)
  completions = completions.reshape(64, 2).astype(np.int32)
  prompt = np.array([3, 5], np.int32)
  batch = tiny.pack([[prompt, *completions]], num_tokens=130)
  params = policy.init(jax.random.key(0))
  rewards = jnp.asarray(np.random.default_rng(0).normal(0, 1, 64), jnp.float32)
  objective = build_objective({"name": "dpo", "beta": beta})

  def all_logps(params):
    return logps_lib.response_logps(policy, params, batch, chunk_size=128)[0, 0]

  ref_logps = jax.jit(all_logps)(params)
  assert float(jnp.exp(ref_logps).sum()) == pytest.approx(1.0, abs=1e-5)
  optimizer = optax.adam(optax.cosine_decay_schedule(1e-2, 1500))

  @jax.jit
  def step(carry, _):
    params, state = carry

    def loss(params):
      return population_loss(objective, all_logps(params), ref_logps, rewards)

    grads = jax.grad(loss)(params)
    updates, state = optimizer.update(grads, state)
    return (optax.apply_updates(params, updates), state), None

  carry = (params, optimizer.init(params))
  (params, _), _ = jax.lax.scan(step, carry, None, length=1500)
  logps, ref_logps, rewards = (
    np.asarray(x, np.float64) for x in (all_logps(params), ref_logps, rewards)
  )
  optimum = tilted(ref_logps, rewards / beta)
  before = total_variation(np.exp(ref_logps), optimum)
  after = total_variation(np.exp(logps), optimum)
  assert before > 0.3
  assert after < 0.02
  # J(pi*) - J(pi) = beta KL(pi || pi*), exactly.
  value = functools.partial(objective_value, ref_logps, rewards, beta)
  gap = value(np.log(optimum)) - value(logps)
  kl = (np.exp(logps) * (logps - np.log(optimum))).sum()
  assert gap == pytest.approx(beta * kl, abs=1e-5)


def objective_value(ref_logps, rewards, beta, logps):
  """Returns E[r] - beta KL(pi || pi_ref)."""
  probs = np.exp(logps)
  return (probs * (rewards - beta * (logps - ref_logps))).sum()
