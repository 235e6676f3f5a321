"""Reads config.json of a Hugging Face model as a ModelConfig, and writes it.

`families` holds what differs between families; `unread_keys` decides about keys
that a family does not read.
"""

from collections.abc import Mapping
import dataclasses
import logging
from typing import Any

from dpo_jax.models.config import ModelConfig, RopeScaling
from dpo_jax.models.huggingface import ranges, unread_keys
from dpo_jax.models.huggingface.families import FAMILIES, Family

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
_ACTIVATION_KEYS = ("hidden_act", "hidden_activation", "activation_function")
_NEEDED = ("vocab_size", "d_model", "num_layers", "num_heads", "max_positions")
# Fields for which null is a value, not a missing key.
_NULLABLE = ("attention_soft_cap", "logits_soft_cap")
_ROPE_KEYS = ("rope_scaling", "rope_parameters", "rope_local_base_freq")
_LLAMA3_PARTS = (
  "low_freq_factor",
  "high_freq_factor",
  "original_max_position_embeddings",
)
# Keys that a dict of rope parameters may have.
_ROPE_PARTS = (
  "type",
  "rope_type",
  "rope_theta",
  "factor",
  "partial_rotary_factor",
  *_LLAMA3_PARTS,
)
_WINDOW_KEYS = (
  "sliding_window",
  "use_sliding_window",
  "max_window_layers",
  "layer_types",
  "sliding_window_pattern",
  "_sliding_window_pattern",
)

# Fields of ModelConfig that config.json does not describe.
_NOT_IN_CONFIG_JSON = (
  "value_head",
  "param_dtype",
  "compute_dtype",
  "remat",
  "attention",
  "lora",
  "frozen",
)


def read_config(raw: Mapping[str, Any], where: str) -> dict[str, Any]:
  """Returns the fields of ModelConfig that a parsed config.json describes.

  Args:
    raw: parsed file.
    where: its path, for errors.

  Returns:
    All fields that describe the model; dtypes and training choices are not
    among them.

  Raises:
    ValueError: an unknown family, missing keys, values of another type or out
      of range, or values that this decoder does not support; all such keys at
      once.
  """
  name = raw.get("model_type")
  if not isinstance(name, str) or name not in FAMILIES:
    raise ValueError(
      f"{where}: model_type={name!r} is not one of the families"
      f" {', '.join(sorted(FAMILIES))}"
    )
  family = FAMILIES[name]
  ranges.check_values(raw, _read_keys(family), where)
  faults = [
    f"{key}={raw[key]!r} (only {values[0]!r})"
    for key, values in family.required.items()
    if raw.get(key) is not None and raw[key] not in values
  ]
  fields = {"family": name, **_read_sizes(raw, family, where)}
  fields["activation"] = _read_activation(
    raw, family, fields.get("is_gated", True), faults
  )
  if family.attention_bias is not None:
    bias = raw.get("attention_bias")
    bias = family.attention_bias if bias is None else bias
    fields |= {"qkv_bias": bias, "out_bias": bias}
  if family.has_query_scalar and raw.get("query_pre_attn_scalar"):
    fields["attention_scale"] = raw["query_pre_attn_scalar"] ** -0.5
  fields |= _read_window(raw, family, fields["num_layers"], faults)
  if family.has_rotary:
    fields |= _read_rope(raw, family, fields["head_dim"], faults)
  _report_unread(raw, family, fields, faults, where)
  return fields


def _read_sizes(
  raw: Mapping[str, Any], family: Family, where: str
) -> dict[str, Any]:
  """Reads the fields with a key of their own, and fills in default sizes.

  The result also has the fields that the family fixes.

  Raises:
    ValueError: the file `where` lacks a needed key.
  """
  fields = dict(family.defaults) | dict(family.fixed)
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
  if not fields.get("num_kv_heads"):
    fields["num_kv_heads"] = fields["num_heads"]
  if not fields.get("head_dim"):
    fields["head_dim"] = fields["d_model"] // fields["num_heads"]
  if not fields.get("d_ff"):
    fields["d_ff"] = 4 * fields["d_model"]
  return fields


def _read_activation(
  raw: Mapping[str, Any], family: Family, is_gated: bool, faults: list[str]
) -> str:
  activation = raw.get(family.activation_key) or raw.get("hidden_act")
  if family.is_gelu_tanh and activation in (None, "", "gelu"):
    activation = "gelu_pytorch_tanh"
  if activation and activation not in _ACTIVATIONS:
    faults.append(f"{family.activation_key}={activation!r}")
  default = "silu" if is_gated else "gelu_tanh"
  ours = _ACTIVATIONS.get(activation, default)
  faults += [
    f"{key}={raw[key]!r} contradicts {family.activation_key}={activation!r}"
    for key in _ACTIVATION_KEYS
    if not family.is_gelu_tanh and raw.get(key) and key != family.activation_key
    if _ACTIVATIONS.get(raw[key]) != ours
  ]
  return ours


def _report_unread(
  raw: Mapping[str, Any],
  family: Family,
  fields: Mapping[str, Any],
  faults: list[str],
  where: str,
) -> None:
  """Logs keys that are ignored, and raises if any key is not supported.

  Raises:
    ValueError: `faults`, and keys that change the model and are not read.
  """
  facts = unread_keys.Facts(
    max_positions=fields["max_positions"],
    head_dim=fields["head_dim"],
    window=fields.get("window"),
    rope_theta=fields.get("rope_theta"),
    has_qk_norm=bool(fields.get("qk_norm")),
  )
  refused, ignored = unread_keys.sort_unread(raw, _read_keys(family), facts)
  if refused or faults:
    raise ValueError(
      f"{where} sets what this decoder does not support:"
      f" {'; '.join(refused + faults)}"
    )
  if ignored:
    _LOG.warning(
      "%s: keys that this decoder does not read are ignored: %s",
      where,
      "; ".join(ignored),
    )


def _read_keys(family: Family) -> frozenset[str]:
  """Returns the keys of config.json that a family reads."""
  keys = {"model_type", *_ACTIVATION_KEYS, *family.names, *family.required}
  keys |= {"attention_bias"} if family.attention_bias is not None else set()
  keys |= set(_WINDOW_KEYS) if family.window else set()
  keys |= {"query_pre_attn_scalar"} if family.has_query_scalar else set()
  if family.has_rotary:
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
  if "full_attention" in rope:  # one rotary embedding for each kind of layer
    local = rope["sliding_attention"]
    if local.get("rope_type", "default") != "default":
      faults.append(f"rope_parameters={rope!r}")
    fields["local_rope_theta"] = float(local["rope_theta"])
    rope = dict(rope["full_attention"])
  if raw.get("rope_local_base_freq") is not None:
    fields["local_rope_theta"] = float(raw["rope_local_base_freq"])
  elif family.local_theta is not None:
    fields.setdefault("local_rope_theta", family.local_theta)
  rope |= raw.get("rope_scaling") or {}
  theta = rope.get("rope_theta", raw.get(family.theta_key))
  fields["rope_theta"] = float(family.theta if theta is None else theta)
  fraction = rope.get("partial_rotary_factor")
  if fraction is None:
    fraction = raw.get(family.partial_rotary_key)
  if fraction is None:
    fraction = family.rotary_fraction
  if fraction != 1.0 and family.partial_rotary_key:
    fields["rotary_dim"] = int(head_dim * fraction)
  elif fraction != 1.0:
    faults.append(f"partial_rotary_factor={fraction!r} (only 1.0)")
  return fields | _read_rope_scaling(raw, rope, faults)


def _read_rope_scaling(
  raw: Mapping[str, Any], rope: Mapping[str, Any], faults: list[str]
) -> dict[str, Any]:
  kind = rope.get("rope_type", rope.get("type"))
  if kind is None:
    kind = "default" if not raw.get("rope_scaling") else None
  if kind not in ("default", "linear", "llama3"):
    faults.append(
      f"rope_parameters or rope_scaling of type {kind!r} (only default,"
      " linear and llama3)"
    )
    return {}
  faults += [
    f"{key} in rope_parameters or rope_scaling"
    for key, value in rope.items()
    if key not in _ROPE_PARTS and value
  ]
  if kind == "default":
    return {}
  needed = ["factor", *_LLAMA3_PARTS] if kind == "llama3" else ["factor"]
  missing = [key for key in needed if rope.get(key) is None]
  if missing:
    faults.append(
      f"rope_parameters or rope_scaling of type {kind!r} without"
      f" {', '.join(missing)}"
    )
    return {}
  scaling = {"kind": kind, "factor": float(rope["factor"])}
  if kind == "llama3":
    low, high = (rope[key] for key in _LLAMA3_PARTS[:2])
    if low >= high:
      faults.append(f"low_freq_factor={low} not below high_freq_factor={high}")
    scaling |= {
      "low_freq_factor": float(rope["low_freq_factor"]),
      "high_freq_factor": float(rope["high_freq_factor"]),
      "original_positions": rope["original_max_position_embeddings"],
    }
  return {"rope_scaling": RopeScaling(**scaling)}


def write_config(config: ModelConfig) -> dict[str, Any]:
  """Returns the config.json of an export, the inverse of `read_config`.

  Raises:
    ValueError: a model that its family's config.json cannot describe.
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
  if family.attention_bias is not None:
    raw["attention_bias"] = config.qkv_bias
  if config.attention_scale is not None:
    # transformers accepts an integer only.
    raw["query_pre_attn_scalar"] = round(config.attention_scale**-2.0)
  raw |= _write_window(config, family)
  if not config.has_learned_positions and family.theta_key:
    raw |= _write_rope(config, family)
  _check_round_trip(config, raw)
  return raw


def _check_round_trip(config: ModelConfig, raw: Mapping[str, Any]) -> None:
  """Raises ValueError if `raw` does not read back as `config`.

  Fields that config.json does not describe, such as dtypes, are left out.
  """
  again = ModelConfig(**read_config(raw, "this model"))
  again = dataclasses.replace(
    again, **{name: getattr(config, name) for name in _NOT_IN_CONFIG_JSON}
  )
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
  """Returns the keys of rotary positions for config.json.

  They have their older names (`rope_theta`, not `rope_parameters`), which all
  versions of transformers read.
  """
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
