"""Held-out metrics are exact for any batches; judges are checked."""

import dataclasses
import types

import numpy as np
import pytest

from dpo_jax import judges
from dpo_jax.data import batch_plan, mismatched, tokenizers
from dpo_jax.data import loader as loader_lib
from dpo_jax.intervals import effective_count, wilson_interval
from dpo_jax.losses import CATALOGUE
from dpo_jax.models import generate
from dpo_jax.training import evaluation, reference, samples
from dpo_jax.training.samples import Samples, sample_metrics, wins_over
from tests import tiny

EIGHT = {"data": 8, "fsdp": 1, "tensor": 1}


@pytest.mark.parametrize(
  ("wins", "count", "low", "high"),
  [
    # Newcombe 1998, Statistics in Medicine 17, table I, method 3.
    (81, 263, 0.2553, 0.3662),
    (15, 148, 0.0624, 0.1605),
    (0, 20, 0.0000, 0.1611),
    (1, 29, 0.0061, 0.1718),
    # By hand: centre (0.5 + 0.19207) / 1.38415, half width 0.26340.
    (5, 10, 0.2366, 0.7634),
    (10, 10, 0.7225, 1.0),
  ],
)
def test_wilson_interval_is_the_published_one(wins, count, low, high):
  got = wilson_interval(wins / count, count)
  np.testing.assert_allclose(got, (low, high), atol=5e-5)


def test_wilson_interval_of_nothing_is_everything():
  assert wilson_interval(0.0, 0) == (0.0, 1.0)


@pytest.mark.parametrize("ties", [0.0, 0.2, 0.5])
@pytest.mark.parametrize("rate", [0.5, 0.8, 0.95])
def test_wilson_interval_holds_the_rate_with_ties_too(rate, ties):
  """95 % of the draws without ties; with ties no fewer."""
  rng = np.random.default_rng(0)
  ties = min(ties, 2 * (1 - rate))
  chances = [1 - rate - ties / 2, ties, rate - ties / 2]
  draws = rng.multinomial(64, chances, 2000)
  rates = (draws @ [0.0, 0.5, 1.0]) / 64
  bounds = np.array([wilson_interval(float(r), 64) for r in rates])
  held = np.mean((bounds[:, 0] <= rate) & (rate <= bounds[:, 1]))
  assert held > (0.93 if not ties else 0.95)


def sigmoid(x):
  return 1.0 / (1.0 + np.exp(-x))


def dpo_figures(logps, ref_logps, beta):
  """Means over all groups, with a loop."""
  rows = []
  for (lp_w, lp_l), (ref_w, ref_l) in zip(logps, ref_logps, strict=True):
    chosen, rejected = beta * (lp_w - ref_w), beta * (lp_l - ref_l)
    margin = chosen - rejected
    rows.append(
      {
        "loss": -np.log(sigmoid(margin)),
        "reward/chosen": chosen,
        "reward/rejected": rejected,
        "reward/margin": margin,
        "reward/accuracy": 1.0 if margin > 0 else 0.5 if margin == 0 else 0.0,
        "logps/chosen": lp_w,
        "logps/rejected": lp_l,
        "log_ratio/chosen": lp_w - ref_w,
        "log_ratio/rejected": lp_l - ref_l,
      }
    )
  return {name: np.mean([row[name] for row in rows]) for name in rows[0]}


@pytest.fixture(scope="module")
def models():
  """A policy, two sets of parameters, ten pairs and their log-probs."""
  policy = tiny.make_policy()
  params, ref_params = (tiny.make_params(policy, seed) for seed in (0, 1))
  groups = tiny.make_groups(10)
  return types.SimpleNamespace(
    policy=policy,
    params=params,
    ref_params=ref_params,
    groups=groups,
    logps=tiny.naive_logps(policy, params, groups),
    ref_logps=tiny.naive_logps(policy, ref_params, groups),
  )


def evaluate(models, batch_size, *, loss="dpo", sizes=None, is_frozen=False):
  placement = tiny.make_placement(sizes)
  program = tiny.make_program(models.policy, loss, placement)
  objective = program.objective
  is_cached = objective.needs_reference and not is_frozen
  loader = tiny.make_loader(
    [group[: 1 + objective.num_slots] for group in models.groups],
    batch_size,
    row_multiple=placement.num_row_shards,
    ref_logps=models.ref_logps.astype(np.float32) if is_cached else None,
  )
  return evaluation.evaluate(
    program,
    models.params,
    models.ref_params if is_frozen else None,
    objective.init(),
    loader,
  )[0]


def assert_figures(got, wanted):
  for name, figure in wanted.items():
    np.testing.assert_allclose(
      got[name], figure, rtol=1e-5, atol=2e-5, err_msg=name
    )


@pytest.mark.fault(56, 58)
@pytest.mark.parametrize(
  ("batch_size", "sizes"),
  [(1, None), (4, None), (8, None), (64, None), (8, EIGHT)],
  ids=str,
)
def test_figures_are_means_over_every_group_once(models, batch_size, sizes):
  # 10 groups in batches of 4 or 8 leave a part batch, padded with empty rows.
  got = evaluate(models, batch_size, sizes=sizes)
  wanted = dpo_figures(models.logps, models.ref_logps, beta=0.1)
  assert 0.0 < wanted["reward/accuracy"] < 1.0
  assert got["num_groups"] == 10
  assert_figures(got, wanted)
  low, high = wilson_interval(wanted["reward/accuracy"], 10)
  assert got["reward/accuracy_low"] == pytest.approx(low)
  assert got["reward/accuracy_high"] == pytest.approx(high)
  assert set(got) == {
    *wanted,
    "num_groups",
    "length_margin_correlation",
    *(f"pull/{tenth / 10}" for tenth in range(11)),
    "reward/accuracy_low",
    "reward/accuracy_high",
  }


def test_a_frozen_reference_gives_the_same_figures(models):
  wanted = dpo_figures(models.logps, models.ref_logps, beta=0.1)
  assert_figures(evaluate(models, 4, is_frozen=True), wanted)


@pytest.mark.parametrize("batch_size", [3, 4, 64])
def test_a_loss_per_token_divides_by_the_tokens_of_the_whole_set(
  models, batch_size
):
  got = evaluate(models, batch_size, loss="sft")
  num_tokens = sum(len(group[1]) for group in models.groups)
  assert_figures(
    got,
    {
      "loss": -models.logps[:, 0].sum() / num_tokens,
      "logps/chosen": models.logps[:, 0].mean(),
    },
  )
  assert "reward/accuracy_low" not in got


def test_the_loss_of_a_list_is_the_weighted_sum_of_its_terms(models):
  got = evaluate(
    models,
    4,
    loss=[{"name": "dpo", "weight": 0.5}, {"name": "sft", "weight": 2.0}],
  )
  dpo, sft = (evaluate(models, 4, loss=name) for name in ("dpo", "sft"))
  wanted = 0.5 * dpo["loss"] + 2.0 * sft["loss"]
  assert got["loss"] == pytest.approx(wanted, rel=1e-5)


def test_a_margin_of_zero_counts_a_half(models):
  # The cached reference is the policy's own, so that all margins are zero.
  same = types.SimpleNamespace(**vars(models) | {"ref_logps": models.logps})
  placement = tiny.make_placement()
  step = reference.make_logps_step(models.policy, placement, 16)
  loader = tiny.make_loader(models.groups, 4)
  same.ref_logps = reference.compute_logps(
    step, models.params, loader, placement
  )
  got = evaluate(same, 4)
  assert got["reward/accuracy"] == 0.5
  assert got["reward/margin"] == 0.0
  assert got["loss"] == pytest.approx(np.log(2), abs=1e-6)


def make_samples(groups, rewards=None):
  """Samples without text: the first response of each group."""
  return Samples(
    prompts=[group[0].tolist() for group in groups],
    responses=[group[1].tolist() for group in groups],
    prompt_texts=[""] * len(groups),
    texts=[""] * len(groups),
    rewards=None if rewards is None else np.array(rewards, np.float64),
  )


def sampled_kl(models, params, ref_params, batch_size, sizes=None):
  placement = tiny.make_placement(sizes)
  return samples.sampled_kl(
    reference.make_logps_step(models.policy, placement, 16),
    params,
    ref_params,
    make_samples(models.groups),
    placement,
    batch_size=batch_size,
  )


def test_a_policy_has_no_divergence_from_itself(models):
  got = sampled_kl(models, models.params, models.params, 4)
  assert got == {"kl": 0.0, "kl_error": 0.0}


@pytest.mark.parametrize(
  ("batch_size", "sizes"), [(4, None), (64, None), (8, EIGHT)], ids=str
)
def test_sampled_kl_is_the_mean_log_ratio(models, batch_size, sizes):
  got = sampled_kl(models, models.params, models.ref_params, batch_size, sizes)
  log_ratios = (models.logps - models.ref_logps)[:, 0]
  # The ratios nearly cancel: what is left is known to the last places of the
  # log-probs, not to its own.
  largest = np.float32(np.abs(models.logps).max())
  few_units = float(4 * np.spacing(largest))
  assert got["kl"] == pytest.approx(log_ratios.mean(), abs=few_units)
  error = log_ratios.std(ddof=1) / np.sqrt(10)
  assert got["kl_error"] == pytest.approx(error, rel=1e-4)
  back = sampled_kl(models, models.ref_params, models.params, 4)
  assert back["kl"] == pytest.approx(-got["kl"], abs=few_units)


def test_wins_ties_and_losses_against_the_reference():
  groups = tiny.make_groups(4)
  ours = make_samples(groups, [1.0, 2.0, 0.0, 3.0])
  theirs = make_samples(groups, [0.0, 2.0, 1.0, 1.0])
  got = sample_metrics(ours, wins_over(ours, theirs, None))
  assert got["sample/win_rate"] == (1 + 0.5 + 0 + 1) / 4
  low, high = wilson_interval(0.625, 4)
  assert (got["sample/win_rate_low"], got["sample/win_rate_high"]) == (
    low,
    high,
  )
  assert got["sample/reward"] == 1.5
  # Variance (0.25 + 0.25 + 2.25 + 2.25) / 3 = 5 / 3.
  assert got["sample/reward_error"] == pytest.approx(np.sqrt(5 / 3 / 4))
  assert got["sample/tokens"] == np.mean([len(g[1]) for g in groups])


def test_samples_of_one_prompt_count_as_much_as_they_differ():
  rng = np.random.default_rng(0)
  prompts = np.repeat(np.arange(50), 8)
  agreeing = (rng.random(50) < 0.7).astype(float)[prompts]
  assert effective_count(agreeing, prompts) == 50
  free = (rng.random(400) < 0.7).astype(float)
  assert effective_count(free, prompts) > 300
  assert effective_count(free, np.arange(400)) == 400
  assert effective_count(np.full(400, 0.5), prompts) == 50
  # Half of the samples repeat the first of their prompt.
  mixed = np.where(rng.random(400) < 0.5, agreeing, free)
  rate, means = mixed.mean(), mixed.reshape(50, 8).mean(1)
  variance = means.var(ddof=1) / 50
  wanted = mixed.var() / variance
  assert 50 < wanted < 400
  np.testing.assert_allclose(effective_count(mixed, prompts), wanted)
  low, high = wilson_interval(rate, wanted)
  assert low < rate < high


def test_intervals_know_that_prompts_repeat():
  groups = tiny.make_groups(2) * 3
  ours = make_samples(groups, [1.0, 2.0, 0.0, 3.0, 4.0, 1.0])
  theirs = make_samples(groups, [0.0, 2.0, 1.0, 1.0, 3.0, 0.0])
  wins = wins_over(ours, theirs, None)
  got = sample_metrics(ours, wins)
  assert got["sample/win_rate"] == 4.5 / 6
  bounds = got["sample/win_rate_low"], got["sample/win_rate_high"]
  values = np.array([1.0, 0.5, 0.0, 1.0, 1.0, 1.0])
  assert bounds == wilson_interval(4.5 / 6, effective_count(values, [0, 1] * 3))
  wins = judges.Wins(*[np.array([1.0, np.nan] * 3)] * 2)
  found = wins.metrics(ours.prompts)
  assert (found["win_rate"], found["left_out"]) == (1.0, 3.0)
  assert found["win_rate_low"] == wilson_interval(1.0, 1)[0]


def test_samples_without_a_judge_have_a_length_only():
  got = sample_metrics(make_samples(tiny.make_groups(3)), None)
  assert set(got) == {"sample/tokens"}


def test_the_error_of_one_sample_is_unknown():
  got = sample_metrics(make_samples(tiny.make_groups(1), [2.0]), None)
  assert np.isnan(got["sample/reward_error"])
  assert "sample/win_rate" not in got


SETTINGS = types.SimpleNamespace(
  max_response_tokens=8, temperature=1.0, top_k=0, top_p=1.0
)


def draw(monkeypatch, judge):
  """Two samples, 'ab' and 'c', to the prompts 'P' and 'Q'."""
  tokenizer = tokenizers.load_tokenizer("bytes", chat_template="")
  ids = [list(text.encode()) for text in ("ab", "c")]
  monkeypatch.setattr(generate, "sample", lambda *args, **kwargs: ids)
  return samples.draw_samples(
    None,
    None,
    [list(text.encode()) for text in ("P", "Q")],
    tokenizer,
    judge,
    seed=0,
    config=SETTINGS,
    placement=tiny.make_placement(),
  )


def test_the_judge_reads_prompt_and_response(monkeypatch):
  seen = []

  def judge(prompt, response):
    seen.append((prompt, response))
    return len(response)

  samples = draw(monkeypatch, judges.per_text(judge))
  assert seen == [("P", "ab"), ("Q", "c")]
  assert samples.rewards.tolist() == [2.0, 1.0]
  assert samples.texts == ["ab", "c"]
  assert draw(monkeypatch, None).rewards is None


@pytest.mark.parametrize("reward", [np.nan, np.inf, -np.inf])
def test_a_judge_that_gives_no_number_is_an_error(monkeypatch, reward):
  def judge(prompt, response):
    return reward if response == "c" else 1.0

  with pytest.raises(ValueError, match=r"eval.judge gave .* for 'c'"):
    draw(monkeypatch, judges.per_text(judge))


def held_out(groups, num, max_tokens=100, indices=None):
  store = tiny.make_loader(groups, 2).store
  indices = np.arange(len(groups)) if indices is None else indices
  return samples.held_out_prompts(store, indices, num, max_tokens=max_tokens)


def prompt_groups(*prompts):
  return [
    [np.array(p, np.int32), np.array([9], np.int32), np.array([8], np.int32)]
    for p in prompts
  ]


def test_held_out_prompts_are_distinct_and_in_order():
  groups = prompt_groups([1], [2, 2], [1], [3])
  assert held_out(groups, 2) == [[1], [2, 2]]
  assert held_out(groups, 3) == [[1], [2, 2], [3]]
  assert held_out(groups, 2, indices=np.array([3, 1, 0])) == [[3], [2, 2]]


def test_held_out_prompts_are_repeated_where_there_are_too_few(caplog):
  groups = prompt_groups([1], [2, 2], [1])
  assert held_out(groups, 2) == [[1], [2, 2]]
  assert not caplog.text
  assert held_out(groups, 5) == [[1], [2, 2], [1], [2, 2], [1]]
  assert "eval.num_samples=5: only 2 held-out prompts differ" in caplog.text


def test_prompts_that_leave_no_room_are_passed_over():
  groups = prompt_groups([1, 1, 1], [2, 2], [3, 3, 3])
  assert held_out(groups, 2, max_tokens=2) == [[2, 2], [2, 2]]
  with pytest.raises(ValueError, match="at most 1 tokens"):
    held_out(groups, 2, max_tokens=1)


def test_a_mean_over_tokens_counts_scored_ones(models):
  """Some turns are read but not scored."""
  masks = tiny.make_masks(models.groups)
  loader = tiny.make_loader(models.groups, 4)
  flags = [
    flag
    for (prompt, *_), group in zip(models.groups, masks, strict=True)
    for flag in (np.zeros(len(prompt), bool), *group)
  ]
  scored = np.concatenate(flags)
  loader = dataclasses.replace(
    loader, store=dataclasses.replace(loader.store, scored=scored)
  )
  program = tiny.make_program(models.policy, "sft", tiny.make_placement())
  got, records = evaluation.evaluate(program, models.params, None, (), loader)
  num_tokens = sum(group[0].sum() for group in masks)
  np.testing.assert_array_equal(records["num_tokens"][:, 0].sum(), num_tokens)
  assert got["loss"] == pytest.approx(
    -records["logps"][:, 0].sum() / num_tokens, rel=1e-5
  )


# Losses that couple the groups of a batch.
COUPLED = sorted(n for n, row in CATALOGUE.items() if row.link_row.is_coupled)


@pytest.mark.slow
@pytest.mark.parametrize("name", COUPLED)
def test_eval_batch_size_changes_no_loss_that_couples_the_batch(models, name):
  """The whole set is one batch: each loss equals that of all sequences."""
  if CATALOGUE[name].group == "pair":
    got = [evaluate(models, size, loss=name)["loss"] for size in (2, 3, 64)]
    sequences = types.SimpleNamespace(logps=models.logps)
  else:
    sequences = unpaired(models, name == "kto")
    got = [sequences.evaluate(name, size)["loss"] for size in (2, 3, 64)]
  assert sequences.logps.std() > 1.0
  np.testing.assert_allclose(got[:2], got[2], rtol=1e-5)


def unpaired(models, has_mismatched):
  """Single responses with alternating labels, and mismatched ones for kto."""
  store = tiny.make_loader(models.groups, 2).store.split_pairs()
  ref_logps = models.ref_logps.reshape(-1, 1).astype(np.float32)
  if has_mismatched:
    store = mismatched.add_slot(store, seed=0, max_tokens=64)
    ref_logps = np.concatenate([ref_logps, np.roll(ref_logps, 3)], 1)

  def evaluate_batches(name, batch_size):
    program = tiny.make_program(models.policy, name, tiny.make_placement())
    indices = np.arange(len(store))
    plan = batch_plan.make_plan(
      store,
      indices,
      batch_size=batch_size,
      row_tokens=0,
      row_multiple=1,
      layout="shared",
    )
    loader = loader_lib.Loader(
      store, indices, plan, batch_size, seed=0, ref_logps=ref_logps
    )
    return evaluation.evaluate(
      program, models.params, None, program.objective.init(), loader
    )[0]

  return types.SimpleNamespace(logps=ref_logps, evaluate=evaluate_batches)
