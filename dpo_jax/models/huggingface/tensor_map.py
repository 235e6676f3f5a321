"""Maps tensors of a Hugging Face checkpoint to our parameters, and back.

Ours are [in, out] kernels with an axis for heads and one for layers. Theirs are
[out, in] matrices for each layer, with some projections fused. The map is a
list of tensors, used in both directions. A device reads its slice of a
parameter: only that slice of the file is read.
"""

from collections.abc import Mapping, Sequence
import dataclasses
import math
from typing import Any, Protocol

import numpy as np

from dpo_jax.models.config import ModelConfig

Index = tuple[slice, ...]


class Sliceable(Protocol):
  """Tensor in a file; indexing reads a slice."""

  def __getitem__(self, index: Any) -> np.ndarray: ...


@dataclasses.dataclass(frozen=True)
class Part:
  """One of our parameters, which holds some outputs of a tensor.

  Attributes:
    key: path in the parameter tree.
    inputs: axes that the kernel contracts; () for a vector.
    outputs: output axes.
    permutation: permutation of the last output axis: ours[i] is
      theirs[permutation[i]].
  """

  key: str
  inputs: tuple[int, ...]
  outputs: tuple[int, ...]
  permutation: tuple[int, ...] = ()

  @property
  def shape(self) -> tuple[int, ...]:
    """Shape of our parameter, without the layer axis."""
    return self.inputs + self.outputs

  @property
  def size(self) -> int:
    """Number of outputs of the tensor that it holds."""
    return math.prod(self.outputs)


@dataclasses.dataclass(frozen=True)
class Tensor:
  """A tensor of each layer, or one tensor outside the layers.

  Attributes:
    name: name in the checkpoint; "{}" stands for the layer.
    parts: parameters that it holds.
    is_transposed: whether it is [out, in], as torch's Linear is.
    by_head: whether parts alternate head by head (GPT-NeoX); otherwise they are
      concatenated.
    is_plain: whether it has the shape of our parameter.
  """

  name: str
  parts: tuple[Part, ...]
  is_transposed: bool = True
  by_head: bool = False
  is_plain: bool = False

  @property
  def is_stacked(self) -> bool:
    return "{}" in self.name

  @property
  def shape(self) -> tuple[int, ...]:
    if self.is_plain:
      return self.parts[0].shape
    outputs = sum(part.size for part in self.parts)
    if not self.parts[0].inputs:
      return (outputs,)
    inputs = math.prod(self.parts[0].inputs)
    return (outputs, inputs) if self.is_transposed else (inputs, outputs)

  def with_inputs(self, inputs: tuple[int, ...]) -> "Tensor":
    """Returns the tensor with other input axes for the kernels of all parts."""
    parts = tuple(dataclasses.replace(p, inputs=inputs) for p in self.parts)
    return dataclasses.replace(self, parts=parts)

  def names(self, num_layers: int) -> list[str]:
    """Returns the names in the checkpoint, one for each layer if stacked."""
    if not self.is_stacked:
      return [self.name]
    return [self.name.format(i) for i in range(num_layers)]

  def read(self, source: Sliceable, which: int, index: Index) -> np.ndarray:
    """Reads a slice of one of our parameters.

    Args:
      source: tensor in its file.
      which: index into `parts`.
      index: a slice for every axis of that part's shape.

    Returns:
      The slice, in the file's dtype.
    """
    part = self.parts[which]
    if self.is_plain:
      return np.asarray(source[tuple(index)])
    num_inputs = len(part.inputs)
    outputs, out_rows = self._output_rows(which, index[num_inputs:])
    if not part.inputs:
      found = np.asarray(source[out_rows])[None]
      in_shape: tuple[int, ...] = ()
    else:
      in_rows, lead = _flat_range(part.inputs, index[0])
      in_shape = (lead, *part.inputs[1:])
      if self.is_transposed:
        found = np.asarray(source[out_rows, in_rows]).T
      else:
        found = np.asarray(source[in_rows, out_rows])
    if self.by_head:
      heads = outputs[0]
      found = found.reshape(len(found), heads, len(self.parts), -1)
      found = found[:, :, which]
    found = found.reshape(*in_shape, *outputs)
    if part.permutation:
      found = found[..., list(part.permutation)]
    # The leading axes are sliced already.
    rest = [slice(None), *index[1:num_inputs]] if part.inputs else []
    rest += [slice(None), *index[num_inputs + 1 :]]
    return found[tuple(rest)]

  def _output_rows(
    self, which: int, index: Index
  ) -> tuple[tuple[int, ...], slice]:
    """Returns the shape of the outputs to read, and their rows in the file.

    Args:
      which: index into `parts`.
      index: slices of the part's output axes; the first one alone is applied.
    """
    part = self.parts[which]
    rows, lead = _flat_range(part.outputs, index[0])
    if self.by_head:
      count = len(self.parts)
      rows = slice(rows.start * count, rows.stop * count)
    else:
      offset = sum(p.size for p in self.parts[:which])
      rows = slice(rows.start + offset, rows.stop + offset)
    return (lead, *part.outputs[1:]), rows

  def write(self, params: Mapping[str, np.ndarray]) -> np.ndarray:
    """Makes the tensor of one layer, as the checkpoint has it.

    Args:
      params: our parameters of that layer by `Part.key`, without a layer axis.
    """
    if self.is_plain:
      return params[self.parts[0].key]
    flat = []
    for part in self.parts:
      found = np.asarray(params[part.key])
      if part.permutation:
        found = found[..., np.argsort(part.permutation)]
      flat.append(found.reshape(math.prod(part.inputs), -1))
    if self.by_head:
      heads = self.parts[0].outputs[0]
      split = [x.reshape(len(x), heads, -1) for x in flat]
      whole = np.stack(split, 2).reshape(len(flat[0]), -1)
    else:
      whole = np.concatenate(flat, 1)
    if not self.parts[0].inputs:
      return whole[0]
    return np.ascontiguousarray(whole.T) if self.is_transposed else whole


def _flat_range(shape: Sequence[int], leading: slice) -> tuple[slice, int]:
  """Returns a slice of the first axis as one of the flattened axes.

  Args:
    shape: axes that are flattened.
    leading: slice of the first of them, of step 1.

  Returns:
    The slice of the flattened axis, and the length of `leading`.
  """
  start, stop, _ = leading.indices(shape[0])
  inner = math.prod(shape[1:])
  return slice(start * inner, stop * inner), stop - start


@dataclasses.dataclass(frozen=True)
class _Names:
  """Names of a family's tensors; "{}" stands for the layer."""

  embedding: str
  final_norm: str
  head: str
  layer: str
  norms: Mapping[str, str]
  projections: Mapping[str, str]
  position_embedding: str = ""
  qk_norms: tuple[str, str] = ("self_attn.q_norm", "self_attn.k_norm")


_LLAMA = _Names(
  embedding="model.embed_tokens",
  final_norm="model.norm",
  head="lm_head",
  layer="model.layers.{}.",
  norms={
    "attention_norm": "input_layernorm",
    "mlp_norm": "post_attention_layernorm",
  },
  projections={
    "query": "self_attn.q_proj",
    "key": "self_attn.k_proj",
    "value": "self_attn.v_proj",
    "attention_out": "self_attn.o_proj",
    "gate": "mlp.gate_proj",
    "up": "mlp.up_proj",
    "down": "mlp.down_proj",
  },
)
_SANDWICH = dataclasses.replace(
  _LLAMA,
  norms={
    "attention_norm": "input_layernorm",
    "attention_post_norm": "post_attention_layernorm",
    "mlp_norm": "pre_feedforward_layernorm",
    "mlp_post_norm": "post_feedforward_layernorm",
  },
)
_PHI = dataclasses.replace(
  _LLAMA,
  projections=_LLAMA.projections
  | dict.fromkeys(("query", "key", "value"), "self_attn.qkv_proj")
  | dict.fromkeys(("gate", "up"), "mlp.gate_up_proj"),
)
_GPT2 = _Names(
  embedding="transformer.wte",
  final_norm="transformer.ln_f",
  head="lm_head",
  layer="transformer.h.{}.",
  norms={"attention_norm": "ln_1", "mlp_norm": "ln_2"},
  projections=dict.fromkeys(("query", "key", "value"), "attn.c_attn")
  | {"attention_out": "attn.c_proj", "up": "mlp.c_fc", "down": "mlp.c_proj"},
  position_embedding="transformer.wpe",
)
_GPTJ = dataclasses.replace(
  _GPT2,
  projections={
    "query": "attn.q_proj",
    "key": "attn.k_proj",
    "value": "attn.v_proj",
    "attention_out": "attn.out_proj",
    "up": "mlp.fc_in",
    "down": "mlp.fc_out",
  },
)
_NEOX = _Names(
  embedding="gpt_neox.embed_in",
  final_norm="gpt_neox.final_layer_norm",
  head="embed_out",
  layer="gpt_neox.layers.{}.",
  norms={
    "attention_norm": "input_layernorm",
    "mlp_norm": "post_attention_layernorm",
  },
  projections=dict.fromkeys(
    ("query", "key", "value"), "attention.query_key_value"
  )
  | {
    "attention_out": "attention.dense",
    "up": "mlp.dense_h_to_4h",
    "down": "mlp.dense_4h_to_h",
  },
)
_NAMES = {
  "gpt2": _GPT2,
  "gptj": _GPTJ,
  "gpt_neox": _NEOX,
  "phi3": _PHI,
  "gemma2": _SANDWICH,
  "gemma3_text": _SANDWICH,
  "olmo2": _SANDWICH,
}
# Families with Conv1D layers, which hold [in, out].
_CONV_FAMILIES = ("gpt2",)


def projection_names(config: ModelConfig) -> dict[str, str]:
  """Returns projection -> name of the module of a layer that holds it.

  Several projections may be in one module. Names have no layer's prefix.
  """
  names = _NAMES.get(config.family, _LLAMA).projections
  return {name: names[name] for name in config.projection_shapes()}


def layer_prefix(config: ModelConfig) -> str:
  """Returns what names of a layer's tensors start with; "{}" is the layer."""
  return _NAMES.get(config.family, _LLAMA).layer


def tensor_map(config: ModelConfig) -> list[Tensor]:
  """Lists a checkpoint's tensors, and which of our parameters each holds.

  Embeddings come first, then the layers' norms and projections, the last norm
  and the head. No tensor holds an adapter or a value head.
  """
  c, names = config, _NAMES.get(config.family, _LLAMA)
  embedding = Part("embedding", (), (c.vocab_size, c.d_model))
  tensors = [Tensor(f"{names.embedding}.weight", (embedding,), is_plain=True)]
  if c.has_learned_positions:
    part = Part("position_embedding", (), (c.max_positions, c.d_model))
    name = f"{names.position_embedding}.weight"
    tensors.append(Tensor(name, (part,), is_plain=True))
  for ours in c.layer_norms():
    theirs = names.layer + names.norms[ours]
    tensors += _norm(c, f"layers/{ours}", theirs, (c.d_model,))
  tensors += _qk_norms(c, names) + _projections(c, names)
  tensors += _norm(c, "final_norm", names.final_norm, (c.d_model,))
  if not c.tie_embeddings:
    part = Part("head", (c.d_model,), (c.vocab_size,))
    tensors.append(Tensor(f"{names.head}.weight", (part,)))
  if c.head_bias:
    part = Part("head_bias", (), (c.vocab_size,))
    tensors.append(Tensor(f"{names.head}.bias", (part,)))
  return tensors


def _norm(
  config: ModelConfig, ours: str, theirs: str, shape: tuple[int, ...]
) -> list[Tensor]:
  scale = Tensor(f"{theirs}.weight", (Part(f"{ours}/scale", (), shape),))
  if config.norm == "rms":
    return [scale]
  return [scale, Tensor(f"{theirs}.bias", (Part(f"{ours}/bias", (), shape),))]


def _qk_norms(config: ModelConfig, names: _Names) -> list[Tensor]:
  if not config.qk_norm:
    return []
  tensors = []
  for ours, theirs, heads in (
    ("query_norm", names.qk_norms[0], config.num_heads),
    ("key_norm", names.qk_norms[1], config.num_kv_heads),
  ):
    shape = (config.head_dim,)
    if config.qk_norm == "full":
      shape = (heads, *shape)
    tensors += _norm(config, f"layers/{ours}", names.layer + theirs, shape)
  return tensors


def _projections(config: ModelConfig, names: _Names) -> list[Tensor]:
  by_module: dict[str, list[str]] = {}
  for ours, theirs in projection_names(config).items():
    by_module.setdefault(theirs, []).append(ours)
  shapes, tensors = config.projection_shapes(), []
  for module, projections in by_module.items():
    settings = dict(
      is_transposed=config.family not in _CONV_FAMILIES,
      by_head=config.family == "gpt_neox" and len(projections) > 1,
    )
    kernels = tuple(
      Part(f"layers/{name}/kernel", *shapes[name], _permutation(config, name))
      for name in projections
    )
    theirs = names.layer + module
    tensors.append(Tensor(f"{theirs}.weight", kernels, **settings))
    if config.has_bias(projections[0]):
      biases = tuple(
        Part(f"layers/{name}/bias", (), shapes[name][1]) for name in projections
      )
      tensors.append(Tensor(f"{theirs}.bias", biases, **settings))
  return tensors


def _permutation(config: ModelConfig, projection: str) -> tuple[int, ...]:
  """Returns the `Part.permutation` of a projection; () for none.

  GPT-J rotates neighbouring channels of queries and keys. We rotate channels
  that are half a head apart.
  """
  if config.family != "gptj" or projection not in ("query", "key"):
    return ()
  size = config.rotary_dim or config.head_dim
  rotated = (*range(0, size, 2), *range(1, size, 2))
  return (*rotated, *range(size, config.head_dim))
