"""The decoder: masks, dtypes, remat, cache."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dpo_jax.models import attention, layers, rotary
from dpo_jax.models.config import Lora
from tests import tiny


def test_mask_equals_its_definition():
  segments = np.array([[1, 1, 1, 1, 1, 2, 2, 2, 0, 0]])
  branches = np.array([[0, 0, 1, 2, 2, 0, 1, 1, 0, 0]])
  mask = np.asarray(attention.shared_prompt_mask(segments, branches))[0]
  for i in range(10):
    for j in range(10):
      sees = (
        j <= i
        and segments[0, i] == segments[0, j]
        and branches[0, j] in (0, branches[0, i])
      )
      assert mask[i, j] == sees, (i, j)
  assert mask.any(-1).all(), "a row that sees nothing has no softmax"


def rotate(x, *positions):
  by = rotary.rotation(jnp.array([positions]), x.shape[-1], 1e4, None)
  return rotary.rotate(x, by)


def test_rotation_is_relative():
  """Scores depend on the distance of positions, not on where they are."""
  keys = jax.random.split(jax.random.key(0))
  query = jax.random.normal(keys[0], (1, 1, 1, 16))
  key = jax.random.normal(keys[1], (1, 1, 1, 16))

  def score(i, j):
    a = rotate(query, i)
    b = rotate(key, j)
    return float((a * b).sum())

  assert score(7, 3) == pytest.approx(score(107, 103), abs=1e-4)
  assert score(7, 3) != pytest.approx(score(7, 4), abs=1e-3)


def test_large_positions_differ_in_bfloat16():
  x = jnp.ones((1, 2, 1, 16), jnp.bfloat16)
  turned = rotate(x, 1000, 1001)
  assert np.abs(np.asarray(turned[0, 0] - turned[0, 1], np.float32)).max() > 0.1


@pytest.mark.parametrize("remat", ["full", "attention", "dots"])
def test_remat_changes_no_gradient(remat):
  groups = tiny.make_groups(4)
  batch = tiny.pack(groups)
  base = tiny.make_policy()
  params = tiny.make_params(base)

  def grads(policy):
    def loss(params):
      hidden = policy.hidden_states(
        params, batch.tokens, batch.positions, batch.segments, batch.branches
      )
      return jnp.square(hidden).sum()

    return jax.jit(jax.grad(loss))(params)

  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4),
    grads(base),
    grads(tiny.make_policy(remat=remat)),
  )


def lower_gradient(**fields):
  """Lowers the gradient of a policy on packed rows."""
  batch = tiny.pack(tiny.make_groups(4))
  policy = tiny.make_policy(attention="xla", activation="relu", **fields)

  def loss(params):
    hidden = policy.hidden_states(
      params, batch.tokens, batch.positions, batch.segments, batch.branches
    )
    return jnp.square(hidden).sum()

  return jax.jit(jax.grad(loss)).lower(policy.abstract_params())


@pytest.mark.slow
def test_remat_keeps_attention():
  """Its softmax is not computed again; with `full` it is."""

  def num_exponentials(remat):
    text = lower_gradient(remat=remat).compile().as_text()
    return text.count(" exponential(")

  kept = num_exponentials("none")
  assert num_exponentials("dots") == num_exponentials("attention") == kept > 0
  assert num_exponentials("full") > kept


@pytest.mark.parametrize("lora", [None, Lora(rank=2, alpha=4.0)])
def test_remat_dots_keeps_projections(lora):
  """None is computed once more; of `attention` all are but the last."""

  def num_products(remat):
    text = lower_gradient(remat=remat, lora=lora).as_text()
    return text.count("stablehlo.dot_general")

  kept = num_products("none")
  assert num_products("dots") == kept > 0
  assert num_products("full") > num_products("attention") > kept


def test_parameters_are_counted():
  for tie in (True, False):
    policy = tiny.make_policy(tie_embeddings=tie)
    leaves = jax.tree.leaves(policy.abstract_params())
    assert sum(leaf.size for leaf in leaves) == policy.config.num_params()


def test_compute_dtype_is_that_of_hidden_states():
  policy = tiny.make_policy(compute_dtype="bfloat16")
  params = tiny.make_params(policy)
  batch = tiny.pack(tiny.make_groups(2))
  hidden = policy.hidden_states(
    params, batch.tokens, batch.positions, batch.segments, batch.branches
  )
  assert hidden.dtype == jnp.bfloat16
  assert jax.tree.leaves(params)[0].dtype == jnp.float32


@pytest.mark.parametrize(
  ("fields", "message"),
  [
    ({"num_kv_heads": 3}, "num_kv_heads=3"),
    ({"head_dim": 15}, "head_dim=15"),
    ({"remat": "some"}, "Known: 'none', 'dots', 'attention', 'full'"),
    ({"compute_dtype": "float16"}, "compute_dtype='float16'"),
  ],
)
def test_impossible_shapes_are_refused(fields, message):
  with pytest.raises(ValueError, match=message):
    tiny.make_policy(**fields)


@pytest.mark.parametrize("outputs", [(3,), (4, 8), (2, 5, 7)])
@pytest.mark.parametrize("inputs", [(6,), (2, 3)])
def test_projection_gradient_equals_autodiff(inputs, outputs):
  """And a sum over tokens begins with the smaller operand."""
  keys = jax.random.split(jax.random.key(0), 3)
  x = jax.random.normal(keys[0], (2, 11, *inputs))
  kernel = jax.random.normal(keys[1], inputs + outputs)
  gradient = jax.random.normal(keys[2], (2, 11, *outputs))

  def plain(x, kernel):
    return jnp.tensordot(x, kernel, len(inputs))

  def project(x, kernel):
    return layers.project(x, kernel, len(inputs), None)

  np.testing.assert_allclose(
    project(x, kernel), plain(x, kernel), rtol=1e-5, atol=1e-5
  )
  wanted = jax.vjp(plain, x, kernel)[1](gradient)
  found = jax.vjp(project, x, kernel)[1](gradient)
  for one, other in zip(found, wanted, strict=True):
    np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-5)
  backward = jax.make_jaxpr(lambda: jax.vjp(project, x, kernel)[1](gradient))()
  sums = [
    [int(np.prod(var.aval.shape)) for var in eqn.invars]
    for eqn in backward.jaxpr.eqns
    if eqn.primitive.name == "dot_general"
    and eqn.params["dimension_numbers"][0] == ((0, 1), (0, 1))
  ]
  assert len(sums) == 1
  assert sums[0][0] <= sums[0][1]
