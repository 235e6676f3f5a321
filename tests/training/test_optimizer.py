"""Schedules at hand-computed steps; optimizers against their formulas."""

import math

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import optax
import pytest

from dpo_jax.config import VALUES, default_config
from dpo_jax.training.optimizer import build_optimizer, build_schedule


def make_config(**fields) -> ml_collections.ConfigDict:
  config = default_config().optimizer
  config.update(
    learning_rate=1.0, warmup_steps=0, max_grad_norm=math.inf, b2=0.9
  )
  config.update(fields)
  return config


def rates(steps, total_steps=10, **fields):
  schedule = build_schedule(make_config(**fields), total_steps)
  return [float(schedule(step)) for step in steps]


def test_constant_schedule():
  assert rates([0, 1, 9], learning_rate=0.5, schedule="constant") == [0.5] * 3


def test_warm_up_rises_in_equal_parts_and_wastes_no_step():
  got = rates(range(7), schedule="constant", warmup_steps=4)
  np.testing.assert_allclose(got, [0.25, 0.5, 0.75, 1, 1, 1, 1], rtol=1e-6)


def test_a_warm_up_of_one_step_is_none():
  got = rates(range(3), schedule="constant", warmup_steps=1)
  np.testing.assert_allclose(got, [1, 1, 1])


def test_linear_schedule_falls_to_zero_at_the_end():
  got = rates([0, 1, 5, 9, 10], schedule="linear")
  np.testing.assert_allclose(got, [1, 0.9, 0.5, 0.1, 0], atol=1e-6)


def test_cosine_schedule_falls_to_zero_at_the_end():
  got = rates([0, 3, 5, 10], total_steps=10, schedule="cosine")
  wanted = [1, (1 + math.cos(0.3 * math.pi)) / 2, 0.5, 0]
  np.testing.assert_allclose(got, wanted, atol=1e-6)


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
def test_a_decay_starts_after_the_warm_up(schedule):
  got = rates(
    [0, 1, 2, 6, 10], schedule=schedule, warmup_steps=2, learning_rate=0.4
  )
  np.testing.assert_allclose(got, [0.2, 0.4, 0.4, 0.2, 0], atol=1e-6)


def test_a_constant_schedule_may_warm_up_for_longer_than_the_run():
  assert rates([4], total_steps=5, warmup_steps=150)[0] == pytest.approx(
    5 / 150
  )


SHAPES = {"layers": {"up": {"kernel": (2, 3, 4)}, "scale": (4,)}, "head": (4,)}


def make_tree(seed):
  rng = np.random.default_rng(seed)
  return jax.tree.map(
    lambda shape: rng.normal(size=shape).astype(np.float32),
    SHAPES,
    is_leaf=lambda x: isinstance(x, tuple),
  )


def train(config, num_steps, learning_rate=0.1, grads_scale=1.0):
  """Parameters after some steps on fixed gradients."""
  optimizer = build_optimizer(config, optax.constant_schedule(learning_rate))
  params = make_tree(0)
  state = optimizer.init(params)
  for step in range(num_steps):
    grads = jax.tree.map(lambda x: grads_scale * x, make_tree(1 + step))
    updates, state = optimizer.update(grads, state, params)
    params = optax.apply_updates(params, updates)
  return params


def follow(rule, num_steps, is_decayed=False):
  """The same with a numpy rule for one array: (p, g, memory, t) -> p."""
  trees = [make_tree(1 + step) for step in range(num_steps)]

  def run(path, p, *grads):
    memory = {}
    for t, g in enumerate(grads, 1):
      is_scale = "scale" in str(path[-1])
      decayed = p * (not is_scale) if is_decayed else 0.0 * p
      p = rule(p, np.asarray(g, np.float64), memory, t, decayed)
    return p

  return jax.tree_util.tree_map_with_path(
    run, jax.tree.map(lambda x: x.astype(np.float64), make_tree(0)), *trees
  )


def assert_same(got, wanted, tolerance=2e-5):
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(
      a, b, rtol=tolerance, atol=tolerance
    ),
    got,
    wanted,
  )


def adamw_rule(p, g, memory, t, decayed):
  # Loshchilov and Hutter 2019 (arXiv:1711.05101), algorithm 2.
  memory["m"] = 0.8 * memory.get("m", 0) + 0.2 * g
  memory["v"] = 0.9 * memory.get("v", 0) + 0.1 * g * g
  m, v = memory["m"] / (1 - 0.8**t), memory["v"] / (1 - 0.9**t)
  return p - 0.1 * (m / (np.sqrt(v) + 1e-3) + 0.3 * decayed)


def rmsprop_rule(p, g, memory, t, decayed):
  # torch.optim.RMSprop: alpha 0.99, epsilon outside the root, from zero.
  memory["v"] = 0.99 * memory.get("v", 0) + 0.01 * g * g
  return p - 0.1 * (g / (np.sqrt(memory["v"]) + 1e-3) + 0.3 * decayed)


def lion_rule(p, g, memory, t, decayed):
  # Chen et al. 2023 (arXiv:2302.06675), algorithm 2.
  m = memory.get("m", 0)
  memory["m"] = 0.9 * m + 0.1 * g
  return p - 0.1 * (np.sign(0.8 * m + 0.2 * g) + 0.3 * decayed)


RULES = {"adamw": adamw_rule, "rmsprop": rmsprop_rule, "lion": lion_rule}


@pytest.mark.parametrize("weight_decay", [0.0, 0.3])
@pytest.mark.parametrize("name", RULES)
def test_an_optimizer_follows_its_formula(name, weight_decay):
  # The weight of an array whose name ends in scale never decays.
  config = make_config(
    name=name, b1=0.8, epsilon=1e-3, weight_decay=weight_decay
  )
  wanted = follow(RULES[name], 5, is_decayed=weight_decay > 0)
  assert_same(train(config, 5), wanted)


def test_rmsprop_is_torchs():
  torch = pytest.importorskip("torch")
  params = [
    torch.nn.Parameter(torch.tensor(x)) for x in jax.tree.leaves(make_tree(0))
  ]
  optimizer = torch.optim.RMSprop(params, lr=0.1, eps=1e-3)
  for step in range(5):
    for p, g in zip(params, jax.tree.leaves(make_tree(1 + step)), strict=True):
      p.grad = torch.tensor(g)
    optimizer.step()
  got = jax.tree.leaves(train(make_config(name="rmsprop", epsilon=1e-3), 5))
  assert_same(got, [p.detach().numpy() for p in params])


def test_adafactor_first_step_has_unit_rms():
  # Shazeer and Stern 2018 (arXiv:1804.04235), algorithm 4 with small,
  # unfactored arrays: at t = 1 the second moment is g^2, so that the update
  # is sign(g), whose rms of 1 the clipping leaves alone.
  wanted = jax.tree.map(
    lambda p, g: p - 0.1 * np.sign(g), make_tree(0), make_tree(1)
  )
  assert_same(train(make_config(name="adafactor"), 1), wanted)


def test_adafactor_decays_by_the_learning_rate():
  before = make_tree(0)
  plain = train(make_config(name="adafactor"), 1)
  decayed = train(make_config(name="adafactor", weight_decay=0.3), 1)
  wanted = {
    "layers": {
      "up": {"kernel": 0.1 * 0.3 * before["layers"]["up"]["kernel"]},
      "scale": np.zeros(4),
    },
    "head": 0.1 * 0.3 * before["head"],
  }
  got = jax.tree.map(lambda a, b: a - b, plain, decayed)
  assert_same(got, wanted, tolerance=1e-6)


@pytest.mark.parametrize("name", VALUES["optimizer.name"].choices)
def test_no_gradient_and_no_decay_move_nothing(name):
  config = make_config(name=name)
  assert_same(train(config, 2, grads_scale=0.0), make_tree(0), tolerance=0)


# A layer's projections, its adapters and other leaves, with two layers.
MATRICES = {
  "query/kernel": ((2, 6, 2, 2), 1),
  "attention_out/kernel": ((2, 2, 2, 6), 2),
  "attention_out/lora_a": ((2, 2, 2, 3), 2),
  "attention_out/lora_b": ((2, 3, 6), 1),
  "key/lora_b": ((2, 3, 2, 2), 1),
  "down/kernel": ((2, 8, 6), 1),
}
OTHERS = {"embedding": (9, 6), "head": (6, 9), "value_head": (6,)}


def make_layers(seed):
  rng = np.random.default_rng(seed)
  layers: dict = {"norm": {"scale": rng.normal(size=(2, 6))}}
  for name, (shape, _) in MATRICES.items():
    projection, leaf = name.split("/")
    layers.setdefault(projection, {})[leaf] = rng.normal(size=shape)
  layers["query"]["bias"] = rng.normal(size=(2, 2, 2))
  others = {name: rng.normal(size=shape) for name, shape in OTHERS.items()}
  return jax.tree.map(np.float32, {"layers": layers, **others})


def orthogonalize(x):
  """Newton-Schulz of Jordan et al. 2024, in numpy."""
  x = x / np.linalg.norm(x)
  for _ in range(5):
    gram = x @ x.T
    x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
  return x


def muon_rule(p, grads, num_inputs):
  """Liu et al. 2025 (arXiv:2502.16982), eq. 4, of a matrix in each layer."""
  momentum, p = np.zeros_like(p), np.float64(p)
  for t, g in enumerate(grads, 1):
    momentum = 0.95 * momentum + 0.05 * g
    # Nesterov's, of moments that are corrected for their start at zero.
    ahead = 0.95 * momentum / (1 - 0.95 ** (t + 1))
    ahead += 0.05 * g / (1 - 0.95**t)
    for layer in range(len(p)):
      shape = p[layer].shape
      fan_in = math.prod(shape[:num_inputs])
      update = orthogonalize(ahead[layer].reshape(fan_in, -1))
      scale = 0.2 * math.sqrt(max(update.shape))
      p[layer] -= 0.1 * (scale * update.reshape(shape) + 0.3 * p[layer])
  return p


def test_muon_orthogonalizes_each_layers_matrices_and_leaves_adamw_the_rest():
  after = {}
  for name in ("muon", "adamw"):
    config = make_config(name=name, b1=0.8, epsilon=1e-3, weight_decay=0.3)
    optimizer = build_optimizer(config, optax.constant_schedule(0.1))
    params = make_layers(0)
    state = optimizer.init(params)
    for step in range(3):
      grads = make_layers(1 + step)
      updates, state = optimizer.update(grads, state, params)
      params = optax.apply_updates(params, updates)
    after[name] = params
  wanted = after["adamw"]
  trees = [make_layers(seed)["layers"] for seed in range(4)]
  for name, (_, num_inputs) in MATRICES.items():
    projection, leaf = name.split("/")
    p, *grads = (np.float64(tree[projection][leaf]) for tree in trees)
    wanted["layers"][projection][leaf] = muon_rule(p, grads, num_inputs)
  assert_same(after["muon"], wanted)


def test_gradients_are_clipped_by_their_global_norm():
  # With Adam's moments switched off (b1 = b2 = 0, large epsilon) the update
  # is the clipped gradient over epsilon.
  config = make_config(
    name="adamw", b1=0.0, b2=0.0, epsilon=1e6, max_grad_norm=0.5
  )
  grads = make_tree(1)
  norm = math.sqrt(sum(float((g**2).sum()) for g in jax.tree.leaves(grads)))
  assert norm > 1.0
  moved = jax.tree.map(
    lambda after, before: after - before,
    train(config, 1, learning_rate=1e6),
    make_tree(0),
  )
  wanted = jax.tree.map(lambda g: -g * 0.5 / norm, grads)
  assert_same(moved, wanted, tolerance=1e-5)


def test_a_small_gradient_is_not_clipped():
  config = make_config(name="adamw", b1=0.0, b2=0.0, epsilon=1e6)
  config.max_grad_norm = 1e3
  free = make_config(name="adamw", b1=0.0, b2=0.0, epsilon=1e6)
  assert_same(
    train(config, 1, learning_rate=1e6),
    train(free, 1, learning_rate=1e6),
    tolerance=0,
  )


def test_the_rate_of_the_schedule_is_the_rate_of_the_step():
  config = make_config(name="lion", schedule="linear", warmup_steps=2)
  optimizer = build_optimizer(config, build_schedule(config, 4))
  params = {"head": jnp.zeros(3)}
  state = optimizer.init(params)
  moved = []
  for _ in range(4):
    updates, state = optimizer.update({"head": jnp.ones(3)}, state, params)
    moved.append(float(updates["head"][0]))
  # Lion moves by exactly the learning rate.
  np.testing.assert_allclose(moved, [-0.5, -1.0, -1.0, -0.5], rtol=1e-6)
