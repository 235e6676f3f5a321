"""FLOPs, bytes and lower bounds of a step, by formula.

XLA's own `cost_analysis` counts a loop's body once and is not used.
"""

from collections.abc import Iterable, Mapping
import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp

from dpo_jax.parallel.active_mesh import ROW_AXES
from dpo_jax.planning.hlo import Collective
from dpo_jax.planning.topology import Topology
from dpo_jax.trees import path_name

FLOPS_FORMULA = """\
P matrix entries of a layer, L layers, V D of the head; R rows of T tokens, S of
them scored; H heads of d. Forward: 2 P L R T + 4 H d L R T (T + 1) / 2 (causal,
every row full) + 2 V D R S. Model FLOPs: three times that, and a forward pass
of a reference that runs. Executed: the head once more, and with remat=full the
layers, with remat=attention those but for attention."""
BYTES_FORMULA = """\
Weights in compute dtype, once a pass, and written and read again where fsdp
gathers them; the whole state read and written once, gradients too; (6 D + 2 (H
+ 2 KV) d + 3 F) L values a token, written and read in every pass; float32
logits written and read in every pass of the head."""


@dataclasses.dataclass(frozen=True)
class Work:
  """Work of one step, over all devices.

  Attributes:
    model_flops: FLOPs that MFU counts.
    executed_flops: FLOPs with those that the backward pass computes again.
    layer_passes: forward and backward passes through the layers' weights.
    head_passes: the same through the head's weights.
    layer_entries: matrix entries of all layers.
    head_entries: matrix entries of the head.
  """

  model_flops: float
  executed_flops: float
  layer_passes: int
  head_passes: int
  layer_entries: int
  head_entries: int


def count_work(
  config: Any,
  params: Any,
  *,
  num_rows: int,
  row_tokens: int,
  scored_tokens: int,
  has_live_reference: bool,
) -> Work:
  """Computes the work of a training step by FLOPS_FORMULA.

  Args:
    config: ModelConfig; its remat decides what is computed again.
    params: abstract parameters; every matrix of a layer multiplies every token.
    num_rows: R, rows of the step over all devices.
    row_tokens: T, tokens of a row.
    scored_tokens: S, scored tokens of a row.
    has_live_reference: whether a reference runs in the step.
  """
  layers = sum(
    math.prod(leaf.shape)
    for path, leaf in jax.tree_util.tree_leaves_with_path(params)
    if is_layer_matrix(path_name(path), leaf.shape)
  )
  head = config.vocab_size * config.d_model
  tokens = num_rows * row_tokens
  attention = 4 * config.num_heads * config.head_dim * config.num_layers
  pairs = num_rows * row_tokens * (row_tokens + 1) / 2
  in_matrices, in_attention = 2.0 * layers * tokens, attention * pairs
  in_head = 2.0 * head * num_rows * scored_tokens
  forward = in_matrices + in_attention + in_head
  model = (3 + has_live_reference) * forward
  again = in_head
  runs_layers_again = config.remat in ("attention", "full")
  if runs_layers_again:
    again += in_matrices
  if config.remat == "full":
    again += in_attention
  return Work(
    model_flops=model,
    executed_flops=model + again,
    layer_passes=2 + has_live_reference + runs_layers_again,
    head_passes=3 + has_live_reference,
    layer_entries=layers,
    head_entries=head,
  )


def is_layer_matrix(name: str, shape: tuple[int, ...]) -> bool:
  """Returns whether a parameter is a stack of matrices of the layers."""
  return (
    name.startswith("layers/") and len(shape) >= 3 and not name.endswith("bias")
  )


def hbm_bytes(
  work: Work,
  config: Any,
  sizes: Mapping[str, int],
  *,
  state_bytes: float,
  gradient_bytes: float,
  num_rows: int,
  row_tokens: int,
  scored_tokens: int,
) -> float:
  """Computes the HBM bytes that a device moves in a step, by BYTES_FORMULA.

  Args:
    work: work of the step, over all devices.
    config: ModelConfig.
    sizes: sizes of the mesh by axis.
    state_bytes: bytes of parameters and optimizer state on a device.
    gradient_bytes: bytes of gradients on a device.
    num_rows: R, rows of the step over all devices.
    row_tokens: T, tokens of a row.
    scored_tokens: S, scored tokens of a row.
  """
  width = jnp.dtype(config.compute_dtype).itemsize
  rows = num_rows / math.prod(sizes[axis] for axis in ROW_AXES)
  touched = 3 if sizes["fsdp"] > 1 else 1
  entries = (
    work.layer_passes * work.layer_entries
    + work.head_passes * work.head_entries
  )
  weights = touched * width * entries / sizes["tensor"]
  values = 6 * config.d_model + 3 * config.d_ff
  values += 2 * config.head_dim * (config.num_heads + 2 * config.num_kv_heads)
  tokens = rows * row_tokens / sizes["context"]
  activations = 2 * work.layer_passes * width * values * config.num_layers
  activations *= tokens / sizes["tensor"]
  logits = 2 * 4 * work.head_passes * rows * scored_tokens
  logits *= config.vocab_size / sizes["tensor"]
  return weights + 2 * state_bytes + 2 * gradient_bytes + activations + logits


def collective_bytes(
  work: Work,
  config: Any,
  sizes: Mapping[str, int],
  *,
  num_rows: int,
  row_tokens: int,
) -> float:
  """Estimates the bytes that a device receives in a step, without compiling.

  The sum of: all-gathers of weights over fsdp and reduce-scatters of their
  float32 gradients; the all-reduce of gradients over data; two all-reduces of
  activations over tensor for each pass through a layer; and keys and values
  over context. See `hbm_bytes` for the arguments.
  """

  def share(axis):
    return (sizes[axis] - 1) / sizes[axis]

  rows = num_rows / math.prod(sizes[axis] for axis in ROW_AXES)
  entries = work.layer_entries + work.head_entries
  gathered = work.layer_passes * work.layer_entries + 3 * work.head_entries
  fsdp = (2.0 * gathered + 4.0 * entries) / sizes["tensor"] * share("fsdp")
  data = 8.0 * entries / (sizes["fsdp"] * sizes["tensor"]) * share("data")
  hidden = 2.0 * rows * row_tokens / sizes["context"] * config.d_model
  reduces = 2 * work.layer_passes * config.num_layers
  tensor = 2.0 * reduces * hidden * share("tensor")
  context = 2.0 * work.layer_passes * config.num_layers * share("context")
  context *= rows * row_tokens * 2 * config.num_kv_heads * config.head_dim
  return fsdp + data + tensor + context


def lower_bounds(
  work: Work,
  num_hbm_bytes: float,
  collectives: Iterable[Collective] | None,
  topology: Topology,
) -> dict[str, float]:
  """Computes lower bounds of the seconds of a step.

  Args:
    work: work of a step, over all devices.
    num_hbm_bytes: bytes that a device moves to and from HBM.
    collectives: collectives of a device; None if they are not known.
    topology: TPU slices.

  Returns:
    "compute", "HBM", "ICI" (all links of a chip busy at once, one way) and
    "DCN" (a chip's share of its host's), of GPUs "NVLink" and "network"; NaN
    for networks if the collectives are not known.
  """
  chip = topology.chip
  ici = dcn = math.nan if collectives is None else 0.0
  for collective in collectives or ():
    received = collective.num_bytes * collective.trips
    if collective.crosses:
      dcn += received
    else:
      ici += received
  inside, outside = chip.networks
  return {
    "compute": work.executed_flops / (topology.num_chips * chip.flops),
    "HBM": num_hbm_bytes * chip.devices / chip.hbm_bandwidth,
    inside: ici * chip.devices / (chip.ici_links * chip.ici_bandwidth),
    outside: dcn * chip.devices / chip.dcn_bandwidth,
  }
