"""Allowed values of the keys of config.json: one table of types and ranges.

Values are checked before anything is computed from them. A wrong number would
otherwise be an error far from its file, or a loop over a billion layers.
"""

from collections.abc import Collection, Iterator, Mapping
import dataclasses
import reprlib
from typing import Any


@dataclasses.dataclass(frozen=True)
class _Allowed:
  """Values of a key.

  Attributes:
    kind: type of the value; float includes whole numbers.
    low: smallest number.
    high: largest number.
    is_nullable: whether the key may be null, which counts as missing.
  """

  kind: type
  low: float = 0
  high: float = 0
  is_nullable: bool = True

  def has(self, value: Any) -> bool:
    """Returns whether a value is allowed."""
    if value is None:
      return self.is_nullable
    if self.kind not in (int, float):
      return isinstance(value, self.kind)
    kinds = int if self.kind is int else int | float
    is_number = isinstance(value, kinds) and not isinstance(value, bool)
    return is_number and self.low <= value <= self.high  # never so for a NaN

  def __str__(self) -> str:
    if self.kind not in (int, float):
      return _NAMES[self.kind]
    if self.kind is int:
      return f"a whole number from {self.low:,} to {self.high:,}"
    return f"a number from {self.low:g} to {self.high:g}"


_NAMES = {
  bool: "true or false",
  str: "text",
  list: "a list of texts",
  dict: "an object",
}

_WIDTH = _Allowed(int, 1, 2**22)
_LAYERS = _Allowed(int, 1, 10_000)
_POSITIONS = _Allowed(int, 1, 2**31)
_EPSILON = _Allowed(float, 1e-12, 0.1, is_nullable=False)
_BASE = _Allowed(float, 1, 1e12)
_FRACTION = _Allowed(float, 1e-3, 1)
_POSITIVE = _Allowed(float, 1e-3, 1e6)
_FLAG = _Allowed(bool)
_TEXT = _Allowed(str)

_KEYS: dict[str, _Allowed] = {
  "vocab_size": _Allowed(int, 1, 2**24),
  "max_window_layers": _Allowed(int, 0, 10_000),
  "layer_types": _Allowed(list),
  "rope_scaling": _Allowed(dict),
  "rope_parameters": _Allowed(dict),
  **dict.fromkeys(
    (
      *("hidden_size", "n_embd", "intermediate_size", "n_inner"),
      *("num_attention_heads", "num_key_value_heads", "n_head"),
      *("head_dim", "rotary_dim"),
    ),
    _WIDTH,
  ),
  **dict.fromkeys(
    (
      *("num_hidden_layers", "n_layer"),
      *("sliding_window_pattern", "_sliding_window_pattern"),
    ),
    _LAYERS,
  ),
  **dict.fromkeys(
    ("max_position_embeddings", "n_positions", "sliding_window"), _POSITIONS
  ),
  **dict.fromkeys(
    ("rms_norm_eps", "layer_norm_eps", "layer_norm_epsilon"), _EPSILON
  ),
  **dict.fromkeys(
    ("rope_theta", "rotary_emb_base", "rope_local_base_freq"), _BASE
  ),
  **dict.fromkeys(("partial_rotary_factor", "rotary_pct"), _FRACTION),
  **dict.fromkeys(
    (
      "query_pre_attn_scalar",
      "attn_logit_softcapping",
      "final_logit_softcapping",
    ),
    _POSITIVE,
  ),
  **dict.fromkeys(
    (
      *("tie_word_embeddings", "attention_bias", "mlp_bias"),
      *("use_parallel_residual", "use_sliding_window"),
    ),
    _FLAG,
  ),
  **dict.fromkeys(
    ("hidden_act", "hidden_activation", "activation_function"), _TEXT
  ),
}
# Keys of rope_scaling and rope_parameters.
_ROPE: dict[str, _Allowed] = {
  "type": _TEXT,
  "rope_type": _TEXT,
  "rope_theta": _BASE,
  "partial_rotary_factor": _FRACTION,
  "factor": _Allowed(float, 1, 1e4),
  "low_freq_factor": _POSITIVE,
  "high_freq_factor": _POSITIVE,
  "original_max_position_embeddings": _POSITIONS,
}
# Kinds of layer that may each have rope parameters of their own.
ROPE_LAYERS = ("full_attention", "sliding_attention")


def check_values(
  raw: Mapping[str, Any], keys: Collection[str], where: str
) -> None:
  """Checks the values of a config.json.

  Args:
    raw: parsed file.
    keys: those that are read.
    where: path of the file, for errors.

  Raises:
    ValueError: values of another type or out of range, all at once.
  """
  read = {key: value for key, value in raw.items() if key in keys}
  faults = [*_faults(read, _KEYS)]
  for name in ("rope_scaling", "rope_parameters"):
    if isinstance(read.get(name), dict):
      faults += _rope_faults(read[name], f"{name}.")
  kinds = read.get("layer_types")
  if isinstance(kinds, list) and not all(isinstance(k, str) for k in kinds):
    faults.append(f"layer_types={reprlib.repr(kinds)} must be a list of texts")
  if faults:
    raise ValueError(f"{where}: {'; '.join(faults)}")


def _rope_faults(rope: Mapping[str, Any], prefix: str) -> Iterator[str]:
  if "full_attention" not in rope:
    yield from _faults(rope, _ROPE, prefix)
    return
  for name in ROPE_LAYERS:
    part = rope.get(name)
    if isinstance(part, dict) and part.get("rope_theta") is not None:
      yield from _faults(part, _ROPE, f"{prefix}{name}.")
    else:
      yield f"{prefix}{name}={reprlib.repr(part)} must have a rope_theta"


def _faults(
  values: Mapping[str, Any], table: Mapping[str, _Allowed], prefix: str = ""
) -> Iterator[str]:
  for key, value in values.items():
    if key in table and not table[key].has(value):
      yield f"{prefix}{key}={reprlib.repr(value)} must be {table[key]}"
