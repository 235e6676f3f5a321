"""The built-in task: its reward, its labels, its determinism."""

import math

import pytest

from dpo_jax.data import synthetic
from dpo_jax.data.examples import parse_record


# Weights of synthetic.py's lexicon, added up by hand.
@pytest.mark.parametrize(
  ("text", "reward"),
  [
    (" was good.", 0.75),
    (" was very good.", 1.5 * 0.75),
    (" was not good.", -0.75),
    (" was not very good.", -1.5 * 0.75),
    (" felt a bit dull, and the cast was superb.", -0.5 + 1.5),
    (" is fine. I loved it.", 0.5 + 1.5),
    (" was good. I am glad it is over.", 0.75 - 1.0),
    # An intensifier or a "not" reaches the next word only.
    (" was very red and good.", 0.75),
    (" was not a thing. good", 0.75),
    # Beginnings of words are not words.
    (" verygood goodness. I loved items. a bitter good", 0.75),
    (" was superb superb superb.", 4.0),
    (" was awful awful awful.", -4.0),
    ("", 0.0),
  ],
)
def test_sentiment_adds_the_lexicon(text, reward):
  assert synthetic.sentiment(text) == pytest.approx(reward)


def test_pairs_carry_the_sentiment_of_their_responses():
  for record in synthetic.review_pairs(200, seed=1):
    for side in ("chosen", "rejected"):
      assert record[f"score_{side}"] == synthetic.sentiment(record[side])


def test_labels_follow_bradley_terry():
  """Wins of the better review match the mean of sigmoid(|difference|)."""
  pairs = list(synthetic.review_pairs(4000, seed=2))
  gaps = [r["score_chosen"] - r["score_rejected"] for r in pairs]
  assert all(gaps), "a tie teaches nothing"
  wins = sum(gap > 0 for gap in gaps) / len(gaps)
  odds = [1 / (1 + math.exp(-abs(gap))) for gap in gaps]
  expected = sum(odds) / len(odds)
  error = math.sqrt(sum(p * (1 - p) for p in odds)) / len(odds)
  assert 0.6 < expected < 0.9
  assert abs(wins - expected) < 3 * error


@pytest.mark.parametrize("task", synthetic.TASKS)
def test_a_seed_is_one_data_set_and_another_seed_another(task):
  make = synthetic.TASKS[task]
  first = list(make(50, 3))
  assert len(first) == 50
  assert list(make(50, 3)) == first
  assert list(make(60, 3))[:50] == first
  assert list(make(50, 4)) != first


@pytest.mark.parametrize("task", synthetic.TASKS)
def test_records_are_of_a_known_format(task):
  for record in synthetic.TASKS[task](20, 0):
    example = parse_record(record, "", None)
    assert example.prompt == record["prompt"]
    assert all(response.startswith(" ") for response in example.responses)
