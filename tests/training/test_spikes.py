"""Steps that spike are skipped: everything but the count of steps stays."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dpo_jax import config as config_lib
from dpo_jax.training.spikes import SpikeRule
from dpo_jax.types import TrainState
from tests import tiny


def make_state(rule, value):
  return TrainState(
    step=jnp.int32(value),
    params={"w": jnp.full(3, value, jnp.float32)},
    opt_state=(jnp.float32(value),),
    loss_state={"mean": jnp.float32(value)},
    ref_params={"w": jnp.full(3, -value, jnp.float32)},
    spikes=rule.init(),
  )


def take_steps(rule, norms):
  """Which steps are skipped, and the last metrics."""
  choose = jax.jit(rule.choose)
  state, skipped, metrics = make_state(rule, 0), [], {}
  for number, norm in enumerate(norms, 1):
    after = make_state(rule, number).replace(spikes=state.spikes)
    chosen, metrics = choose(state, after, jnp.float32(norm))
    is_skipped = float(chosen.params["w"][0]) != number
    other = state if is_skipped else after
    for name in ("params", "opt_state", "loss_state", "ref_params"):
      jax.tree.map(
        np.testing.assert_array_equal,
        getattr(chosen, name),
        getattr(other, name),
      )
    assert int(chosen.step) == number
    skipped.append(is_skipped)
    state = chosen
  return skipped, metrics


@pytest.mark.fault(30)
def test_a_spike_is_skipped_and_counted():
  skipped, metrics = take_steps(SpikeRule(3.0, 4), [1, 1.2, 1.1, 9, 1, 3.2])
  assert skipped == [False, False, False, True, False, False]
  assert float(metrics["skipped_steps"]) == 1.0
  # The upper median of 1.2, 1.1, 9 and 1, times the factor.
  assert float(metrics["spike_limit"]) == pytest.approx(3.6)


def test_no_step_is_skipped_before_half_of_the_window_is_known():
  skipped, _ = take_steps(SpikeRule(2.0, 4), [1, 10, 100])
  assert skipped == [False, False, False]


def test_norms_that_stay_large_are_followed():
  skipped, _ = take_steps(SpikeRule(2.0, 4), [1, 1, 1, 1, 10, 10, 10])
  assert skipped == [False] * 4 + [True, True, False]


def test_a_factor_that_skips_every_other_step_is_refused():
  config = tiny.make_config(numerics__skip_spikes=1.0)
  with pytest.raises(ValueError, match=r"skip_spikes=1\.0 would skip"):
    config_lib.resolve(config)
