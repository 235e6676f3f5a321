"""Logits equal those of transformers, without it: tests/golden/make.py."""

import functools
import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import save_file

from dpo_jax.models import huggingface
from dpo_jax.models.decoder import Policy
from tests.golden import make
from tests.models.families import CASES

_FOLDER = pathlib.Path(make.__file__).parent
_FAMILIES = json.loads((_FOLDER / "families.json").read_text())


@functools.partial(jax.jit, static_argnums=0)
def logits_of(policy, params, tokens):
  """Computes f32 [T, V] of one sequence."""
  tokens = tokens[None]
  hidden = policy.hidden_states(
    params,
    tokens,
    jnp.arange(tokens.shape[1])[None],
    jnp.ones_like(tokens),
    jnp.zeros_like(tokens),
  )
  return policy.readout(params).logits(hidden)[0]


def test_every_family_has_golden_logits():
  assert set(_FAMILIES) == set(CASES)


@pytest.mark.parametrize("family", CASES)
def test_logits_equal_those_of_transformers(family, tmp_path, unoptimized):
  described = _FAMILIES[family]
  (tmp_path / "config.json").write_text(json.dumps(described["config"]))
  weights = make.draw_weights(family, described["shapes"])
  save_file(weights, tmp_path / "model.safetensors")
  policy = Policy(huggingface.load_config(str(tmp_path)))
  device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
  shardings = jax.tree.map(lambda _: device, policy.abstract_params())
  params = huggingface.load_params(str(tmp_path), policy, shardings)
  ours = logits_of(policy, params, jnp.asarray(make.draw_tokens(family)))
  wanted = np.load(_FOLDER / "families.npz")[family]
  assert np.abs(wanted).max() > 0.5, "flat logits would show nothing"
  np.testing.assert_allclose(ours, wanted, atol=1e-4, rtol=1e-4)
