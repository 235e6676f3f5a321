"""A small random transformers model of every family, dims small but uneven."""

from typing import Any

# Windows shorter than the texts, several key-value heads, caps on.
_LLAMA = dict(
  vocab_size=96,
  hidden_size=24,
  intermediate_size=40,
  num_hidden_layers=3,
  num_attention_heads=4,
  num_key_value_heads=2,
  max_position_embeddings=64,
)
_GPT = dict(vocab_size=96, n_embd=24, n_layer=3, n_head=3, n_positions=64)
_LLAMA3 = dict(
  rope_type="llama3",
  rope_theta=50.0,
  factor=8.0,
  low_freq_factor=1.0,
  high_freq_factor=4.0,
  original_max_position_embeddings=32,
)
_LOCAL, _GLOBAL = "sliding_attention", "full_attention"

CASES: dict[str, tuple[str, dict[str, Any]]] = {
  "gpt2": ("GPT2", _GPT | dict(n_inner=40)),
  "gptj": ("GPTJ", _GPT | dict(n_head=4, rotary_dim=4)),
  "gpt_neox": (
    "GPTNeoX",
    {k: v for k, v in _LLAMA.items() if k != "num_key_value_heads"}
    | dict(num_attention_heads=3, rotary_pct=0.25),
  ),
  "gpt_neox sequential": (
    "GPTNeoX",
    {k: v for k, v in _LLAMA.items() if k != "num_key_value_heads"}
    | dict(num_attention_heads=3, use_parallel_residual=False, rotary_pct=0.5),
  ),
  "llama": ("Llama", _LLAMA | dict(head_dim=10)),
  "llama biased, scaled": (
    "Llama",
    _LLAMA
    | dict(attention_bias=True, mlp_bias=True, rope_parameters=_LLAMA3)
    | dict(tie_word_embeddings=True),
  ),
  "llama linear": (
    "Llama",
    _LLAMA
    | dict(
      rope_parameters=dict(rope_type="linear", factor=4.0, rope_theta=1e4)
    ),
  ),
  "mistral": ("Mistral", _LLAMA | dict(sliding_window=5)),
  "qwen2": ("Qwen2", _LLAMA),
  "qwen2 windowed": (
    "Qwen2",
    _LLAMA
    | dict(use_sliding_window=True, sliding_window=5, max_window_layers=1),
  ),
  "qwen3": ("Qwen3", _LLAMA | dict(head_dim=10)),
  "gemma": ("Gemma", _LLAMA | dict(head_dim=10)),
  "gemma2": (
    "Gemma2",
    _LLAMA
    | dict(
      head_dim=10,
      sliding_window=5,
      query_pre_attn_scalar=7,
      attn_logit_softcapping=2.0,
      final_logit_softcapping=3.0,
    ),
  ),
  "gemma3_text": (
    "Gemma3",
    _LLAMA
    | dict(
      head_dim=10,
      sliding_window=5,
      query_pre_attn_scalar=7,
      layer_types=[_LOCAL, _GLOBAL, _LOCAL],
      rope_parameters={
        _LOCAL: dict(rope_type="default", rope_theta=100.0),
        _GLOBAL: dict(rope_type="linear", factor=8.0, rope_theta=1000.0),
      },
    ),
  ),
  "olmo2": ("Olmo2", _LLAMA),
  "phi3": (
    "Phi3",
    _LLAMA | dict(sliding_window=5, partial_rotary_factor=1.0),
  ),
  "phi3 partial": (
    "Phi3",
    _LLAMA
    | dict(
      num_attention_heads=3,
      num_key_value_heads=1,
      partial_rotary_factor=0.5,
    ),
  ),
}


def make_model(name: str) -> Any:
  """A torch model with random weights that are not small, in float32."""
  import torch
  import transformers

  architecture, fields = CASES[name]
  config_name = f"{architecture}{'Text' if architecture == 'Gemma3' else ''}"
  config = getattr(transformers, f"{config_name}Config")(
    **{"eos_token_id": 1, "bos_token_id": 2, "pad_token_id": 0, **fields}
  )
  torch.manual_seed(0)
  model = transformers.AutoModelForCausalLM.from_config(
    config, attn_implementation="eager"
  ).eval()
  with torch.no_grad():
    for parameter in model.parameters():
      noise = torch.randn_like(parameter)
      # Biases and norm scales too must differ from what they start as.
      parameter.add_(noise, alpha=0.2 if parameter.ndim > 1 else 0.3)
  return model
