"""Decides about keys of config.json that a family does not read.

Such a key is metadata, or has a value that changes nothing, or changes what the
model computes. The last kind is refused, even if the family's class in
transformers ignores it. Other keys are reported in the log as not used; the
tensors of the checkpoint decide which parameters the model has.
"""

from collections.abc import Callable, Mapping
import dataclasses
import re
import reprlib
from typing import Any

# Keys about files, training and generation.
_METADATA = re.compile(
  r"""
    _.*  # private to whoever wrote the file
  | architectures | auto_map | model_type | tokenizer_class | problem_type
  | (torch_)?dtype | .*_?version | unsloth_.* | is_llama_config
  | (bos|eos|pad|sep|unk|decoder_start|image|video)_token_id
  | .*(dropout|_pdrop|dropout_prob)
  | (hidden_)?initializer_range | initializer_.*
  | use_cache | cache_implementation | gradient_checkpointing
  | chunk_size_feed_forward | pretraining_tp | return_dict | output_.*
  | id2label | label2id | num_labels | task_specific_params | summary_.*
  | is_decoder | gpt_j_style | n_ctx | max_sequence_length | seq_length
  | model_max_length | original_max_position_embeddings
  | router_aux_loss_coef | router_jitter_noise
  """,
  re.VERBOSE,
)


@dataclasses.dataclass(frozen=True)
class Facts:
  """Values of the keys that are read, to compare the others with.

  Attributes:
    max_positions: longest sequence.
    head_dim: width of a head.
    window: positions that a local layer sees, or None.
    rope_theta: base of the rotary embedding, or None without one.
    has_qk_norm: whether queries and keys are normed.
  """

  max_positions: int
  head_dim: int
  window: int | None
  rope_theta: float | None
  has_qk_norm: bool


def _is_off(value: Any, facts: Facts) -> bool:
  del facts
  return not value


def _is_one(value: Any, facts: Facts) -> bool:
  """Returns whether a value is 1, or a list of ones."""
  del facts
  values = value if isinstance(value, list) else [value]
  return all(v == 1 for v in values)


def _is_on(value: Any, facts: Facts) -> bool:
  del facts
  return value is True


def _sees_all(value: Any, facts: Facts) -> bool:
  """Returns whether a window is off, already read or max_positions long."""
  if value is False or value == facts.window:
    return True
  return _is_number(value) and value >= facts.max_positions


def _is_number(value: Any) -> bool:
  return isinstance(value, int | float) and not isinstance(value, bool)


# Keys that change the computation: pattern of the key, and whether a value
# changes nothing. null never does.
_COMPUTED: tuple[tuple[str, Callable[[Any, Facts], bool]], ...] = (
  (r".*quant.*", _is_off),
  (r"(.*_)?(experts?|moe)(_.*)?", _is_off),
  (r"(.*_)?sinks?(_.*)?", _is_off),
  (
    r".*_multipliers?|logits_scaling|logit_scale|scale_emb|scale_depth",
    _is_one,
  ),
  (r"clip_qkv|qkv_clip|.*soft_?cap(ping)?", _is_off),
  (r"no_rope_layers", _is_one),
  (r"no_rope_layer_interval|num_kv_shared_layers", _is_off),
  (r"rope_interleaved|use_mrope|mrope_.*|(use_)?alibi", _is_off),
  (r"rope_(scaling|parameters)|rope_local_base_freq", _is_off),
  (r"partial_rotary_factor|rotary_pct", _is_one),
  (r"rotary|use_rope|is_causal|scale_attn(_weights)?", _is_on),
  (
    r"rope_theta|rotary_emb_base",
    lambda value, facts: facts.rope_theta in (None, value),
  ),
  (r"(sliding|attention|local)_window(_size)?", _sees_all),
  (
    r"layer_types",
    lambda value, facts: (
      isinstance(value, list) and set(map(str, value)) <= {"full_attention"}
    ),
  ),
  (
    r"query_pre_attn_scalar",
    lambda value, facts: value == facts.head_dim,
  ),
  (r"(attn|attention|softmax)_scale", lambda value, facts: False),
  (
    r"(use_)?qk_(layer_?)?norm",
    lambda value, facts: not value or facts.has_qk_norm,
  ),
  (
    r"use_bidirectional_attention|add_cross_attention|is_encoder_decoder"
    r"|scale_attn_by_inverse_layer_idx|(use_)?parallel_(residual|attn)",
    _is_off,
  ),
)


def sort_unread(
  raw: Mapping[str, Any], read: frozenset[str], facts: Facts
) -> tuple[list[str], list[str]]:
  """Sorts the keys that a family does not read into refused and ignored ones.

  Args:
    raw: the parsed config.json.
    read: keys that the family reads.
    facts: values of those keys.

  Returns:
    "key=value" of keys that change what the model computes, and of ignored keys
    that are worth a line in the log.
  """
  refused, ignored = [], []
  for key, value in raw.items():
    if key in read or value is None:
      continue
    is_neutral = next(
      (test for name, test in _COMPUTED if re.fullmatch(name, key)), None
    )
    if is_neutral is not None:
      if not is_neutral(value, facts):
        refused.append(f"{key}={reprlib.repr(value)}")
    elif value is not False and not _METADATA.fullmatch(key):
      ignored.append(f"{key}={reprlib.repr(value)}")
  return refused, ignored
