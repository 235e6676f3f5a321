"""Checks of the data: what each finds, and what it does then."""

import json
import logging

import numpy as np
import pytest

from dpo_jax.config import CHECKS
from dpo_jax.data import checks
from dpo_jax.data.groups import COUNTS
from dpo_jax.records.workdir import Workdir
from dpo_jax.training.setup import build_run
from tests import tiny


def make_report(**found):
  report = {"source": "jsonl:x", "records": 100, "groups": 80, "dropped": {}}
  return report | dict.fromkeys(COUNTS, 0) | found


def find(action="warn", **found):
  actions = dict.fromkeys(CHECKS, action)
  loader = tiny.make_loader(tiny.make_groups(40), 4)
  object.__setattr__(
    loader.store, "prompt_hashes", np.arange(40, dtype=np.uint32)
  )
  results = checks.run_checks(
    actions, [make_report(**found)], {"train": loader}
  )
  checks.act(results)
  return {r.name: r for r in results if r.message and r.where == "jsonl:x"}


def test_the_table_has_the_checks_of_the_config():
  tables = (checks.SOURCE_CHECKS, checks.TRAIN_CHECKS, checks.HELD_OUT_CHECKS)
  assert sorted(name for table in tables for name in table) == sorted(CHECKS)


@pytest.mark.parametrize(
  ("name", "below", "above", "message"),
  [
    ("broken", {}, {"broken": 1}, "1.0 % of the records are broken"),
    ("prompts_cut", {"prompts_cut": 8}, {"prompts_cut": 9}, "11.2 % of the pr"),
    ("responses_cut", {"responses_cut": 8}, {"responses_cut": 40}, "0.50 of"),
    ("special_tokens", {"special_tokens": 40}, {"special_tokens": 41}, "=read"),
    ("duplicates", {"duplicates": 4}, {"duplicates": 5}, "6.2 % of the groups"),
    ("contradictions", {}, {"contradictions": 2}, "2.5 % of the groups"),
    ("ties", {"ties": 8}, {"ties": 9}, "equal score"),
    ("chosen_scores_lower", {}, {"chosen_scores_lower": 4}, "5.0 %"),
    (
      "identical",
      {"dropped": {"identical_responses": 10}},
      {"dropped": {"identical_responses": 11}},
      "11.0 % of the records",
    ),
    (
      "empty",
      {"dropped": {"empty_response": 10}},
      {"dropped": {"empty_response": 11}},
      "11.0 % of the records",
    ),
  ],
)
def test_report_above_the_limit_gives_a_message(name, below, above, message):
  assert name not in find(**below)
  [found] = find(**above).values()
  assert found.name == name and message in found.message
  assert f"data.checks.{name}=warn" in found.message


def test_stopping_check_names_all_findings(caplog):
  with pytest.raises(ValueError) as error:
    find("stop", broken=1, ties=80)
  assert "1.0 % of the records are broken" in str(error.value)
  assert "100.0 % of the groups have responses of equal" in str(error.value)
  with caplog.at_level(logging.WARNING, "dpo_jax"):
    assert find("off", broken=1)["broken"].value == 0.01
  assert not caplog.text


def test_length_accuracy_by_hand():
  lengths = np.array([[5, 3], [2, 9], [4, 4], [8, 1]])
  assert checks.length_accuracy(lengths) == (1 + 0 + 0.5 + 1) / 4


def write(path, pairs):
  lines = [
    json.dumps({"prompt": p, "chosen": c, "rejected": r}) for p, c, r in pairs
  ]
  path.write_text("\n".join(lines))
  return f"jsonl:{path}"


def run_of(tmp_path, **overrides):
  config = tiny.make_config(eval__max_groups=0, **overrides)
  return build_run(config, Workdir.at(tmp_path / "run"))


def test_small_data_sets_are_reported(tmp_path, caplog, on_one_device):
  pairs = [("same", f" long and good {i}", f" b{i}") for i in range(29)]
  source = write(tmp_path / "one.jsonl", pairs)
  other = write(tmp_path / "two.jsonl", pairs[:3])
  settings = {"data__source": source, "batch_size": 64}
  with caplog.at_level(logging.WARNING, "dpo_jax"):
    run = run_of(tmp_path, **settings, data__eval_source=other)
  assert "fewer than 30 groups are held out (27 are missing)" in caplog.text
  assert "eval: 100.0 % of the held-out prompts are trained on" in caplog.text
  assert "a batch has 2.2 times the groups there are" in caplog.text
  assert (
    "by length alone" in caplog.text and "50.0 % from a half" in caplog.text
  )
  found = {r["name"]: r for r in run.data.description()["checks"]}
  assert found["overlap"]["value"] == 1.0
  assert set(run.data.description()["reports"]) == {source, other}
  caplog.clear()
  with caplog.at_level(logging.WARNING, "dpo_jax"):
    run_of(tmp_path, **settings, data__eval_fraction=0.0)
  assert "held out" not in caplog.text  # as was asked for
  settings |= {"data__eval_source": other, "data__checks__small_data": "stop"}
  with pytest.raises(ValueError, match=r"2\.2 times .*small_data=stop"):
    run_of(tmp_path, **settings)


def test_each_held_out_set_is_checked_by_its_name(tmp_path, on_one_device):
  pairs = [(f"prompt {i}", f" a{i}", f" b{i}") for i in range(90)]
  train = write(tmp_path / "train.jsonl", pairs[:40])
  sets = {
    "apart": write(tmp_path / "apart.jsonl", pairs[40:80]),
    "shared": write(tmp_path / "shared.jsonl", pairs[30:40]),
  }
  named = ",".join(f"{name}={spec}" for name, spec in sets.items())
  run = run_of(tmp_path, data__source=train, data__eval_sources=named)
  found = {(r.name, r.where) for r in run.data.checks if r.message}
  about_sets = {x for x in found if x[0] in checks.HELD_OUT_CHECKS}
  assert about_sets == {
    ("overlap", "eval/shared"),
    ("few_held_out", "eval/shared"),
  }


def make_rows(scores):
  """Records of pairs, each with its two scores, or with none for None."""
  rows = []
  for i, pair in enumerate(scores):
    row = {"prompt": f"p {i}", "chosen": f" a{i}", "rejected": f" b{i}"}
    columns = ("score_chosen", "score_rejected")
    rows.append(row | dict(zip(columns, pair or (), strict=False)))
  return rows


def run_on(tmp_path, rows, loss, online=None, **overrides):
  """A run of a loss on rows of data, all of which it trains on."""
  path = tmp_path / "pairs.jsonl"
  path.write_text("\n".join(json.dumps(row) for row in rows))
  config = tiny.make_config(
    eval__max_groups=0,
    data__source=f"jsonl:{path}",
    data__eval_fraction=0.0,
    **overrides,
  )
  with config.ignore_type():
    config.loss = loss
  config.online.update(online or {})
  return build_run(config, Workdir.at(tmp_path / "run"))


def acting(run):
  """Names of the checks that found something and are on."""
  return {r.name for r in run.data.checks if r.message and r.action != "off"}


REWARD_AWARE = {"name": "reward_aware", "weight": 1.0}


@pytest.mark.parametrize(
  ("loss", "num_scored", "warns"),
  [
    ({"name": "odpo"}, 0, True),
    ({"name": "odpo"}, 40, False),
    ({"name": "odpo"}, 39, True),
    ({"name": "odpo", "alpha": 0.0}, 0, False),
    ({"name": "reward_aware"}, 0, True),
    ({"name": "reward_model"}, 0, False),
    ({"name": "reward_model", "margin_weight": 0.5}, 0, True),
    ({"name": "dpo"}, 0, False),
    ([REWARD_AWARE, {"name": "dpo", "weight": 1.0}], 0, True),
  ],
  ids=str,
)
def test_a_loss_that_reads_the_gap_in_score_wants_scores(
  tmp_path, on_one_device, loss, num_scored, warns
):
  scores = [(i + 2, 1) if i < num_scored else None for i in range(40)]
  rows = make_rows(scores)
  assert ("default_scores" in acting(run_on(tmp_path, rows, loss))) == warns


def test_scores_of_data_that_is_not_read_are_not_asked_for(
  tmp_path, on_one_device
):
  rows = make_rows([None] * 40)
  online = dict(kind="pairs", judge="sentiment")
  run = run_on(tmp_path, rows, {"name": "odpo"}, online=online)
  assert "default_scores" not in acting(run)


@pytest.mark.parametrize(
  ("loss", "num_kept", "warns"),
  [
    ({"name": "reward_aware"}, 40, False),
    ({"name": "dpo"}, 20, True),
    ({"name": "kto"}, 40, True),  # two responses of each pair
    ([REWARD_AWARE, {"name": "sft", "weight": 1.0}], 40, False),
    ([REWARD_AWARE, {"name": "dpo", "weight": 1.0}], 20, True),
  ],
  ids=str,
)
def test_reward_aware_keeps_ties_and_does_not_warn(
  tmp_path, on_one_device, loss, num_kept, warns
):
  """Half of the pairs tie; other losses drop them, and the check says so."""
  rows = make_rows([(i % 2, 0) for i in range(40)])
  run = run_on(tmp_path, rows, loss, data__split_pairs=True)
  assert len(run.data.train.indices) == num_kept
  assert ("ties" in acting(run)) == warns
