"""One Flax decoder for GPT-2, NeoX, GPT-J, Llama, Mistral, Qwen, Gemma & co.

Families differ in the fields of `ModelConfig`, never by name. Layers are
stacked along a leading axis and scanned, so compile time does not grow with
depth; windows that differ between layers are scanned with them. `Policy` splits
the module into graph and parameters once. From there on parameters are a nested
dict of arrays: donation, reference copies, checkpoints and partition rules are
operations on a tree.
"""

import dataclasses
import functools
import math
from typing import Any

from flax import nnx
import flax.struct
import jax
from jax.ad_checkpoint import checkpoint_policies
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from dpo_jax.models import attention, lora, rotary
from dpo_jax.models.config import REMAT_POLICIES, ModelConfig
from dpo_jax.models.layers import NO_WINDOW, Cache, Layer, Norm, SharedInputs
from dpo_jax.parallel import active_mesh
from dpo_jax.trees import Params


class Decoder(nnx.Module):
  """Maps token ids to hidden states."""

  def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs):
    self.config = config

    def draw(*shape):
      drawn = 0.02 * jax.random.normal(rngs.params(), shape)
      return nnx.Param(drawn.astype(config.param_dtype))

    self.embedding = draw(config.vocab_size, config.d_model)
    if config.has_learned_positions:
      self.position_embedding = draw(config.max_positions, config.d_model)

    @nnx.split_rngs(splits=config.num_layers)
    @nnx.vmap(in_axes=0, out_axes=0)
    def stack(rngs: nnx.Rngs) -> Layer:
      return Layer(config, rngs=rngs)

    self.layers = stack(rngs)
    self.final_norm = Norm(config)
    if not config.tie_embeddings:
      self.head = draw(config.d_model, config.vocab_size)
    if config.head_bias:
      zeros = jnp.zeros((config.vocab_size,), config.param_dtype)
      self.head_bias = nnx.Param(zeros)
    if config.value_head:
      # Zero, so that every response starts with the same value.
      zeros = jnp.zeros((config.d_model,), config.param_dtype)
      self.value_head = nnx.Param(zeros)

  def __call__(
    self,
    tokens: jax.Array,
    positions: jax.Array,
    rows: attention.Rows | None = None,
    cache: Cache | None = None,
  ) -> tuple[jax.Array, Cache | None]:
    """Computes the hidden states after the final norm.

    Args:
      tokens: i32 [B, T].
      positions: i32 [B, T].
      rows: the same tokens as packed rows; None with a cache.
      cache: keys and values of earlier tokens, or None.

    Returns:
      [B, T, D] in the compute dtype, and the cache extended by these tokens, or
      None without one.
    """
    config = self.config
    dtype = jnp.dtype(config.compute_dtype)
    # Gather before casting: casting first copies the whole embedding.
    x = self.embedding[...][tokens].astype(dtype)
    if config.is_embedding_scaled:
      # Rounded to the compute dtype, as in the family's training.
      x *= jnp.asarray(math.sqrt(config.d_model), dtype)
    if config.has_learned_positions:
      x += self.position_embedding[...][positions].astype(dtype)
    graph, stacked = nnx.split(self.layers)
    shared = SharedInputs(positions, *rotary.rotations(config, positions), rows)
    windows = None
    if config.local_layers:
      local = jnp.array(config.local_layers)
      windows = jnp.where(local, config.window, NO_WINDOW)

    def body(x, scanned):
      params, window, layer_cache = scanned
      layer = nnx.merge(graph, params)
      return layer(constrain_activations(x), shared, window, layer_cache)

    kept = REMAT_POLICIES[config.remat]
    if kept is not None:
      policy = checkpoint_policies.save_only_these_names(*kept)
      body = jax.checkpoint(body, policy=policy, prevent_cse=False)
    x, cache = jax.lax.scan(body, x, (stacked, windows, cache))
    return self.final_norm(x), cache


def constrain_activations(x: jax.Array) -> jax.Array:
  """Shards activations [R, T, D]: rows over devices, and T over `context`.

  T stays whole where `context` does not divide it. Without the constraint the
  partitioner may follow a sharded kernel instead and gather the batch. No
  effect outside a mesh and under pmap.
  """
  sizes = active_mesh.free_axes()
  axes = tuple(name for name in active_mesh.ROW_AXES if name in sizes)
  if not axes:
    return x
  # Sampling extends by one token, so T may not be divisible.
  is_split = "context" in sizes and x.shape[1] % sizes["context"] == 0
  context = "context" if is_split else None
  return jax.lax.with_sharding_constraint(x, PartitionSpec(axes, context))


@flax.struct.dataclass
class Readout:
  """Output projection: hidden states to logits.

  Attributes:
    kernel: [D, V] in the compute dtype.
    bias: f32 [V], or None.
    soft_cap: see ModelConfig.logits_soft_cap.
  """

  kernel: jax.Array
  bias: jax.Array | None = None
  soft_cap: float | None = flax.struct.field(pytree_node=False, default=None)

  def logits(self, hidden: jax.Array) -> jax.Array:
    """Computes logits: [..., D] -> f32 [..., V]."""
    logits = jnp.einsum(
      "...d,dv->...v",
      hidden,
      self.kernel,
      preferred_element_type=jnp.float32,
    )
    return self.finish(logits)

  def finish(self, products: jax.Array) -> jax.Array:
    """Adds the bias to products with the kernel, then applies the soft cap."""
    logits = products
    if self.bias is not None:
      logits += self.bias
    if self.soft_cap is not None:
      logits = self.soft_cap * jnp.tanh(logits / self.soft_cap)
    return logits


@dataclasses.dataclass(frozen=True)
class Policy:
  """Decoder as functions of a parameter tree.

  Parameters without adapters give the policy with its adapters off.
  """

  config: ModelConfig

  @functools.cached_property
  def _graph_and_state(self) -> tuple[Any, Any]:
    return nnx.split(
      nnx.eval_shape(lambda: Decoder(self.config, rngs=nnx.Rngs(0)))
    )

  def abstract_params(self) -> Params:
    """Returns a nested dict of ShapeDtypeStructs.

    If some parameters are frozen, the trained ones are float32 for any
    `param_dtype`: an update is far below the resolution of bfloat16.
    """

    def with_dtype(path, x):
      return jax.ShapeDtypeStruct(x.shape, self._dtype(path, x))

    tree = nnx.to_pure_dict(self._graph_and_state[1])
    return jax.tree_util.tree_map_with_path(with_dtype, tree)

  def init(self, key: jax.Array) -> Params:
    """Draws random parameters, a nested dict."""
    decoder = Decoder(self.config, rngs=nnx.Rngs(params=key))
    tree = nnx.to_pure_dict(nnx.state(decoder, nnx.Param))
    return jax.tree_util.tree_map_with_path(
      lambda path, x: x.astype(self._dtype(path, x)), tree
    )

  def _dtype(self, path: Any, leaf: Any) -> Any:
    config = self.config
    has_adapters = config.lora is not None
    name = "/".join(str(part.key) for part in path)
    is_trained = (has_adapters or config.frozen) and lora.is_trained(
      name, has_adapters=has_adapters, frozen=config.frozen
    )
    return jnp.dtype("float32") if is_trained else leaf.dtype

  @property
  def without_adapters(self) -> "Policy":
    """Decoder with its adapters off."""
    return Policy(dataclasses.replace(self.config, lora=None))

  def _bind(self, params: Params) -> Decoder:
    if self.config.lora is not None and not lora.has_adapters(params):
      return self.without_adapters._bind(params)
    graph, abstract = self._graph_and_state
    state = jax.tree.map(lambda x: x, abstract)
    nnx.replace_by_pure_dict(state, params)
    return nnx.merge(graph, state)

  def hidden_states(
    self,
    params: Params,
    tokens: jax.Array,
    positions: jax.Array,
    segments: jax.Array,
    branches: jax.Array,
    *,
    groups_per_row: int = 1,
  ) -> jax.Array:
    """Computes hidden states after the final norm of packed rows: [R, T, D].

    Args:
      params: from `init`, with or without adapters.
      tokens, positions, segments, branches: i32 [R, T], see `types.Batch`.
      groups_per_row: see `attention.make_rows`.
    """
    rows = attention.make_rows(
      positions,
      segments,
      branches,
      head_dim=self.config.head_dim,
      backend=self.config.attention,
      groups_per_row=groups_per_row,
    )
    return self._bind(params)(tokens, positions, rows)[0]

  def init_cache(self, batch_size: int, length: int) -> Cache:
    """Returns a cache without tokens, for `length` positions of each sequence.

    It is keys and values: zeros [L, B, length, num_kv_heads, head_dim] each.
    """
    c = self.config
    shape = (c.num_layers, batch_size, length, c.num_kv_heads, c.head_dim)
    zeros = jnp.zeros(shape, c.compute_dtype)
    return zeros, zeros

  def extend(
    self, params: Params, tokens: jax.Array, positions: jax.Array, cache: Cache
  ) -> tuple[jax.Array, Cache]:
    """Extends a cache by tokens.

    Args:
      params: from `init`.
      tokens: i32 [B, T].
      positions: i32 [B, T], position of each token in its sequence, below the
        cache's length; a token is stored there, and attends up to there.
      cache: from `init_cache` or an earlier call.

    Returns:
      Hidden states [B, T, D], and the extended cache.
    """
    return self._bind(params)(tokens, positions, None, cache)

  def readout(self, params: Params) -> Readout:
    """Returns the output projection of parameters, in the compute dtype."""
    config = self.config
    kernel = params["embedding"].T if config.tie_embeddings else params["head"]
    bias = params["head_bias"].astype(jnp.float32) if config.head_bias else None
    return Readout(
      kernel.astype(config.compute_dtype), bias, config.logits_soft_cap
    )
