"""Losses and gradients equal those that TRL computes: tests/golden/make.py."""

import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dpo_jax.losses import build_objective
from dpo_jax.types import Sequences

_GOLDEN = json.loads(
  pathlib.Path(__file__)
  .parents[1]
  .joinpath("golden", "losses.json")
  .read_text()
)
CASES = _GOLDEN["cases"]


def name_of(case):
  knobs = ",".join(f"{k}={v}" for k, v in case["knobs"].items())
  return f"{case['name']}:{knobs}"


@pytest.fixture(scope="module")
def measured(unoptimized):
  """Losses of the golden pairs, and gradients of their sums, in float64."""

  def total(logps, sequences, case):
    objective = build_objective({"name": case["name"], **case["knobs"]})
    moved = sequences.replace(logps=logps)
    losses = objective.apply(moved, objective.init())[0]
    return losses.sum(), losses

  @jax.jit
  def measure(sequences):
    return {
      name_of(case): jax.grad(total, has_aux=True)(
        sequences.logps, sequences, case
      )
      for case in CASES
    }

  with jax.enable_x64(True):
    fields = {
      name: jnp.asarray(value, jnp.float64)
      for name, value in _GOLDEN["fields"].items()
    }
    shape = fields["logps"].shape
    return measure(
      Sequences(**fields, score=jnp.zeros(shape), valid=jnp.ones(shape, bool))
    )


@pytest.mark.parametrize("case", CASES, ids=name_of)
def test_losses_equal_those_of_trl(case, measured):
  _, losses = measured[name_of(case)]
  np.testing.assert_allclose(losses, case["losses"], rtol=1e-5)


@pytest.mark.parametrize(
  "case", [c for c in CASES if c["gradient"] is not None], ids=name_of
)
def test_gradients_equal_those_of_trl(case, measured):
  gradient, _ = measured[name_of(case)]
  np.testing.assert_allclose(gradient, case["gradient"], rtol=1e-5, atol=1e-9)


def test_the_pairs_have_losses_that_differ():
  """Equal losses would not tell one pair from another."""
  for case in CASES:
    if case["gradient"] is not None and not case["name"].startswith("aot"):
      assert len(set(np.round(case["losses"], 6))) > 3, name_of(case)
