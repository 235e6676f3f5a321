"""Writes adapters as a folder that `peft` loads.

peft has adapters on the modules of the checkpoint, some of which hold several
of our projections. Adapters of such a module are joined: A is stacked, B is
block-diagonal. The module gets its own rank and alpha, which keep the scale.
"""

import json
from typing import Any

from etils import epath
import numpy as np
from safetensors.numpy import save_file

from dpo_jax.models.config import ModelConfig
from dpo_jax.models.huggingface.tensor_map import (
  Tensor,
  layer_prefix,
  tensor_map,
)
from dpo_jax.system import files
from dpo_jax.trees import Params

_PREFIX = "base_model.model."


def save_adapter(
  folder: epath.PathLike,
  params: Params,
  config: ModelConfig,
  *,
  base: str,
  revision: str | None = None,
) -> None:
  """Writes adapter_config.json and adapter_model.safetensors.

  Args:
    folder: folder to write to.
    params: parameters; only adapters are read.
    config: shape of the policy, with its adapters.
    base: name or folder of the base model.
    revision: revision of a base model of the Hub.

  Raises:
    ValueError: a policy without adapters.
  """
  if config.lora is None:
    raise ValueError("this policy has no adapters: export the model itself")
  tensors: dict[str, np.ndarray] = {}
  ranks: dict[str, int] = {}
  for tensor in tensor_map(config):
    names = [part.key.split("/") for part in tensor.parts]
    if not tensor.is_stacked or names[0][-1] != "kernel":
      continue
    adapted = [config.lora.has(name[1]) for name in names]
    if not any(adapted):
      continue
    module = tensor.name.removeprefix(layer_prefix(config))
    module = module.removesuffix(".weight")
    ranks[module] = config.lora.rank * sum(adapted)
    for layer in range(config.num_layers):
      low, high = _join(tensor, adapted, params["layers"], layer)
      theirs = f"{_PREFIX}{tensor.name.format(layer)}".removesuffix(".weight")
      tensors[f"{theirs}.lora_A.weight"] = low
      tensors[f"{theirs}.lora_B.weight"] = high
  root = epath.Path(folder)
  root.mkdir(parents=True, exist_ok=True)
  with files.writing(root / "adapter_model.safetensors") as path:
    save_file(tensors, path, metadata={"format": "pt"})
  described = _describe(config, ranks) | {
    "base_model_name_or_path": base,
    "revision": revision,
  }
  (root / "adapter_config.json").write_text(json.dumps(described, indent=2))


def _join(
  tensor: Tensor, adapted: list[bool], layers: Any, layer: int
) -> tuple[np.ndarray, np.ndarray]:
  """Computes A [r, in] and B [out, r] of one module of a layer, float32.

  Args:
    tensor: tensor of the module's kernel.
    adapted: whether each of the tensor's parts has an adapter.
    layers: the policy's stacked layers, by name of the projection.
    layer: index of the layer.

  Returns:
    A stacked and B block-diagonal; r is the rank times the adapted parts.
  """
  lows, columns = [], []
  num_adapted = sum(adapted)
  for part, is_adapted in zip(tensor.parts, adapted, strict=True):
    leaves = layers[part.key.split("/")[1]]
    if not is_adapted:
      columns.append(None)
      continue
    low = np.asarray(leaves["lora_a"][layer], np.float32)
    rank = low.shape[-1]
    columns.append(np.asarray(leaves["lora_b"][layer], np.float32))
    lows.append(low.reshape(-1, rank).T)
  # Each row of B is converted as a row of the kernel is.
  ranks = [slice(i * rank, (i + 1) * rank) for i in range(num_adapted)]
  high_parts = {}
  next_ranks = iter(ranks)
  for part, column in zip(tensor.parts, columns, strict=True):
    whole = np.zeros((rank * num_adapted, *part.outputs), np.float32)
    if column is not None:
      whole[next(next_ranks)] = column
    high_parts[part.key] = whole
  high = tensor.with_inputs((rank * num_adapted,)).write(high_parts)
  if not tensor.is_transposed:
    high = high.T
  # safetensors writes the buffer and ignores its strides.
  low = np.ascontiguousarray(np.concatenate(lows))
  return low, np.ascontiguousarray(high)


def _describe(config: ModelConfig, ranks: dict[str, int]) -> dict[str, Any]:
  lora = config.lora
  patterns, alphas = {}, {}
  for module, rank in ranks.items():
    if rank == lora.rank:
      continue
    # The scale is alpha / rank, or alpha / sqrt(rank), of the joined rank.
    factor = rank / lora.rank
    patterns[module] = rank
    alphas[module] = lora.alpha * (
      factor**0.5 if lora.is_rank_stabilized else factor
    )
  return {
    "peft_type": "LORA",
    "task_type": "CAUSAL_LM",
    "r": lora.rank,
    "lora_alpha": lora.alpha,
    "lora_dropout": 0.0,
    "bias": "none",
    "use_rslora": lora.is_rank_stabilized,
    "fan_in_fan_out": config.family == "gpt2",
    "target_modules": sorted(ranks),
    "rank_pattern": patterns,
    "alpha_pattern": alphas,
    "inference_mode": True,
    "init_lora_weights": True,
  }
