"""Tokenizers that come with a model."""

import dataclasses
import json
import logging
import pathlib
import re

import jax
import numpy as np
import pytest
import tokenizers as hf_tokenizers

from dpo_jax import judges
from dpo_jax.data import tokenizers
from dpo_jax.model_sources import open_tokenizer, parse
from dpo_jax.models import huggingface
from dpo_jax.parallel import mesh
from dpo_jax.records import resume
from dpo_jax.records.metrics import read_metrics
from dpo_jax.records.workdir import Workdir
from dpo_jax.train import train
from tests import faults, tiny
from tests.data.folders import train_bytes, write_folder

ROOT = pathlib.Path(__file__).parents[2]

pytestmark = pytest.mark.usefixtures("in_haste")


def write_model(folder, *, has_tokenizer=True, **tokenizer_config):
  """Writes a tiny Hugging Face model, with a tokenizer of 300 tokens."""
  policy = tiny.make_policy(vocab_size=384)
  params = policy.init(jax.random.key(1))
  huggingface.save_params(folder, policy, params, dtype="float32")
  if has_tokenizer:
    write_folder(folder, **tokenizer_config)
  return str(folder)


def write_run(folder, init, **data):
  """Writes the config.json of a run, as far as its tokenizer needs it."""
  folder.mkdir()
  (folder / "model.json").write_text("{}")
  config = {"policy": {"init": init}, "data": data}
  (folder / "config.json").write_text(json.dumps(config))
  return f"run:{folder}"


def settings(init, **data):
  return parse(init).tokenizer_settings(data)


def test_random_weights_read_bytes():
  found = settings("random")
  assert found["tokenizer"] == "bytes"
  assert found["template_date"] == tokenizers.DEFAULT_DATE
  assert isinstance(open_tokenizer(found), tokenizers.ByteTokenizer)


def test_a_folder_brings_its_own_tokenizer(tmp_path):
  folder = write_model(tmp_path)
  assert settings(f"hf:{folder}")["tokenizer"] == folder
  named = settings(f"hf:{folder}", tokenizer=folder)
  assert named == settings(f"hf:{folder}")


def test_a_hub_model_brings_its_own_tokenizer(tmp_path, monkeypatch):
  folder = write_model(tmp_path)
  monkeypatch.setattr(
    huggingface, "download", {"me/model@1": folder}.__getitem__
  )
  found = settings("hub:me/model@1")
  assert found["tokenizer"] == "hub:me/model@1"
  assert open_tokenizer(found).digest == (
    tokenizers.load_tokenizer(folder).digest
  )


def test_a_run_brings_the_tokenizer_template_eos_and_date_it_was_trained_with(
  tmp_path,
):
  folder = write_model(tmp_path / "model")
  (tmp_path / "t.jinja").write_text("x")
  trained_with = {
    "tokenizer": folder,
    "chat_template": str(tmp_path / "t.jinja"),
    "eos_token": "<|user|>",
    "template_date": "2020-02-02",
  }
  first = write_run(tmp_path / "first", f"hf:{folder}", **trained_with)
  assert settings(first) == trained_with
  second = write_run(tmp_path / "second", first, tokenizer="")
  assert settings(second) == trained_with
  assert settings(second, eos_token="</s>") == trained_with | {
    "eos_token": "</s>"
  }
  # Another vocabulary has its own end of a response and template.
  other = str(write_folder(tmp_path / "other"))
  assert settings(second, tokenizer=other) == {
    "tokenizer": other,
    "chat_template": "",
    "eos_token": "",
    "template_date": "2020-02-02",
  }


@pytest.mark.parametrize("plain", ["bytes", "letters:4"])
def test_a_run_of_bytes_or_letters_brings_them(tmp_path, plain):
  run = write_run(tmp_path / "run", "random", tokenizer=plain)
  assert settings(run)["tokenizer"] == plain
  with pytest.raises(ValueError, match=r"data\.tokenizer='/x' .*'run:"):
    settings(run, tokenizer="/x")


@pytest.mark.parametrize("plain", ["bytes", "letters:4"])
def test_byte_ids_are_refused_where_the_model_has_a_tokenizer(tmp_path, plain):
  folder = write_model(tmp_path / "model")
  run = write_run(tmp_path / "run", f"hf:{folder}")
  for init in (f"hf:{folder}", run):
    with pytest.raises(ValueError, match=rf"'{plain}' .*own tokenizer is"):
      settings(init, tokenizer=plain)


def test_a_model_without_a_tokenizer_must_be_told_one(tmp_path):
  init = f"hf:{write_model(tmp_path, has_tokenizer=False)}"
  with pytest.raises(ValueError, match=r"no tokenizer\.json.*or 'bytes'"):
    settings(init)
  assert settings(init, tokenizer="bytes")["tokenizer"] == "bytes"
  # One in a format that is not read is a tokenizer all the same.
  (tmp_path / "tokenizer.model").write_bytes(b"")
  for given in ("", "bytes"):
    with pytest.raises(ValueError, match=r"\(tokenizer\.model is not read\)"):
      settings(init, tokenizer=given)


def test_a_folder_of_adapters_is_refused_with_what_to_do(tmp_path):
  (tmp_path / "adapter_config.json").write_text("{}")
  with pytest.raises(ValueError, match="holds adapters of peft"):
    parse(f"hf:{tmp_path}", "policy.init")


def test_a_run_that_is_not_there_is_named(tmp_path):
  with pytest.raises(FileNotFoundError, match=r"nowhere/config\.json"):
    settings(f"run:{tmp_path / 'nowhere'}")


@pytest.mark.parametrize(
  ("name", "content"),
  [
    ("config.json", '{"data": {}}'),
    ("config.json", '{"policy": 3, "data": {}}'),
    ("model.json", '{"vocab_size": 3}'),
    ("model.json", "[]"),
  ],
)
def test_damaged_records_of_a_run_are_named(tmp_path, name, content):
  workdir = Workdir.at(tmp_path)
  workdir.write_config(tiny.make_config().to_dict())
  shape = dataclasses.asdict(tiny.make_policy().config)
  workdir.model.write_text(json.dumps(shape))
  assert parse(f"run:{tmp_path}").trained_model == tiny.make_policy().config
  (tmp_path / name).write_text(content)
  with pytest.raises(ValueError, match=f"^{tmp_path / name} is damaged"):
    _ = parse(f"run:{tmp_path}").trained_model


def test_a_tokenizer_with_other_ids_is_warned_of(tmp_path, caplog):
  init = f"hf:{write_model(tmp_path / 'model')}"
  vocabulary = json.loads(train_bytes().to_str())
  words = vocabulary["model"]["vocab"]
  words["the"], words["cat"] = words["cat"], words["the"]
  (tmp_path / "copy").mkdir()
  (tmp_path / "swapped").mkdir()
  write_folder(tmp_path / "copy")
  write_folder(
    tmp_path / "swapped",
    hf_tokenizers.Tokenizer.from_str(json.dumps(vocabulary)),
  )
  for name, is_warned in (("copy", False), ("swapped", True)):
    caplog.clear()
    found = settings(init, tokenizer=str(tmp_path / name))
    with caplog.at_level(logging.WARNING):
      parse(init).warn_of_other_ids(found, open_tokenizer(found))
    assert ("gives 2 of the 300 tokens" in caplog.text) == is_warned


def readme_config():
  """The config that the README shows, as its code makes it."""
  text = (ROOT / "README.md").read_text()
  blocks = re.findall(r"```python\n(.*?)```", text, re.S)
  [code] = [block for block in blocks if "def get_config" in block]
  names = {}
  exec(code, names)
  return names["get_config"]()


def test_the_readmes_config_reads_with_the_models_tokenizer(
  tmp_path, monkeypatch
):
  monkeypatch.chdir(tmp_path)
  write_model(tmp_path / "pythia")
  rows = [
    {
      "prompt": f"what is the answer {i}",
      "chosen": " the answer is that the cat sat",
      "rejected": f" the dog ran away {i}",
    }
    for i in range(8)
  ]
  (tmp_path / "pairs.jsonl").write_text("\n".join(map(json.dumps, rows)))
  config = readme_config()
  assert config.policy.init == "hf:pythia"
  small = tiny.make_config()
  small.policy, small.loss = config.policy, config.loss
  small.data.source = config.data.source
  small.data.eval_fraction = 0.0
  small.total_steps = 1
  train(small, tmp_path / "run")
  recorded = Workdir.of_run(tmp_path / "run").read_config()
  assert recorded["data"]["tokenizer"] == "pythia"
  # By hand: ids of the model's own tokenizer, each response by itself.
  tokenizer = tokenizers.load_tokenizer("pythia")
  source = parse(config.policy.init)
  policy = source.policy(config.policy)
  params = source.load(policy, mesh.make_mesh({"data": -1}), seed=0)

  def ids(text, is_continuation):
    return tokenizer.encode(
      [text], is_rendered=False, is_continuation=is_continuation
    )[0]

  groups = [
    [
      np.int32([tokenizer.bos_id, *ids(row["prompt"], False)]),
      np.int32([*ids(row["chosen"], True), tokenizer.eos_id]),
    ]
    for row in rows
  ]
  wanted = tiny.naive_logps(policy, params, groups).mean()
  [row] = read_metrics(tmp_path / "run", "train")
  np.testing.assert_allclose(row["logps/chosen"], wanted, rtol=1e-5)


def test_an_old_workdir_without_a_tokenizers_name_goes_on(tmp_path):
  config = tiny.make_config()
  config.data.tokenizer = ""
  workdir = Workdir.at(tmp_path)
  resume.record(config, {}, {}, workdir)
  config.data.tokenizer = "bytes"
  assert not resume.check_same_config(config, workdir)
  resume.record(config, {}, {}, workdir)
  config.data.tokenizer = "letters:4"
  with pytest.raises(ValueError, match="'bytes' there, 'letters:4' now"):
    resume.check_same_config(config, workdir)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["hf", "hub"])
def test_a_reward_model_judges_with_the_tokenizer_it_was_trained_with(
  tmp_path, monkeypatch, kind
):
  """Values of the judge, which reads text, and of the run's evaluation."""
  folder = write_model(tmp_path / "model")
  where = {"hf": folder, "hub": "me/model@1"}[kind]
  monkeypatch.setattr(
    huggingface, "download", {"me/model@1": folder}.__getitem__
  )
  texts = ("the answer is no", "the cat sat on the mat", "what does the dog")
  rows = [
    {
      "prompt": f"what is the answer {i}",
      "chosen": f" {texts[i % 3]}",
      "rejected": f" and {texts[(i + 1) % 3]}",
    }
    for i in range(24)
  ]
  (tmp_path / "pairs.jsonl").write_text("\n".join(map(json.dumps, rows)))
  config = tiny.make_config(
    policy__init=f"{kind}:{where}",
    loss__name="reward_model",
    data__source=f"jsonl:{tmp_path / 'pairs.jsonl'}",
    data__eval_fraction=0.4,
    data__eos_token="<|system|>",
    optimizer__learning_rate=1e-2,
    total_steps=3,
    eval__max_groups=0,
  )
  train(config, tmp_path / "run")
  with np.load(tmp_path / "run" / "eval_logps" / "3.npz") as file:
    values, ids = file["values"], file["example_ids"]
  judge = judges.get_judge(f"reward:{tmp_path / 'run'}")
  prompts = [rows[i]["prompt"] for i in ids]
  for slot, name in enumerate(("chosen", "rejected")):
    rewards = judges.ask(judge, prompts, [rows[i][name] for i in ids])
    np.testing.assert_allclose(rewards, values[:, slot], atol=1e-5)
  assert np.ptp(values) > 1e-3


@pytest.mark.parametrize(
  ("init", "error", "message"),
  [
    ("", ValueError, "must be one of random, hf:FOLDER"),
    ("hf:", ValueError, "must be one of random"),
    ("magic", ValueError, "policy.init='magic' must be one of"),
    ("hf:/nowhere", FileNotFoundError, "the folder /nowhere does not exist"),
    ("run:/nowhere", FileNotFoundError, "not the workdir of a run"),
    ("Qwen/Qwen3-4B", ValueError, "'hub:Qwen/Qwen3-4B@REVISION'"),
    ("Qwen/Qwen3-4B@12ab", ValueError, "'hub:Qwen/Qwen3-4B@12ab'"),
    ("hf:Qwen/Qwen3-4B", FileNotFoundError, "'hub:Qwen/Qwen3-4B@REVISION'"),
    ("hub:Qwen/Qwen3-4B", ValueError, "name the commit"),
  ],
)
def test_an_init_that_names_nothing_is_refused(init, error, message):
  with pytest.raises(error, match=message):
    parse(init)


def test_a_branch_is_pinned_to_its_commit(tmp_path, monkeypatch, caplog):
  """The config of the run records the commit, which a resume uses."""
  commits = ["1" * 40, "2" * 40]
  for commit in commits:
    write_model(tmp_path / commit)
  latest = commits[0]

  def download(where):
    revision = where.partition("@")[2]
    return str(tmp_path / (latest if revision == "main" else revision))

  monkeypatch.setattr(huggingface, "download", download)
  config = tiny.make_config(policy__init="hub:me/model@main", total_steps=1)
  config.data.tokenizer = ""
  train(config, tmp_path / "run")
  recorded = Workdir.of_run(tmp_path / "run").read_config()
  assert recorded["policy"]["init"] == f"hub:me/model@{commits[0]}"
  assert recorded["data"]["tokenizer"] == f"hub:me/model@{commits[0]}"
  latest = commits[1]
  config.total_steps = 2
  with caplog.at_level(logging.INFO, "dpo_jax"):
    train(config, tmp_path / "run")
  assert f"'hub:me/model@main' is hub:me/model@{commits[0]}" in caplog.text
  config.policy.init = f"hub:me/model@{latest}"
  with pytest.raises(ValueError, match=f"policy.init: .*{latest}' now"):
    train(config, tmp_path / "run")


@pytest.mark.slow
def test_a_run_resumes_without_the_run_that_it_began_with(
  tmp_path, monkeypatch
):
  """Its parameters are saved, and its reference's log-probs are cached."""
  shared = dict(
    data__source="synthetic:review_pairs:40",
    data__eval_fraction=0.1,
    data__cache_dir=str(tmp_path / "stores"),
  )
  train(tiny.make_config(total_steps=1, **shared), tmp_path / "sft")
  config = tiny.make_config(
    total_steps=4, policy__init=f"run:{tmp_path / 'sft'}", **shared
  )
  train(config, tmp_path / "whole")
  with monkeypatch.context() as patch:
    faults.stop_at(patch, 2)
    with pytest.raises(SystemExit):
      train(config, tmp_path / "parts")
  (tmp_path / "sft").rename(tmp_path / "elsewhere")
  train(config, tmp_path / "parts")
  whole, parts = (
    [row["loss"] for row in read_metrics(tmp_path / name, "train")]
    for name in ("whole", "parts")
  )
  assert parts == whole
  with pytest.raises(FileNotFoundError, match="sft"):  # a fresh run needs it
    train(config, tmp_path / "fresh")
  for path in (tmp_path / "parts" / "reference").iterdir():
    path.unlink()
  config.total_steps = 6
  with pytest.raises(FileNotFoundError, match="put one of them back"):
    train(config, tmp_path / "parts")
