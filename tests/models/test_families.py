"""Every family against transformers: logits, gradients, files, sampling."""

import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

from dpo_jax.models import generate, huggingface
from dpo_jax.models import logps as logps_lib
from dpo_jax.models.decoder import Policy
from tests import tiny
from tests.models.families import CASES, make_model

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
pytestmark = pytest.mark.slow

LENGTHS = (17, 9, 13)


@functools.cache
def theirs(name):
  return make_model(name)


@pytest.fixture(scope="module")
def load(tmp_path_factory):
  """Family -> (folder, policy, params), made once."""

  @functools.cache
  def load_one(name):
    folder = tmp_path_factory.mktemp("model")
    theirs(name).save_pretrained(folder)
    return folder, *open_folder(folder)

  return load_one


def open_folder(folder):
  policy = Policy(huggingface.load_config(str(folder)))
  device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
  shardings = jax.tree.map(lambda _: device, policy.abstract_params())
  return policy, huggingface.load_params(str(folder), policy, shardings)


def ragged():
  rng = np.random.default_rng(0)
  return [rng.integers(3, 96, n).astype(np.int32) for n in LENGTHS]


def our_logits(policy, params, tokens):
  """f32 [T, V] of one sequence; one program for all lengths up to 32."""
  # Later tokens do not change the logits of a token.
  padded = np.pad(np.asarray(tokens), (0, 32 - len(tokens)))
  return _padded_logits(policy, params, padded.astype(np.int32))[: len(tokens)]


@functools.partial(jax.jit, static_argnums=0)
def _padded_logits(policy, params, tokens):
  tokens = jnp.asarray(tokens)[None]
  hidden = policy.hidden_states(
    params,
    tokens,
    jnp.arange(tokens.shape[1])[None],
    jnp.ones_like(tokens),
    jnp.zeros_like(tokens),
  )
  return policy.readout(params).logits(hidden)[0]


@pytest.mark.parametrize("name", CASES)
def test_logits_agree_on_ragged_sequences(load, name):
  _, policy, params = load(name)
  for tokens in ragged():
    with torch.no_grad():
      wanted = theirs(name)(torch.tensor(tokens[None])).logits[0].numpy()
    ours = our_logits(policy, params, tokens)
    assert np.abs(wanted).max() > 0.5, "flat logits would show nothing"
    np.testing.assert_allclose(ours, wanted, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", CASES)
def test_gradients_of_a_log_prob_agree(load, name, tmp_path):
  """The gradient, written as a checkpoint, is torch's own."""
  _, policy, params = load(name)
  tokens = ragged()[0]

  def log_prob(params):
    logps = jax.nn.log_softmax(our_logits(policy, params, tokens))
    return logps[jnp.arange(len(tokens) - 1), tokens[1:]].sum()

  ours = jax.jit(jax.grad(log_prob))(params)
  huggingface.save_params(tmp_path, policy, ours, dtype="float32")
  model = theirs(name)
  model.zero_grad()
  logps = torch.log_softmax(model(torch.tensor(tokens[None])).logits[0], -1)
  logps[
    torch.arange(len(tokens) - 1), torch.tensor(tokens[1:]).long()
  ].sum().backward()
  written = load_file(tmp_path / "model.safetensors")
  compared = 0
  for key, parameter in model.named_parameters():
    if key == "lm_head.weight" and "embed_out.weight" in written:
      key = "embed_out.weight"  # renamed when it is saved
    if key not in written:
      continue  # the tied projection
    wanted = parameter.grad.numpy()
    scale = max(np.abs(wanted).max(), 1e-3)
    np.testing.assert_allclose(
      written[key] / scale, wanted / scale, atol=1e-3, err_msg=key
    )
    compared += 1
  assert compared == len(written)


@pytest.mark.parametrize("name", CASES)
def test_export_is_the_import_bit_for_bit(load, name, tmp_path):
  folder, policy, params = load(name)
  huggingface.save_params(tmp_path, policy, params, dtype="float32")
  before = load_file(folder / "model.safetensors")
  after = load_file(tmp_path / "model.safetensors")
  assert before.keys() == after.keys()
  for key, tensor in before.items():
    np.testing.assert_array_equal(after[key], tensor, err_msg=key)
  again = transformers.AutoModelForCausalLM.from_pretrained(
    tmp_path, attn_implementation="eager"
  ).eval()
  tokens = torch.tensor(ragged()[0][None])
  with torch.no_grad():
    np.testing.assert_allclose(
      again(tokens).logits.numpy(),
      theirs(name)(tokens).logits.numpy(),
      atol=1e-6,
    )
  assert huggingface.load_config(str(tmp_path)) == policy.config


@pytest.mark.parametrize("name", CASES)
def test_shared_prompts_equal_separate_forwards(load, name):
  """Windows and local layers count positions, not places in the row."""
  _, policy, params = load(name)
  groups = tiny.make_groups(4, num_slots=3)
  wanted = tiny.naive_logps(policy, params, groups)
  for layout in ("shared", "packed"):
    batch = tiny.pack(groups, layout, num_tokens=96)
    logps = jax.jit(
      lambda p, batch=batch: logps_lib.response_logps(
        policy, p, batch, chunk_size=16
      )
    )(params)
    for r, g in np.argwhere(batch.example_ids >= 0):
      np.testing.assert_allclose(
        logps[r, g], wanted[batch.example_ids[r, g]], rtol=1e-4
      )


@pytest.mark.parametrize("temperature", [0.0, 0.8])
@pytest.mark.parametrize("name", CASES)
def test_cached_sampling_equals_the_uncached_forward(load, name, temperature):
  _, policy, params = load(name)
  prompts = [
    tokens[:n].tolist() for tokens, n in zip(ragged(), (7, 2, 11), strict=True)
  ]
  num = 12
  settings = generate.Sampling(num, temperature, stop_ids=(1,))
  ours = generate.sample(policy, params, prompts, settings, seed=3)
  base = jax.random.key(3)
  for i, (prompt, response) in enumerate(zip(prompts, ours, strict=True)):
    key, text = jax.random.fold_in(base, i), list(prompt)
    for step in range(num):
      logits = our_logits(policy, params, text)[-1]
      if temperature:
        drawn = jax.random.categorical(
          jax.random.fold_in(key, step), logits / temperature
        )
      else:
        drawn = jnp.argmax(logits)
      text.append(int(drawn))
      if text[-1] == 1:
        break
    assert text[len(prompt) :] == response
  if name == "llama":
    with torch.no_grad():
      greedy = theirs(name).generate(
        torch.tensor([prompts[0]]), max_new_tokens=num, do_sample=False
      )[0, len(prompts[0]) :]
    if temperature == 0.0:
      assert greedy.tolist() == ours[0]


def test_shards_hold_what_one_file_holds(load, tmp_path):
  folder, policy, params = load("llama")
  huggingface.save_params(
    tmp_path, policy, params, dtype="float32", max_shard_bytes=9_000
  )
  assert len(list(tmp_path.glob("*.safetensors"))) > 3
  index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
  assert (
    index["weight_map"].keys() == load_file(folder / "model.safetensors").keys()
  )
  _, again = open_folder(tmp_path)
  jax.tree.map(np.testing.assert_array_equal, again, params)
  transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
