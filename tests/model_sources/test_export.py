"""An export is refused, and its card written, without weights."""

import dataclasses

import pytest

from dpo_jax import config as config_lib
from dpo_jax.model_sources.export import export
from dpo_jax.model_sources.model_card import without_folders
from dpo_jax.models.config import Lora
from dpo_jax.records import resume
from dpo_jax.records.workdir import Workdir
from dpo_jax.system.files import write_json
from tests import tiny


@pytest.fixture
def run(tmp_path):
  """The config and the shape of a run with adapters."""
  workdir = Workdir.at(tmp_path / "run")
  config = config_lib.resolve(tiny.make_config(lora__rank=2))
  workdir.write_config(resume.as_json(config))
  model = tiny.make_policy(lora=Lora(2, 4.0)).config
  write_json(workdir.model, dataclasses.asdict(model))
  return workdir.path


@pytest.mark.parametrize(
  ("settings", "message"),
  [
    (
      {"name": "me/tuned", "only_adapter": True},
      r"push_to='me/tuned' uploads adapters.*--base=ORG/NAME",
    ),
    ({"base": "me/model"}, r"base='me/model' is that of adapters: add"),
    ({"base": "model", "only_adapter": True}, "base='model' must be ORG/NAME"),
  ],
)
def test_a_base_that_a_reader_cannot_find_is_refused(
  run, tmp_path, settings, message
):
  with pytest.raises(ValueError, match=message):
    export(run, tmp_path / "out", **settings)
  assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
  ("text", "wanted"),
  [
    ("--workdir=/home/me/runs/dpo --x", "--workdir=.../dpo --x"),
    ('"init": "hf:/srv/models/base/"', '"init": "hf:.../base/"'),
    ("a=jsonl:/a/b.jsonl,b=hf:/c/d", "a=jsonl:.../b.jsonl,b=hf:.../d"),
    ("from `/srv/model`.", "from `.../model`."),
    ("https://host.org/a/b?c=/d", "https://host.org/a/b?c=/d"),
    ("gs://bucket/a/b me/model runs/a/b", "gs://bucket/a/b me/model runs/a/b"),
    ('f"{folder}/base/x"', 'f"{folder}/base/x"'),
  ],
)
def test_a_card_of_an_upload_has_no_folder_of_this_machine(text, wanted):
  assert without_folders(text) == wanted
