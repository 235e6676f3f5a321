"""Writes a policy as a Hugging Face folder: config.json and safetensors."""

from collections.abc import Iterator, Mapping
import json
from typing import Any

from etils import epath
import jax.numpy as jnp
import numpy as np
from safetensors.numpy import save_file

from dpo_jax.models.config import ModelConfig
from dpo_jax.models.decoder import Policy
from dpo_jax.models.huggingface import config_json
from dpo_jax.models.huggingface.read import INDEX
from dpo_jax.models.huggingface.tensor_map import Tensor, tensor_map
from dpo_jax.system import files
from dpo_jax.trees import Params

_MAX_SHARD_BYTES = 5 * 10**9


def save_params(
  folder: epath.PathLike,
  policy: Policy,
  params: Params,
  *,
  dtype: str,
  token_ids: Mapping[str, Any] | None = None,
  max_shard_bytes: int = _MAX_SHARD_BYTES,
) -> None:
  """Writes config.json and safetensors; large models in several files.

  A value head is left out, because transformers has none.

  Args:
    folder: folder to write to.
    policy: the decoder, without adapters; merge them first.
    params: its parameters.
    dtype: dtype of the weights in the files.
    token_ids: `bos_token_id`, `eos_token_id` and `pad_token_id` for
      config.json; None for a token that does not exist.
    max_shard_bytes: maximum bytes of a file; the host holds one at a time.

  Raises:
    ValueError: a model that its family's config.json cannot describe.
  """
  root = epath.Path(folder)
  config = policy.config
  raw = config_json.write_config(config) | {"torch_dtype": dtype}
  # Written even if null, because families have defaults for them.
  raw |= dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"))
  raw |= token_ids or {}
  root.mkdir(parents=True, exist_ok=True)
  shards = _plan_shards(config, jnp.dtype(dtype).itemsize, max_shard_bytes)
  weight_map, total = {}, 0
  for number, members in enumerate(shards, 1):
    file = "model.safetensors"
    if len(shards) > 1:
      file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
    tensors = {
      # safetensors writes the buffer and ignores its strides.
      name: np.ascontiguousarray(
        _export_tensor(tensor, params, layer).astype(dtype)
      )
      for name, tensor, layer in members
    }
    weight_map |= dict.fromkeys(tensors, file)
    total += sum(x.nbytes for x in tensors.values())
    with files.writing(root / file) as path:
      save_file(tensors, path, metadata={"format": "pt"})
  if len(shards) > 1:
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (root / INDEX).write_text(json.dumps(index, indent=2) + "\n")
  (root / "config.json").write_text(json.dumps(raw, indent=2) + "\n")


_Member = tuple[str, Tensor, int | None]


def _members(config: ModelConfig) -> Iterator[_Member]:
  for tensor in tensor_map(config):
    if tensor.is_stacked:
      for layer, name in enumerate(tensor.names(config.num_layers)):
        yield name, tensor, layer
    else:
      yield tensor.name, tensor, None


def _plan_shards(
  config: ModelConfig, itemsize: int, max_bytes: int
) -> list[list[_Member]]:
  shards: list[list[_Member]] = [[]]
  filled = 0
  for member in _members(config):
    size = int(np.prod(member[1].shape)) * itemsize
    if shards[-1] and filled + size > max_bytes:
      shards.append([])
      filled = 0
    shards[-1].append(member)
    filled += size
  return shards


def _export_tensor(tensor: Tensor, params: Params, layer: int | None) -> Any:
  arrays = {}
  for part in tensor.parts:
    array = params
    for key in part.key.split("/"):
      array = array[key]
    arrays[part.key] = np.asarray(array if layer is None else array[layer])
  return tensor.write(arrays)
