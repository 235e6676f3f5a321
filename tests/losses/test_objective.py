"""build_objective: what it refuses, composes and counts."""

import functools

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import pytest

from dpo_jax.losses import build_objective, regularizers, with_sampled_kl
from dpo_jax.types import Sequences
from tests.tiny import make_sequences


def losses_of(objective, sequences):
  return objective.apply(sequences, objective.init())[0]


@pytest.mark.parametrize(
  ("config", "message"),
  [
    ({"name": "dpoo"}, "Did you mean 'dpo'"),
    ({"name": None}, "not in the catalogue"),
    ({"name": "dpo", "tau": 0.1}, "does not read it. It reads: beta"),
    ({"name": "dpo", "betta": 0.1}, "Did you mean 'beta'"),
    ({"name": "dpo", "beta": 0.0}, r"outside \(0, inf\)"),
    ({"name": "dpo", "beta": float("nan")}, r"outside \(0, inf\)"),
    ({"name": "dpo", "beta": -0.1}, r"outside \(0, inf\)"),
    ({"name": "dpo", "beta": float("inf")}, r"outside \(0, inf\)"),
    ({"name": "ipo", "tau": 0.0}, r"outside \(0, inf\)"),
    ({"name": "r_dpo", "alpha": float("inf")}, "is outside"),
    ({"name": "dpo", "beta": "0.1"}, "must be a number"),
    ({"name": "dpo", "label_smoothing": 0.1}, "does not read it"),
    ({"name": "cdpo", "label_smoothing": 0.5}, r"outside \[0, 0.5\)"),
    ({"name": "cdpo", "label_smoothing": -0.1}, r"outside \[0, 0.5\)"),
    ({"name": "exo", "label_smoothing": 0.0}, "infinite loss"),
    ({"name": "kto", "desirable_weight": -0.1}, r"outside \[0, inf\)"),
    ({"name": "ipo", "length_normalize": 1}, "must be True or False"),
    ({"name": "f_dpo", "divergence": "tv"}, "must be one of reverse_kl"),
    ({"name": "f_dpo", "alpha": 0.3}, "only with divergence='alpha'"),
    ({"name": "simper", "beta": 0.1}, "no hyper-parameters"),
    ({"name": "dpo", "reward": "logp"}, "Did you mean 'logps'"),
    ({"name": "dpo", "link": "nca"}, "is unknown"),
    ({"name": "dpo", "link": "noise_contrastive"}, "is a group link"),
    ({"name": "dpo", "link": "squared"}, "no default for tau"),
    # A reward and a link keep their ranges in another row.
    (
      {"name": "dpo", "link": "exact", "label_smoothing": 0.0},
      "infinite loss",
    ),
    (
      {
        "name": "dpo",
        "reward": "f_divergence",
        "divergence": "alpha",
        "alpha": 0.0,
      },
      r"outside \(0, 1\)",
    ),
    (
      {
        "name": "dpo",
        "reward": "f_divergence",
        "divergence": "forward_kl",
        "alpha": 0.5,
      },
      "only with divergence='alpha'",
    ),
    ({"name": "nca", "reward": "logps"}, "no such zero"),
    ({"name": "kto", "reward": "logps"}, "no such zero"),
    ({"name": "apo_zero", "reward": "logps"}, "no such zero"),
    ({"name": "bco_pair", "reward": "logps"}, "no such zero"),
    ({"name": "aot", "reward": "logps"}, "takes no other reward"),
    ([], "at least one"),
    ([{"name": "dpo"}], "needs a weight above 0"),
    ([{"name": "dpo", "weight": -1}], "needs a weight above 0"),
    ([{"name": "dpo", "weight": 0}], "needs a weight above 0"),
    ([{"name": "dpo", "weight": 1}] * 2, "one of them twice"),
    (
      [{"name": "dpo", "weight": 1}, {"name": "kto", "weight": 1}],
      "must read groups of one kind",
    ),
    (
      [{"name": "kto", "weight": 1}, {"name": "sft", "weight": 1}],
      "undesirable responses would become more likely",
    ),
  ],
  ids=str,
)
def test_bad_configs_are_refused(config, message):
  with pytest.raises(ValueError, match=message):
    build_objective(config)


def test_the_bound_of_a_closed_range_is_in_it():
  """A weight of 0 leaves the desirable responses out."""
  build_objective({"name": "kto", "desirable_weight": 0.0})


def test_an_unread_knob_of_a_divergence_need_not_be_set_in_another_row():
  sequences = make_sequences(2, scale=1.0)
  knobs = {"divergence": "forward_kl", "beta": 0.3}
  ours = build_objective({"name": "dpo", "reward": "f_divergence", **knobs})
  np.testing.assert_array_equal(
    losses_of(ours, sequences),
    losses_of(build_objective({"name": "f_dpo", **knobs}), sequences),
  )
  assert build_objective(ours.to_dict() | {"alpha": None}) == ours


def test_scored_tokens_are_those_of_valid_groups():
  """The first response or all samples count; half a pair does not."""
  num_tokens = jnp.array([[5.0, 7.0], [11.0, 13.0], [17.0, 19.0]])
  valid = jnp.array([[True, True], [True, False], [True, True]])
  terms = [{"name": "dpo", "weight": 1.0}, {"name": "sft", "weight": 1.0}]
  for config, wanted in (
    ({"name": "sft"}, 5 + 11 + 17),
    ({"name": "cpo"}, 5 + 17),
    ({"name": "ppo"}, 5 + 7 + 11 + 17 + 19),
    (terms, 5 + 17),
  ):
    objective = build_objective(config)
    assert objective.scored_tokens(num_tokens, valid) == wanted


def test_placeholders_of_a_config_dict_count_as_not_set():
  config = ml_collections.ConfigDict({"name": "ipo"})
  config.tau = ml_collections.config_dict.placeholder(float)
  config.beta = ml_collections.config_dict.placeholder(float)
  assert build_objective(config).knobs == {
    "tau": 0.1,
    "length_normalize": False,
  }


def test_links_combine_with_other_rewards():
  sequences = make_sequences(2)
  r = np.asarray(sequences.logps - sequences.ref_logps, np.float64)
  n = np.asarray(sequences.num_tokens, np.float64)
  ours = losses_of(
    build_objective({"name": "ipo", "reward": "mean_log_ratio", "tau": 0.5}),
    sequences,
  )
  margin = r[:, 0] / n[:, 0] - r[:, 1] / n[:, 1]
  np.testing.assert_allclose(ours, (margin - 1.0) ** 2, rtol=1e-4)
  ours = losses_of(
    build_objective({"name": "hinge", "reward": "forward_kl"}), sequences
  )
  margin = -np.exp(-r[:, 0]) + np.exp(-r[:, 1])
  np.testing.assert_allclose(ours, np.maximum(0, 1 - 0.1 * margin), rtol=1e-4)


def test_reward_logps_makes_dpo_reference_free():
  objective = build_objective({"name": "dpo", "reward": "logps"})
  assert not objective.needs_reference
  sequences = make_sequences(2).replace(ref_logps=None)
  margin = np.asarray(sequences.logps[:, 0] - sequences.logps[:, 1])
  per_group, metrics, _ = objective.apply(sequences, objective.init())
  np.testing.assert_allclose(
    per_group, np.logaddexp(0, -0.1 * margin), rtol=1e-5
  )
  # Beta scales the metrics, as in the row itself.
  np.testing.assert_allclose(metrics["reward/margin"], 0.1 * margin, rtol=1e-5)


def test_a_list_of_losses_is_their_weighted_sum():
  sequences = make_sequences(2)
  objective = build_objective(
    [
      {"name": "dpo", "weight": 0.8, "beta": 0.3},
      {"name": "bco_pair", "weight": 0.2},
      {"name": "sft", "weight": 1.0},
    ]
  )
  per_group, metrics, state = objective.apply(sequences, objective.init())
  parts = {
    name: losses_of(build_objective({"name": name, **knobs}), sequences)
    for name, knobs in (
      ("dpo", {"beta": 0.3}),
      ("bco_pair", {}),
      ("sft", {}),
    )
  }
  wanted = 0.8 * parts["dpo"] + 0.2 * parts["bco_pair"] + parts["sft"]
  np.testing.assert_allclose(per_group, wanted, rtol=1e-5)
  for name, value in parts.items():
    np.testing.assert_allclose(metrics[f"loss/{name}"], value, rtol=1e-6)
  assert objective.is_coupled
  assert objective.num_slots == 2
  assert float(state[1]["count"]) == 1.0


def test_missing_fields_are_named():
  sequences = make_sequences(2).replace(ref_logps=None, kl=None)
  with pytest.raises(ValueError, match="ref_logps is None"):
    losses_of(build_objective({"name": "dpo"}), sequences)
  sequences = make_sequences(2).replace(kl=None)
  with pytest.raises(ValueError, match="reads kl of the sequences"):
    losses_of(build_objective({"name": "tdpo"}), sequences)


@pytest.mark.parametrize(
  ("name", "num_slots"), [("dpo", 3), ("dpo", 1), ("kto", 2), ("sft", 0)]
)
def test_groups_of_another_size_are_refused(name, num_slots):
  with pytest.raises(ValueError, match=f"these hold {num_slots}"):
    build_objective({"name": name}).check_group_size(num_slots)


@pytest.mark.parametrize(
  ("config", "wanted"),
  [
    # A pair, a tie, the wrong order, one response, one with label False.
    ({"name": "dpo"}, {"tied_scores": [1], "too_few_responses": [3, 4]}),
    (
      {"name": "odpo"},
      {
        "tied_scores": [1],
        "chosen_scores_lower": [2],
        "too_few_responses": [3, 4],
      },
    ),
    ({"name": "reward_aware"}, {"too_few_responses": [3, 4]}),
    ({"name": "sft"}, {"undesirable_response": [4]}),
    (
      {"name": "reward_model"},
      {"tied_scores": [1], "too_few_responses": [3, 4]},
    ),
    (
      [{"name": "dpo", "weight": 1.0}, {"name": "reward_aware", "weight": 1.0}],
      {"tied_scores": [1], "too_few_responses": [3, 4]},
    ),
    (
      [{"name": "dpo", "weight": 1.0}, {"name": "sft", "weight": 1.0}],
      {"tied_scores": [1], "too_few_responses": [3, 4]},
    ),
  ],
  ids=str,
)
def test_unusable_groups_are_found_by_reason(config, wanted):
  score = np.array([[1, 0], [2, 2], [0, 1], [1, 0], [0, 0]], np.float32)
  present = np.array([[1, 1], [1, 1], [1, 1], [1, 0], [1, 0]], bool)
  found = build_objective(config).unusable(score, present)
  rows = {k: np.flatnonzero(mask).tolist() for k, mask in found.items()}
  assert {k: v for k, v in rows.items() if v} == wanted


def test_a_tie_within_a_longer_ranking_is_kept():
  objective = build_objective({"name": "plackett_luce"})
  score = np.array([[2, 2, 1], [1, 1, 1], [3, 3, 9]], np.float32)
  present = np.array([[1, 1, 1], [1, 1, 1], [1, 1, 0]], bool)
  found = objective.unusable(score, present)
  assert found["tied_scores"].tolist() == [False, True, True]


def test_the_kl_on_old_samples_has_the_value_and_gradient_of_the_kl():
  """All three responses, each with the probability that it was sampled."""
  old, ref = np.array([0.5, 0.3, 0.2]), np.array([0.2, 0.2, 0.6])
  logits = jnp.array([0.3, -0.5, 0.1])

  def sequences_of(logits):
    column = functools.partial(jnp.asarray, dtype=jnp.float32)
    return Sequences(
      logps=jax.nn.log_softmax(logits)[:, None],
      num_tokens=jnp.ones((3, 1)),
      score=jnp.zeros((3, 1)),
      valid=jnp.ones((3, 1), bool),
      ref_logps=column(np.log(ref)[:, None]),
      old_logps=column(np.log(old)[:, None]),
      sample_weight=column(old[:, None]),
    )

  def estimate(logits):
    terms = regularizers.sampled_kl(sequences_of(logits), kl_weight=0.7)
    return terms.sum()

  def exact(logits):
    logps = jax.nn.log_softmax(logits)
    return 0.7 * (jnp.exp(logps) * (logps - np.log(ref))).sum()

  found, wanted = map(jax.value_and_grad, (estimate, exact))
  for a, b in zip(found(logits), wanted(logits), strict=True):
    np.testing.assert_allclose(a, b, rtol=1e-5)


def test_responses_of_the_data_have_no_kl_term():
  """One pair is sampled, with weight 2 / 2; the other is of the data."""
  objective = build_objective({"name": "dpo", "beta": 0.5})
  sequences = make_sequences(2, num=2)
  weights = jnp.array([[1.0, 1.0], [0.0, 0.0]])
  sequences = sequences.replace(
    old_logps=sequences.logps, sample_weight=weights
  )
  plain = objective.losses(sequences)
  found = with_sampled_kl(objective, 0.3).losses(sequences)
  log_ratios = sequences.logps - sequences.ref_logps
  np.testing.assert_allclose(
    found - plain, [0.3 * log_ratios[0].sum(), 0.0], rtol=1e-4, atol=1e-6
  )
  assert with_sampled_kl(objective, 0.0) is objective
