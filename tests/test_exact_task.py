"""The enumerable task: identities, bounds, and what is drawn from it."""

import collections
import json
import math

import jax
import numpy as np
import pytest

from dpo_jax.data import tokenizers
from dpo_jax.models.config import ModelConfig
from dpo_jax.models.decoder import Policy
from experiments import exact_frontier, exact_sweep, exact_task, sweep
from experiments.exact_task import Task
from tests import faults, tiny


@pytest.fixture(scope="module")
def task():
  """A reference of random weights, and its rewards."""
  policy = make_policy()
  return Task.make(exact_task.all_logps(policy, make_params(policy)), 0)


def make_policy():
  return Policy(
    ModelConfig(
      vocab_size=exact_task.NUM_LETTERS,
      d_model=32,
      num_layers=1,
      num_heads=2,
      num_kv_heads=2,
      head_dim=16,
      d_ff=64,
      max_positions=8,
    )
  )


def make_params(policy, seed=0):
  params = policy.init(jax.random.key(seed))
  return jax.tree.map(lambda x: 6.0 * x if x.ndim > 1 else x, params)


def test_all_completions_have_their_probabilities():
  policy = make_policy()
  params = make_params(policy)
  logps = exact_task.all_logps(policy, params)
  np.testing.assert_allclose(np.exp(logps).sum(-1), 1.0, atol=1e-5)
  chosen = [0, 7, 1234, 4095]
  ids = exact_task.completions()[chosen]
  prompt = np.array([2, 3], np.int32)  # "cd", the second
  wanted = tiny.naive_logps(policy, params, [[prompt, *ids]])[0]
  np.testing.assert_allclose(logps[1, chosen], wanted, atol=1e-4)


def test_rewards_have_the_mean_and_deviation_that_is_said(task):
  ref = np.exp(task.ref_logps)
  np.testing.assert_allclose((ref * task.rewards).sum(-1), 0.0, atol=1e-6)
  variance = (ref * task.rewards**2).sum(-1).mean()
  assert math.sqrt(variance) == pytest.approx(1.5, rel=1e-5)


@pytest.mark.parametrize("beta", [0.1, 0.5, 2.0])
def test_regret_is_beta_times_the_kl_to_the_optimum(task, beta):
  """For the optimum, the reference, and a policy of other weights."""
  policy = make_policy()
  other = exact_task.all_logps(policy, make_params(policy, seed=1))
  found = task.metrics(task.optimum(beta), beta)
  assert found["regret"] == pytest.approx(0.0, abs=1e-9)
  assert found["share"] == pytest.approx(1.0, abs=5e-3)
  for logps in (task.ref_logps, other):
    found = task.metrics(logps, beta)  # raises where the two differ
    kl = (np.exp(logps) * (logps - task.optimum(beta))).sum(-1).mean()
    assert found["regret"] == pytest.approx(beta * kl, abs=1e-4)
    assert found["regret"] > 0.05


def test_nothing_crosses_the_frontier(task):
  policy = make_policy()
  for seed in (1, 2):
    logps = exact_task.all_logps(policy, make_params(policy, seed))
    assert task.metrics(logps, None)["share"] < 0.5
  for num in (2, 8):
    assert task.metrics(task.best_of(num), None)["share"] < 1.0


def test_probabilities_that_do_not_sum_to_one_are_noticed(task):
  with pytest.raises(ValueError, match="sum to"):
    task.metrics(task.ref_logps + 0.1, 0.5)


@pytest.mark.parametrize("num", [2, 4, 8, 16])
def test_best_of_n_is_near_its_bound(task, num):
  """KL = log N - (N-1)/N for rewards without ties and small probabilities."""
  logps = task.best_of(num)
  np.testing.assert_allclose(np.exp(logps).sum(-1), 1.0, atol=1e-9)
  _, kl = task.reward_and_kl(logps)
  bound = math.log(num) - (num - 1) / num
  assert kl <= bound + 1e-9
  assert kl == pytest.approx(bound, rel=0.1)


def test_best_of_one_is_the_reference(task):
  np.testing.assert_allclose(task.best_of(1), task.ref_logps, atol=1e-6)


def test_chosen_responses_are_within_log_2(task):
  preferred = task.preferred()
  np.testing.assert_allclose(np.exp(preferred).sum(-1), 1.0, atol=1e-4)
  reward, kl = task.reward_and_kl(preferred)
  assert reward > 0.3
  assert 0 < kl < math.log(2)


def test_bayes_is_the_best_that_scores_can_do(task):
  ours, bayes = task.pair_accuracy(task.rewards)
  # Of a response with itself nobody is right more often than by half.
  assert ours == pytest.approx(bayes, abs=1e-3)
  assert task.pair_accuracy(-task.rewards)[0] < 0.5 < bayes


def test_pairs_follow_the_reference_the_label_and_the_flips(task, tmp_path):
  where = {
    exact_task.to_text(x): i for i, x in enumerate(exact_task.completions())
  }

  def right(label, flips):
    path = str(tmp_path / f"{label}{flips}.jsonl")
    task.write_pairs(path, 3000, label=label, flips=flips, seed=0)
    with open(path, encoding="utf-8") as file:
      rows = [json.loads(line) for line in file]
    assert len(rows) == 3000
    assert all(row["chosen"] != row["rejected"] for row in rows)
    prompts = collections.Counter(row["prompt"] for row in rows)
    assert set(prompts) == set(exact_task.PROMPTS)
    wins = [
      task.rewards[exact_task.PROMPTS.index(r["prompt"])][
        [where[r["chosen"]], where[r["rejected"]]]
      ]
      for r in rows
    ]
    return np.mean([w > x for w, x in wins])

  assert right("argmax", 0.0) == 1.0
  assert right("argmax", 0.2) == pytest.approx(0.8, abs=0.03)
  bayes = task.pair_accuracy(task.rewards)[1]
  assert right("bradley_terry", 0.0) == pytest.approx(bayes, abs=0.03)


def test_texts_follow_the_language(tmp_path):
  path = str(tmp_path / "texts.jsonl")
  exact_task.write_demonstrations(path, 20_000, 0)
  with open(path, encoding="utf-8") as file:
    rows = [json.loads(line) for line in file]
  first = [row["completion"][0] for row in rows if row["prompt"] == "ab"]
  counts = collections.Counter(first)
  wanted = exact_task.language(0)[0, 1]
  for letter, p in zip("abcdefgh", wanted, strict=True):
    assert counts[letter] / len(first) == pytest.approx(p, abs=0.03)


def test_letters_are_ids_and_back():
  letters = tokenizers.load_tokenizer("letters:8")
  assert letters.encode(["abh"], is_rendered=False, is_continuation=False) == [
    [0, 1, 7]
  ]
  assert letters.decode([0, 1, 7, 8]) == "abh"
  with pytest.raises(tokenizers.RecordError, match="more than the first 8"):
    letters.encode(["abi"], is_rendered=False, is_continuation=False)
  with pytest.raises(ValueError, match="2 to 26 letters"):
    tokenizers.load_tokenizer("letters:40")


class SmallBuilder(exact_sweep.Builder):
  """Builds runs of one seed that a test can afford."""

  def __init__(self, workdir, steps):
    super().__init__(sweep.Settings(workdir, "tiny"), steps=steps)

  def _add_reference(self):
    self.size = dict(seeds=1, pairs=20_000, steps=0, sft_steps=150)
    super()._add_reference()

  def add(self, *args, **others):
    return super().add(*args, **{"learning_rate": 2e-3} | others)


def run_small_sweep(workdir):
  """PPO on the truth, Preferred-FT, on-policy and offline DPO, flipped labels;
  a reward model, which takes longer."""
  builder = SmallBuilder(workdir, steps=250)
  builder.use_every_pair_once()
  builder.add(
    "PPO",
    dict(name="ppo", value_weight=0.5),
    seed=0,
    beta=0.5,
    online=dict(
      kind="rollouts",
      kl_weight=0.5,
      judge=builder.truth,
      every_steps=2,
      num_samples=2,
    ),
    learning_rate=3e-3,
  )
  builder.add("Preferred-FT", dict(name="preferred_ft"), seed=0)
  builder.add_dpo(0, 0.25)
  builder.add_on_policy_dpo(0, 0.25, rounds=10)
  builder.add_noisy(0, 0.5, 0.2)
  longer = SmallBuilder(workdir, steps=800)
  longer.use_every_pair_once()
  longer.add("reward model", dict(name="reward_model"), seed=1)
  runs = list((builder.runs | longer.runs).values())
  assert sweep.execute(runs, sweep.choose(runs), workdir) == {}


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
  """Rows by method, from a child of one device: eight only share its work."""
  workdir = str(tmp_path_factory.mktemp("exact"))
  code = "import sys; from tests import test_exact_task as t\n"
  child = faults.spawn(
    code + "t.run_small_sweep(sys.argv[1])",
    workdir,
    # Its steps are many, and faster as XLA compiles by itself.
    XLA_FLAGS="--xla_force_host_platform_device_count=1",
  )
  output = child.communicate()[0]
  assert child.returncode == 0, output
  rows = exact_sweep.collect(workdir).rows
  return {
    (row["method"], row["flips"]): row
    for row in rows
    if row["method"] != "frontier"
  }


@pytest.mark.slow
def test_ppo_on_the_truth_reaches_the_frontier(measured):
  assert measured["PPO", 0.0]["share"] > 0.95


@pytest.mark.slow
def test_a_reward_model_approaches_bayes(measured):
  row = measured["reward model", 0.0]
  # Of what Bayes is better than chance; 102,400 pairs do not give it all.
  assert row["accuracy"] - 0.5 > 0.8 * (row["bayes_accuracy"] - 0.5)
  assert row["accuracy"] <= row["bayes_accuracy"]


@pytest.mark.slow
def test_preferred_ft_stays_within_log_2(measured):
  assert 0.0 < measured["Preferred-FT", 0.0]["kl"] < math.log(2)


@pytest.mark.slow
def test_pairs_of_the_policy_halve_the_regret(measured):
  """As many labels and steps, the labels on what the policy says by then.

  At a low beta, whose optimum is far from what the reference says; at beta 1
  there is less to gain (experiments/README.md, online_vs_offline).
  """
  offline = measured["DPO", 0.0]["regret"]
  assert measured["on-policy DPO", 0.0]["regret"] < 0.5 * offline


@pytest.mark.slow
def test_a_fifth_of_flipped_labels_orders_the_losses(measured):
  """Of regret at the nominal beta: robust < DPO < cDPO."""
  robust, plain, smoothed = (
    measured[method, 0.2]["regret"] for method in ("robust DPO", "DPO", "cDPO")
  )
  assert robust < 0.9 * plain < 0.9 * 0.9 * smoothed


def test_the_figure_and_the_table_are_functions_of_the_rows(task, tmp_path):
  rows = [
    exact_sweep._labels("DPO", seed, beta=0.5, flips=flips)
    | task.metrics(task.optimum(0.5 + 0.1 * seed), 0.5)
    for seed in (0, 1)
    for flips in (0.0, 0.2)
  ]
  kls, rewards = task.frontier(10)
  rows += [
    exact_sweep._labels("frontier", 0) | {"reward": r, "kl": k, "share": 1.0}
    for k, r in zip(kls, rewards, strict=True)
  ]
  files = exact_frontier.plot(rows, str(tmp_path / "figure"))
  assert [path.rpartition(".")[2] for path in files] == ["png", "pdf", "csv"]
  lines = exact_sweep.table(rows)
  assert [line["flips"] for line in lines] == ["0", "0.2"]
  assert lines[0]["seeds"] == 2
  assert lines[0]["+-regret"] > 0
