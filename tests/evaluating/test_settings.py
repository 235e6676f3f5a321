"""The config of an evaluation is the run's, where it does not differ."""

import json

import pytest

from dpo_jax import config as config_lib
from dpo_jax.evaluating import settings
from dpo_jax.records import resume
from dpo_jax.records.workdir import Workdir
from tests import tiny


@pytest.fixture
def record(tmp_path):
  """Records a config as a run does, and reads it again."""

  def write_and_read(changed=None, **overrides):
    config = config_lib.resolve(tiny.make_config(**overrides))
    values = resume.as_json(config) | (changed or {})
    Workdir.at(tmp_path).write_config(values)
    return settings.recorded_config(Workdir.at(tmp_path))

  return write_and_read


def resolved(config):
  return json.loads(json.dumps(resume.as_json(config_lib.resolve(config))))


@pytest.mark.parametrize(
  "overrides",
  [
    {},
    {"loss__name": "ipo", "loss__tau": 0.3, "optimizer__max_grad_norm": 1e9},
    {
      "data__sources": ({"source": "synthetic:review_pairs", "weight": 2.0},),
      "data__source": None,
    },
    {"loss": ({"name": "dpo", "weight": 0.5}, {"name": "sft", "weight": 2.0})},
  ],
)
def test_a_recorded_config_is_read_as_it_was_resolved(record, overrides):
  wanted = resolved(tiny.make_config(**overrides))
  wanted["mesh"]["context"] = 1  # which the tiny config does not name
  assert resolved(record(**overrides)) == wanted
  assert settings.differences(record(**overrides), record(**overrides)) == {}


def test_steps_of_epochs_and_keys_of_older_versions_are_filled_in(record):
  changed = {"epochs": 2.0, "total_steps": 7, "mesh": {"data": -1}}
  recorded = record(changed)
  assert (recorded.total_steps, recorded.epochs) == (7, None)
  assert recorded.mesh.context == 1
  assert resolved(recorded)["total_steps"] == 7


def test_one_held_out_source_replaces_the_other(record):
  recorded = record(data__eval_source="jsonl:a")
  found = settings.evaluation_config(recorded, {"data.eval_sources": "b=c"})
  assert (found.data.eval_source, found.data.eval_sources) == ("", "b=c")
  back = settings.evaluation_config(found, {"data.eval_source": "d"})
  assert (back.data.eval_source, back.data.eval_sources) == ("d", "")
  assert settings.differences(recorded, back) == {
    "data.eval_source": {"run": "jsonl:a", "here": "d"}
  }


def test_records_may_be_read_otherwise_where_they_have_their_own_source(record):
  given = {"data.eval_source": "jsonl:a", "data.max_tokens": 99}
  found = settings.evaluation_config(record(), given)
  assert found.data.max_tokens == 99
  with pytest.raises(ValueError, match=r"data\.columns: the held-out groups"):
    settings.evaluation_config(record(), {"data.columns": "prompt=q"})


def test_another_loss_forgets_the_knobs_and_the_reference_of_the_first(record):
  recorded = record(loss__name="ipo", loss__tau=0.3, eval__losses=("hinge",))
  found = settings.evaluation_config(recorded, {"loss.name": "kto"})
  assert (found.loss.tau, found.reference.kind) == (None, "auto")
  assert found.eval.losses == ()
  same = settings.evaluation_config(recorded, {"loss.tau": 0.5})
  assert (same.loss.name, same.loss.tau) == ("ipo", 0.5)
  assert same.eval.losses == ("hinge",)
  live = record(reference__kind="ema")
  found = settings.evaluation_config(live, {"loss.name": "kto"})
  assert found.reference.kind == "ema"


@pytest.mark.parametrize(
  ("given", "against", "message"),
  [
    ({}, "chosen", "^against='chosen' needs samples, and eval.num_samples=0"),
    ({"eval.judge": "api:m"}, "reference", "^eval.judge='api:m' needs"),
    ({"eval.judge": "sentiment"}, "chosen", "^against='chosen' and eval.judge"),
  ],
)
def test_what_reads_samples_needs_some(record, given, against, message):
  config = settings.evaluation_config(record(), given)
  with pytest.raises(ValueError, match=message):
    settings.check_samples_are_drawn(config, given, against)
  settings.check_samples_are_drawn(config, {"eval.judge": ""}, "reference")
  config.eval.num_samples = 1
  settings.check_samples_are_drawn(config, given, against)


def test_a_knob_of_a_sum_of_losses_needs_a_name(record):
  losses = ({"name": "dpo", "weight": 0.5}, {"name": "sft", "weight": 2.0})
  with pytest.raises(ValueError, match=r"name one with --config\.loss\.name"):
    settings.evaluation_config(record(loss=losses), {"loss.beta": 1.0})
