"""Table of the model families: how the config.json of each maps to ModelConfig.

A row holds the family's names for the fields of ModelConfig, the fields that it
fixes, and the keys that are supported at some values only.
"""

from collections.abc import Mapping
import dataclasses
from typing import Any

_LLAMA_NAMES = {
  "vocab_size": "vocab_size",
  "hidden_size": "d_model",
  "intermediate_size": "d_ff",
  "num_hidden_layers": "num_layers",
  "num_attention_heads": "num_heads",
  "num_key_value_heads": "num_kv_heads",
  "head_dim": "head_dim",
  "max_position_embeddings": "max_positions",
  "rms_norm_eps": "norm_eps",
  "tie_word_embeddings": "tie_embeddings",
}
_GPT_NAMES = {
  "vocab_size": "vocab_size",
  "n_embd": "d_model",
  "n_inner": "d_ff",
  "n_layer": "num_layers",
  "n_head": "num_heads",
  "n_positions": "max_positions",
  "layer_norm_epsilon": "norm_eps",
  "tie_word_embeddings": "tie_embeddings",
}


@dataclasses.dataclass(frozen=True)
class Family:
  """Meaning of a family's config.json.

  Attributes:
    architecture: class in transformers, without its suffix.
    names: key of config.json -> field of ModelConfig.
    fixed: fields that all models of the family share.
    defaults: values of fields whose key may be absent.
    activation_key: key of the activation.
    is_gelu_tanh: whether "gelu" and a missing activation mean
      "gelu_pytorch_tanh", and all activation keys but `activation_key` are
      ignored. Gemma's first configs have two keys; its models use one.
    required: keys that are supported at these values only.
    window: layers with a window: "" none, "all", "late" (from
      max_window_layers on), or a number n: all but every n-th.
    attention_bias: value where the key `attention_bias` is absent; None if the
      family has no such key.
    has_query_scalar: whether `query_pre_attn_scalar` is a key.
    partial_rotary_key: key of the rotated fraction of a head, or "".
    rotary_fraction: fraction where that key is absent.
    theta_key: key of the base of the rotary embedding, or "".
    theta: base where that key is absent.
    local_theta: base in local layers where its key is absent; None if all
      layers share one base.
    suffix: suffix of the class.
  """

  architecture: str
  names: Mapping[str, str]
  fixed: Mapping[str, Any] = dataclasses.field(default_factory=dict)
  defaults: Mapping[str, Any] = dataclasses.field(default_factory=dict)
  activation_key: str = "hidden_act"
  is_gelu_tanh: bool = False
  required: Mapping[str, tuple] = dataclasses.field(default_factory=dict)
  window: str | int = ""
  attention_bias: bool | None = False
  has_query_scalar: bool = False
  partial_rotary_key: str = ""
  rotary_fraction: float = 1.0
  theta_key: str = "rope_theta"
  theta: float = 1e4
  local_theta: float | None = None
  suffix: str = "ForCausalLM"

  @property
  def has_rotary(self) -> bool:
    """Whether positions are rotary, not learned."""
    return "has_learned_positions" not in self.fixed


def _llama(architecture: str, **others: Any) -> Family:
  names = _LLAMA_NAMES | others.pop("names", {})
  defaults = {"norm_eps": 1e-6, "tie_embeddings": False}
  defaults |= others.pop("defaults", {})
  return Family(architecture, names, defaults=defaults, **others)


_GEMMA_FIXED = dict(norm_offset=1.0, is_embedding_scaled=True)
_GEMMA_DEFAULTS = dict(tie_embeddings=True, head_dim=256)
_CAUSAL = {"use_bidirectional_attention": (False, None)}
_LAYER_NORM = dict(norm="layer", is_gated=False)

FAMILIES: dict[str, Family] = {
  "llama": _llama("Llama", names={"mlp_bias": "mlp_bias"}),
  "mistral": _llama("Mistral", window="all", attention_bias=None),
  "qwen2": _llama(
    "Qwen2",
    fixed=dict(qkv_bias=True),
    window="late",
    attention_bias=None,
  ),
  "qwen3": _llama(
    "Qwen3",
    fixed=dict(qk_norm="head"),
    defaults=dict(head_dim=128),
    window="late",
  ),
  "gemma": _llama(
    "Gemma",
    fixed=_GEMMA_FIXED,
    defaults=_GEMMA_DEFAULTS,
    is_gelu_tanh=True,
    required=_CAUSAL,
  ),
  "gemma2": _llama(
    "Gemma2",
    names={
      "attn_logit_softcapping": "attention_soft_cap",
      "final_logit_softcapping": "logits_soft_cap",
    },
    fixed=_GEMMA_FIXED | dict(post_norm=True),
    defaults=_GEMMA_DEFAULTS
    | dict(attention_soft_cap=50.0, logits_soft_cap=30.0),
    activation_key="hidden_activation",
    is_gelu_tanh=True,
    required=_CAUSAL,
    window=2,
    has_query_scalar=True,
  ),
  "gemma3_text": _llama(
    "Gemma3",
    names={
      "attn_logit_softcapping": "attention_soft_cap",
      "final_logit_softcapping": "logits_soft_cap",
    },
    fixed=_GEMMA_FIXED | dict(post_norm=True, qk_norm="head"),
    defaults=_GEMMA_DEFAULTS
    | dict(attention_soft_cap=None, logits_soft_cap=None),
    activation_key="hidden_activation",
    is_gelu_tanh=True,
    required=_CAUSAL,
    window=6,
    has_query_scalar=True,
    theta=1e6,
    local_theta=1e4,
  ),
  "olmo2": _llama(
    "Olmo2",
    fixed=dict(pre_norm=False, post_norm=True, qk_norm="full"),
    defaults=dict(norm_eps=1e-5),
  ),
  "phi3": _llama(
    "Phi3",
    defaults=dict(norm_eps=1e-5),
    window="all",
    attention_bias=None,
    partial_rotary_key="partial_rotary_factor",
  ),
  "gpt2": Family(
    "GPT2",
    _GPT_NAMES,
    fixed=_LAYER_NORM
    | dict(
      qkv_bias=True, out_bias=True, mlp_bias=True, has_learned_positions=True
    ),
    defaults=dict(norm_eps=1e-5, tie_embeddings=True),
    activation_key="activation_function",
    required={
      "scale_attn_weights": (True,),
      "scale_attn_by_inverse_layer_idx": (False,),
      "reorder_and_upcast_attn": (False,),
      "add_cross_attention": (False,),
    },
    attention_bias=None,
    suffix="LMHeadModel",
  ),
  "gptj": Family(
    "GPTJ",
    _GPT_NAMES | {"rotary_dim": "rotary_dim"},
    fixed=_LAYER_NORM
    | dict(
      mlp_bias=True, head_bias=True, is_parallel=True, is_norm_shared=True
    ),
    defaults=dict(norm_eps=1e-5, tie_embeddings=False),
    activation_key="activation_function",
    attention_bias=None,
    theta_key="",
  ),
  "gpt_neox": Family(
    "GPTNeoX",
    {
      key: name
      for key, name in _LLAMA_NAMES.items()
      if name not in ("num_kv_heads", "head_dim", "norm_eps")
    }
    | {"layer_norm_eps": "norm_eps", "use_parallel_residual": "is_parallel"},
    fixed=_LAYER_NORM | dict(mlp_bias=True),
    defaults=dict(norm_eps=1e-5, tie_embeddings=False, is_parallel=True),
    attention_bias=True,
    partial_rotary_key="rotary_pct",
    rotary_fraction=0.25,
    theta_key="rotary_emb_base",
  ),
}
