"""The losses as functions of arrays: values, gradients and what they refuse."""

import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dpo_jax import losses
from dpo_jax.losses import CATALOGUE, KNOBS, build_objective
from dpo_jax.losses.arrays import ARGUMENTS
from tests.losses import oracles
from tests.losses.cases import KEYS, NAMES, VARIANTS, WIDTH, as_groups
from tests.tiny import make_sequences

FUNCTIONS = [n for n in NAMES if not CATALOGUE[n].is_coupled]
CASES = [(name, knobs) for name, knobs in VARIANTS if name in FUNCTIONS]
# Fields that carry a gradient; the others are data.
TRAINED = (
  "logps",
  "head_logps",
  "sampled_logps",
  "values",
  "token_logps",
  "token_values",
)


def function_of(name):
  return getattr(losses, f"{name}_loss")


def arrays_of(name, sequences, knobs):
  """Arguments of a loss's function, by name, from the fields of sequences."""
  row = CATALOGUE[name]
  known = ARGUMENTS[row.group]
  arrays = {}
  for key in inspect.signature(function_of(name)).parameters:
    if key in known and row.is_read(known[key].field, row.defaults | knobs):
      array = getattr(sequences, known[key].field)
      if known[key].slot is not None:
        array = array[:, known[key].slot]
      is_label = known[key].is_bool and array.dtype != bool
      arrays[key] = array > 0.5 if is_label else array
  return arrays


def case(name, knobs, scale=5.0):
  sequences = make_sequences(WIDTH[CATALOGUE[name].group], scale=scale)
  return sequences, arrays_of(name, sequences, knobs)


def differences(name, groups, knobs, field, slot):
  """Gradient of the oracle's sum by central differences: f64, slot's shape."""
  key, step = KEYS[field], 1e-5

  def total():
    return sum(oracles.loss(name, groups, knobs))

  def slope(values, i):
    was = values[i]
    values[i] = was + step
    above = total()
    values[i] = was - step
    below = total()
    values[i] = was
    return (above - below) / (2 * step)

  if slot is not None:
    return np.array([slope(group[key], slot) for group in groups])
  return np.array(
    [
      [
        [slope(row, i) for i in range(len(row))]
        if isinstance(row, list)
        else slope(group[key], k)
        for k, row in enumerate(group[key])
      ]
      for group in groups
    ]
  )


def test_every_loss_of_single_groups_has_a_function():
  found = {n.removesuffix("_loss") for n in losses.functions.__all__}
  assert found == set(FUNCTIONS)
  assert found <= {n.removesuffix("_loss") for n in dir(losses)}
  assert set(CATALOGUE) - found == {
    "aot",
    "aot_unpaired",
    "bco",
    "bco_pair",
    "beta_dpo",
    "kto",
  }


@pytest.mark.parametrize("name", FUNCTIONS)
def test_defaults_are_those_of_the_catalogue(name):
  parameters = inspect.signature(function_of(name)).parameters
  defaults = {k: p.default for k, p in parameters.items() if k in KNOBS}
  extra = {"label_smoothing": 0.0} if name == "dpo" else {}
  assert defaults == CATALOGUE[name].defaults | extra
  for key in defaults:
    assert parameters[key].kind is inspect.Parameter.KEYWORD_ONLY


@pytest.mark.parametrize(("name", "knobs"), CASES, ids=str)
def test_values_equal_a_float64_loop(name, knobs):
  sequences, arrays = case(name, knobs)
  ours = function_of(name)(**arrays, **knobs)
  assert ours.dtype == jnp.float32
  wanted = oracles.loss(
    name, as_groups(sequences), CATALOGUE[name].defaults | knobs
  )
  np.testing.assert_allclose(ours, wanted, rtol=1e-5, atol=2e-6)


@pytest.mark.parametrize(("name", "knobs"), CASES, ids=str)
def test_values_equal_those_in_training_bit_for_bit(name, knobs):
  sequences, arrays = case(name, knobs)
  objective = build_objective({"name": name, **knobs})
  np.testing.assert_array_equal(
    function_of(name)(**arrays, **knobs), objective.apply(sequences, ())[0]
  )


def traced_knobs(name, knobs):
  """Values of the knobs that a loss reads and that may be traced."""
  full, row = CATALOGUE[name].defaults | knobs, CATALOGUE[name]
  return {
    k: v
    for k, v in full.items()
    if KNOBS[k].type is float and row.is_read(k, full)
  }


@pytest.fixture(scope="module")
def compiled(unoptimized):
  """By case: (value, gradients by arrays), and gradients by knobs.

  In one program, as one for each case takes longer to compile.
  """

  def measure(name, knobs, arrays, values):
    known = ARGUMENTS[CATALOGUE[name].group]
    trained = {k: a for k, a in arrays.items() if known[k].field in TRAINED}
    fixed = {k: v for k, v in knobs.items() if k not in values}

    def by_arrays(trained):
      return function_of(name)(**(arrays | trained), **knobs).sum()

    def by_knobs(values):
      return function_of(name)(**arrays, **fixed, **values).sum()

    return jax.value_and_grad(by_arrays)(trained), jax.grad(by_knobs)(values)

  @jax.jit
  def measure_all(inputs):
    return {
      f"{name}-{knobs}": measure(name, knobs, *inputs[f"{name}-{knobs}"])
      for name, knobs in CASES
    }

  return measure_all(
    {
      f"{name}-{knobs}": (
        case(name, knobs, scale=1.0)[1],
        traced_knobs(name, knobs),
      )
      for name, knobs in CASES
    }
  )


@pytest.mark.parametrize(("name", "knobs"), CASES, ids=str)
def test_gradients_under_jit_equal_finite_differences(compiled, name, knobs):
  """By every array that depends on the policy; values under jit too."""
  sequences, arrays = case(name, knobs, scale=1.0)
  known = ARGUMENTS[CATALOGUE[name].group]
  (value, gradients), _ = compiled[f"{name}-{knobs}"]
  assert gradients
  eager = function_of(name)(**arrays, **knobs).sum()
  np.testing.assert_allclose(value, eager, rtol=1e-5)
  groups, full = as_groups(sequences), CATALOGUE[name].defaults | knobs
  for key, gradient in gradients.items():
    argument = known[key]
    wanted = differences(name, groups, full, argument.field, argument.slot)
    np.testing.assert_allclose(
      gradient, wanted, rtol=1e-3, atol=2e-5, err_msg=key
    )


@pytest.mark.parametrize(("name", "knobs"), CASES, ids=str)
def test_gradients_by_knobs_equal_finite_differences(compiled, name, knobs):
  """A knob may be traced; flags and names may not."""
  sequences, _ = case(name, knobs, scale=1.0)
  groups, full = as_groups(sequences), CATALOGUE[name].defaults | knobs
  _, slopes = compiled[f"{name}-{knobs}"]
  for key, value in traced_knobs(name, knobs).items():
    step = 1e-6 * value or 1e-6
    above = sum(oracles.loss(name, groups, full | {key: value + step}))
    below = sum(oracles.loss(name, groups, full | {key: value - step}))
    wanted = (above - below) / (2 * step)
    np.testing.assert_allclose(
      slopes[key], wanted, rtol=2e-4, atol=1e-4, err_msg=key
    )


def test_gradient_by_label_smoothing_equals_a_finite_difference():
  sequences, arrays = case("dpo", {})
  slope = jax.jit(
    jax.grad(lambda e: losses.dpo_loss(**arrays, label_smoothing=e).sum())
  )(0.1)
  groups = as_groups(sequences)
  above, below = (
    sum(oracles.loss("cdpo", groups, {"beta": 0.1, "label_smoothing": e}))
    for e in (0.101, 0.099)
  )
  np.testing.assert_allclose(slope, (above - below) / 0.002, rtol=1e-4)


def test_slots_without_a_response_change_nothing():
  sequences, arrays = case("plackett_luce", {})
  valid = sequences.valid.at[0, 3].set(False)
  arrays |= {k: v.at[0, 3].set(jnp.nan) for k, v in arrays.items()}
  ours = losses.plackett_luce_loss(**arrays, valid=valid)
  shorter = {k: v[:1, :3] for k, v in arrays.items()}
  wanted = losses.plackett_luce_loss(**shorter)
  np.testing.assert_allclose(ours[0], wanted[0], rtol=1e-6)
  assert jnp.isfinite(ours).all()


@pytest.mark.parametrize(
  ("knobs", "message"),
  [
    ({"beta": 0.0}, r"beta=0.0 is outside \(0, inf\)"),
    ({"beta": -1.0}, "beta=-1.0"),
    ({"beta": float("nan")}, "beta=nan"),
    ({"beta": 0.1, "label_smoothing": 0.5}, r"0.5 is outside \[0, 0.5\)"),
    ({"beta": 0.1, "label_smoothing": -0.1}, "label_smoothing=-0.1"),
  ],
)
def test_knobs_out_of_range_are_refused(knobs, message):
  with pytest.raises(ValueError, match=message):
    losses.dpo_loss(*[jnp.zeros(2)] * 4, **knobs)


@pytest.mark.parametrize(
  ("call", "message"),
  [
    (
      lambda x: losses.dpo_loss(x, x, x, x[:, None]),
      r"ref_rejected_logps must have the shape \[3\]; got \[3, 1\]",
    ),
    (
      lambda x: losses.dpo_loss(x, x, x[:2], x),
      r"ref_chosen_logps must have the shape \[3\]; got \[2\]",
    ),
    (
      lambda x: losses.dpo_loss(x, x, x, x > 0),
      "ref_rejected_logps must be float; got bool",
    ),
    (
      lambda x: losses.apo_zero_unpaired_loss(x, x, x),
      "labels must be bool; got float32",
    ),
    (
      lambda x: losses.ipo_loss(x, x, x, x, length_normalize=True),
      "chosen_num_tokens is missing: the loss reads it with length_normalize",
    ),
    (
      lambda x: losses.ipo_loss(x, x, x, x, x, x),
      "chosen_num_tokens is given, but .* only with length_normalize=True",
    ),
    (
      lambda x: losses.dpo_loss(None, x, x, x),
      "policy_chosen_logps is missing: the loss reads it$",
    ),
    (
      lambda x: losses.unlikelihood_loss(x, x, token_level=True),
      "rejected_complement_logps is missing",
    ),
    (
      lambda x: losses.reward_model_loss(x[:, None], x[:, None]),
      "groups of 2 or more responses",
    ),
    (
      lambda x: losses.reward_model_loss(
        jnp.zeros((3, 2)), jnp.zeros((3, 2)), valid=x > 0
      ),
      r"valid must be bool \[3, 2\]; got bool \[3\]",
    ),
    (
      lambda x: losses.f_dpo_loss(x, x, x, x, divergence="tv"),
      "must be one of reverse_kl",
    ),
    (lambda x: losses.exo_loss(x, x, x, x, label_smoothing=0.0), "infinite"),
    (lambda x: losses.dpo_loss(x, x, x, x, beta="0.1"), "must be a number"),
  ],
)
def test_bad_arguments_are_refused(call, message):
  with pytest.raises(ValueError, match=message):
    call(jnp.zeros(3))


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.int32, np.float64])
def test_losses_are_float32_whatever_is_given(dtype):
  x = np.zeros(3).astype(dtype)
  loss = losses.dpo_loss(x, x, x, x, beta=np.float32(0.1))
  assert loss.dtype == jnp.float32
  np.testing.assert_allclose(loss, np.log(2.0), rtol=1e-6)


def test_dpo_loss_by_hand():
  """beta 0.5, log-ratios 2 and -2: -log sigmoid(2) = 0.126928."""
  loss = losses.dpo_loss(
    jnp.array([-1.0]),
    jnp.array([-7.0]),
    jnp.array([-3.0]),
    jnp.array([-5.0]),
    beta=0.5,
  )
  np.testing.assert_allclose(loss, [0.126928], rtol=1e-5)
  smoothed = losses.dpo_loss(
    jnp.array([-1.0]),
    jnp.array([-7.0]),
    jnp.array([-3.0]),
    jnp.array([-5.0]),
    beta=0.5,
    label_smoothing=0.25,
  )
  # 0.75 * 0.126928 + 0.25 * 2.126928
  np.testing.assert_allclose(smoothed, [0.626928], rtol=1e-5)


def test_gradient_weight_of_dpo_is_that_of_the_paper():
  """d loss / d lp_w = -beta sigmoid(-beta D): 2305.18290, sec. 4."""
  rng = np.random.default_rng(0)
  args = [jnp.asarray(rng.normal(-20, 3, 5), jnp.float32) for _ in range(4)]
  chosen, rejected = jax.grad(
    lambda w, x: losses.dpo_loss(w, x, *args[2:], beta=0.3).sum(), (0, 1)
  )(*args[:2])
  margin = np.asarray((args[0] - args[2]) - (args[1] - args[3]), np.float64)
  weight = 0.3 / (1 + np.exp(0.3 * margin))
  np.testing.assert_allclose(chosen, -weight, rtol=1e-4)
  np.testing.assert_allclose(rejected, weight, rtol=1e-4)
