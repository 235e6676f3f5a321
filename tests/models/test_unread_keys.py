"""Keys of config.json that a family does not read: kept, refused or told."""

import json
import logging

import pytest

from dpo_jax.models.config import ModelConfig
from dpo_jax.models.huggingface import config_json

_LLAMA = {
  "hidden_size": 64,
  "intermediate_size": 128,
  "num_hidden_layers": 2,
  "num_attention_heads": 4,
  "num_key_value_heads": 2,
  "max_position_embeddings": 512,
  "vocab_size": 384,
  "hidden_act": "silu",
  "rms_norm_eps": 1e-5,
}
_GPT = {
  "vocab_size": 384,
  "n_embd": 64,
  "n_layer": 2,
  "n_head": 4,
  "n_positions": 512,
  "activation_function": "gelu_new",
}
_BASES = {
  "gpt2": _GPT,
  "gptj": _GPT | {"rotary_dim": 8},
  "gpt_neox": {
    key: value
    for key, value in _LLAMA.items()
    if key not in ("num_key_value_heads", "rms_norm_eps")
  }
  | {"hidden_act": "gelu"},
  "gemma2": _LLAMA
  | {"hidden_activation": "gelu_pytorch_tanh", "sliding_window": 256},
}


def read(family, **others):
  raw = {"model_type": family, **_BASES.get(family, _LLAMA), **others}
  return ModelConfig(**config_json.read_config(raw, "m/config.json"))


@pytest.mark.parametrize(
  ("family", "others"),
  [
    ("llama", {"is_llama_config": True, "rope_interleaved": False}),
    ("llama", {"unsloth_version": "2025.1", "unsloth_fixed": True}),
    ("llama", {"sliding_window": None, "max_sequence_length": 512}),
    ("llama", {"quantization_config": None, "num_local_experts": 0}),
    ("llama", {"embedding_multiplier": 1.0, "logits_scaling": 1}),
    ("llama", {"clip_qkv": None, "no_rope_layers": [1, 1]}),
    ("llama", {"layer_types": ["full_attention"] * 2, "use_qk_norm": False}),
    ("llama", {"_commit_hash": "12ab", "transformers_version": "9"}),
    ("llama", {"sliding_window": 4096, "partial_rotary_factor": 1.0}),
    ("llama", {"rotary_emb_base": 1e4, "rope_theta": None}),
    ("qwen2", {"use_mrope": False, "attention_bias": False}),
    ("qwen2", {"use_sliding_window": False, "sliding_window": 128}),
    ("qwen3", {"use_qk_norm": True, "mlp_bias": False}),
    ("mistral", {"sliding_window": None, "mlp_bias": False}),
    ("phi3", {"attention_bias": False, "rope_scaling": None}),
    ("gptj", {"scale_attn_weights": True, "rotary": True}),
    ("gpt2", {"n_ctx": 512, "n_inner": None, "summary_use_proj": True}),
    ("gemma2", {"sliding_window_size": 256, "cache_implementation": "h"}),
    ("gpt_neox", {"attention_bias": None, "rope_theta": 1e4}),
  ],
  ids=lambda x: "-".join(x) if isinstance(x, dict) else x,
)
def test_neutral_values_and_metadata_change_nothing(caplog, family, others):
  with caplog.at_level(logging.WARNING):
    config = read(family, **others)
  read_keys = {"use_sliding_window", "sliding_window", "n_inner"}
  assert config == read(
    family, **{k: v for k, v in others.items() if k in read_keys}
  )
  assert not caplog.records


@pytest.mark.parametrize(
  ("family", "others", "named"),
  [
    ("llama", {"quantization_config": {"bits": 4}}, "quantization_config={"),
    ("llama", {"kv_cache_quant_method": "int8"}, "kv_cache_quant_method="),
    ("qwen3", {"num_experts": 8}, "num_experts=8"),
    ("llama", {"moe_layer_freq": 1}, "moe_layer_freq=1"),
    ("llama", {"rope_scaling": {"rope_type": "yarn", "factor": 4}}, "'yarn'"),
    (
      "phi3",
      {"rope_scaling": {"type": "longrope", "long_factor": [1.0]}},
      "'longrope'",
    ),
    ("gpt2", {"rope_scaling": {"type": "linear"}}, "rope_scaling={"),
    (
      "llama",
      {"rope_scaling": {"type": "default", "mrope_section": [16]}},
      "mrope_section in rope_parameters",
    ),
    ("llama", {"attention_sinks": True}, "attention_sinks=True"),
    ("llama", {"num_sink_tokens": 4}, "num_sink_tokens=4"),
    ("llama", {"hidden_act": "quick_gelu"}, "hidden_act='quick_gelu'"),
    (
      "llama",
      {"hidden_activation": "relu"},
      "hidden_activation='relu' contradicts hidden_act='silu'",
    ),
    ("llama", {"layer_types": ["chunked_attention"] * 2}, "layer_types="),
    ("qwen2", {"layer_types": ["linear_attention"] * 2}, "layer_types="),
    ("llama", {"residual_multiplier": 0.22}, "residual_multiplier=0.22"),
    ("llama", {"ssm_multipliers": [1.0, 0.5]}, "ssm_multipliers="),
    ("llama", {"logits_scaling": 8.0}, "logits_scaling=8.0"),
    ("olmo2", {"clip_qkv": 8.0}, "clip_qkv=8.0"),
    ("llama", {"no_rope_layers": [1, 0]}, "no_rope_layers=[1, 0]"),
    ("llama", {"partial_rotary_factor": 0.5}, "partial_rotary_factor=0.5"),
    ("llama", {"rotary_pct": 0.25}, "rotary_pct=0.25"),
    ("llama", {"rotary_emb_base": 5e5}, "rotary_emb_base=500000.0"),
    ("llama", {"rope_interleaved": True}, "rope_interleaved=True"),
    ("llama", {"sliding_window": 128}, "sliding_window=128"),
    ("gemma2", {"sliding_window_size": 128}, "sliding_window_size=128"),
    ("llama", {"final_logit_softcapping": 30.0}, "final_logit_softcapping="),
    ("llama", {"query_pre_attn_scalar": 64}, "query_pre_attn_scalar=64"),
    ("llama", {"qk_layernorm": True}, "qk_layernorm=True"),
    ("llama", {"is_causal": False}, "is_causal=False"),
    ("gptj", {"scale_attn_weights": False}, "scale_attn_weights=False"),
    ("gpt2", {"scale_attn_weights": False}, "scale_attn_weights=False (only"),
  ],
)
def test_unread_keys_that_change_the_computation_are_refused(
  family, others, named
):
  with pytest.raises(ValueError, match="does not support") as raised:
    read(family, **others)
  assert named in str(raised.value)
  assert len(str(raised.value)) < 300


def test_all_refused_keys_are_named_at_once():
  with pytest.raises(ValueError, match=r"num_experts=8; clip_qkv=2") as raised:
    read("llama", num_experts=8, clip_qkv=2, hidden_act="swiglu_oai")
  assert "hidden_act='swiglu_oai'" in str(raised.value)


def test_other_keys_are_ignored_and_logged(caplog):
  with caplog.at_level(logging.WARNING):
    config = read("llama", mlp_width=7, use_cache=True, vision=False)
  assert config == read("llama")
  assert "m/config.json" in caplog.text and "mlp_width=7" in caplog.text
  assert "use_cache" not in caplog.text and "vision" not in caplog.text


def test_long_values_are_shortened(caplog):
  with caplog.at_level(logging.WARNING):
    read("llama", factors=list(range(1000)))
  assert len(caplog.text) < 300


def test_published_configs_are_read(real_data):
  """Parameters of nine published models, in millions, as they are known."""
  path = real_data / "inputs" / "published_configs.json"
  wanted = {
    "smollm2-135m": 134.5,
    "gpt-j-6b": 6050.9,
    "gemma-2-9b-it": 9241.7,
    "phi-3-mini-4k": 3821.1,
    "llama-3.2-1b": 1235.8,
    "qwen2.5-0.5b": 494.0,
    "mistral-7b-v0.3": 7248.0,
    "pythia-70m": 70.4,
  }
  found = {
    name: ModelConfig(**config_json.read_config(raw, name)).num_params() / 1e6
    for name, raw in json.loads(path.read_text()).items()
  }
  assert {k: round(v, 1) for k, v in found.items() if k in wanted} == wanted
  assert "unsloth-saved" in found
