"""Enumerable tasks whose responses have several lengths."""

import collections
import json

import numpy as np
import pytest

from dpo_jax.data import tokenizers
from dpo_jax.models.config import ModelConfig
from dpo_jax.models.decoder import Policy
from experiments import exact_task
from experiments.exact_space import FIXED, Space
from experiments.exact_task import Task
from tests import tiny
from tests.test_exact_task import make_params

SPACE = Space(3, 3, has_end=True, prompts=("ab", "bc"))


@pytest.fixture(scope="module")
def policy():
  shape = dict(d_model=32, num_layers=1, num_heads=2, num_kv_heads=2)
  return Policy(
    ModelConfig(
      vocab_size=SPACE.vocab_size,
      head_dim=16,
      d_ff=64,
      max_positions=8,
      **shape,
    )
  )


@pytest.fixture(scope="module")
def task(policy):
  logps = exact_task.all_logps(policy, make_params(policy), SPACE)
  return Task.make(logps, 0, SPACE)


def test_responses_of_all_lengths_are_enumerated():
  assert SPACE.num_responses == 1 + 3 + 9 + 27 == len(SPACE.texts)
  assert SPACE.texts[:6] == ["", "a", "b", "c", "aa", "ab"]
  assert SPACE.texts[-1] == "ccc"
  assert len(set(SPACE.texts)) == len(SPACE.texts)
  # The end is a token, except after the longest, which are cut off.
  assert SPACE.num_tokens[[0, 1, 4, -1]].tolist() == [1, 2, 3, 3]
  assert FIXED.num_responses == 4096 == len(FIXED.responses())
  assert set(FIXED.num_tokens) == {4}


def test_log_probs_of_ended_responses_equal_those_of_a_forward_pass(
  policy, task
):
  np.testing.assert_allclose(np.exp(task.ref_logps).sum(-1), 1.0, atol=1e-5)
  params, end = make_params(policy), SPACE.num_letters
  for text, tokens in (("", [end]), ("b", [1, end]), ("cab", [2, 0, 1])):
    found = task.ref_logps[1, SPACE.index[text]]
    ids = np.array(tokens, np.int32)
    wanted = tiny.naive_logps(policy, params, [[np.array([1, 2]), ids]])
    np.testing.assert_allclose(found, wanted[0, 0], atol=1e-4, err_msg=text)


def test_a_task_too_large_to_enumerate_is_refused():
  with pytest.raises(
    ValueError,
    match=r"num_letters=8 and length=5 give 37,449 responses of 0 to 5"
    r" letters to each prompt, and at most 10,000",
  ):
    Space(8, 5, has_end=True)


def test_the_true_reward_has_mean_0_at_every_length(task):
  ref = np.exp(task.ref_logps)
  for length in (1, 2, 3):
    those = SPACE.num_tokens == length
    mean = (ref[:, those] * task.rewards[:, those]).sum(-1)
    np.testing.assert_allclose(mean, 0.0, atol=1e-9)
  assert (ref * task.rewards**2).sum(-1).mean() == pytest.approx(1.5**2)


def test_demonstrations_have_all_lengths_equally_often(tmp_path):
  path = str(tmp_path / "texts.jsonl")
  exact_task.write_demonstrations(path, 6000, 0, SPACE)
  with open(path, encoding="utf-8") as file:
    rows = [json.loads(line) for line in file]
  counts = collections.Counter(len(row["completion"]) for row in rows)
  assert sorted(counts) == [1, 2, 3]
  for count in counts.values():
    assert count / 6000 == pytest.approx(1 / 3, abs=0.03)


def test_no_pair_has_an_empty_response(task, tmp_path):
  path = str(tmp_path / "pairs.jsonl")
  task.write_pairs(path, 1000, label="bradley_terry", flips=0.0, seed=0)
  with open(path, encoding="utf-8") as file:
    rows = [json.loads(line) for line in file]
  assert all(row["chosen"] and row["rejected"] for row in rows)
  assert {len(row["chosen"]) for row in rows} == {1, 2, 3}


def test_the_last_letter_may_be_the_end_of_a_response():
  letters = tokenizers.load_tokenizer("letters:4", eos_token="d")
  assert (letters.vocab_size, letters.eos_id, letters.stop_ids) == (4, 3, (3,))
  assert letters.decode([0, 2, 3]) == "ac"
  with pytest.raises(tokenizers.RecordError, match="more than the first 3"):
    letters.encode(["ad"], is_rendered=False, is_continuation=False)
  assert letters.digest != tokenizers.load_tokenizer("letters:4").digest
  with pytest.raises(ValueError, match="its last letter, 'd'"):
    tokenizers.load_tokenizer("letters:4", eos_token="b")
