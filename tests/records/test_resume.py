"""A resumed run is the run of its workdir, or what differs was allowed."""

import json

import pytest

from dpo_jax.config import resolve
from dpo_jax.records import resume
from dpo_jax.records.history import add_to_history
from dpo_jax.records.workdir import Workdir
from dpo_jax.training.optimizer import build_schedule
from tests import tiny

IDENTITY = {
  "train": {"content": "c", "store": "s", "groups": 8},
  "tokenizer": {"vocab": "v", "chat_template": "t"},
}

LINEAR = {
  "optimizer__schedule": "linear",
  "optimizer__warmup_steps": 0,
  "optimizer__learning_rate": 1e-3,
}


def change(path, value):
  """IDENTITY with another value."""
  identity = json.loads(json.dumps(IDENTITY))
  split, key = path.split(".")
  identity[split][key] = value
  return identity


def start(tmp_path, identity=IDENTITY, **overrides):
  """Compares and records a run, as each start does."""
  config = resolve(tiny.make_config(**overrides))
  workdir = Workdir.at(tmp_path)
  accepted = resume.check_same(config, identity, workdir, build_schedule)
  step = resume.go_back_to(config, accepted, workdir)
  resume.record(config, identity, accepted, workdir, step=step)
  return accepted, step


def history(tmp_path):
  return json.loads((tmp_path / "data.json").read_text())["history"]


@pytest.mark.parametrize(
  ("kind", "identity"),
  [
    ("data", change("train.content", "d")),
    ("data", change("train.groups", 7)),
    ("tokenizer", change("tokenizer.vocab", "w")),
    ("tokenizer", change("tokenizer.chat_template", "u")),
    ("format", change("train.store", "t")),
  ],
)
@pytest.mark.fault(48)
def test_other_data_are_refused_unless_allowed(tmp_path, kind, identity):
  start(tmp_path)
  with pytest.raises(ValueError, match=f"resume.allow={kind} takes"):
    start(tmp_path, identity)
  others = ",".join(
    {"data", "tokenizer", "format", "config", "total_steps"} - {kind}
  )
  with pytest.raises(ValueError, match=f"resume.allow={kind} takes"):
    start(tmp_path, identity, resume__allow=others)
  accepted, _ = start(tmp_path, identity, resume__allow=kind)
  assert set(accepted) == {kind}
  assert start(tmp_path, identity) == ({}, None)  # it is the run's from now on
  with pytest.raises(ValueError, match="there"):
    start(tmp_path)
  [entry] = history(tmp_path)
  assert "there" in entry["accepted"][kind][0]


def test_what_one_start_allows_is_not_recorded(tmp_path):
  start(tmp_path)
  start(tmp_path, loss__beta=0.2, resume__allow="config", resume__step=3)
  recorded = json.loads((tmp_path / "config.json").read_text())
  assert recorded["loss"]["beta"] == 0.2
  assert recorded["resume"] == {"allow": "", "step": None}


def test_a_moved_data_file_is_other_data_not_another_config(tmp_path):
  start(tmp_path, data__source="jsonl:a.jsonl")
  with pytest.raises(ValueError, match=r"resume\.allow=data takes"):
    start(tmp_path, data__source="jsonl:b.jsonl", resume__allow="config")
  accepted, _ = start(
    tmp_path, data__source="jsonl:b.jsonl", resume__allow="data"
  )
  assert accepted == {
    "data": ["data.source: 'jsonl:a.jsonl' there, 'jsonl:b.jsonl' now"]
  }


def test_other_total_steps_bend_a_schedule(tmp_path):
  start(tmp_path, total_steps=6, **LINEAR)
  with pytest.raises(ValueError) as error:
    start(tmp_path, total_steps=12, **LINEAR)
  # The rate falls to 0 at the last step: at step 3 of 6 and of 12.
  assert "rate at step 3: 0.0005 there, 0.00075 now" in str(error.value)
  start(tmp_path, total_steps=12, resume__allow="total_steps", **LINEAR)
  assert json.loads((tmp_path / "config.json").read_text())["total_steps"] == 12


def test_more_steps_at_a_constant_rate_are_the_same_run(tmp_path):
  start(tmp_path, total_steps=6)
  assert start(tmp_path, total_steps=12) == ({}, None)


def test_a_knob_that_is_newer_than_a_run_has_its_default_there(tmp_path):
  loss = dict(loss__name="reward_model", reference__kind="none")
  start(tmp_path, **loss)
  file = tmp_path / "config.json"
  recorded = json.loads(file.read_text())
  del recorded["loss"]["center_weight"]
  file.write_text(json.dumps(recorded))
  with pytest.raises(ValueError, match=r"loss.center_weight: 0.0 there"):
    start(tmp_path, loss__center_weight=0.1, **loss)
  assert start(tmp_path, **loss) == ({}, None)


def test_a_restart_with_the_same_command_does_not_go_back_again(tmp_path):
  start(tmp_path)
  assert start(tmp_path, resume__step=4) == ({}, 4)
  assert start(tmp_path, resume__step=4) == ({}, None)
  # With another rate it is another attempt.
  again = dict(optimizer__learning_rate=1e-5, resume__allow="config")
  assert start(tmp_path, resume__step=4, **again)[1] == 4
  assert start(tmp_path, resume__step=4, **again)[1] is None
  assert start(tmp_path, resume__step=2, **again)[1] == 2
  assert [entry["step"] for entry in history(tmp_path)] == [4, 4, 2]


def test_a_reference_that_is_taken_does_not_repeat_the_going_back(tmp_path):
  """Its entry in the history comes after that of the step."""
  start(tmp_path)
  assert start(tmp_path, resume__step=4)[1] == 4
  add_to_history(Workdir.at(tmp_path), {"reference": ["a there, b now"]})
  assert start(tmp_path, resume__step=4)[1] is None


@pytest.mark.fault(48)
@pytest.mark.parametrize("text", [None, "{}", '{"history": []}'])
def test_a_run_that_forgot_its_data_is_refused(tmp_path, text):
  workdir = Workdir.at(tmp_path)
  start(tmp_path)
  for is_trained in (False, True):
    if is_trained:  # until then nothing was learnt from data
      workdir.saves.write_text('{"begun": 4, "saved": 4}')
    workdir.data.unlink(missing_ok=True)
    if text is not None:
      workdir.data.write_text(text)
    if is_trained:
      with pytest.raises(ValueError, match=r"does not tell on which data"):
        start(tmp_path)
  assert "data" in start(tmp_path, resume__allow="data")[0]
  assert json.loads(workdir.data.read_text())["train"] == IDENTITY["train"]
  assert start(tmp_path) == ({}, None)


@pytest.mark.parametrize("value", ["3", '["x"]'])
def test_a_damaged_history_is_named(tmp_path, value):
  start(tmp_path)
  path = tmp_path / "data.json"
  known = json.loads(path.read_text()) | {"history": json.loads(value)}
  path.write_text(json.dumps(known))
  with pytest.raises(ValueError, match=r'data\.json is damaged: "history"'):
    start(tmp_path, resume__step=4)


def test_each_curve_is_that_of_its_own_optimizer(tmp_path):
  start(tmp_path, total_steps=6, **LINEAR)
  now = LINEAR | {"optimizer__warmup_steps": 8}
  accepted, _ = start(
    tmp_path, total_steps=12, resume__allow="total_steps,config", **now
  )
  assert "rate at step 3: 0.0005 there, 0.0005 now" in accepted["total_steps"]
  assert "rate at step 0: 0.001 there, 0.000125 now" in accepted["total_steps"]


def test_an_unknown_kind_of_difference_is_refused(tmp_path):
  with pytest.raises(ValueError, match="'dat' must be one of config, total"):
    start(tmp_path, resume__allow="data,dat")
