"""The exactly answerable questions: their metrics by hand, and their laws."""

import json

import numpy as np
import pytest

from experiments import (
  displacement,
  exact_data,
  exact_sweep,
  length_bias,
  overoptimisation,
  sweep,
)
from experiments.exact_space import FIXED, Space
from experiments.exact_task import Task


def uniform_task(space=FIXED):
  """A task whose reference is uniform over all completions."""
  shape = len(space.prompts), space.num_responses
  return Task.make(np.full(shape, -np.log(shape[1])), 0, space)


def read_lines(path):
  with open(path, encoding="utf-8") as file:
    return [json.loads(line) for line in file]


@pytest.mark.parametrize("num_equal", [0, 3])
def test_similar_pairs_share_that_many_letters(tmp_path, num_equal):
  path = str(tmp_path / "pairs.jsonl")
  task = uniform_task()
  exact_data.write_similar_pairs(task, path, 200, num_equal=num_equal, seed=0)
  rows = read_lines(path)
  assert len(rows) == 200
  for row in rows:
    pairs = zip(row["chosen"], row["rejected"], strict=True)
    assert sum(a == b for a, b in pairs) == num_equal
  # The larger reward is chosen more often.
  prompts, pairs = displacement.read_pairs(task, path)
  rewards = task.rewards[prompts[:, None], pairs]
  assert 0.6 < (rewards[:, 0] > rewards[:, 1]).mean() < 1.0


def test_shifts_by_hand(tmp_path):
  """Of two chosen responses one rises by 0.2 and one falls by 0.4."""
  task = uniform_task()
  path = str(tmp_path / "pairs.jsonl")
  task.write_chosen(path, np.array([0, 1]), np.array([[5, 6], [7, 8]]))
  logps = task.ref_logps.copy()
  logps[0, 5], logps[1, 7] = logps[0, 5] + 0.2, logps[1, 7] - 0.4
  logps[1, 8] -= 1.0
  found = displacement.shifts(task, logps, path=path)
  assert found["chosen"] == pytest.approx(-0.1)
  assert found["rejected"] == pytest.approx(-0.5)
  assert found["share_fallen"] == 0.5
  best = task.optimum(displacement.BETA) - task.ref_logps
  wanted = (best[0, 5] + best[1, 7]) / 2
  assert found["optimum_chosen"] == pytest.approx(wanted)


def test_the_slope_on_length_is_that_of_a_biased_optimum():
  """A policy pi_ref exp(s n) / Z has the slope s, and longer responses."""
  space = Space(3, 3, has_end=True)
  task = uniform_task(space)
  logits = task.ref_logps + 0.3 * space.num_tokens
  logps = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
  found = length_bias.lengths(task, logps)
  assert found["slope"] == pytest.approx(0.3)
  start = length_bias.lengths(task, task.ref_logps)
  assert start["slope"] == 0.0
  assert start["tokens"] == pytest.approx((2 * 3 + 3 * 9 + 3 * 27 + 1) / 40)
  assert found["tokens"] > start["tokens"]


def test_the_true_reward_of_the_length_task_has_no_slope():
  task = uniform_task(Space(3, 3, has_end=True))
  found = length_bias.lengths(task, task.ref_logps + task.rewards)
  assert found["slope"] == pytest.approx(0.0, abs=1e-12)


def row_of(method, seed, **metrics):
  labels = exact_sweep.make_labels(method, seed, beta=0.05, knob="500 pairs")
  return labels | metrics


def test_the_top_of_a_curve_is_that_of_the_mean_over_seeds():
  rewards = {0: (0.5, 0.9, 0.2), 1: (0.7, 0.3, 0.2)}
  rows = [
    row_of("DPO", seed, step=10 * i + 10, reward=reward, kl=i + 1.0)
    for seed, values in rewards.items()
    for i, reward in enumerate(values)
  ]
  (line,) = overoptimisation.table(rows)
  assert (line["top step"], line["top KL"]) == (10, 1.0)
  assert line["top E[r]"] == pytest.approx(0.6)
  assert (line["last step"], line["last E[r]"]) == (30, 0.2)


METRICS = dict.fromkeys((*displacement.METRICS, *length_bias.METRICS), 0.5)


@pytest.mark.parametrize(
  ("experiment", "rows"),
  [
    (
      overoptimisation,
      [row_of("DPO", 0, step=s, reward=0.1, kl=s) for s in (1, 2)],
    ),
    (
      displacement,
      [
        row_of(m, 0, **METRICS) | {"knob": f"{n} equal"}
        for m in displacement.LOSSES
        for n in (0, 3)
      ],
    ),
    (length_bias, [row_of(m, 0, **METRICS) for m in length_bias.LOSSES]),
  ],
)
def test_plots_and_tables_are_functions_of_the_rows(experiment, rows, tmp_path):
  files = experiment.plot(rows, str(tmp_path / "figure"))
  assert [path.rpartition(".")[2] for path in files] == ["png", "pdf", "csv"]
  assert experiment.table(rows)


@pytest.mark.parametrize(
  "experiment", [overoptimisation, displacement, length_bias]
)
@pytest.mark.parametrize("scale", sweep.SCALES)
def test_every_run_has_a_valid_config(experiment, scale):
  runs = experiment.runs(sweep.Settings("W", scale))
  assert sweep.estimate(runs, scale)
