"""What leaves: folders that transformers and peft open, and agree on."""

import dataclasses
import json

import jax
import numpy as np
import pytest

from dpo_jax import initialize, mesh
from dpo_jax.data import tokenizer_files, tokenizers
from dpo_jax.export import export
from dpo_jax.models import peft as peft_lib
from dpo_jax.models.config import Lora
from dpo_jax.models.decoder import Policy
from dpo_jax.train import train
from tests import tiny
from tests.models.families import CASES, make_model
from tests.models.test_families import open_folder, our_logits

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
pytestmark = pytest.mark.slow

TOKENS = np.random.default_rng(0).integers(3, 90, 17).astype(np.int32)


def their_logits(model):
  with torch.no_grad():
    return model(torch.tensor(TOKENS[None])).logits[0].numpy()


def ours(workdir):
  """Logits of a run's policy, adapters merged."""
  recorded = json.loads((workdir / "model.json").read_text())
  policy = initialize.Policy(
    dataclasses.replace(initialize.ModelConfig.from_dict(recorded), lora=None)
  )
  placement = mesh.make_mesh({"data": -1})
  params = initialize.load_params(f"run:{workdir}", policy, placement, seed=0)
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
  card = (tmp_path / "README.md").read_text()
  for part in ("# dpo with", "reward/accuracy", "train: ", '"beta": 0.1'):
    assert part in card, part


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


def test_peft_loads_the_adapter_of_a_run_and_agrees(run, tmp_path):
  peft = pytest.importorskip("peft")
  base = tmp_path / "base"
  config = tiny.make_config(total_steps=1, optimizer__learning_rate=0.0)
  train(config, tmp_path / "start")
  export(tmp_path / "start", base)
  export(run, tmp_path / "adapter", only_adapter=True)
  model = transformers.AutoModelForCausalLM.from_pretrained(base)
  before = their_logits(model)
  model = peft.PeftModel.from_pretrained(model, tmp_path / "adapter").eval()
  np.testing.assert_allclose(their_logits(model), ours(run), atol=1e-4)
  assert np.abs(before - ours(run)).max() > 1e-2


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
  with pytest.raises(FileNotFoundError, match="no workdir of a run"):
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
