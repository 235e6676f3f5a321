"""Partition rules of the decoder's parameters."""

from typing import Any

from jax.sharding import Mesh, PartitionSpec

from dpo_jax.parallel import sharding

# First match wins; every parameter must match one. The leading axis of a
# layer's parameter is the layer.
PARTITION_RULES: tuple[tuple[str, PartitionSpec], ...] = (
  (r"^embedding$", PartitionSpec("tensor", "fsdp")),
  (r"^head$", PartitionSpec("fsdp", "tensor")),
  (
    r"^layers/(query|key|value)/kernel$",
    PartitionSpec(None, "fsdp", "tensor", None),
  ),
  (r"^layers/(gate|up)/kernel$", PartitionSpec(None, "fsdp", "tensor")),
  (
    r"^layers/attention_out/kernel$",
    PartitionSpec(None, "tensor", None, "fsdp"),
  ),
  (r"^layers/down/kernel$", PartitionSpec(None, "tensor", "fsdp")),
  (r"^position_embedding$", PartitionSpec(None, "fsdp")),
  (r"^layers/(query|key|value|gate|up)/bias$", PartitionSpec(None, "tensor")),
  (r"^head_bias$", PartitionSpec("tensor")),
  # Adapters are sharded as their kernels are.
  (
    r"^layers/(query|key|value|gate|up)/lora_a$",
    PartitionSpec(None, "fsdp", None),
  ),
  (
    r"^layers/(query|key|value|gate|up)/lora_b$",
    PartitionSpec(None, None, "tensor"),
  ),
  (r"^layers/(attention_out|down)/lora_a$", PartitionSpec(None, "tensor")),
  (
    r"^layers/(attention_out|down)/lora_b$",
    PartitionSpec(None, None, "fsdp"),
  ),
  (r"(scale|bias)$|^value_head$", PartitionSpec()),
)


def param_shardings(abstract_params: Any, mesh: Mesh) -> Any:
  """Returns the NamedShardings of a policy's parameters, in the same tree.

  Raises:
    ValueError: see `sharding.param_shardings`.
  """
  return sharding.param_shardings(abstract_params, mesh, PARTITION_RULES)


def state_shardings(state: Any, params: Any, mesh: Mesh) -> Any:
  """Returns the NamedShardings of a TrainState, in the same tree.

  Args:
    state: arrays or ShapeDtypeStructs.
    params: the policy's parameters, which the state mirrors.
    mesh: see `sharding.state_shardings`.
  """
  return sharding.state_shardings(state, params, mesh, PARTITION_RULES)
