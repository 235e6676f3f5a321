"""One Flax decoder for the Llama family.

Layers are stacked along a leading axis and scanned, so that compile time does
not grow with depth. `Policy` splits the module once at the boundary:
parameters are a nested dict of arrays from there on, so that donation, a
reference copy, checkpoints and partition rules are operations on a tree.
"""

import dataclasses
import functools
from typing import Any

from flax import nnx
import jax
from jax.ad_checkpoint import checkpoint_policies
import jax.numpy as jnp
from jax.sharding import AxisType, PartitionSpec

from dpo_jax.models import attention
from dpo_jax.models.config import ModelConfig

# K and V of all layers: f [L, B, C, num_kv_heads, head_dim] each.
Cache = tuple[jax.Array, jax.Array]


class RMSNorm(nnx.Module):
  """Root-mean-square normalisation, computed in float32."""

  def __init__(self, config: ModelConfig):
    self.epsilon = config.norm_eps
    self.scale = nnx.Param(
      jnp.ones((config.d_model,), jnp.dtype(config.param_dtype))
    )

  def __call__(self, x: jax.Array) -> jax.Array:
    wide = x.astype(jnp.float32)
    variance = jnp.mean(jnp.square(wide), -1, keepdims=True)
    normed = wide * jax.lax.rsqrt(variance + self.epsilon)
    return (normed * self.scale.astype(jnp.float32)).astype(x.dtype)


class Projection(nnx.Module):
  """A bias-free linear map over the leading `contract` axes of its kernel."""

  def __init__(
    self,
    shape: tuple[int, ...],
    *,
    contract: int,
    std: float,
    config: ModelConfig,
    rngs: nnx.Rngs,
  ):
    self.contract = contract
    self.dtype = jnp.dtype(config.compute_dtype)
    kernel = std * jax.random.normal(rngs.params(), shape)
    self.kernel = nnx.Param(kernel.astype(config.param_dtype))

  def __call__(self, x: jax.Array) -> jax.Array:
    return jax.lax.dot_general(
      x,
      self.kernel.astype(self.dtype),
      (
        (
          tuple(range(x.ndim - self.contract, x.ndim)),
          tuple(range(self.contract)),
        ),
        ((), ()),
      ),
    )


class Layer(nnx.Module):
  """Attention and a gated feed-forward layer, each behind an RMSNorm."""

  def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs):
    c = config
    project = functools.partial(Projection, config=c, rngs=rngs)
    # The maps that write to the residual stream start smaller with depth, so
    # that its variance does not grow with the number of layers.
    std, out_std = 0.02, 0.02 / (2 * c.num_layers) ** 0.5
    queries = (c.d_model, c.num_heads, c.head_dim)
    keys = (c.d_model, c.num_kv_heads, c.head_dim)
    self.rope_theta = c.rope_theta
    self.scale = c.head_dim**-0.5
    self.attention_norm = RMSNorm(c)
    self.query = project(queries, contract=1, std=std)
    self.key = project(keys, contract=1, std=std)
    self.value = project(keys, contract=1, std=std)
    self.attention_out = project(
      (c.num_heads, c.head_dim, c.d_model), contract=2, std=out_std
    )
    self.mlp_norm = RMSNorm(c)
    self.gate = project((c.d_model, c.d_ff), contract=1, std=std)
    self.up = project((c.d_model, c.d_ff), contract=1, std=std)
    self.down = project((c.d_ff, c.d_model), contract=1, std=out_std)

  def __call__(
    self,
    x: jax.Array,
    positions: jax.Array,
    rows: attention.Rows | None,
    cache: Cache | None,
  ) -> tuple[jax.Array, Cache | None]:
    normed = self.attention_norm(x)
    rotate = functools.partial(
      attention.rotate, positions=positions, theta=self.rope_theta
    )
    queries = rotate(self.query(normed))
    keys, values = rotate(self.key(normed)), self.value(normed)
    if cache is not None:
      # A sequence's cache slot is its position: ragged prompts need no left
      # padding, and what a padded prompt wrote is overwritten before any
      # later token may look at it.
      rows = jnp.arange(x.shape[0])[:, None]
      keys = cache[0].at[rows, positions].set(keys)
      values = cache[1].at[rows, positions].set(values)
      cache = (keys, values)
      mask = jnp.arange(keys.shape[1]) <= positions[..., None]
      attended = attention.attend(
        queries, keys, values, mask, scale=self.scale, soft_cap=None
      )
    else:
      attended = attention.attend_rows(
        queries,
        keys,
        values,
        rows,
        window=None,
        scale=self.scale,
        soft_cap=None,
      )
    x = x + self.attention_out(attended)
    normed = self.mlp_norm(x)
    return x + self.down(
      jax.nn.silu(self.gate(normed)) * self.up(normed)
    ), cache


class Decoder(nnx.Module):
  """Token ids to hidden states."""

  def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs):
    self.config = config
    shape = (config.vocab_size, config.d_model)
    embedding = 0.02 * jax.random.normal(rngs.params(), shape)
    self.embedding = nnx.Param(embedding.astype(config.param_dtype))

    @nnx.split_rngs(splits=config.num_layers)
    @nnx.vmap(in_axes=0, out_axes=0)
    def stack(rngs: nnx.Rngs) -> Layer:
      return Layer(config, rngs=rngs)

    self.layers = stack(rngs)
    self.final_norm = RMSNorm(config)
    if not config.tie_embeddings:
      head = 0.02 * jax.random.normal(rngs.params(), shape[::-1])
      self.head = nnx.Param(head.astype(config.param_dtype))
    if config.value_head:
      # Zero: every response starts with the same value.
      zeros = jnp.zeros((config.d_model,), config.param_dtype)
      self.value_head = nnx.Param(zeros)

  def __call__(
    self,
    tokens: jax.Array,
    positions: jax.Array,
    rows: attention.Rows | None = None,
    cache: Cache | None = None,
  ) -> tuple[jax.Array, Cache | None]:
    """Hidden states after the final norm.

    Args:
      tokens: i32 [B, T].
      positions: i32 [B, T].
      rows: the same tokens as packed rows, where there is no cache.
      cache: keys and values of earlier tokens, or None.

    Returns:
      [B, T, D] in the compute dtype, and the cache with these tokens in it.
    """
    config = self.config
    # Gather, then cast: the other way round copies the whole embedding.
    x = self.embedding[...][tokens].astype(config.compute_dtype)
    graph, stacked = nnx.split(self.layers)

    def body(x, scanned):
      params, layer_cache = scanned
      layer = nnx.merge(graph, params)
      x, layer_cache = layer(keep_rows_apart(x), positions, rows, layer_cache)
      return x, layer_cache

    if config.remat != "none":
      policy = {
        "full": checkpoint_policies.nothing_saveable,
        "dots": checkpoint_policies.dots_with_no_batch_dims_saveable,
      }[config.remat]
      body = jax.checkpoint(body, policy=policy, prevent_cse=False)
    x, cache = jax.lax.scan(body, x, (stacked, cache))
    return self.final_norm(x), cache


def keep_rows_apart(x: jax.Array) -> jax.Array:
  """Pins the leading axis of activations to the mesh's batch axes.

  Without it the partitioner may follow a sharded kernel instead, and gather
  the batch. Outside a mesh, and under pmap, there is nothing to pin.
  """
  mesh = jax.sharding.get_abstract_mesh()
  axes = tuple(
    name
    for name, kind in zip(mesh.axis_names, mesh.axis_types, strict=True)
    if name in ("data", "fsdp") and kind is AxisType.Auto
  )
  if not axes:
    return x
  return jax.lax.with_sharding_constraint(x, PartitionSpec(axes))


@dataclasses.dataclass(frozen=True)
class Policy:
  """The decoder as functions of a parameter tree."""

  config: ModelConfig

  @functools.cached_property
  def _graph_and_state(self) -> tuple[Any, Any]:
    return nnx.split(
      nnx.eval_shape(lambda: Decoder(self.config, rngs=nnx.Rngs(0)))
    )

  def abstract_params(self) -> Any:
    """Nested dict of ShapeDtypeStructs."""
    return nnx.to_pure_dict(self._graph_and_state[1])

  def init(self, key: jax.Array) -> Any:
    """Random parameters, a nested dict."""
    decoder = Decoder(self.config, rngs=nnx.Rngs(params=key))
    return nnx.to_pure_dict(nnx.state(decoder, nnx.Param))

  def _bind(self, params: Any) -> Decoder:
    graph, abstract = self._graph_and_state
    state = jax.tree.map(lambda x: x, abstract)
    nnx.replace_by_pure_dict(state, params)
    return nnx.merge(graph, state)

  def hidden_states(
    self,
    params: Any,
    tokens: jax.Array,
    positions: jax.Array,
    segments: jax.Array,
    branches: jax.Array,
  ) -> jax.Array:
    """Hidden states of packed rows: i32 [R, T] each -> [R, T, D]."""
    rows = attention.make_rows(
      positions, segments, branches, backend=self.config.attention
    )
    return self._bind(params)(tokens, positions, rows)[0]

  def init_cache(self, batch_size: int, length: int) -> Cache:
    """An empty cache for `length` positions."""
    c = self.config
    shape = (c.num_layers, batch_size, length, c.num_kv_heads, c.head_dim)
    zeros = jnp.zeros(shape, c.compute_dtype)
    return zeros, zeros

  def extend(
    self, params: Any, tokens: jax.Array, positions: jax.Array, cache: Cache
  ) -> tuple[jax.Array, Cache]:
    """Reads tokens on top of a cache.

    Args:
      params: from `init`.
      tokens: i32 [B, T].
      positions: i32 [B, T], where each token stands in its sequence; a token
        sees the cache up to its own position.
      cache: from `init_cache` or an earlier call.

    Returns:
      Hidden states [B, T, D], and the new cache.
    """
    return self._bind(params)(tokens, positions, None, cache)

  def unembedding(self, params: Any) -> jax.Array:
    """The output projection, [D, V], in the compute dtype."""
    if self.config.tie_embeddings:
      kernel = params["embedding"].T
    else:
      kernel = params["head"]
    return kernel.astype(self.config.compute_dtype)
