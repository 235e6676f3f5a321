"""Writes our weights as a Llama of transformers, for other contenders."""

import json
import pathlib
from typing import Any

import numpy as np
from safetensors.numpy import save_file

from dpo_jax.models.config import ModelConfig


def write_weights(folder: str, config: ModelConfig, params: Any) -> None:
  """Writes model.safetensors, float32.

  Args:
    folder: existing folder.
    config: shape of the model, with an untied head.
    params: its parameters, on the host.
  """
  tensors = {
    "model.embed_tokens.weight": params["embedding"],
    "model.norm.weight": params["final_norm"]["scale"],
    "lm_head.weight": params["head"].T,
  }
  layers = params["layers"]
  kernels = {
    "self_attn.q_proj": (layers["query"]["kernel"], 1),
    "self_attn.k_proj": (layers["key"]["kernel"], 1),
    "self_attn.v_proj": (layers["value"]["kernel"], 1),
    "self_attn.o_proj": (layers["attention_out"]["kernel"], 2),
    "mlp.gate_proj": (layers["gate"]["kernel"], 1),
    "mlp.up_proj": (layers["up"]["kernel"], 1),
    "mlp.down_proj": (layers["down"]["kernel"], 1),
  }
  norms = {
    "input_layernorm": layers["attention_norm"]["scale"],
    "post_attention_layernorm": layers["mlp_norm"]["scale"],
  }
  for i in range(config.num_layers):
    for name, (kernel, num_inputs) in kernels.items():
      width = int(np.prod(kernel.shape[1 : 1 + num_inputs]))
      matrix = np.asarray(kernel[i]).reshape(width, -1).T
      tensors[f"model.layers.{i}.{name}.weight"] = matrix
    for name, scales in norms.items():
      tensors[f"model.layers.{i}.{name}.weight"] = scales[i]
  tensors = {
    name: np.ascontiguousarray(x, np.float32) for name, x in tensors.items()
  }
  save_file(tensors, f"{folder}/model.safetensors", metadata={"format": "pt"})


def write_config(folder: str, config: ModelConfig) -> None:
  """Writes config.json to an existing folder."""
  described = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_act": "silu",
    "vocab_size": config.vocab_size,
    "hidden_size": config.d_model,
    "intermediate_size": config.d_ff,
    "num_hidden_layers": config.num_layers,
    "num_attention_heads": config.num_heads,
    "num_key_value_heads": config.num_kv_heads,
    "head_dim": config.head_dim,
    "max_position_embeddings": config.max_positions,
    "rms_norm_eps": config.norm_eps,
    "rope_theta": config.rope_theta,
    "tie_word_embeddings": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
  }
  (pathlib.Path(folder) / "config.json").write_text(json.dumps(described))
