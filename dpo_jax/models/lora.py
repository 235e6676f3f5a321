"""Low-rank adapters as part of a parameter tree.

Hu et al. 2021 (arXiv:2106.09685). An adapter is two leaves next to its kernel;
`layers.Projection` applies it without a merged copy. A tree without adapters is
the policy with its adapters off, which is the policy it started from.
"""

from collections.abc import Mapping
import re
from typing import Any

import jax
import jax.numpy as jnp

from dpo_jax.models.config import ModelConfig
from dpo_jax.trees import Params

ADAPTER_LEAVES = ("lora_a", "lora_b")


def has_adapters(params: Params) -> bool:
  """Returns whether a nested dict has adapters."""
  return any(
    key in ADAPTER_LEAVES or (isinstance(x, Mapping) and has_adapters(x))
    for key, x in params.items()
  )


def is_trained(name: str, *, has_adapters: bool, frozen: str) -> bool:
  """Returns whether a parameter is trained.

  Args:
    name: its path, such as "layers/query/kernel".
    has_adapters: whether the policy has adapters. If so, only they and a value
      head are trained.
    frozen: regular expression; parameters whose path it matches anywhere are
      not trained. "" freezes none.
  """
  if frozen and re.search(frozen, name):
    return False
  is_adapter = name.rpartition("/")[2] in ADAPTER_LEAVES
  return not has_adapters or is_adapter or name == "value_head"


def without_adapters(params: Params) -> Params:
  """Returns a copy of the tree without the leaves of adapters."""
  return {
    key: without_adapters(x) if isinstance(x, Mapping) else x
    for key, x in params.items()
    if key not in ADAPTER_LEAVES
  }


def merge_adapters(params: Params, config: ModelConfig) -> Params:
  """Replaces W by W + scale A B, for a policy without adapters.

  Args:
    params: parameters with adapters.
    config: shape of the policy, with its adapters.

  Returns:
    The tree without adapters. Kernels keep their dtype; products are float32.
  """
  shapes, scale = config.projection_shapes(), config.lora.scale

  def merge(name: str, leaves: Mapping[str, jax.Array]) -> dict[str, Any]:
    base = {k: x for k, x in leaves.items() if k not in ADAPTER_LEAVES}
    if "lora_a" not in leaves:
      return base
    # Shapes with the layer axis: [L, *inputs, r] and [L, r, *outputs].
    inputs, outputs = shapes[name]
    kernel, low, high = (leaves[k] for k in ("kernel", *ADAPTER_LEAVES))
    rank = low.shape[-1]
    product = jnp.einsum(
      "lir,lro->lio",
      low.reshape(len(low), -1, rank),
      high.reshape(len(high), rank, -1),
      precision="highest",
    ).reshape(-1, *inputs, *outputs)
    merged = kernel.astype(jnp.float32) + scale * product
    return base | {"kernel": merged.astype(kernel.dtype)}

  layers = {
    name: merge(name, leaves) if name in shapes else leaves
    for name, leaves in params["layers"].items()
  }
  return {**params, "layers": layers}
