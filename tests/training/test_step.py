"""Optional fields of a loss, and gradients over microbatches."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from dpo_jax import config as config_lib
from dpo_jax.config import default_config
from dpo_jax.losses import CATALOGUE, build_objective
from dpo_jax.models import partition_rules
from dpo_jax.models.config import ModelConfig
from dpo_jax.models.decoder import Policy
from dpo_jax.models.presets import PRESETS
from dpo_jax.parallel import mesh as mesh_lib
from dpo_jax.parallel.pmap import make_placement
from dpo_jax.training import forward, measure, reference
from dpo_jax.training import step as step_lib
from dpo_jax.types import TrainState
from tests import tiny

pytestmark = pytest.mark.usefixtures("unoptimized")

COUPLED = [n for n, row in CATALOGUE.items() if row.link_row.is_coupled]
WIDTH = {"single": 1, "pair": 2, "first": 1, "ranking": 2}


@functools.partial(jax.jit, static_argnums=0)
def log_probs(policy, params, tokens):
  positions = jnp.arange(tokens.shape[1])[None]
  hidden = policy.hidden_states(
    params, tokens, positions, jnp.ones_like(tokens), jnp.zeros_like(tokens)
  )
  return jax.nn.log_softmax(policy.readout(params).logits(hidden[0])), hidden[0]


def per_token(policy, params, prompt, response):
  """log-probs [n, V] before each token, and the last token's state."""
  tokens = np.zeros((1, 32), np.int32)
  length = len(prompt) + len(response)
  tokens[0, :length] = np.concatenate([prompt, response])
  logps, hidden = log_probs(policy, params, tokens)
  places = np.arange(len(prompt), length) - 1
  return np.asarray(logps, np.float64)[places], np.asarray(hidden)[length - 1]


@pytest.fixture(scope="module")
def model():
  policy = Policy(
    ModelConfig(vocab_size=96, value_head=True, **PRESETS["tiny"])
  )
  params = tiny.make_params(policy)
  params["value_head"] = jnp.linspace(-1, 1, policy.config.d_model)
  return policy, params, tiny.make_params(policy, seed=1)


def test_every_field_equals_a_loop(model):
  """head, sampled, alignment, complement, kl, values and the reference's."""
  policy, params, ref_params = model
  groups = tiny.make_groups(5)
  batch = tiny.pack(groups, token_masks=frozenset({"head", "sampled"}))
  needs = frozenset(
    {
      "head_logps",
      "ref_head_logps",
      "sampled_logps",
      "ref_sampled_logps",
      "alignment",
      "complement_logps",
      "kl",
      "values",
    }
  )
  figures = jax.jit(
    lambda p, r: forward.read_sequences(
      policy, p, r, batch, chunk_size=7, needs=needs
    )
  )(params, ref_params)
  ids = batch.example_ids.reshape(-1)
  num_slots = batch.valid.shape[2]
  for b in np.flatnonzero(ids >= 0):
    prompt, *responses = groups[ids[b]]
    shortest = min(map(len, responses))
    row, group = divmod(b, batch.valid.shape[1])
    for k, response in enumerate(responses):
      ours = {f: getattr(figures, f)[b, k] for f in needs}
      logps, state = per_token(policy, params, prompt, response)
      ref_logps, _ = per_token(policy, ref_params, prompt, response)
      at = np.arange(len(response)), response
      is_mine = batch.slots[row] == group * num_slots + k
      sampled = batch.token_masks["sampled"][row][is_mine]
      assert sampled.sum() == shortest
      wanted = {
        "head_logps": logps[at][:shortest].sum(),
        "ref_head_logps": ref_logps[at][:shortest].sum(),
        "sampled_logps": logps[at][sampled].sum(),
        "ref_sampled_logps": ref_logps[at][sampled].sum(),
        "alignment": np.mean(logps[at] - np.log((np.exp(logps) ** 2).sum(-1))),
        "complement_logps": np.log1p(-np.exp(logps[at])).sum(),
        "kl": (np.exp(ref_logps) * (ref_logps - logps)).sum(),
        "values": float(state @ np.asarray(params["value_head"])),
      }
      for name, figure in wanted.items():
        np.testing.assert_allclose(
          ours[name], figure, rtol=2e-4, atol=2e-4, err_msg=name
        )
      np.testing.assert_allclose(
        figures.ref_logps[b, k], ref_logps[at].sum(), rtol=1e-4
      )


def test_no_gradient_reaches_the_reference_or_the_weights_of_wpo(model):
  policy, params, ref_params = model
  batch = tiny.pack(tiny.make_groups(3))

  def field(params, ref_params, name):
    sequences = forward.read_sequences(
      policy,
      params,
      ref_params,
      batch,
      chunk_size=8,
      needs=frozenset({"kl", "alignment"}),
    )
    return getattr(sequences, name).sum()

  for name in ("kl", "ref_logps"):
    grads = jax.grad(field, 1)(params, ref_params, name)
    assert all(not jnp.any(g) for g in jax.tree.leaves(grads))
  grads = jax.grad(field, 0)(params, ref_params, "alignment")
  assert all(not jnp.any(g) for g in jax.tree.leaves(grads))
  grads = jax.grad(field, 0)(params, ref_params, "kl")
  assert any(jnp.any(g) for g in jax.tree.leaves(grads))


def test_the_mismatched_slot_is_taken_off(model):
  policy, params, _ = model
  ref_logps = np.arange(8, dtype=np.float32).reshape(4, 2) - 20
  batch = tiny.pack(tiny.make_groups(4), ref_logps=ref_logps)
  sequences = forward.read_sequences(
    policy,
    params,
    None,
    batch,
    chunk_size=8,
    needs=frozenset({"mismatched_logps", "mismatched_ref_logps"}),
  )
  plain = forward.read_sequences(policy, params, None, batch, chunk_size=8)
  assert sequences.logps.shape[1] == sequences.valid.shape[1] == 1
  np.testing.assert_array_equal(sequences.mismatched_logps, plain.logps[:, 1])
  np.testing.assert_array_equal(
    sequences.mismatched_ref_logps, plain.ref_logps[:, 1]
  )


def one_step(loss, *, devices=1, parts=1, parallelism="jit"):
  """Loss, gradient norm, parameters and loss state after two SGD steps."""
  sizes = {"data": devices, "fsdp": 1, "tensor": 1}
  mesh = mesh_lib.make_mesh(sizes, jax.devices()[:devices])
  placement = make_placement(mesh, parallelism)
  objective = build_objective(loss)
  width = WIDTH[objective.group] + ("mismatched_logps" in objective.needs)
  groups = tiny.make_groups(28, width)
  ref_logps = np.random.default_rng(1).normal(-30, 3, (28, width))
  batch = tiny.pack(groups, num_rows=16, ref_logps=ref_logps.astype(np.float32))
  if objective.group == "single":  # labels by turns
    labels = (batch.example_ids % 2).astype(np.float32)[..., None]
    batch = batch.replace(score=np.broadcast_to(labels, batch.score.shape))
  policy = tiny.make_policy()
  params = tiny.make_params(policy)
  optimizer = optax.sgd(1e-3)
  state = TrainState(
    step=jnp.zeros((), jnp.int32),
    params=params,
    opt_state=optimizer.init(params),
    loss_state=objective.init(),
  )
  shardings = partition_rules.state_shardings(state, params, placement.mesh)
  state = placement.place_state(jax.device_put(state, shardings))
  step = step_lib.make_train_step(
    policy,
    objective,
    optimizer,
    optax.constant_schedule(1e-3),
    accumulation_steps=parts,
    chunk_size=16,
    axis_name=placement.axis_name,
  )
  step = placement.bind(placement.compile_step(step, shardings))
  batch = placement.place_training_batch(batch)
  history = []
  for _ in range(2):
    state, metrics, (sequences, _) = step(state, batch)
    logps = placement.gather_rows(sequences.logps)
    history.append({**placement.fetch(metrics), "logps": logps})
  return history, jax.device_get((state.params, state.loss_state))


@pytest.mark.parametrize("devices", [1, 8])
def test_metrics_of_a_step_are_means_over_its_groups(devices):
  (first, _), _ = one_step({"name": "dpo", "beta": 0.1}, devices=devices)
  ref_logps = np.random.default_rng(1).normal(-30, 3, (28, 2))
  batch = tiny.pack(
    tiny.make_groups(28, 2),
    num_rows=16,
    ref_logps=ref_logps.astype(np.float32),
  )
  is_group = batch.example_ids.reshape(-1) >= 0
  assert is_group.sum() == 28
  logps = first["logps"].reshape(-1, 2)[is_group].astype(np.float64)
  theirs = batch.ref_logps.reshape(-1, 2)[is_group].astype(np.float64)
  rewards = 0.1 * (logps - theirs)
  margins = rewards[:, 0] - rewards[:, 1]
  for name, wanted in (
    ("loss", np.log1p(np.exp(-margins))),
    ("reward/accuracy", margins > 0),
    ("reward/margin", margins),
    ("logps/chosen", logps[:, 0]),
  ):
    np.testing.assert_allclose(first[name], wanted.mean(), rtol=1e-4)


# By kind of group, in one program: its metrics have the loss of each. DPO is
# not coupled.
LISTS = {
  kind: [
    {"name": name, "weight": 1 / (i + 3)}
    for i, name in enumerate(
      n for n in (*COUPLED, "dpo") if CATALOGUE[n].group == kind
    )
  ]
  for kind in ("pair", "single")
}


@pytest.mark.slow
@pytest.mark.parametrize("kind", LISTS)
def test_batch_coupled_losses_do_not_see_devices_or_parts(kind):
  loss = LISTS[kind]
  history, (params, loss_state) = one_step(loss)
  assert {f"loss/{term['name']}" for term in loss} <= history[0].keys()
  for kwargs in ({"devices": 8}, {"devices": 4, "parts": 4}):
    other, (other_params, other_state) = one_step(loss, **kwargs)
    for a, b in zip(history, other, strict=True):
      assert a.keys() == b.keys()
      for name in a:
        np.testing.assert_allclose(
          a[name], b[name], rtol=3e-5, atol=1e-5, err_msg=f"{name} {kwargs}"
        )
    same = functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-5)
    jax.tree.map(same, params, other_params)
    jax.tree.map(same, loss_state, other_state)


@pytest.mark.parametrize("name", COUPLED)
def test_pmap_refuses_them_by_name(name):
  with pytest.raises(ValueError, match=f"loss '{name}' couples the groups"):
    one_step({"name": name}, devices=8, parallelism="pmap")


def resolve(loss="dpo", **settings):
  config = default_config()
  config.loss.name = loss
  config.reference.update(settings)
  return config_lib.resolve(config).reference


def test_the_reference_follows_softly_or_hard():
  """Every second step: alpha * policy + (1 - alpha) * reference."""
  old, new = {"w": jnp.array([1.0, 2.0])}, {"w": jnp.array([3.0, 6.0])}
  for alpha, wanted in ((0.25, [1.5, 3.0]), (1.0, [3.0, 6.0])):
    update = reference.make_update(
      resolve(kind="ema", alpha=alpha, every_steps=2)
    )
    still = update(old, new, jnp.int32(3))
    np.testing.assert_array_equal(still["w"], old["w"])
    moved = update(old, new, jnp.int32(4))
    np.testing.assert_allclose(moved["w"], wanted)
  assert reference.make_update(resolve(kind="frozen")) is None


def test_the_reference_is_moved_by_the_steps_that_are_taken():
  """After the fourth step, from state.step 3, it is given 4."""
  params = {"w": jnp.ones(2)}
  optimizer = optax.sgd(0.5)
  state = TrainState(
    step=jnp.int32(3),
    params=params,
    opt_state=optimizer.init(params),
    ref_params={"w": jnp.zeros(2)},
  )

  def update(ref_params, params, step):
    return {"w": ref_params["w"] + params["w"] * step}

  after = step_lib._apply_gradients(state, params, optimizer, update)
  np.testing.assert_array_equal(after.params["w"], [0.5, 0.5])
  np.testing.assert_array_equal(after.ref_params["w"], [2.0, 2.0])
  assert after.step == 4


@pytest.mark.parametrize(
  ("loss", "settings", "kind"),
  [
    ("dpo", {}, "cached"),
    ("sft", {}, "none"),
    ("simpo", {}, "none"),
    ("tdpo", {}, "frozen"),
    ("ld_dpo", {}, "frozen"),
    ("kto", {}, "cached"),
    ("dpo", {"kind": "ema"}, "ema"),
  ],
)
def test_the_kind_of_reference_follows_from_the_loss(loss, settings, kind):
  assert resolve(loss, **settings).kind == kind


@pytest.mark.parametrize(
  ("loss", "settings", "message"),
  [
    ("dpo", {"kind": "frosen"}, "must be one of"),
    ("dpo", {"kind": "none"}, "compares with a reference"),
    ("tdpo", {"kind": "cached"}, "reads kl, and a cache holds"),
    ("dpo", {"kind": "cached", "alpha": 0.5}, "only reference.kind='ema'"),
    ("dpo", {"every_steps": 5}, "only reference.kind='ema'"),
    ("dpo", {"kind": "ema", "alpha": 0.0}, r"alpha=0.0 is outside \(0, 1\]"),
    ("dpo", {"kind": "ema", "every_steps": 0}, r"outside \[1, inf"),
  ],
  ids=str,
)
def test_references_that_cannot_be_are_refused(loss, settings, message):
  with pytest.raises(ValueError, match=message):
    resolve(loss, **settings)


def test_a_gradient_weight_is_of_all_sums_that_a_loss_reads():
  """If every sum has every token, these losses have the weight of DPO."""
  sequences = tiny.make_sequences(2)
  sequences = sequences.replace(
    head_logps=sequences.logps,
    ref_head_logps=sequences.ref_logps,
    sampled_logps=sequences.logps,
    ref_sampled_logps=sequences.ref_logps,
  )
  weights = {
    name: measure.measure(build_objective({"name": name}), sequences)[
      f"{name}/gradient_weight"
    ]
    for name in ("dpo", "ld_dpo", "sampo", "reward_model")
  }
  assert (weights["dpo"] > 0).all()
  np.testing.assert_allclose(weights["ld_dpo"], weights["dpo"], rtol=1e-5)
  np.testing.assert_allclose(weights["sampo"], weights["dpo"], rtol=1e-5)
  values = np.asarray(sequences.values, np.float64)
  np.testing.assert_allclose(
    weights["reward_model"],
    1 / (1 + np.exp(values[:, 0] - values[:, 1])),
    rtol=1e-5,
  )


def test_other_losses_come_from_the_same_forward_pass(model):
  """Their figures equal those of each loss by itself."""
  policy, params, ref_params = model
  batch = tiny.pack(tiny.make_groups(6))
  others = [
    build_objective({"name": n}) for n in ("ipo", "hinge", "tdpo", "aot")
  ]
  step = forward.make_eval_step(
    policy, chunk_size=16, needs=frozenset({"ref_logps", "kl"})
  )
  sequences = jax.jit(step)(params, ref_params, batch)
  measure_all = measure.make_measure(build_objective({"name": "dpo"}), others)
  _, metrics, _ = measure_all(sequences, ())
  is_valid = np.asarray(sequences.valid.all(1))
  for other in others:
    per_group, own, _ = other.apply(sequences, other.init())
    per_group = np.broadcast_to(per_group, is_valid.shape)
    np.testing.assert_allclose(
      metrics[f"{other.name}/loss"][is_valid], per_group[is_valid], rtol=1e-5
    )
    np.testing.assert_allclose(
      metrics[f"{other.name}/margin"][is_valid],
      own["reward/margin"][is_valid],
      rtol=1e-5,
    )
  # The gradient weight of IPO is 2 |D - 1 / (2 tau)|.
  log_ratios = np.asarray(sequences.logps - sequences.ref_logps, np.float64)
  margin = log_ratios[:, 0] - log_ratios[:, 1]
  np.testing.assert_allclose(
    metrics["ipo/gradient_weight"][is_valid],
    2 * np.abs(margin - 5.0)[is_valid],
    rtol=1e-4,
  )


def test_the_step_s_parts_are_named_for_the_profiler():
  policy = tiny.make_policy()
  params = tiny.make_params(policy)
  optimizer = optax.sgd(1e-3)
  objective = build_objective({"name": "dpo"})
  step = step_lib.make_train_step(
    policy,
    objective,
    optimizer,
    optax.constant_schedule(1e-3),
    accumulation_steps=1,
    chunk_size=16,
    axis_name=None,
  )
  state = TrainState(
    step=jnp.zeros((), jnp.int32),
    params=params,
    opt_state=optimizer.init(params),
    loss_state=objective.init(),
    ref_params=params,
  )
  lowered = jax.jit(step).lower(state, tiny.pack(tiny.make_groups(4)))
  text = lowered.as_text(debug_info=True)
  for name in (
    "attention",
    "feed_forward",
    "vocabulary",
    "reference",
    "loss",
    "gradient",
    "optimizer",
  ):
    assert re.search(rf"[(/\"]{name}[)/]", text), name
