"""Judges give one finite number for a response, or the run says who did not."""

import dataclasses
import json

import numpy as np
import pytest

from dpo_jax import judges
from dpo_jax.data import synthetic
from dpo_jax.intervals import wilson_interval
from dpo_jax.judges.classifier import Classifier, fit_classifier, text_buckets
from dpo_jax.train import train
from tests import faults, tiny

pytestmark = pytest.mark.usefixtures("in_haste")


def test_the_built_in_truth_reads_the_response_alone():
  judge = judges.get_judge("sentiment")
  rewards = judges.ask(judge, ["awful", "great"], [" was great.", " was bad."])
  assert rewards.tolist() == [1.0, -0.75]
  assert judges.get_judge("") is None


@pytest.mark.parametrize("name", ["me", "table:", "sentiment:x", "reward:"])
def test_unknown_judges_are_named_with_their_key(name):
  with pytest.raises(
    ValueError, match=r"online.judge=.* one of sentiment, tab"
  ):
    judges.get_judge(name, key="online.judge")


@pytest.mark.parametrize(
  ("given", "message"),
  [
    ([1.0], "one number for each of 2 responses, and gave \\[1.0\\]"),
    ("good", "and gave 'good'"),
    (["good", "bad"], "and gave \\['good', 'bad'\\]"),
    ([None, 1.0], "gave nan for 'x'"),
    ([1.0, np.inf], "gave inf for 'y': a reward must be finite"),
    (np.ones((2, 2)), "one number for each"),
  ],
)
def test_nonsense_is_refused_with_what_it_was(given, message):
  with pytest.raises(ValueError, match=message):
    judges.ask(lambda prompts, responses: given, ["p", "q"], ["x", "y"])


def test_a_table_knows_its_rewards_and_nothing_else(tmp_path):
  path = tmp_path / "table.jsonl"
  path.write_text('{"prompt": "p", "response": "x", "reward": 2}\n')
  judge = judges.get_judge(f"table:{path}")
  assert judges.ask(judge, ["p"], ["x"]).tolist() == [2.0]
  with pytest.raises(ValueError, match="no reward for the response 'y' to 'p'"):
    judges.ask(judge, ["p"], ["y"])
  path.write_text('{"prompt": "p"}\n')
  with pytest.raises(ValueError, match=r"table\.jsonl:1: not .*KeyError"):
    judges.get_judge(f"table:{path}")
  path.write_text(f'{{"prompt": "p", "response": "x", "reward": {10**400}}}\n')
  with pytest.raises(ValueError, match=r"table\.jsonl:1: not .*Overflow"):
    judges.get_judge(f"table:{path}")


def test_buckets_are_words_and_pairs_once():
  alone = text_buckets("good", 2**20)
  assert len(alone) == 1
  assert len(text_buckets("Good good, GOOD", 2**20)) == 2  # and "good good"
  assert set(alone) < set(text_buckets("a good film", 2**20))
  assert len(text_buckets("", 8)) == 0


def test_a_classifier_learns_sentiment_and_comes_back_from_disk(tmp_path):
  texts = [r["completion"] for r in synthetic.review_demonstrations(600, 0)]
  labels = np.array([synthetic.sentiment(text) > 0 for text in texts])
  found = fit_classifier(
    texts[:400], labels[:400], num_buckets=2**12, num_steps=100
  )
  right = (found.logits(texts[400:]) > 0) == labels[400:]
  assert right.mean() > 0.85
  path = str(tmp_path / "folder" / "classifier.npz")
  found.write(path)
  judge = judges.get_judge(f"classifier:{path}")
  np.testing.assert_allclose(
    judges.ask(judge, ["We saw it. The plot"], [texts[0]]),
    found.logits(["We saw it. The plot" + texts[0]]),
  )


def test_a_classifier_by_hand():
  """Bias .5, weights 1 for "good", 2 for "film", 4 for "good film"."""
  size = 2**20
  (good,), (film,) = text_buckets("good", size), text_buckets("film", size)
  buckets = text_buckets("Good film", size)
  (both,) = set(buckets.tolist()) - {good, film}
  weights = np.zeros(size, np.float32)
  weights[[good, film, both]] = 1.0, 2.0, 4.0
  logits = Classifier(weights, 0.5).logits(["Good film", "a good plot", ""])
  # A text of 3 n-grams, one of 5 that shares only "good", and no n-grams.
  wanted = [0.5 + 7 / 3**0.5, 0.5 + 1 / 5**0.5, 0.5]
  np.testing.assert_allclose(logits, wanted, rtol=1e-6)


def test_a_damaged_classifier_and_a_single_class_are_explained(tmp_path):
  path = tmp_path / "c.npz"
  Classifier(np.ones(1000, np.float32), 0.0).write(str(path))
  faults.truncate(path)
  with pytest.raises(ValueError, match="is damaged, or not a classifier"):
    judges.get_judge(f"classifier:{path}")
  with pytest.raises(FileNotFoundError, match="no such file"):
    judges.get_judge(f"classifier:{tmp_path}/none.npz")
  with pytest.raises(ValueError, match="two classes"):
    fit_classifier(["a", "b"], [True, True])


class Comparing(judges.Comparer):
  """A judge by a function of prompt, first and second."""

  def __init__(self, function):
    self.function, self.shown = function, []

  def compare(self, prompts, firsts, seconds):
    self.shown += list(zip(prompts, firsts, seconds, strict=True))
    return [self.function(*shown) for shown in self.shown]


def in_both_orders(function, responses, others):
  judge = Comparing(function)
  prompts = [f"p{i}" for i in range(len(responses))]
  return judge, judges.compare_in_both_orders(judge, prompts, responses, others)


def test_a_judge_that_always_takes_the_first_gives_a_half():
  _, wins = in_both_orders(lambda *shown: 1.0, ["a", "b"], ["c", "d"])
  found = wins.metrics()
  assert (found["win_rate"], found["order_bias"]) == (0.5, 1.0)
  _, wins = in_both_orders(
    lambda prompt, first, second: float(len(first) > len(second)),
    ["aa", "b"],
    ["c", "dd"],
  )
  found = wins.metrics()
  assert (found["win_rate"], found["order_bias"]) == (0.5, 0.0)


def test_wins_ties_and_the_order_are_counted_by_hand():
  """Shown first: win, tie, loss, no answer; second: win, loss, loss, win."""
  answers = {
    ("a", "w"): 1.0,
    ("w", "a"): 0.0,
    ("b", "x"): 0.5,
    ("x", "b"): 1.0,
    ("c", "y"): 0.0,
    ("y", "c"): 1.0,
    ("d", "z"): np.nan,
    ("z", "d"): 0.0,
  }
  _, wins = in_both_orders(
    lambda prompt, first, second: answers[first, second], "abcd", "wxyz"
  )
  np.testing.assert_array_equal(wins.of_pairs, [1.0, 0.25, 0.0, np.nan])
  found = wins.metrics()
  assert found["win_rate"] == pytest.approx(1.25 / 3)
  assert found["order_bias"] == pytest.approx((0 + 0.5 + 0) / 3)
  assert found["left_out"] == 1.0
  bounds = found["win_rate_low"], found["win_rate_high"]
  assert bounds == wilson_interval(1.25 / 3, 3)


def test_equal_responses_are_a_tie_and_not_asked():
  judge, wins = in_both_orders(lambda *shown: 1.0, ["same", "a"], ["same", "b"])
  assert wins.of_pairs.tolist() == [0.5, 0.5]
  assert judge.shown == [("p1", "a", "b"), ("p1", "b", "a")]
  judge, wins = in_both_orders(lambda *shown: 1.0, ["same"], ["same"])
  assert (judge.shown, wins.metrics()["win_rate"]) == ([], 0.5)


def test_no_answer_at_all_has_no_win_rate():
  _, wins = in_both_orders(lambda *shown: np.nan, ["a"], ["b"])
  found = wins.metrics()
  assert np.isnan(found["win_rate"]) and np.isnan(found["order_bias"])
  assert (found["win_rate_low"], found["win_rate_high"]) == (0.0, 1.0)


@pytest.mark.parametrize(
  ("answer", "message"),
  [(7, "gave 7 for pair 0: it must be a prob"), ("A", "one probability for")],
)
def test_a_judge_that_gives_no_probability_is_refused(answer, message):
  with pytest.raises(ValueError, match=message):
    in_both_orders(lambda *shown: answer, ["a"], ["b"])


def test_a_run_that_is_no_reward_model_is_refused(tmp_path):
  with pytest.raises(FileNotFoundError, match=r"loss\.name='reward_model'"):
    judges.get_judge(f"reward:{tmp_path}")
  (tmp_path / "config.json").write_text(
    '{"policy": {}, "data": {}, "loss": {}}'
  )
  model = dataclasses.asdict(tiny.make_policy().config)
  (tmp_path / "model.json").write_text(json.dumps(model))
  with pytest.raises(ValueError, match="has no value head"):
    judges.get_judge(f"reward:{tmp_path}")


@pytest.mark.slow
def test_a_reward_model_judges_as_it_was_evaluated(tmp_path):
  """The judge, which reads text, and the run, which reads packed pairs."""
  config = tiny.make_config(
    loss__name="reward_model",
    total_steps=3,
    data__source="synthetic:review_pairs:60",
    data__eval_fraction=0.4,
    data__cache_dir=str(tmp_path / "cache"),
    eval__max_groups=0,
  )
  train(config, tmp_path / "run")
  with np.load(tmp_path / "run" / "eval_logps" / "3.npz") as file:
    values, ids = file["values"], file["example_ids"]
  records = list(synthetic.review_pairs(60, 0))
  judge = judges.get_judge(f"reward:{tmp_path / 'run'}")
  chosen = [records[i] for i in ids]
  prompts = [record["prompt"] for record in chosen]
  for slot, name in enumerate(("chosen", "rejected")):
    rewards = judges.ask(judge, prompts, [record[name] for record in chosen])
    np.testing.assert_allclose(rewards, values[:, slot], atol=1e-5)
  assert np.ptp(values) > 1e-3
