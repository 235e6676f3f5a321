"""Hugging Face checkpoints: what is read, and what is refused."""

import hashlib
import json
import os
import reprlib
import shutil

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from dpo_jax.models import generate, huggingface, partition_rules
from dpo_jax.models.decoder import Policy
from dpo_jax.models.huggingface import tensor_map
from dpo_jax.parallel import mesh as mesh_lib
from tests import bucket, faults


def load(folder, **overrides):
  policy = Policy(huggingface.load_config(str(folder), **overrides))
  device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
  shardings = jax.tree.map(lambda _: device, policy.abstract_params())
  return policy, huggingface.load_params(str(folder), policy, shardings)


@pytest.fixture
def stories(real_data):
  return real_data / "stories260k"


@pytest.fixture
def folder(tmp_path):
  """A tiny random checkpoint with uneven dimensions, written by hand."""
  config = {
    "model_type": "llama",
    "vocab_size": 48,
    "hidden_size": 12,
    "intermediate_size": 20,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 6,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": False,
  }
  rng = np.random.default_rng(0)

  def draw(*shape):
    return rng.normal(size=shape).astype(np.float32)

  tensors = {
    "model.embed_tokens.weight": draw(48, 12),
    "model.norm.weight": draw(12),
    "lm_head.weight": draw(48, 12),
  }
  for i in range(2):
    shapes = {
      "self_attn.q_proj": (24, 12),
      "self_attn.k_proj": (12, 12),
      "self_attn.v_proj": (12, 12),
      "self_attn.o_proj": (12, 24),
      "mlp.gate_proj": (20, 12),
      "mlp.up_proj": (20, 12),
      "mlp.down_proj": (12, 20),
      "input_layernorm": (12,),
      "post_attention_layernorm": (12,),
    }
    for name, shape in shapes.items():
      tensors[f"model.layers.{i}.{name}.weight"] = draw(*shape)
  (tmp_path / "config.json").write_text(json.dumps(config))
  save_file(tensors, tmp_path / "model.safetensors")
  return tmp_path


def rewrite(folder, change):
  tensors = load_file(folder / "model.safetensors")
  change(tensors)
  save_file(tensors, folder / "model.safetensors")


def reconfigure(folder, **fields):
  path = folder / "config.json"
  path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def test_kernels_are_the_checkpoint_transposed(folder):
  _, params = load(folder)
  tensors = load_file(folder / "model.safetensors")
  for layer in range(2):
    weight = tensors[f"model.layers.{layer}.self_attn.q_proj.weight"]
    kernel = params["layers"]["query"]["kernel"][layer]
    # Row 6 h + i of the checkpoint is channel i of head h.
    for head, channel in ((0, 0), (1, 5), (3, 2)):
      np.testing.assert_array_equal(
        kernel[:, head, channel], weight[6 * head + channel]
      )
    weight = tensors[f"model.layers.{layer}.self_attn.o_proj.weight"]
    kernel = params["layers"]["attention_out"]["kernel"][layer]
    np.testing.assert_array_equal(kernel[3, 2], weight[:, 6 * 3 + 2])
    weight = tensors[f"model.layers.{layer}.mlp.down_proj.weight"]
    kernel = params["layers"]["down"]["kernel"][layer]
    np.testing.assert_array_equal(kernel, weight.T)


def test_a_model_of_a_bucket_is_read_and_written(folder, monkeypatch):
  bucket.stand_in(folder.parent, monkeypatch)
  policy, params = load(f"gs://{folder.name}")
  jax.tree.map(np.testing.assert_array_equal, params, load(folder)[1])
  out = f"gs://{folder.name}/out"
  huggingface.save_params(
    out, policy, params, dtype="float32", max_shard_bytes=4000
  )
  assert len(list((folder / "out").glob("*.safetensors"))) > 1
  jax.tree.map(np.testing.assert_array_equal, params, load(out)[1])


def test_a_mesh_holds_the_same_numbers(folder):
  policy, params = load(folder)
  mesh = mesh_lib.make_mesh({"data": 2, "fsdp": 2, "tensor": 2})
  shardings = partition_rules.param_shardings(policy.abstract_params(), mesh)
  sharded = huggingface.load_params(str(folder), policy, shardings)
  kernel = sharded["layers"]["query"]["kernel"]
  assert kernel.addressable_shards[0].data.shape == (2, 6, 2, 6)
  jax.tree.map(np.testing.assert_array_equal, params, sharded)


def test_param_dtype_is_an_option(folder):
  _, params = load(folder, param_dtype="bfloat16")
  assert {str(x.dtype) for x in jax.tree.leaves(params)} == {"bfloat16"}


def test_all_errors_of_a_checkpoint_are_named_at_once(folder):
  def spoil(tensors):
    del tensors["model.norm.weight"]
    tensors["model.layers.0.self_attn.q_proj.bias"] = np.zeros(24, np.float32)
    tensors["lm_head.weight"] = np.zeros((40, 12), np.float32)

  rewrite(folder, spoil)
  with pytest.raises(ValueError) as error:
    load(folder)
  for part in (
    "3 faults",
    "missing model.norm.weight",
    "unexpected model.layers.0.self_attn.q_proj.bias",
    "lm_head.weight is [40, 12], expected [48, 12]",
  ):
    assert part in str(error.value)


@pytest.mark.parametrize("is_equal", [True, False])
def test_a_tied_head_that_differs_is_kept_untied(folder, caplog, is_equal):
  def tie(tensors):
    if is_equal:
      tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"]

  rewrite(folder, tie)
  head = load_file(folder / "model.safetensors")["lm_head.weight"]
  reconfigure(folder, tie_word_embeddings=True)
  policy, params = load(folder)
  assert policy.config.tie_embeddings == is_equal
  assert ("kept untied" in caplog.text) == (not is_equal)
  np.testing.assert_array_equal(policy.readout(params).kernel, head.T)


def test_a_config_alone_is_enough_for_its_shape(folder):
  reconfigure(folder, tie_word_embeddings=True)
  (folder / "model.safetensors").unlink()
  assert huggingface.load_config(str(folder)).tie_embeddings


@pytest.mark.fault(62)
def test_nan_weights_are_refused(folder):
  def spoil(tensors):
    tensors["model.norm.weight"][3] = np.nan

  rewrite(folder, spoil)
  with pytest.raises(ValueError, match=r"model\.norm\.weight holds a NaN"):
    load(folder)


@pytest.mark.fault(60)
@pytest.mark.parametrize(
  ("fields", "message"),
  [
    ({"model_type": "bloom"}, "model_type='bloom' is not one of.*gemma.*qwen3"),
    ({"rope_scaling": {"factor": 8.0}}, "rope_scaling of type None"),
    ({"rope_parameters": {"rope_type": "yarn"}}, "of type 'yarn'"),
    ({"sliding_window": 32}, "sliding_window=32"),
    ({"hidden_act": "swiglu_oai"}, "hidden_act='swiglu_oai'"),
    ({"num_experts": 8, "quant_method": "int4"}, "num_experts=8; quant_m"),
  ],
)
def test_unsupported_keys_are_refused(folder, fields, message):
  reconfigure(folder, **fields)
  with pytest.raises(ValueError, match=message):
    huggingface.load_config(str(folder))


@pytest.mark.parametrize(
  ("key", "value", "allowed"),
  [
    ("vocab_size", "384", "a whole number from 1 to 16,777,216"),
    ("vocab_size", 384.0, "a whole number from 1 to 16,777,216"),
    ("vocab_size", [384], "a whole number from 1 to 16,777,216"),
    ("vocab_size", True, "a whole number from 1 to 16,777,216"),
    ("num_hidden_layers", 10**9, "a whole number from 1 to 10,000"),
    ("num_hidden_layers", 0, "a whole number from 1 to 10,000"),
    ("num_key_value_heads", 0, "a whole number from 1 to 4,194,304"),
    ("max_position_embeddings", -5, "a whole number from 1 to 2,147,483,648"),
    ("max_position_embeddings", 10**15, "a whole number from 1 to"),
    ("rms_norm_eps", None, "a number from 1e-12 to 0.1"),
    ("rms_norm_eps", float("nan"), "a number from 1e-12 to 0.1"),
    ("rms_norm_eps", -1, "a number from 1e-12 to 0.1"),
    ("rms_norm_eps", 10**400, "a number from 1e-12 to 0.1"),
    ("rope_theta", 0, "a number from 1 to 1e+12"),
    ("rope_theta", float("inf"), "a number from 1 to 1e+12"),
    ("tie_word_embeddings", "no", "true or false"),
    ("attention_bias", 1, "true or false"),
    ("hidden_act", ["silu"], "text"),
    ("rope_scaling", "linear", "an object"),
  ],
)
def test_values_out_of_range_are_named_with_what_is_allowed(
  folder, key, value, allowed
):
  reconfigure(folder, **{key: value})
  with pytest.raises(ValueError) as caught:
    huggingface.load_config(str(folder))
  message = f"{folder / 'config.json'}: {key}={reprlib.repr(value)} must be"
  assert str(caught.value).startswith(f"{message} {allowed}")


@pytest.mark.parametrize(
  ("name", "value", "message"),
  [
    ("rope_scaling", {"type": "linear"}, "type 'linear' without factor"),
    ("rope_scaling", {"type": "linear", "factor": 0}, "scaling.factor=0 must"),
    (
      "rope_scaling",
      {"type": "llama3", "factor": 8.0, "low_freq_factor": 1.0},
      "without high_freq_factor, original_max_position_embeddings",
    ),
    (
      "rope_scaling",
      {
        "type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 4.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
      },
      "low_freq_factor=4.0 not below high_freq_factor=4.0",
    ),
    (
      "rope_parameters",
      {"full_attention": {"rope_theta": 1e4}},
      "rope_parameters.sliding_attention=None must have a rope_theta",
    ),
    ("rope_parameters", {"rope_theta": "1e4"}, "parameters.rope_theta='1e4'"),
    ("layer_types", 3, "sets what this decoder does not support"),
    ("num_attention_heads", 3, "num_heads=3 must be a multiple"),
    ("model_type", ["llama"], r"model_type=\['llama'\] is not one of"),
  ],
)
def test_odd_values_are_refused_with_the_file(folder, name, value, message):
  reconfigure(folder, **{name: value})
  with pytest.raises(ValueError, match=f"config.json.*{message}"):
    huggingface.load_config(str(folder))


@pytest.mark.parametrize("dtype", ["int64", "int8", "bool"])
def test_weights_of_integers_are_refused(folder, dtype):
  def spoil(tensors):
    name = "model.norm.weight"
    tensors[name] = np.ones_like(tensors[name]).astype(dtype)

  rewrite(folder, spoil)
  theirs = {"int64": "I64", "int8": "I8", "bool": "BOOL"}[dtype]
  message = rf"norm\.weight has the dtype {theirs} in model\.safetensors"
  with pytest.raises(ValueError, match=message):
    load(folder)


@pytest.mark.parametrize("target", ["config.json", "model.safetensors"])
def test_a_damaged_download_is_refused(folder, target):
  """As the cache of the Hub holds it: a link to a file named by its digest."""
  path = folder / target
  content = path.read_bytes()
  digest = hashlib.sha256(content).hexdigest()
  if target == "config.json":
    start = b"blob %d\0" % len(content)
    digest = hashlib.sha1(start + content).hexdigest()
  (folder / "blobs").mkdir()
  path.rename(folder / "blobs" / digest)
  path.symlink_to(folder / "blobs" / digest)
  load(folder)
  faults.flip_byte(path, -2)
  with pytest.raises(ValueError, match=f"{target} is damaged: its digest"):
    load(folder)


def test_a_missing_field_is_named(folder):
  path = folder / "config.json"
  raw = json.loads(path.read_text())
  del raw["hidden_size"]
  path.write_text(json.dumps(raw))
  with pytest.raises(ValueError, match="lacks hidden_size"):
    huggingface.load_config(str(folder))


def test_a_config_may_begin_with_a_byte_order_mark(folder):
  path = folder / "config.json"
  before = huggingface.load_config(str(folder))
  path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
  assert huggingface.load_config(str(folder)) == before


def test_a_key_that_a_config_holds_twice_is_refused(folder):
  path = folder / "config.json"
  path.write_text(path.read_text().replace("{", '{"hidden_size": 8,', 1))
  message = r"config\.json has the key 'hidden_size' twice"
  with pytest.raises(ValueError, match=message):
    huggingface.load_config(str(folder))
  (folder / "model.safetensors.index.json").write_text(
    '{"weight_map": {"x": "a.safetensors", "x": "b.safetensors"}}'
  )
  path.write_text(path.read_text().replace('"hidden_size": 8,', "", 1))
  with pytest.raises(ValueError, match=r"index\.json .* the key 'x' twice"):
    load(folder)


@pytest.mark.parametrize(
  "name",
  ["config.json", "model.safetensors", "model.safetensors.index.json"],
)
def test_a_pipe_or_a_broken_link_in_a_folder_is_named(folder, name):
  path = folder / name
  path.unlink(missing_ok=True)
  os.mkfifo(path)
  with pytest.raises(OSError, match=f"{name}' is a pipe or a device"):
    load(folder)
  path.unlink()
  path.symlink_to("gone")
  with pytest.raises(FileNotFoundError, match=f"{name}' is a link to 'gone'"):
    load(folder)


@pytest.mark.fault(62)
@pytest.mark.parametrize("kept", [0, 5, 300, -40])
def test_a_file_that_is_cut_short_is_named(folder, kept):
  path = folder / "model.safetensors"
  path.write_bytes(path.read_bytes()[:kept])
  with pytest.raises(ValueError, match=r"model\.safetensors is cut short"):
    load(folder)


@pytest.mark.fault(63)
@pytest.mark.parametrize(
  "name", ["../model.safetensors", "/etc/passwd", "sub/model.safetensors", ""]
)
def test_an_index_may_not_point_outside_its_folder(folder, name):
  index = folder / "model.safetensors.index.json"
  index.write_text(json.dumps({"weight_map": {"lm_head.weight": name}}))
  with pytest.raises(ValueError, match="must name files in its own folder"):
    load(folder)


def test_an_index_that_names_absent_files_is_refused(folder):
  index = folder / "model.safetensors.index.json"
  index.write_text(json.dumps({"weight_map": {"x": "model-2.safetensors"}}))
  with pytest.raises(FileNotFoundError, match=r"model-2\.safetensors"):
    load(folder)
  for value in (3, None, ["model.safetensors"], {"lm_head.weight": 3}):
    index.write_text(json.dumps({"weight_map": value}))
    with pytest.raises(ValueError, match=r"index\.json: weight_map must map"):
      load(folder)
  index.write_text("{")
  with pytest.raises(ValueError, match="json is damaged"):
    load(folder)


def test_a_tensor_in_two_files_is_refused(folder):
  (folder / "model.safetensors").rename(folder / "a.safetensors")
  shutil.copy(folder / "a.safetensors", folder / "b.safetensors")
  with pytest.raises(ValueError, match="which another file holds too"):
    load(folder)


def test_only_the_device_s_shard_is_read(folder, monkeypatch):
  """No read is larger than the largest tensor's part on a device."""
  sizes = []
  original = tensor_map.Tensor.read

  def read(self, source, which, index):
    piece = original(self, source, which, index)
    sizes.append(piece.size)
    return piece

  monkeypatch.setattr(tensor_map.Tensor, "read", read)
  policy = Policy(huggingface.load_config(str(folder)))
  mesh = mesh_lib.make_mesh({"data": 1, "fsdp": 4, "tensor": 2})
  shardings = partition_rules.param_shardings(policy.abstract_params(), mesh)
  huggingface.load_params(str(folder), policy, shardings)
  assert max(sizes) == 48 * 12 // 8
  # A tensor on several devices is read once.
  assert sizes.count(12) == len(["final"]) + 4 * len(["norms"])


@pytest.mark.fault(60)
def test_hub_model_requires_a_revision(monkeypatch, folder):
  calls = []

  def snapshot_download(name, **settings):
    calls.append((name, settings))
    return str(folder)

  monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
  with pytest.raises(ValueError, match="ORG/NAME@REVISION"):
    huggingface.download("org/name")
  assert huggingface.download("org/name@0123abc") == str(folder)
  name, settings = calls[0]
  assert (name, settings["revision"]) == ("org/name", "0123abc")
  assert not any("bin" in p or "py" in p for p in settings["allow_patterns"])


@pytest.mark.fault(59)
def test_missing_files_are_named(tmp_path, folder):
  with pytest.raises(FileNotFoundError, match=r"config\.json"):
    huggingface.load_config(str(tmp_path / "nowhere"))
  (folder / "model.safetensors").unlink()
  with pytest.raises(FileNotFoundError, match=r"no \*\.safetensors"):
    load(folder)


def test_stories_continue_as_they_should(stories):
  """The greedy continuation that the checkpoint's own notes give."""
  tokenizers = pytest.importorskip("tokenizers")
  policy, params = load(stories)
  tokenizer = tokenizers.Tokenizer.from_file(str(stories / "tokenizer.json"))
  ids = tokenizer.encode("Once upon a time").ids
  out = generate.sample(
    policy,
    params,
    [ids],
    generate.Sampling(60, 0.0, stop_ids=(2,)),
    seed=0,
  )
  assert tokenizer.decode(out[0]).startswith(
    ", there was a little girl named Lily. She loved to play outside in the"
    " park. One day, she saw a big, red ball."
  )


@pytest.mark.slow
def test_logits_agree_with_transformers(stories, folder, tmp_path):
  torch = pytest.importorskip("torch")
  transformers = pytest.importorskip("transformers")
  reconfigure(folder, architectures=["LlamaForCausalLM"])
  copy = tmp_path / "stories"
  shutil.copytree(stories, copy)
  # Says that the head is tied, and has another one.
  odd = tmp_path / "odd"
  odd.mkdir()
  for name in ("config.json", "model.safetensors"):
    shutil.copy(folder / name, odd)
  reconfigure(odd, tie_word_embeddings=True)
  for path in (folder, copy, odd):
    policy, params = load(path)
    model = transformers.AutoModelForCausalLM.from_pretrained(path)
    vocab = policy.config.vocab_size
    tokens = np.random.default_rng(0).integers(0, vocab, (2, 50))
    with torch.no_grad():
      theirs = model(torch.tensor(tokens)).logits.numpy()
    hidden = policy.hidden_states(
      params,
      tokens,
      np.broadcast_to(np.arange(50), tokens.shape),
      np.ones_like(tokens),
      np.zeros_like(tokens),
    )
    ours = policy.readout(params).logits(hidden)
    np.testing.assert_allclose(ours, theirs, atol=1e-4, rtol=1e-4)
