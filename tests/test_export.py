"""Exports open in transformers and peft, with the same logits."""

import dataclasses
import json
import shutil
import sys

import jax
import numpy as np
import pytest

from dpo_jax.data import tokenizer_files, tokenizers
from dpo_jax.model_sources import TrainedRun
from dpo_jax.model_sources.export import export
from dpo_jax.models import huggingface
from dpo_jax.models.config import Lora
from dpo_jax.models.decoder import Policy
from dpo_jax.models.huggingface import peft as peft_lib
from dpo_jax.parallel import mesh
from dpo_jax.records.metrics import read_metrics
from dpo_jax.train import train
from tests import faults, tiny
from tests.data import folders, hub_server
from tests.models.families import CASES, make_model
from tests.models.test_families import open_folder, our_logits

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("in_haste")]

TOKENS = np.random.default_rng(0).integers(3, 90, 17).astype(np.int32)


def their_logits(model):
  with torch.no_grad():
    return model(torch.tensor(TOKENS[None])).logits[0].numpy()


def ours(workdir):
  """Logits of a run's policy, adapters merged."""
  run = TrainedRun.at(workdir)
  policy = Policy(dataclasses.replace(run.trained_model, lora=None))
  params = run.load(policy, mesh.make_mesh({"data": -1}), seed=0)
  return our_logits(policy, params, TOKENS)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
  """A short DPO run with adapters, of random weights and bytes."""
  workdir = tmp_path_factory.mktemp("run")
  knobs = dict(lora__rank=2, optimizer__learning_rate=1e-2)
  train(tiny.make_config(**knobs), workdir)
  return workdir


def test_an_export_opens_in_transformers_and_agrees(run, tmp_path):
  export(run, tmp_path)
  model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path).eval()
  np.testing.assert_allclose(their_logits(model), ours(run), atol=1e-4)
  tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path)
  text = "Über 5 €, great!\n"
  ids = [256, *text.encode()]
  assert tokenizer(text)["input_ids"] == ids
  assert tokenizer.decode(ids, skip_special_tokens=True) == text
  assert model.generation_config.eos_token_id == tokenizer.eos_token_id == 257


def run_snippet(card, capsys):
  """Runs the code of a model card, and returns what it prints."""
  capsys.readouterr()
  exec(card.partition("```python\n")[2].partition("```")[0], {})
  return capsys.readouterr().out


def test_the_card_of_an_export_tells_all_and_its_code_runs(
  run, tmp_path, capsys
):
  export(run, tmp_path)
  card = (tmp_path / "README.md").read_text()
  data = json.loads((run / "data.json").read_text())
  for part in (
    "license: unknown\n",
    "# dpo with",
    "trained from `random weights`",
    "| metric | step 4 | last evaluation |",
    "| `synthetic:review_pairs:40` | 40 |",
    f"| train | {data['train']['groups']} | {data['train']['content']} |",
    (run / "git.txt").read_text().strip(),
    " ".join(sys.orig_argv[1:2]),
    '"beta": 0.1',
  ):
    assert part in card, part
  (row,) = (x for x in card.splitlines() if x.startswith("| eval/reward/accu"))
  low = read_metrics(run, "eval")[-1]["reward/accuracy_low"]
  assert f"({low:.4g} to" in row and "accuracy_low" not in card
  assert run_snippet(card, capsys).startswith("<bos>We saw")


def test_an_export_is_pushed_by_the_command(run, tmp_path, monkeypatch):
  with hub_server.serve(str(tmp_path / "hub"), monkeypatch) as server:
    server.tokens["Bearer hf_a_secret"] = "write"
    process = faults.spawn(
      "import runpy; runpy.run_module('dpo_jax.export', run_name='__main__')",
      f"--workdir={run}",
      f"--out={tmp_path / 'out'}",
      "--push_to=me/model",
      "--commit_message=the first",
      HF_ENDPOINT=f"http://127.0.0.1:{server.server_port}",
      HF_TOKEN="hf_a_secret",
      HF_HUB_DISABLE_XET="1",
      JAX_DISABLE_MOST_OPTIMIZATIONS="1",  # as here: for the same bits
    )
    output = process.communicate(timeout=120)[0]
  assert process.returncode == 0 and "hf_a_secret" not in output, output
  assert server.messages == ["the first"] and server.private == {"me/model"}
  pushed = server.repositories["me/model"]["main"]
  assert pushed["model.safetensors"] == (
    (tmp_path / "out" / "model.safetensors").read_bytes()
  )
  assert b'folder = snapshot_download("me/model")' in pushed["README.md"]


def test_an_export_is_a_start_for_another_run(run, tmp_path):
  export(run, tmp_path / "out")
  config = tiny.make_config(
    policy__init=f"hf:{tmp_path / 'out'}", total_steps=1
  )
  train(config, tmp_path / "next")
  np.testing.assert_allclose(
    our_logits(*open_folder(tmp_path / "out"), TOKENS), ours(run), atol=1e-5
  )


def test_bfloat16_is_asked_for_and_said(run, tmp_path):
  export(run, tmp_path, dtype="bfloat16")
  model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
  assert model.dtype == torch.bfloat16


@pytest.mark.parametrize("kind", ["random", "run", "hf"])
def test_peft_loads_the_adapter_of_a_run_on_its_base(
  tmp_path, kind, request, capsys
):
  """Also of a run that began where transformers can open nothing."""
  peft = pytest.importorskip("peft")
  knobs = dict(lora__rank=2, optimizer__learning_rate=1e-2)
  if kind == "random":
    workdir = request.getfixturevalue("run")
  else:
    workdir, start = tmp_path / "run", tmp_path / "start"
    train(tiny.make_config(total_steps=2, **knobs), start)
    if kind == "hf":
      export(start, tmp_path / "model")
    where = {"run": f"run:{start}", "hf": f"hf:{tmp_path / 'model'}"}[kind]
    train(tiny.make_config(policy__init=where, **knobs), workdir)
  export(workdir, tmp_path / "adapter", only_adapter=True)
  model = peft.AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter")
  wanted = ours(workdir)
  np.testing.assert_allclose(their_logits(model.eval()), wanted, atol=1e-4)
  with model.disable_adapter():
    assert np.abs(their_logits(model) - wanted).max() > 1e-2
  card = (tmp_path / "adapter" / "README.md").read_text()
  has_base = (tmp_path / "adapter" / "base" / "config.json").exists()
  assert has_base == (kind != "hf")
  name = "base" if has_base else str(tmp_path / "model")
  assert f"trained from `{name}`" in card
  assert "base_model" not in card  # no name of the Hub
  assert run_snippet(card, capsys).startswith("<bos>We saw")
  if has_base:
    transformers.AutoTokenizer.from_pretrained(tmp_path / "adapter" / "base")
    assert 'from_pretrained(f"{folder}/base")' in card


def test_a_value_head_that_is_left_out_is_told(tmp_path, caplog):
  config = tiny.make_config(loss__name="reward_model", lora__rank=2)
  train(config, tmp_path / "run")
  for kind in (True, False):
    caplog.clear()
    export(tmp_path / "run", tmp_path / str(kind), only_adapter=kind)
    found = [r.message for r in caplog.records if "value head" in r.message]
    assert found == ["the value head is not exported: transformers has none"]


def test_the_base_of_an_adapter_on_the_hub_names_its_revision(
  run, tmp_path, monkeypatch
):
  peft = pytest.importorskip("peft")
  export(run, tmp_path / "model")
  monkeypatch.setattr(
    huggingface,
    "download",
    {"me/model@12ab": str(tmp_path / "model")}.__getitem__,
  )
  config = tiny.make_config(
    policy__init="hub:me/model@12ab", lora__rank=2, total_steps=1
  )
  train(config, tmp_path / "run")
  export(tmp_path / "run", tmp_path / "adapter", only_adapter=True)
  found = peft.PeftConfig.from_pretrained(tmp_path / "adapter")
  assert found.base_model_name_or_path == "me/model"
  assert found.revision == "12ab"
  card = (tmp_path / "adapter" / "README.md").read_text()
  assert "base_model: me/model\n" in card
  assert not (tmp_path / "adapter" / "base").exists()


def test_the_base_of_an_adapter_may_be_named(run, tmp_path):
  export(run, tmp_path, only_adapter=True, name="me/tuned", base="me/model")
  described = json.loads((tmp_path / "adapter_config.json").read_text())
  assert described["base_model_name_or_path"] == "me/model"
  assert described["revision"] is None
  assert not (tmp_path / "base").exists()
  card = (tmp_path / "README.md").read_text()
  assert "base_model: me/model\n" in card
  assert "trained from `me/model`" in card
  assert 'from_pretrained("me/model")' in card
  assert str(run.parent) not in card and str(tmp_path.parent) not in card


def test_an_adapter_on_a_base_that_changed_is_refused(tmp_path):
  start = tmp_path / "start"
  train(tiny.make_config(total_steps=1), start)
  config = tiny.make_config(
    policy__init=f"run:{start}", lora__rank=2, total_steps=1
  )
  train(config, tmp_path / "run")
  shutil.rmtree(start)
  train(tiny.make_config(total_steps=1, seed=1), start)
  with pytest.raises(ValueError, match="restore the old weights"):
    export(tmp_path / "run", tmp_path / "adapter", only_adapter=True)


def test_the_pad_token_is_the_tokenizers(tmp_path):
  policy = tiny.make_policy(vocab_size=384)
  huggingface.save_params(
    tmp_path / "model", policy, policy.init(jax.random.key(1)), dtype="float32"
  )
  folders.write_folder(tmp_path / "model", pad_token="<|system|>")
  config = tiny.make_config(
    policy__init=f"hf:{tmp_path / 'model'}", total_steps=1
  )
  train(config, tmp_path / "run")
  export(tmp_path / "run", tmp_path / "out")
  tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
  pad_id = tokenizer.convert_tokens_to_ids("<|system|>")
  assert tokenizer.pad_token_id == pad_id != tokenizer.eos_token_id
  for name in ("config.json", "generation_config.json"):
    raw = json.loads((tmp_path / "out" / name).read_text())
    assert raw["pad_token_id"] == pad_id


@pytest.mark.parametrize("files", ["json", "pair"])
def test_an_exported_tokenizer_puts_the_bos_that_was_trained_with(
  tmp_path, files
):
  trained = folders.train_bytes()
  folder = folders.write_folder(
    tmp_path / "in", trained, add_bos_token=True, puts_bos=files == "json"
  )
  if files == "pair":  # of GPT-2's kind, where add_bos_token counts
    trained.model.save(folder)
    (tmp_path / "in" / "tokenizer.json").unlink()
  tokenizer = tokenizers.load_tokenizer(folder)
  tokenizer_files.save_tokenizer(tokenizer, tmp_path)
  theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
  ids = tokenizer.encode(
    ["the cat sat"], is_rendered=False, is_continuation=False
  )[0]
  assert theirs("the cat sat")["input_ids"] == [tokenizer.bos_id, *ids]


@pytest.mark.parametrize(
  ("name", "targets", "is_rank_stabilized"),
  [
    ("gpt2", "query|value|down", False),  # two of three fused, [in, out]
    ("gpt_neox", "query|key|value|up", True),  # fused head by head
    ("phi3", ".*", True),
    ("gptj", ".*", False),  # channels in another order
    ("gemma2", "attention_out|gate", False),
  ],
)
def test_adapters_of_fused_projections_are_joined(
  name, targets, is_rank_stabilized, tmp_path
):
  peft = pytest.importorskip("peft")
  model = make_model(name)
  model.save_pretrained(tmp_path / "base")
  base, params = open_folder(tmp_path / "base")
  lora = Lora(3, 5.0, targets, is_rank_stabilized)
  policy = Policy(dataclasses.replace(base.config, lora=lora))
  adapted = policy.init(jax.random.key(0))
  noise = np.random.default_rng(0)

  def fill(ours, theirs):
    filled = dict(ours)
    for key, leaf in ours.items():
      if isinstance(leaf, dict):
        filled[key] = fill(leaf, theirs.get(key, {}))
      elif key == "lora_b":
        filled[key] = 0.3 * noise.normal(size=leaf.shape).astype(np.float32)
      elif key != "lora_a":
        filled[key] = theirs[key]
    return filled

  adapted = fill(adapted, params)
  peft_lib.save_adapter(
    tmp_path / "adapter", adapted, policy.config, base=str(tmp_path / "base")
  )
  wanted = our_logits(policy, adapted, TOKENS)
  before = their_logits(model)
  loaded = peft.PeftModel.from_pretrained(model, tmp_path / "adapter").eval()
  np.testing.assert_allclose(their_logits(loaded), wanted, atol=1e-4)
  assert np.abs(before - wanted).max() > 0.05
  assert name in CASES


def test_a_tokenizer_comes_out_as_it_went_in(real_data, tmp_path):
  folder = str(real_data / "tokenizers" / "chatml_6400")
  tokenizer_files.save_tokenizer(tokenizers.load_tokenizer(folder), tmp_path)
  before, after = (
    transformers.AutoTokenizer.from_pretrained(f) for f in (folder, tmp_path)
  )
  messages = [{"role": "user", "content": "Hi <there>, 5 €?"}]
  assert after.apply_chat_template(
    messages, tokenize=False, add_generation_prompt=True
  ) == before.apply_chat_template(
    messages, tokenize=False, add_generation_prompt=True
  )
  assert after("Hello world")["input_ids"] == before("Hello world")["input_ids"]
  assert after.eos_token_id == before.eos_token_id


def test_what_cannot_be_exported_is_refused(run, tmp_path):
  with pytest.raises(FileNotFoundError, match="not the workdir of a run"):
    export(tmp_path / "nowhere", tmp_path / "out")
  with pytest.raises(ValueError, match="dtype='int8' must be one of"):
    export(run, tmp_path / "out", dtype="int8")
  (tmp_path / "taken").mkdir()
  (tmp_path / "taken" / "config.json").write_text("{}")
  with pytest.raises(ValueError, match="holds a model already"):
    export(run, tmp_path / "taken")
  train(tiny.make_config(total_steps=1), tmp_path / "full")
  with pytest.raises(ValueError, match="trained no adapters"):
    export(tmp_path / "full", tmp_path / "out", only_adapter=True)


def test_a_damaged_record_is_refused_before_weights_are_written(run, tmp_path):
  shutil.copytree(run, tmp_path / "run")
  (tmp_path / "run" / "metrics.jsonl").write_text("garbage\n")
  for kind in (True, False):
    with pytest.raises(ValueError, match=r"metrics\.jsonl:1 is damaged"):
      export(tmp_path / "run", tmp_path / "out", only_adapter=kind)
  assert not (tmp_path / "out").exists()


def test_a_run_is_exported_without_the_run_that_it_began_with(tmp_path):
  train(tiny.make_config(total_steps=1), tmp_path / "start")
  config = tiny.make_config(
    policy__init=f"run:{tmp_path / 'start'}", total_steps=1
  )
  train(config, tmp_path / "run")
  shutil.rmtree(tmp_path / "start")
  export(tmp_path / "run", tmp_path / "out")
  assert (tmp_path / "out" / "model.safetensors").exists()
