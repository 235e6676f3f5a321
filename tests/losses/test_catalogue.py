"""Properties of every row of the catalogue."""

import functools
import itertools
import math

import jax
import jax.numpy as jnp
from jax.test_util import check_grads
import numpy as np
import pytest

from dpo_jax.losses import (
  CATALOGUE,
  KNOBS,
  build_objective,
  mean_over_groups,
  rewards,
)
from dpo_jax.losses.knobs import DISTANCES
from dpo_jax.types import Sequences
from tests.losses import oracles
from tests.losses.cases import NAMES, VARIANTS, WIDTH, as_groups
from tests.tiny import make_sequences

PAIRS = [name for name in NAMES if CATALOGUE[name].group == "pair"]
MARGIN_ON_LOG_RATIOS = [
  name
  for name in PAIRS
  if CATALOGUE[name].reward in ("log_ratio", "summed_or_mean_log_ratio")
  and CATALOGUE[name].link_row.kind == "margin"
  and not CATALOGUE[name].regularizers  # they read single log-ratios
]
LOGISTIC = [
  name for name in MARGIN_ON_LOG_RATIOS if "logistic" in CATALOGUE[name].link
]


def build(name, **knobs):
  return build_objective({"name": name, **knobs})


def losses_of(objective, sequences):
  return objective.apply(sequences, objective.init())[0]


def mean_loss(objective, sequences):
  per_group = losses_of(objective, sequences)
  count = objective.valid_groups(sequences.valid).sum()
  return mean_over_groups(per_group, count)


def sequences_for(name, **kwargs):
  return make_sequences(WIDTH[CATALOGUE[name].group], **kwargs)


OBJECTIVES = {f"{n}-{knobs}": build(n, **knobs) for n, knobs in VARIANTS}


@jax.jit
def measure_all(batches):
  """Measures every loss on the batch of its width.

  One program for all of them: one for each takes longer to compile.

  Args:
    batches: Sequences by width.

  Returns:
    By loss and knobs: (mean loss, (losses, metrics, state)), and the gradient
    of the mean loss by the log-probs.
  """

  def measure(objective):
    sequences = batches[WIDTH[objective.group]]

    def total(logps):
      moved = sequences.replace(logps=logps)
      found = objective.apply(moved, objective.init())
      count = objective.valid_groups(moved.valid).sum()
      return mean_over_groups(found[0], count), found

    return jax.value_and_grad(total, has_aux=True)(sequences.logps)

  return {key: measure(objective) for key, objective in OBJECTIVES.items()}


def batches_of(change=lambda sequences: sequences, **kwargs):
  """Changed random sequences by width."""
  widths = sorted(set(WIDTH.values()))
  return {k: change(make_sequences(k, **kwargs)) for k in widths}


def to_float64(sequences):
  return jax.tree.map(
    lambda x: jnp.asarray(np.asarray(x, np.float64)) if x.dtype != bool else x,
    sequences,
  )


@pytest.fixture(scope="module")
def plain(unoptimized):
  """Every loss on random sequences, in float32."""
  return measure_all(batches_of())


@pytest.fixture(scope="module")
def exact(unoptimized):
  """The same in float64, where only the formula can differ."""
  with jax.enable_x64(True):
    return measure_all(batches_of(to_float64))


def test_every_row_has_an_oracle():
  assert [n for n in NAMES if not hasattr(oracles, n)] == []


@pytest.mark.parametrize(("name", "knobs"), VARIANTS, ids=str)
def test_values_equal_a_float64_loop(plain, exact, name, knobs):
  key = f"{name}-{knobs}"
  wanted = oracles.loss(
    name, as_groups(sequences_for(name)), OBJECTIVES[key].knobs
  )
  # The objective's state is float32, so not to 1e-12. SAMPLED compute in
  # float32 and sum terms of size 1 that cancel.
  atol = 5e-7 if name in SAMPLED else 1e-9
  (_, (wide, *_)), _ = exact[key]
  np.testing.assert_allclose(wide, wanted, rtol=1e-6, atol=atol)
  (_, (ours, *_)), _ = plain[key]
  assert ours.dtype == jnp.float32
  np.testing.assert_allclose(ours, wanted, rtol=1e-5, atol=2e-6)


# These contain a mean of the batch under a stop-gradient, which changes finite
# differences. A test below covers them.
SHIFTED = ("bco", "bco_pair", "beta_dpo")
# These cast log-probs to float32 and have tests of their own.
SAMPLED = ("ppo", "reinforce")


@pytest.fixture(scope="module")
def slopes(unoptimized):
  """By loss: the gradient along a random direction, and its difference."""
  eps = 1e-6
  with jax.enable_x64(True):
    batches = batches_of(to_float64, scale=2.0)
    rng = np.random.default_rng(0)
    directions = {k: rng.normal(size=s.logps.shape) for k, s in batches.items()}

    def moved(step):
      return measure_all(
        {
          k: s.replace(logps=s.logps + step * directions[k])
          for k, s in batches.items()
        }
      )

    found, above, below = moved(0.0), moved(eps / 2), moved(-eps / 2)
  return {
    key: (
      (directions[WIDTH[objective.group]] * found[key][1]).sum(),
      (above[key][0][0] - below[key][0][0]) / eps,
    )
    for key, objective in OBJECTIVES.items()
  }


@pytest.mark.fault(28)
@pytest.mark.parametrize(
  ("name", "knobs"),
  [v for v in VARIANTS if v[0] not in (*SHIFTED, *SAMPLED)],
  ids=str,
)
def test_gradients_equal_finite_differences(slopes, name, knobs):
  slope, difference = slopes[f"{name}-{knobs}"]
  np.testing.assert_allclose(slope, difference, rtol=1e-5, atol=1e-5)


def test_gradients_of_ppo_equal_finite_differences():
  objective = build("ppo")
  with jax.enable_x64(True):
    sequences = to_float64(sequences_for("ppo"))

    @jax.jit
    def loss(token_logps, token_values):
      return mean_loss(
        objective,
        sequences.replace(token_logps=token_logps, token_values=token_values),
      )

    # The old log-probs are cast to float32, so the step must be coarse.
    check_grads(
      loss,
      (sequences.token_logps, sequences.token_values),
      order=1,
      modes=["rev"],
      eps=1e-3,
      rtol=1e-2,
      atol=1e-3,
    )


def test_on_policy_gradient_of_reinforce_is_minus_the_advantage():
  objective = build("reinforce")
  sequences = sequences_for("reinforce")
  sequences = sequences.replace(old_logps=sequences.logps)
  grad = jax.jit(
    jax.grad(lambda logps: mean_loss(objective, sequences.replace(logps=logps)))
  )(sequences.logps)
  score = np.asarray(sequences.score, np.float64)
  advantages = score - (score.sum(1, keepdims=True) - score) / 2
  # The mean over 6 groups of the mean over 3 samples.
  np.testing.assert_allclose(grad, -advantages / 18, rtol=1e-5, atol=1e-6)


def test_reinforce_has_no_gradient_beyond_its_clip():
  """A response whose likelihood should fall back keeps its gradient."""
  objective = build("reinforce", clip=0.2)
  sequences = make_sequences(2, num=1).replace(score=jnp.array([[1.0, 0.0]]))

  @jax.jit
  def slopes(ratio):
    moved = sequences.replace(
      old_logps=sequences.logps - jnp.log(ratio), ref_logps=None
    )
    return jax.grad(
      lambda logps: mean_loss(objective, moved.replace(logps=logps))
    )(moved.logps)[0]

  # A = 1 and -1, the mean over two responses.
  np.testing.assert_allclose(slopes(1.1), [-0.55, 0.55], rtol=1e-5)
  np.testing.assert_allclose(slopes(1.3), [0.0, 0.65], rtol=1e-5)
  np.testing.assert_allclose(slopes(0.7), [-0.35, 0.0], rtol=1e-5)


@pytest.mark.parametrize("name", ["cpo", "slic"])
def test_mean_over_tokens_is_over_the_whole_batch(name):
  """Parts of a batch, given the size of the whole, have the same losses."""
  objective = build(name, sft_per_token=True)
  sequences = sequences_for(name)
  counts = {
    "num_groups": jnp.float32(6),
    "total_tokens": objective.scored_tokens(
      sequences.num_tokens, sequences.valid
    ),
  }
  assert counts["total_tokens"] == sequences.num_tokens[:, 0].sum()
  losses = jax.jit(functools.partial(losses_of, objective))
  parts = []
  for start, stop in ((0, 3), (3, 6)):
    part = jax.tree.map(lambda x, i=start, j=stop: x[i:j], sequences)
    parts.append(losses(part.replace(**counts)))
  np.testing.assert_allclose(
    jnp.concatenate(parts), losses(sequences), rtol=1e-6
  )


def test_a_sample_without_siblings_has_no_reinforce_loss():
  sequences = sequences_for("reinforce")
  alone = sequences.valid.at[0, 1:].set(False)
  per_group = losses_of(build("reinforce"), sequences.replace(valid=alone))
  assert per_group[0] == 0.0
  assert (per_group[1:] != 0.0).all()


@pytest.mark.parametrize("name", ["bco", "bco_pair", "beta_dpo", "kto"])
def test_no_gradient_flows_through_statistics_of_the_batch(name):
  """The gradient of one group's loss is zero on every other group."""
  objective = build(name)
  sequences = sequences_for(name)
  jacobian = jax.jit(
    jax.jacobian(
      lambda logps: losses_of(objective, sequences.replace(logps=logps))
    )
  )(sequences.logps)
  for i in range(6):
    others = np.delete(np.asarray(jacobian[i]), i, axis=0)
    np.testing.assert_array_equal(others, 0.0)
    assert np.abs(jacobian[i, i]).max() > 0


@pytest.fixture(scope="module")
def extremes(unoptimized):
  """Every loss where log-ratios are large: by their size and the length."""
  signs = np.stack(np.meshgrid(*[[-1.0, 0.0, 1.0]] * 2), -1).reshape(-1, 2)
  signs = np.pad(signs, ((0, 0), (0, max(WIDTH.values()) - 2)))

  def measure(size, length):
    def change(sequences):
      shape = sequences.logps.shape
      ref_logps = np.full(shape, -500.0, np.float32)
      moved = ref_logps + size * signs[:, : shape[1]]
      return sequences.replace(
        logps=moved.astype(np.float32),
        ref_logps=ref_logps,
        num_tokens=np.full(shape, length, np.float32),
      )

    return measure_all(batches_of(change, num=len(signs)))

  return {
    case: measure(*case)
    for case in itertools.product((0.0, 50.0, 500.0), (1.0, 30.0))
  }


@pytest.mark.fault(24, 25, 28)
@pytest.mark.parametrize(("name", "knobs"), VARIANTS, ids=str)
def test_extreme_log_ratios_stay_finite(extremes, name, knobs):
  for case, found in extremes.items():
    (value, _), grad = found[f"{name}-{knobs}"]
    assert np.isfinite(value), (name, *case)
    assert np.isfinite(grad).all(), (name, *case)


@pytest.fixture(scope="module")
def padded(unoptimized):
  """Every loss with three groups more that are not valid, by their content."""

  def pad(sequences, filler):
    def one(x):
      rest = ((0, 3), *((0, 0),) * (x.ndim - 1))
      if x.dtype == bool:
        return jnp.pad(x, rest)
      return jnp.pad(x, rest, constant_values=filler)

    return jax.tree.map(one, sequences)

  return {
    str(filler): measure_all(batches_of(lambda s, f=filler: pad(s, f)))
    for filler in (0.0, -77.0, np.nan, np.inf)
  }


@pytest.mark.parametrize("name", NAMES)
def test_padding_groups_do_not_change_any_bit(padded, plain, name):
  """The content of a group that is not valid may even be NaN or inf."""
  key = f"{name}-{{}}"
  (bare, (*_, wanted)), bare_grad = plain[key]
  first = padded["0.0"][key]
  for filler, found in padded.items():
    other = found[key]
    assert first[0][0] == other[0][0], filler
    np.testing.assert_array_equal(first[1], other[1], err_msg=filler)
    jax.tree.map(
      functools.partial(np.testing.assert_allclose, rtol=1e-5, err_msg=filler),
      other[0][1][2],
      wanted,
    )
  np.testing.assert_array_equal(first[1][6:], 0.0)
  np.testing.assert_allclose(first[0][0], bare, rtol=1e-6)
  np.testing.assert_allclose(first[1][:6], bare_grad, rtol=1e-5, atol=1e-7)


@pytest.fixture(scope="module")
def shuffled(unoptimized):
  """Every loss on the groups in another order, and the order."""
  order = jnp.array([3, 1, 5, 0, 4, 2])
  change = functools.partial(jax.tree.map, lambda x: x[order])
  return measure_all(batches_of(change)), order


@pytest.mark.parametrize("name", NAMES)
def test_order_of_groups_does_not_change_losses(plain, shuffled, name):
  other, order = shuffled
  one, other = (m[f"{name}-{{}}"][0][1][0] for m in (plain, other))
  np.testing.assert_allclose(one[order], other, rtol=2e-6)


@pytest.fixture(scope="module")
def raised(unoptimized):
  """Every loss with a constant more on all log-probs."""
  return measure_all(batches_of(lambda s: s.replace(logps=s.logps + 2.0)))


@pytest.mark.parametrize("name", MARGIN_ON_LOG_RATIOS)
def test_margin_losses_ignore_a_constant_on_both_log_ratios(
  plain, raised, name
):
  one, other = (m[f"{name}-{{}}"][0][1][0] for m in (plain, raised))
  np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-5)


@pytest.fixture(scope="module")
def swapped(unoptimized):
  """Every loss with the slots of each group in reverse."""
  return measure_all(
    batches_of(
      lambda s: jax.tree.map(lambda x: x[:, ::-1] if x.ndim == 2 else x, s)
    )
  )


@pytest.mark.parametrize("name", PAIRS)
def test_swapping_a_pair_negates_its_margin(plain, swapped, name):
  one, other = (m[f"{name}-{{}}"][0][1][1] for m in (plain, swapped))
  np.testing.assert_array_equal(one["reward/margin"], -other["reward/margin"])
  # Scores are swapped too, and a loss that learns from them goes by them.
  goes_by_scores = CATALOGUE[name].link_row.uses_ties
  wanted = other["reward/accuracy"]
  np.testing.assert_array_equal(
    one["reward/accuracy"], wanted if goes_by_scores else 1.0 - wanted
  )


@pytest.fixture(scope="module")
def at_the_start(unoptimized):
  """Every loss where the policy is the reference."""
  return measure_all(batches_of(lambda s: s.replace(ref_logps=s.logps)))


@pytest.mark.parametrize("name", LOGISTIC)
def test_policy_equal_to_reference_gives_log_2_and_a_tie(at_the_start, name):
  (_, (per_group, metrics, _)), _ = at_the_start[f"{name}-{{}}"]
  np.testing.assert_allclose(per_group, math.log(2), rtol=1e-6)
  np.testing.assert_array_equal(metrics["reward/margin"], 0.0)
  np.testing.assert_array_equal(metrics["reward/accuracy"], 0.5)


LIMITS = [
  ("cdpo", {"label_smoothing": 0.0}),
  ("robust_dpo", {"label_smoothing": 0.0}),
  ("plackett_luce", {}),
  ("f_dpo", {"divergence": "reverse_kl"}),
  ("ld_dpo", {"alpha": 1.0}),
  ("r_dpo", {"alpha": 0.0}),
  ("odpo", {"alpha": 0.0}),
  ("dpop", {"penalty_weight": 0.0}),
  ("rpo", {"sft_weight": 0.0}),
  ("tdpo", {"alpha": 0.0}),
  ("dpo_shift", {"shift": 1.0}),
  ("beta_dpo", {"alpha": 0.0}),
]


@pytest.fixture(scope="module")
def limits(unoptimized):
  """The losses of LIMITS, and those of DPO last."""
  objectives = [build(name, beta=0.2, **knobs) for name, knobs in LIMITS]
  objectives.append(build("dpo", beta=0.2))

  @jax.jit
  def losses(sequences):
    return [losses_of(objective, sequences) for objective in objectives]

  return losses(make_sequences(2))


@pytest.mark.parametrize(
  "case", range(len(LIMITS)), ids=lambda i: str(LIMITS[i])
)
def test_limits_are_dpo(limits, case):
  np.testing.assert_allclose(
    limits[case], limits[-1], rtol=1e-5, err_msg=str(LIMITS[case])
  )


def test_alphapo_tends_to_simpo():
  sequences = make_sequences(2)
  wanted = losses_of(build("simpo"), sequences)
  for alpha, tolerance in ((0.0, 1e-6), (1e-3, 5e-3)):
    ours = losses_of(build("alphapo", alpha=alpha), sequences)
    np.testing.assert_allclose(ours, wanted, rtol=tolerance)


def test_the_reward_of_alphapo_is_its_formula():
  """0 where every token is certain; a margin would not show a constant."""
  sequences = make_sequences(2)
  logps = jnp.array([[0.0, -3.0]] * len(sequences.logps))
  sequences = sequences.replace(
    logps=logps, num_tokens=jnp.full(logps.shape, 2.0)
  )
  found = rewards.power_mean_prob(sequences, alpha=0.25)
  wanted = [0.0, (1.0 - math.exp(0.25 * 1.5)) / 0.25]
  np.testing.assert_allclose(found, [wanted] * len(logps), rtol=1e-5)


@pytest.mark.parametrize(
  "divergence", ["reverse_kl", "jensen_shannon", "alpha"]
)
def test_the_reward_of_a_policy_that_is_its_reference_is_0(divergence):
  sequences = make_sequences(2)
  sequences = sequences.replace(ref_logps=sequences.logps)
  found = rewards.f_divergence(sequences, divergence=divergence, alpha=0.5)
  np.testing.assert_allclose(found, 0.0, atol=1e-6)


def test_robust_loss_over_flipped_labels_averages_to_the_clean_loss():
  e = 0.2
  sequences = make_sequences(2)
  flipped = jax.tree.map(lambda x: x[:, ::-1] if x.ndim == 2 else x, sequences)
  robust = functools.partial(losses_of, build("robust_dpo", label_smoothing=e))
  expected = (1 - e) * robust(sequences) + e * robust(flipped)
  np.testing.assert_allclose(
    expected, losses_of(build("dpo"), sequences), rtol=1e-5
  )


@pytest.mark.parametrize("e", [0.1, 0.3])
def test_cdpo_has_its_minimum_where_the_paper_says(e):
  """The gradient vanishes iff sigmoid(beta D) = 1 - e."""
  beta = 0.5
  target = math.log((1 - e) / e) / beta
  sequences = make_sequences(2, num=1).replace(
    logps=jnp.array([[target - 3.0, -3.0]]), ref_logps=jnp.zeros((1, 2))
  )
  objective = build("cdpo", beta=beta, label_smoothing=e)

  @jax.jit
  def slope(shift):
    return jax.grad(
      lambda lp: mean_loss(objective, sequences.replace(logps=lp))
    )(sequences.logps.at[0, 0].add(shift))[0, 0]

  assert abs(slope(0.0)) < 1e-6
  assert slope(-1.0) < -1e-3
  assert slope(1.0) > 1e-3


def test_rankings_with_ties_and_gaps():
  """By hand: z = (2, 1, 0), beta 1."""
  objective = build("plackett_luce", beta=1.0)

  @jax.jit
  def losses(score, valid):
    sequences = Sequences(
      logps=jnp.array([[2.0, 1.0, 0.0]]),
      ref_logps=jnp.zeros((1, 3)),
      num_tokens=jnp.ones((1, 3)),
      score=score,
      valid=valid,
    )
    return losses_of(objective, sequences)

  def loss(score, valid=(True, True, True)):
    return float(losses(jnp.array([score]), jnp.array([valid]))[0])

  e = math.e
  first = math.log((e**2 + e + 1) / e**2)
  second = math.log((e + 1) / e)
  assert loss([3.0, 2.0, 1.0]) == pytest.approx(first + second, rel=1e-5)
  tied = math.log((e**2 + 1) / e**2) + second
  assert loss([3.0, 3.0, 1.0]) == pytest.approx(tied, rel=1e-5)
  assert loss([1.0, 1.0, 1.0]) == 0.0
  two = math.log((e**2 + 1) / e**2)
  assert loss([3.0, 2.0, 1.0], (True, False, True)) == pytest.approx(two, 1e-5)
  assert loss([3.0, 2.0, 1.0], (True, False, False)) == 0.0


def test_odpo_ignores_pairs_whose_scores_tie_or_are_reversed():
  objective = build("odpo")
  sequences = make_sequences(2, num=3).replace(
    score=jnp.array([[2.0, 1.0], [1.0, 1.0], [0.0, 1.0]])
  )

  def total(logps):
    per_group = losses_of(objective, sequences.replace(logps=logps))
    return per_group.sum(), per_group

  slopes, per_group = jax.jit(jax.grad(total, has_aux=True))(sequences.logps)
  wanted = losses_of(build("dpo"), sequences)[0]  # log(2 - 1) is 0
  np.testing.assert_allclose(per_group, [wanted, 0.0, 0.0], rtol=1e-6)
  np.testing.assert_array_equal(slopes[1:], 0.0)
  assert (slopes[0] != 0.0).all()


@pytest.mark.parametrize("distance", DISTANCES)
def test_reward_aware_losses_are_least_at_the_gap_in_score(distance):
  """For a gap above 0, of 0 and below 0; and the order does not matter."""
  objective = build(
    "reward_aware", beta=0.5, score_scale=2.0, distance=distance
  )
  gaps = jnp.array([0.7, 0.0, -0.4])

  def total(ratios):
    pairs = jnp.stack([ratios, jnp.zeros_like(ratios)], 1)
    scores = jnp.stack([gaps, jnp.zeros_like(gaps)], 1)
    sequences = make_sequences(2, num=3).replace(
      logps=pairs, ref_logps=jnp.zeros((3, 2)), score=scores
    )
    per_group = losses_of(objective, sequences)
    reverse = sequences.replace(logps=pairs[:, ::-1], score=scores[:, ::-1])
    return per_group.sum(), (per_group, losses_of(objective, reverse))

  measure = jax.jit(jax.grad(total, has_aux=True))
  best = 2.0 * gaps / 0.5
  slopes, (least, _) = measure(best)
  np.testing.assert_allclose(least, 0.0, atol=1e-6)
  np.testing.assert_allclose(slopes, 0.0, atol=1e-6)
  for side in (-1.0, 1.0):
    slopes, (per_group, reversed_) = measure(best + side)
    assert (per_group > 1e-3).all()
    assert (side * slopes > 1e-3).all()
    np.testing.assert_allclose(reversed_, per_group, rtol=1e-5)


@pytest.mark.parametrize("distance", DISTANCES)
def test_reward_aware_losses_are_finite_far_from_the_gap(distance):
  """The slope points to the gap, unless the KL has none in float32."""
  objective = build("reward_aware", beta=1.0, distance=distance)
  sequences = make_sequences(2, num=2).replace(
    score=jnp.array([[80.0, 0.0], [0.0, 80.0]]), ref_logps=jnp.zeros((2, 2))
  )

  def total(ratios):
    logps = jnp.stack([ratios, jnp.zeros_like(ratios)], 1)
    per_group = losses_of(objective, sequences.replace(logps=logps))
    return per_group.sum(), per_group

  for ratio in (-1e4, 1e4):
    slopes, per_group = jax.grad(total, has_aux=True)(jnp.full(2, ratio))
    assert np.isfinite(per_group).all() and np.isfinite(slopes).all()
    wrong = 0 if ratio < 0 else 1
    assert per_group[wrong] > 50.0
    if distance != "forward_kl":
      assert slopes[wrong] * np.sign(ratio) > 0.5


def test_reward_aware_accuracy_goes_by_the_scores():
  """In either order; a tie has none."""
  sequences = make_sequences(2, num=3).replace(
    logps=jnp.array([[2.0, 1.0]] * 3),
    ref_logps=jnp.zeros((3, 2)),
    score=jnp.array([[1.0, 0.0], [0.0, 1.0], [1.0, 1.0]]),
  )
  for name, wanted in (
    ("reward_aware", [1.0, 0.0, np.nan]),
    ("dpo", [1.0, 1.0, 1.0]),
  ):
    objective = build(name)
    _, metrics, _ = objective.apply(sequences, objective.init())
    np.testing.assert_array_equal(metrics["reward/accuracy"], wanted)


def test_running_means_are_over_all_steps():
  objective = build("bco_pair")
  state = objective.init()
  means = []
  for seed in range(3):
    sequences = make_sequences(2, seed=seed)
    _, _, state = objective.apply(sequences, state)
    ratios = np.asarray(sequences.logps - sequences.ref_logps, np.float64)
    means.append(0.1 * ratios.mean())
    assert float(state["mean"]) == pytest.approx(np.mean(means), rel=1e-4)


def test_bco_threshold_is_halfway_between_the_labels_means():
  """Each mean is over the steps that had the label, this one included."""
  objective = build("bco")
  state = objective.init()
  means = {True: [], False: []}
  for seed, labels in enumerate([(1, 1), (0, 1), (0, 0)]):
    sequences = make_sequences(1, num=2, seed=seed).replace(
      score=jnp.array(labels, jnp.float32)[:, None]
    )
    per_group, _, state = objective.apply(sequences, state)
    z = 0.1 * np.asarray(sequences.logps - sequences.ref_logps, np.float64)
    z, labels = z[:, 0], np.array(labels, bool)
    for label, seen in means.items():
      if (labels == label).any():
        seen.append(z[labels == label].mean())
    shift = np.mean([np.mean(seen) for seen in means.values() if seen])
    wanted = [
      -oracles.log_sigmoid((x - shift) * (1 if label else -1))
      for x, label in zip(z, labels, strict=True)
    ]
    np.testing.assert_allclose(per_group, wanted, rtol=1e-4)


def test_beta_dpo_compares_a_batch_with_earlier_ones():
  """A batch enters the moving mean after it was compared with it."""
  objective = build("beta_dpo", beta=0.1, alpha=0.6)
  state = objective.init()
  mean = 0.0
  for seed in range(3):
    sequences = make_sequences(2, seed=seed, scale=1.0)
    per_group, _, state = objective.apply(sequences, state)
    ratios = np.asarray(sequences.logps - sequences.ref_logps, np.float64)
    margins = ratios[:, 0] - ratios[:, 1]
    batch_mean = 0.1 * margins.mean()
    beta = 0.1 * (1 + 0.6 * (batch_mean - mean))
    wanted = [-oracles.log_sigmoid(beta * m) for m in margins]
    np.testing.assert_allclose(per_group, wanted, rtol=1e-4)
    mean = 0.9 * mean + 0.1 * batch_mean


@pytest.mark.fault(27)
@pytest.mark.parametrize(
  ("name", "knobs"),
  [
    ("simpo", {}),
    ("ipo", {"length_normalize": True}),
    ("orpo", {}),
    ("length_normalized_dpo", {}),
  ],
)
def test_a_response_without_tokens_counts_as_one_token(name, knobs):
  sequences = make_sequences(2)
  num_tokens = sequences.num_tokens
  none, one, two = (
    losses_of(
      build(name, **knobs),
      sequences.replace(num_tokens=num_tokens.at[0].set(count)),
    )
    for count in (0.0, 1.0, 2.0)
  )
  np.testing.assert_array_equal(none, one)
  assert none[0] != two[0]


def test_every_default_is_in_range_and_every_knob_has_one():
  for loss in CATALOGUE.values():
    assert set(loss.defaults) == set(loss.knobs), loss.name
    for knob, value in loss.defaults.items():
      loss.ranges.get(knob, KNOBS[knob]).check(knob, value)
  used = {knob for loss in CATALOGUE.values() for knob in loss.knobs}
  assert used == set(KNOBS)
