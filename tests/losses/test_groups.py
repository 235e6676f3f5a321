"""Metrics of each kind of group, by hand."""

import jax.numpy as jnp
import numpy as np

from dpo_jax.losses.groups import GROUPS
from dpo_jax.types import Sequences


def sequences_of(score, valid):
  score = jnp.array(score, jnp.float32)
  zeros = jnp.zeros_like(score)
  return Sequences(
    logps=zeros, num_tokens=zeros + 1.0, score=score, valid=jnp.array(valid)
  )


def metrics_of(group, rewards, score, valid):
  values = {"reward": jnp.array(rewards, jnp.float32)}
  return GROUPS[group].metrics(values, sequences_of(score, valid))


def test_accuracy_leaves_out_pairs_of_equal_score():
  """Two of the three pairs count: the scores are 2, 1 and 1."""
  found = metrics_of(
    "ranking",
    rewards=[[1.0, 3.0, 0.0]],
    score=[[2.0, 1.0, 1.0]],
    valid=[[True, True, True]],
  )
  # The first loses to the second and beats the third; they are not compared.
  np.testing.assert_allclose(found["reward/accuracy"], [0.5])
  np.testing.assert_allclose(found["reward/rejected"], [1.5])
  np.testing.assert_allclose(found["reward/margin"], [-0.5])


def test_blank_slots_are_in_no_metric():
  """The second slot is blank; its reward is any number."""
  found = metrics_of(
    "ranking",
    rewards=[[1.0, 9.0, 0.5]],
    score=[[3.0, 0.0, 1.0]],
    valid=[[True, False, True]],
  )
  np.testing.assert_allclose(found["reward/accuracy"], [1.0])
  np.testing.assert_allclose(found["reward/rejected"], [0.5])
  found = metrics_of(
    "samples",
    rewards=[[1.0, 9.0, 0.5]],
    score=[[0.0, 0.0, 0.0]],
    valid=[[True, False, True]],
  )
  np.testing.assert_allclose(found["reward/mean"], [0.75])


def test_a_group_without_a_pair_has_no_accuracy():
  found = metrics_of(
    "ranking", rewards=[[1.0, 0.0]], score=[[1.0, 0.0]], valid=[[True, False]]
  )
  assert np.isnan(found["reward/accuracy"]).all()


def test_a_response_with_a_label_is_right_if_its_reward_has_that_sign():
  """A label of 1 wants a reward above 0, and a label of 0 one below."""
  found = metrics_of(
    "single",
    rewards=[[2.0], [-1.0], [3.0], [-4.0], [0.0]],
    score=[[1.0], [1.0], [0.0], [0.0], [0.0]],
    valid=[[True]] * 5,
  )
  np.testing.assert_array_equal(found["reward/accuracy"], [1, 0, 0, 1, 0.5])
  nan = np.nan
  np.testing.assert_array_equal(
    found["reward/chosen"], [2.0, -1.0, nan, nan, nan]
  )
  np.testing.assert_array_equal(
    found["reward/rejected"], [nan, nan, 3.0, -4.0, 0.0]
  )
