"""config.json of the model families <-> ModelConfig.

A family is a row: what its config calls our fields, what it fixes, and which
of its fields are honoured at some values only. `unread_keys` decides about
keys that are in none of these.
"""

from collections.abc import Mapping
import dataclasses
import logging
from typing import Any

from dpo_jax.models.config import ModelConfig, RopeScaling
from dpo_jax.models.huggingface import unread_keys

_LOG = logging.getLogger(__name__)

_ACTIVATIONS = {
  "silu": "silu",
  "swish": "silu",
  "gelu": "gelu",
  "gelu_new": "gelu_tanh",
  "gelu_fast": "gelu_tanh",
  "gelu_pytorch_tanh": "gelu_tanh",
  "relu": "relu",
}
# Gemma's first configs name two, of which its models use one.
_ACTIVATION_KEYS = ("hidden_act", "hidden_activation", "activation_function")
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
_NEEDED = ("vocab_size", "d_model", "num_layers", "num_heads", "max_positions")
# Fields for which null is a value, and not an absent key.
_NULLABLE = ("attention_soft_cap", "logits_soft_cap")
_ROPE_KEYS = ("rope_scaling", "rope_parameters", "rope_local_base_freq")
# What a dict of the rotation may say.
_ROPE_PARTS = (
  "type",
  "rope_type",
  "rope_theta",
  "factor",
  "low_freq_factor",
  "high_freq_factor",
  "original_max_position_embeddings",
  "partial_rotary_factor",
)
_WINDOW_KEYS = (
  "sliding_window",
  "use_sliding_window",
  "max_window_layers",
  "layer_types",
  "sliding_window_pattern",
  "_sliding_window_pattern",
)


@dataclasses.dataclass(frozen=True)
class Family:
  """How a family's config.json reads.

  Attributes:
    architecture: the class in transformers, without its suffix.
    names: key of config.json -> field of ModelConfig.
    fixed: fields that all its models share.
    defaults: fields whose key may be absent.
    activation_key: the key that names the activation.
    required: keys that are honoured at these values only.
    window: which layers have the window: "" none, "all", "late" (those from
      max_window_layers on), or a number n: all but every n-th.
    has_attention_bias: whether `attention_bias` is a key.
    partial_rotary_key: what names the turned share of a head, or "".
    theta_key: what names the base of the rotation.
    suffix: of the class.
  """

  architecture: str
  names: Mapping[str, str]
  fixed: Mapping[str, Any] = dataclasses.field(default_factory=dict)
  defaults: Mapping[str, Any] = dataclasses.field(default_factory=dict)
  activation_key: str = "hidden_act"
  required: Mapping[str, tuple] = dataclasses.field(default_factory=dict)
  window: str | int = ""
  has_attention_bias: bool = True
  partial_rotary_key: str = ""
  theta_key: str = "rope_theta"
  suffix: str = "ForCausalLM"


def _llama(architecture: str, **others: Any) -> Family:
  names = _LLAMA_NAMES | others.pop("names", {})
  defaults = {"norm_eps": 1e-6, "tie_embeddings": False}
  defaults |= others.pop("defaults", {})
  return Family(architecture, names, defaults=defaults, **others)


_GEMMA_FIXED = dict(norm_offset=1.0, is_embedding_scaled=True)
_GEMMA_DEFAULTS = dict(tie_embeddings=True, head_dim=256)
_ONE_WAY = {"use_bidirectional_attention": (False, None)}
_LAYER_NORM = dict(norm="layer", is_gated=False)

FAMILIES: dict[str, Family] = {
  "llama": _llama("Llama", names={"mlp_bias": "mlp_bias"}),
  "mistral": _llama("Mistral", window="all", has_attention_bias=False),
  "qwen2": _llama(
    "Qwen2",
    fixed=dict(qkv_bias=True),
    window="late",
    has_attention_bias=False,
  ),
  "qwen3": _llama(
    "Qwen3",
    fixed=dict(qk_norm="head"),
    defaults=dict(head_dim=128),
    window="late",
  ),
  "gemma": _llama(
    "Gemma", fixed=_GEMMA_FIXED, defaults=_GEMMA_DEFAULTS, required=_ONE_WAY
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
    required=_ONE_WAY,
    window=2,
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
    required=_ONE_WAY,
    window=6,
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
    has_attention_bias=False,
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
    has_attention_bias=False,
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
    has_attention_bias=False,
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
    partial_rotary_key="rotary_pct",
    theta_key="rotary_emb_base",
  ),
}


def read_config(raw: Mapping[str, Any], where: str) -> dict[str, Any]:
  """Fields of ModelConfig from a parsed config.json.

  Args:
    raw: the parsed file.
    where: its path, for errors.

  Returns:
    Every field that describes the model; dtypes and the like are not.

  Raises:
    ValueError: an unknown family, a field that we would have to honour and do
      not, or one that is missing; all at once.
  """
  name = raw.get("model_type")
  if name not in FAMILIES:
    raise ValueError(
      f"{where}: model_type={name!r} is not one of the families"
      f" {', '.join(sorted(FAMILIES))}"
    )
  family = FAMILIES[name]
  faults = [
    f"{key}={raw[key]!r} (only {values[0]!r})"
    for key, values in family.required.items()
    if raw.get(key) is not None and raw[key] not in values
  ]
  fields = dict(family.defaults) | {"family": name, **family.fixed}
  fields |= {
    ours: raw[key]
    for key, ours in family.names.items()
    if key in raw and (raw[key] is not None or ours in _NULLABLE)
  }
  missing = [
    key
    for key, ours in family.names.items()
    if ours in _NEEDED and fields.get(ours) is None
  ]
  if missing:
    raise ValueError(f"{where} lacks {', '.join(missing)}")
  activation = raw.get(family.activation_key) or raw.get("hidden_act")
  if "gemma" in name and (not activation or activation == "gelu"):
    activation = "gelu_pytorch_tanh"
  if activation and activation not in _ACTIVATIONS:
    faults.append(f"{family.activation_key}={activation!r}")
  fields["activation"] = _ACTIVATIONS.get(
    activation, "gelu_tanh" if not fields.get("is_gated", True) else "silu"
  )
  faults += [
    f"{key}={raw[key]!r} beside {family.activation_key}={activation!r}"
    for key in _ACTIVATION_KEYS
    if "gemma" not in name and raw.get(key) and key != family.activation_key
    if _ACTIVATIONS.get(raw[key]) != fields["activation"]
  ]
  if family.has_attention_bias:
    bias = raw.get("attention_bias")
    if bias is None:  # GPT-NeoX has it unless told not to
      bias = name == "gpt_neox"
    fields |= {"qkv_bias": bias, "out_bias": bias}
  if not fields.get("num_kv_heads"):
    fields["num_kv_heads"] = fields["num_heads"]
  if not fields.get("head_dim"):
    fields["head_dim"] = fields["d_model"] // fields["num_heads"]
  if not fields.get("d_ff"):
    fields["d_ff"] = 4 * fields["d_model"]
  if family.window in (2, 6) and raw.get("query_pre_attn_scalar"):
    fields["attention_scale"] = raw["query_pre_attn_scalar"] ** -0.5
  fields |= _read_window(raw, family, fields["num_layers"], faults)
  has_rope = "has_learned_positions" not in family.fixed
  if has_rope:
    fields |= _read_rope(raw, family, fields["head_dim"], faults)
  facts = unread_keys.Facts(
    max_positions=fields["max_positions"],
    head_dim=fields["head_dim"],
    window=fields.get("window"),
    rope_theta=fields.get("rope_theta"),
    has_qk_norm=bool(fields.get("qk_norm")),
  )
  refused, ignored = unread_keys.sort_unread(raw, _read_keys(family), facts)
  faults = refused + faults
  if faults:
    raise ValueError(
      f"{where} asks for what this decoder does not do: {'; '.join(faults)}"
    )
  if ignored:
    _LOG.warning(
      "%s: keys that this decoder does not read are ignored: %s",
      where,
      "; ".join(ignored),
    )
  return fields


def _read_keys(family: Family) -> frozenset[str]:
  """Keys of config.json that a family's fields are made of."""
  keys = {"model_type", *_ACTIVATION_KEYS, *family.names, *family.required}
  keys |= {"attention_bias"} if family.has_attention_bias else set()
  keys |= set(_WINDOW_KEYS) if family.window else set()
  keys |= {"query_pre_attn_scalar"} if family.window in (2, 6) else set()
  if "has_learned_positions" not in family.fixed:
    keys |= {*_ROPE_KEYS, family.theta_key, family.partial_rotary_key} - {""}
  return frozenset(keys)


def _read_window(
  raw: Mapping[str, Any], family: Family, num_layers: int, faults: list[str]
) -> dict[str, Any]:
  if not family.window:
    return {}
  kinds = raw.get("layer_types") or []
  if set(kinds) - {"full_attention", "sliding_attention"}:
    faults.append(f"layer_types={sorted(set(kinds))}")
  window = raw.get("sliding_window")
  if window is None or not raw.get("use_sliding_window", True):
    return {}
  if family.window == "late" and not raw.get("use_sliding_window", False):
    return {}
  if kinds:
    local = [kind == "sliding_attention" for kind in kinds]
  elif family.window == "all":
    local = [True] * num_layers
  elif family.window == "late":
    first = raw.get("max_window_layers", num_layers)
    local = [i >= first for i in range(num_layers)]
  else:
    period = raw.get("sliding_window_pattern", family.window)
    local = [bool((i + 1) % period) for i in range(num_layers)]
  return {"window": window, "local_layers": tuple(local)} if any(local) else {}


def _read_rope(
  raw: Mapping[str, Any], family: Family, head_dim: int, faults: list[str]
) -> dict[str, Any]:
  rope = dict(raw.get("rope_parameters") or {})
  fields: dict[str, Any] = {}
  if "full_attention" in rope:  # one rotation for each kind of layer
    local = rope["sliding_attention"]
    if local.get("rope_type", "default") != "default":
      faults.append(f"rope_parameters={rope!r}")
    fields["local_rope_theta"] = float(local["rope_theta"])
    rope = dict(rope["full_attention"])
  if raw.get("rope_local_base_freq") is not None:
    fields["local_rope_theta"] = float(raw["rope_local_base_freq"])
  elif family.window == 6:
    fields.setdefault("local_rope_theta", 1e4)
  rope |= raw.get("rope_scaling") or {}
  theta = rope.get("rope_theta", raw.get(family.theta_key))
  if theta is None:
    theta = 1e6 if family.window == 6 else 1e4
  fields["rope_theta"] = float(theta)
  share = rope.get("partial_rotary_factor")
  if share is None:
    share = raw.get(family.partial_rotary_key)
  if share is None:
    share = 0.25 if family.partial_rotary_key == "rotary_pct" else 1.0
  if share != 1.0 and family.partial_rotary_key:
    fields["rotary_dim"] = int(head_dim * share)
  elif share != 1.0:
    faults.append(f"partial_rotary_factor={share!r} (only 1.0)")
  unknown = [k for k, v in rope.items() if k not in _ROPE_PARTS and v]
  kind = rope.get("rope_type", rope.get("type"))
  if kind is None:
    kind = "default" if not raw.get("rope_scaling") else None
  if kind in ("linear", "llama3"):
    scaling = {"kind": kind, "factor": float(rope["factor"])}
    if kind == "llama3":
      scaling |= {
        "low_freq_factor": float(rope["low_freq_factor"]),
        "high_freq_factor": float(rope["high_freq_factor"]),
        "original_positions": rope["original_max_position_embeddings"],
      }
    fields["rope_scaling"] = RopeScaling(**scaling)
  elif kind != "default":
    faults.append(
      f"rope_parameters or rope_scaling of type {kind!r} (only default,"
      " linear and llama3)"
    )
    return fields
  faults += [f"{key} in rope_parameters or rope_scaling" for key in unknown]
  return fields


def write_config(config: ModelConfig) -> dict[str, Any]:
  """Undoes `read_config`: what config.json of an export says.

  Raises:
    ValueError: a shape that the family cannot express.
  """
  family = FAMILIES[config.family]
  activations = {ours: theirs for theirs, ours in _ACTIVATIONS.items()}
  activations |= {"silu": "silu", "gelu_tanh": "gelu_pytorch_tanh"}
  if family.activation_key == "activation_function":
    activations["gelu_tanh"] = "gelu_new"
  raw: dict[str, Any] = {
    "architectures": [f"{family.architecture}{family.suffix}"],
    "model_type": config.family,
    **{key: getattr(config, ours) for key, ours in family.names.items()},
    family.activation_key: activations[config.activation],
    **{key: values[0] for key, values in family.required.items()},
    "torch_dtype": config.param_dtype,
  }
  if family.has_attention_bias:
    raw["attention_bias"] = config.qkv_bias
  if config.attention_scale is not None:
    # An integer, which transformers insists on.
    raw["query_pre_attn_scalar"] = round(config.attention_scale**-2.0)
  raw |= _write_window(config, family)
  if not config.has_learned_positions and family.theta_key:
    raw |= _write_rope(config, family)
  again = ModelConfig(**read_config(raw, "this model"))
  ours = {
    name: getattr(config, name)
    for name in (
      "value_head",
      "param_dtype",
      "compute_dtype",
      "remat",
      "attention",
      "lora",
      "frozen",
    )
  }
  again = dataclasses.replace(again, **ours)
  differing = [
    f.name
    for f in dataclasses.fields(config)
    if not _is_close(getattr(config, f.name), getattr(again, f.name))
  ]
  if differing:
    raise ValueError(
      f"the family {config.family!r} cannot express this model's"
      f" {', '.join(differing)}"
    )
  return raw


def _is_close(a: Any, b: Any) -> bool:
  if isinstance(a, float) and isinstance(b, float):
    return abs(a - b) <= 1e-12 * abs(a)
  return a == b


def _write_window(config: ModelConfig, family: Family) -> dict[str, Any]:
  if not family.window:
    return {}
  raw: dict[str, Any] = {"sliding_window": config.window}
  if family.window == "all":
    return raw
  local = config.local_layers or (False,) * config.num_layers
  kinds = ("full_attention", "sliding_attention")
  raw["layer_types"] = [kinds[is_local] for is_local in local]
  if family.window == "late":
    raw |= {
      "use_sliding_window": any(local),
      "max_window_layers": local.index(True) if any(local) else len(local),
    }
  return raw


def _write_rope(config: ModelConfig, family: Family) -> dict[str, Any]:
  """The older keys, which every reader of config.json still takes."""
  raw: dict[str, Any] = {family.theta_key: config.rope_theta}
  if config.local_rope_theta is not None:
    raw["rope_local_base_freq"] = config.local_rope_theta
  if family.partial_rotary_key:
    rotary_dim = config.rotary_dim or config.head_dim
    raw[family.partial_rotary_key] = rotary_dim / config.head_dim
  scaling = config.rope_scaling
  if scaling is not None:
    raw["rope_scaling"] = {"rope_type": scaling.kind, "factor": scaling.factor}
    if scaling.kind == "llama3":
      raw["rope_scaling"] |= {
        "low_freq_factor": scaling.low_freq_factor,
        "high_freq_factor": scaling.high_freq_factor,
        "original_max_position_embeddings": scaling.original_positions,
      }
  return raw
