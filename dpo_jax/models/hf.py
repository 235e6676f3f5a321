"""Hugging Face checkpoints: config.json and safetensors to our parameters."""

from collections.abc import Callable
import contextlib
import dataclasses
import json
from typing import Any

from etils import epath
import jax
import numpy as np
import safetensors

from dpo_jax.models.config import ModelConfig
from dpo_jax.models.decoder import Policy

# Fields of config.json that say nothing about what the model computes.
_IGNORED = {
  "_name_or_path",
  "architectures",
  "attention_dropout",
  "bos_token_id",
  "dtype",
  "eos_token_id",
  "initializer_range",
  "pad_token_id",
  "pretraining_tp",
  "torch_dtype",
  "transformers_version",
  "use_cache",
}
# Fields that we honour at one value only.
_REQUIRED = {
  "model_type": ("llama",),
  "hidden_act": ("silu",),
  "attention_bias": (False,),
  "mlp_bias": (False,),
  "rope_scaling": (None,),
}
_NEEDED = {
  "vocab_size",
  "hidden_size",
  "intermediate_size",
  "num_hidden_layers",
  "num_attention_heads",
  "max_position_embeddings",
}
_READ = _NEEDED | {
  "num_key_value_heads",
  "head_dim",
  "rms_norm_eps",
  "rope_theta",
  "rope_parameters",
  "tie_word_embeddings",
}


def load_config(folder: str, **overrides: Any) -> ModelConfig:
  """Reads config.json.

  Args:
    folder: a local Hugging Face model folder.
    **overrides: fields of ModelConfig that are ours to choose, such as dtypes.

  Returns:
    The model's shape.

  Raises:
    FileNotFoundError: no config.json there.
    ValueError: a field that we would have to honour and do not.
  """
  path = epath.Path(folder) / "config.json"
  if not path.exists():
    raise FileNotFoundError(
      f"{path} does not exist: a Hugging Face model folder holds config.json"
      " and *.safetensors"
    )
  raw = json.loads(path.read_text())
  rope = raw.get("rope_parameters") or {}
  refused = [
    f"{key}={raw[key]!r} (only {wanted[0]!r})"
    for key, wanted in _REQUIRED.items()
    if key in raw and raw[key] not in wanted
  ]
  if rope.get("rope_type", "default") != "default":
    refused.append(f"rope_parameters={rope!r} (only the default rotation)")
  known = _IGNORED | set(_REQUIRED) | _READ
  refused += [f"{key}={raw[key]!r}" for key in raw if key not in known]
  if refused:
    raise ValueError(
      f"{path} asks for what this decoder does not do: {'; '.join(refused)}"
    )
  missing = sorted(_NEEDED - raw.keys())
  if missing:
    raise ValueError(f"{path} lacks {', '.join(missing)}")
  num_heads = raw["num_attention_heads"]
  return ModelConfig(
    vocab_size=raw["vocab_size"],
    d_model=raw["hidden_size"],
    num_layers=raw["num_hidden_layers"],
    num_heads=num_heads,
    num_kv_heads=raw.get("num_key_value_heads") or num_heads,
    head_dim=raw.get("head_dim") or raw["hidden_size"] // num_heads,
    d_ff=raw["intermediate_size"],
    max_positions=raw["max_position_embeddings"],
    rope_theta=float(rope.get("rope_theta", raw.get("rope_theta", 1e4))),
    norm_eps=raw.get("rms_norm_eps", 1e-6),
    tie_embeddings=raw.get("tie_word_embeddings", False),
    **overrides,
  )


@dataclasses.dataclass(frozen=True)
class _Source:
  """Where one of our parameters comes from.

  Attributes:
    names: tensors in the checkpoint; one a layer where `is_stacked`.
    shape: shape of each in the checkpoint.
    convert: that tensor to our layout, without the layer axis.
    is_stacked: whether our parameter has a leading layer axis.
  """

  names: tuple[str, ...]
  shape: tuple[int, ...]
  convert: Callable[[np.ndarray], np.ndarray]
  is_stacked: bool


def _sources(config: ModelConfig) -> dict[str, _Source]:
  """Our parameter paths, each with its source in a Llama checkpoint."""
  c = config

  def stacked(name, shape, convert=lambda x: x):
    names = tuple(
      f"model.layers.{i}.{name}.weight" for i in range(c.num_layers)
    )
    return _Source(names, shape, convert, True)

  def single(name, shape, convert=lambda x: x):
    return _Source((f"{name}.weight",), shape, convert, False)

  # A checkpoint holds [out, in]; our kernels are [in, out] with heads apart.
  def heads(name, num_heads):
    return stacked(
      f"self_attn.{name}",
      (num_heads * c.head_dim, c.d_model),
      lambda x: x.T.reshape(c.d_model, num_heads, c.head_dim),
    )

  def transposed(name, shape):
    return stacked(name, shape, np.transpose)

  sources = {
    "embedding": single("model.embed_tokens", (c.vocab_size, c.d_model)),
    "final_norm/scale": single("model.norm", (c.d_model,)),
    "layers/attention_norm/scale": stacked("input_layernorm", (c.d_model,)),
    "layers/mlp_norm/scale": stacked("post_attention_layernorm", (c.d_model,)),
    "layers/query/kernel": heads("q_proj", c.num_heads),
    "layers/key/kernel": heads("k_proj", c.num_kv_heads),
    "layers/value/kernel": heads("v_proj", c.num_kv_heads),
    "layers/attention_out/kernel": stacked(
      "self_attn.o_proj",
      (c.d_model, c.num_heads * c.head_dim),
      lambda x: x.T.reshape(c.num_heads, c.head_dim, c.d_model),
    ),
    "layers/gate/kernel": transposed("mlp.gate_proj", (c.d_ff, c.d_model)),
    "layers/up/kernel": transposed("mlp.up_proj", (c.d_ff, c.d_model)),
    "layers/down/kernel": transposed("mlp.down_proj", (c.d_model, c.d_ff)),
  }
  if not c.tie_embeddings:
    sources["head"] = single("lm_head", (c.vocab_size, c.d_model), np.transpose)
  return sources


def load_params(folder: str, policy: Policy, shardings: Any) -> Any:
  """Streams a checkpoint's tensors onto the devices.

  Each tensor is read, converted and placed by itself, so that the host never
  holds the model.

  Args:
    folder: a local Hugging Face model folder.
    policy: the decoder, of the folder's shape.
    shardings: tree like the parameters, of Shardings.

  Returns:
    The parameters in `policy.config.param_dtype`.

  Raises:
    ValueError: tensors missing, unexpected or misshapen, all listed at once,
      or a tensor with a non-finite value.
  """
  root = epath.Path(folder)
  paths = sorted(root.glob("*.safetensors"))
  if not paths:
    raise FileNotFoundError(
      f"{folder} holds no *.safetensors; pickled weights are not read: convert"
      " them with save_pretrained(safe_serialization=True)"
    )
  sources = _sources(policy.config)
  with contextlib.ExitStack() as stack:
    where: dict[str, Any] = {}
    for path in paths:
      file = stack.enter_context(
        safetensors.safe_open(str(path), framework="numpy")
      )
      where |= dict.fromkeys(file.keys(), file)
    _check_names(folder, where, sources, policy.config)

    def place(path, abstract, sharding):
      key = "/".join(str(part.key) for part in path)
      source, dtype = sources[key], abstract.dtype

      def read(name):
        tensor = where[name].get_tensor(name)
        if not np.isfinite(np.asarray(tensor, np.float32)).all():
          raise ValueError(f"{folder}: {name} holds a NaN or an infinity")
        return source.convert(tensor).astype(dtype)

      def part(index):
        if not source.is_stacked:
          return read(source.names[0])[index]
        layers = range(len(source.names))[index[0]]
        return np.stack([read(source.names[i])[index[1:]] for i in layers])

      return jax.make_array_from_callback(abstract.shape, sharding, part)

    return jax.tree_util.tree_map_with_path(
      place, policy.abstract_params(), shardings
    )


def _check_names(
  folder: str,
  where: dict[str, Any],
  sources: dict[str, _Source],
  config: ModelConfig,
) -> None:
  wanted = {name: s.shape for s in sources.values() for name in s.names}
  # Some exports repeat the tied projection, and old ones store buffers.
  spare = {"lm_head.weight"} if config.tie_embeddings else set()
  spare |= {name for name in where if name.endswith("rotary_emb.inv_freq")}
  faults = [f"missing {name}" for name in sorted(wanted.keys() - where.keys())]
  faults += [
    f"unexpected {name}"
    for name in sorted(where.keys() - wanted.keys() - spare)
  ]
  for name in sorted(wanted.keys() & where.keys()):
    shape = tuple(where[name].get_slice(name).get_shape())
    if shape != wanted[name]:
      faults.append(f"{name} is {list(shape)}, wanted {list(wanted[name])}")
  if faults:
    shown = "\n  ".join(faults[:20])
    raise ValueError(
      f"{folder} does not hold the model that its config.json describes"
      f" ({len(faults)} faults):\n  {shown}"
    )
