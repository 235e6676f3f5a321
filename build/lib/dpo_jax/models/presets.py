"""Shapes of models by name: those of papers, and small ones for trials.

A preset has the vocabulary size of its checkpoint. Random weights take that of
the tokenizer.
"""

from typing import Any

from dpo_jax.models.config import RopeScaling

_GPT2 = dict(
  family="gpt2",
  norm="layer",
  activation="gelu_tanh",
  is_gated=False,
  qkv_bias=True,
  out_bias=True,
  mlp_bias=True,
  has_learned_positions=True,
  vocab_size=50257,
  max_positions=1024,
)
_PYTHIA = dict(
  family="gpt_neox",
  norm="layer",
  activation="gelu",
  is_gated=False,
  is_parallel=True,
  qkv_bias=True,
  out_bias=True,
  mlp_bias=True,
  tie_embeddings=False,
  vocab_size=50304,
  max_positions=2048,
)
_LLAMA3 = dict(
  vocab_size=128256,
  max_positions=8192,
  rope_theta=5e5,
  tie_embeddings=False,
)
_LLAMA31 = _LLAMA3 | dict(
  max_positions=131072, rope_scaling=RopeScaling("llama3", 8.0)
)
_LLAMA32 = _LLAMA31 | dict(
  rope_scaling=RopeScaling("llama3", 32.0), tie_embeddings=True
)
_QWEN2 = dict(
  family="qwen2",
  norm_eps=1e-6,
  qkv_bias=True,
  rope_theta=1e6,
  max_positions=32768,
)
_QWEN3 = dict(
  family="qwen3",
  norm_eps=1e-6,
  qk_norm="head",
  rope_theta=1e6,
  max_positions=40960,
  vocab_size=151936,
)
_GEMMA = dict(
  norm_eps=1e-6,
  norm_offset=1.0,
  activation="gelu_tanh",
  is_embedding_scaled=True,
  max_positions=8192,
)
_GEMMA2 = _GEMMA | dict(
  family="gemma2",
  post_norm=True,
  attention_soft_cap=50.0,
  logits_soft_cap=30.0,
  window=4096,
  vocab_size=256000,
)
_GEMMA3 = _GEMMA | dict(
  family="gemma3_text",
  post_norm=True,
  qk_norm="head",
  rope_theta=1e6,
  local_rope_theta=1e4,
  vocab_size=262144,
  max_positions=32768,
)


def _shape(
  width: int, layers: int, heads: int, kv_heads: int, d_ff: int, **others: Any
) -> dict[str, Any]:
  return dict(
    d_model=width,
    num_layers=layers,
    num_heads=heads,
    num_kv_heads=kv_heads,
    head_dim=others.pop("head_dim", width // heads),
    d_ff=d_ff,
    **others,
  )


def _gpt2(width: int, layers: int, heads: int) -> dict[str, Any]:
  return _GPT2 | _shape(width, layers, heads, heads, 4 * width)


def _pythia(width: int, layers: int, heads: int, vocab: int = 50304) -> dict:
  shape = _shape(width, layers, heads, heads, 4 * width)
  rotary_dim = shape["head_dim"] // 4
  return _PYTHIA | shape | dict(rotary_dim=rotary_dim, vocab_size=vocab)


def _local(layers: int, period: int) -> tuple[bool, ...]:
  """Returns whether each layer is local: all but every period-th one."""
  return tuple(bool((i + 1) % period) for i in range(layers))


PRESETS: dict[str, dict[str, Any]] = {
  "tiny": _shape(64, 2, 4, 2, 160, max_positions=512),
  "1m": _shape(128, 5, 4, 4, 352, max_positions=512),
  "gpt2": _gpt2(768, 12, 12),
  "gpt2-medium": _gpt2(1024, 24, 16),
  "gpt2-large": _gpt2(1280, 36, 20),
  "gpt2-xl": _gpt2(1600, 48, 25),
  "gpt-j-6b": _shape(
    4096,
    28,
    16,
    16,
    16384,
    family="gptj",
    norm="layer",
    activation="gelu_tanh",
    is_gated=False,
    is_parallel=True,
    is_norm_shared=True,
    mlp_bias=True,
    head_bias=True,
    rotary_dim=64,
    tie_embeddings=False,
    vocab_size=50400,
    max_positions=2048,
  ),
  "pythia-70m": _pythia(512, 6, 8),
  "pythia-160m": _pythia(768, 12, 12),
  "pythia-410m": _pythia(1024, 24, 16),
  "pythia-1b": _pythia(2048, 16, 8),
  "pythia-1.4b": _pythia(2048, 24, 16),
  "pythia-2.8b": _pythia(2560, 32, 32),
  "pythia-6.9b": _pythia(4096, 32, 32, 50432),
  "pythia-12b": _pythia(5120, 36, 40, 50688),
  "llama-7b": _shape(
    4096,
    32,
    32,
    32,
    11008,
    norm_eps=1e-6,
    vocab_size=32000,
    max_positions=2048,
    tie_embeddings=False,
  ),
  "llama2-7b": _shape(
    4096,
    32,
    32,
    32,
    11008,
    vocab_size=32000,
    max_positions=4096,
    tie_embeddings=False,
  ),
  "llama3-8b": _LLAMA3 | _shape(4096, 32, 32, 8, 14336),
  "llama3-70b": _LLAMA3 | _shape(8192, 80, 64, 8, 28672),
  "llama3.1-8b": _LLAMA31 | _shape(4096, 32, 32, 8, 14336),
  "llama3.2-1b": _LLAMA32 | _shape(2048, 16, 32, 8, 8192),
  "llama3.2-3b": _LLAMA32 | _shape(3072, 28, 24, 8, 8192, head_dim=128),
  "mistral-7b": _shape(
    4096,
    32,
    32,
    8,
    14336,
    family="mistral",
    vocab_size=32000,
    max_positions=32768,
    window=4096,
    local_layers=(True,) * 32,
    tie_embeddings=False,
  ),
  "qwen2-0.5b": _QWEN2 | _shape(896, 24, 14, 2, 4864, vocab_size=151936),
  "qwen2-1.5b": _QWEN2 | _shape(1536, 28, 12, 2, 8960, vocab_size=151936),
  "qwen2-7b": _QWEN2
  | _shape(3584, 28, 28, 4, 18944, vocab_size=152064, tie_embeddings=False),
  "qwen3-0.6b": _QWEN3 | _shape(1024, 28, 16, 8, 3072, head_dim=128),
  "qwen3-1.7b": _QWEN3 | _shape(2048, 28, 16, 8, 6144, head_dim=128),
  "qwen3-4b": _QWEN3 | _shape(2560, 36, 32, 8, 9728, head_dim=128),
  "qwen3-8b": _QWEN3
  | _shape(4096, 36, 32, 8, 12288, head_dim=128, tie_embeddings=False),
  "gemma-2b": _GEMMA
  | _shape(
    2048, 18, 8, 1, 16384, head_dim=256, family="gemma", vocab_size=256000
  ),
  "gemma-7b": _GEMMA
  | _shape(
    3072, 28, 16, 16, 24576, head_dim=256, family="gemma", vocab_size=256000
  ),
  "gemma2-2b": _GEMMA2
  | _shape(
    2304,
    26,
    8,
    4,
    9216,
    head_dim=256,
    attention_scale=256**-0.5,
    local_layers=_local(26, 2),
  ),
  "gemma2-9b": _GEMMA2
  | _shape(
    3584,
    42,
    16,
    8,
    14336,
    head_dim=256,
    attention_scale=256**-0.5,
    local_layers=_local(42, 2),
  ),
  "gemma3-270m": _GEMMA3
  | _shape(
    640,
    18,
    4,
    1,
    2048,
    head_dim=256,
    attention_scale=256**-0.5,
    window=512,
    local_layers=_local(18, 6),
  ),
  "gemma3-1b": _GEMMA3
  | _shape(
    1152,
    26,
    4,
    1,
    6912,
    head_dim=256,
    attention_scale=256**-0.5,
    window=512,
    local_layers=_local(26, 6),
  ),
  "olmo2-1b": _shape(
    2048,
    16,
    16,
    16,
    8192,
    family="olmo2",
    norm_eps=1e-6,
    pre_norm=False,
    post_norm=True,
    qk_norm="full",
    rope_theta=5e5,
    tie_embeddings=False,
    vocab_size=100352,
    max_positions=4096,
  ),
  "olmo2-7b": _shape(
    4096,
    32,
    32,
    32,
    11008,
    family="olmo2",
    norm_eps=1e-6,
    pre_norm=False,
    post_norm=True,
    qk_norm="full",
    rope_theta=5e5,
    tie_embeddings=False,
    vocab_size=100352,
    max_positions=4096,
  ),
  "phi3-mini": _shape(
    3072,
    32,
    32,
    32,
    8192,
    family="phi3",
    vocab_size=32064,
    max_positions=4096,
    window=2047,
    local_layers=(True,) * 32,
    tie_embeddings=False,
  ),
}
