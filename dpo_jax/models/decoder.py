"""One Flax decoder for GPT-2, NeoX, GPT-J, Llama, Mistral, Qwen, Gemma & co.

Families differ in the fields of `ModelConfig`, never by name. Layers are
stacked along a leading axis and scanned, so that compile time does not grow
with depth; what differs from layer to layer (a window) is scanned with them.
`Policy` splits the module once at the boundary: parameters are a nested dict
of arrays from there on, so that donation, a reference copy, checkpoints and
partition rules are operations on a tree.
"""

import dataclasses
import functools
import math
from typing import Any

from flax import nnx
import flax.struct
import jax
from jax.ad_checkpoint import checkpoint_name, checkpoint_policies
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from dpo_jax.models import attention, lora, rotary
from dpo_jax.models.config import PROJECTED, REMAT_POLICIES, ModelConfig
from dpo_jax.parallel import active_mesh

# K and V of all layers: f [L, B, C, num_kv_heads, head_dim] each.
Cache = tuple[jax.Array, jax.Array]

_ACTIVATIONS = {
  "silu": jax.nn.silu,
  "gelu": functools.partial(jax.nn.gelu, approximate=False),
  "gelu_tanh": functools.partial(jax.nn.gelu, approximate=True),
  "relu": jax.nn.relu,
}
# The window of a layer that has none.
_EVERYTHING = 2**30


class Norm(nnx.Module):
  """Root-mean-square or layer normalisation, computed in float32."""

  def __init__(self, config: ModelConfig, shape: tuple[int, ...] = ()):
    self.epsilon = config.norm_eps
    self.offset = config.norm_offset
    shape = shape or (config.d_model,)
    self.axes = tuple(range(-len(shape), 0))
    # A scale starts at what makes it one with its offset.
    ones = jnp.full(shape, 1.0 - self.offset, jnp.dtype(config.param_dtype))
    self.scale = nnx.Param(ones)
    self.is_centered = config.norm == "layer"
    if self.is_centered:
      self.bias = nnx.Param(jnp.zeros_like(ones))

  def __call__(self, x: jax.Array) -> jax.Array:
    wide = x.astype(jnp.float32)
    if self.is_centered:
      wide -= wide.mean(self.axes, keepdims=True)
    variance = jnp.mean(jnp.square(wide), self.axes, keepdims=True)
    normed = wide * jax.lax.rsqrt(variance + self.epsilon)
    normed *= self.offset + self.scale.astype(jnp.float32)
    if self.is_centered:
      normed += self.bias.astype(jnp.float32)
    return normed.astype(x.dtype)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def _project(
  x: jax.Array, kernel: jax.Array, contract: int, split: int | None
) -> jax.Array:
  """Contracts the last axes of x with the first of kernel, of which `fsdp`
  splits the axis `split`.

  The gradient is autodiff's but for the order in which the kernel's is
  multiplied: a CPU transposes the first operand of a sum over tokens, and
  computes again, out of order, whatever was fused into it. So the smaller
  one goes first.
  """
  axes = tuple(range(x.ndim - contract, x.ndim))
  return jax.lax.dot_general(
    x,
    active_mesh.gathered(kernel, split),
    ((axes, tuple(range(contract))), ((), ())),
  )


def _project_fwd(x, kernel, contract, split):
  return _project(x, kernel, contract, split), (x, kernel)


def _project_bwd(contract, split, saved, gradient):
  x, kernel = saved
  kernel = active_mesh.gathered(kernel, split)
  num_outputs = kernel.ndim - contract
  tokens = tuple(range(x.ndim - contract))
  outputs = tuple(range(gradient.ndim - num_outputs, gradient.ndim))
  x_gradient = jax.lax.dot_general(
    gradient, kernel, ((outputs, tuple(range(contract, kernel.ndim))), ((), ()))
  )
  over_tokens = ((tokens, tokens), ((), ()))
  if x.size <= gradient.size:
    kernel_gradient = jax.lax.dot_general(x, gradient, over_tokens)
  else:
    turned = jax.lax.dot_general(gradient, x, over_tokens)
    inputs = tuple(range(num_outputs, kernel.ndim))
    kernel_gradient = turned.transpose(inputs + tuple(range(num_outputs)))
  return x_gradient, kernel_gradient


_project.defvjp(_project_fwd, _project_bwd)


class Projection(nnx.Module):
  """A linear map, with an adapter beside it where the config asks for one."""

  def __init__(self, name: str, config: ModelConfig, *, rngs: nnx.Rngs):
    inputs, outputs = config.projection_shapes()[name]
    self.contract = len(inputs)
    self.dtype = jnp.dtype(config.compute_dtype)
    # The maps that write to the residual stream start smaller with depth, so
    # that its variance does not grow with the number of layers.
    is_writing = name in ("attention_out", "down")
    std = 0.02
    if is_writing:
      std /= math.sqrt(2 * config.num_layers)
    # Axes that `fsdp` splits, the stream's, of kernel, lora_a and lora_b.
    self.splits = (-1, None, -1) if is_writing else (0, 0, None)
    kernel = std * jax.random.normal(rngs.params(), inputs + outputs)
    self.kernel = nnx.Param(kernel.astype(config.param_dtype))
    self.has_bias = config.has_bias(name)
    if self.has_bias:
      self.bias = nnx.Param(jnp.zeros(outputs, config.param_dtype))
    self.lora_scale = None
    if config.lora is not None and config.lora.has(name):
      self.lora_scale = config.lora.scale
      # float32 whatever the base is: adapters are all that is trained.
      bound = 1.0 / math.sqrt(math.prod(inputs))
      shape = (*inputs, config.lora.rank)
      self.lora_a = nnx.Param(
        jax.random.uniform(rngs.params(), shape, minval=-bound, maxval=bound)
      )
      # Zero: the adapter has no effect at the start.
      self.lora_b = nnx.Param(jnp.zeros((config.lora.rank, *outputs)))

  def __call__(self, x: jax.Array) -> jax.Array:
    kernel_split, a_split, b_split = self.splits
    out = self._apply(x, self.kernel[...], self.contract, kernel_split)
    if self.has_bias:
      out += self.bias.astype(self.dtype)
    if self.lora_scale is not None:
      low = self._apply(x, self.lora_a[...], self.contract, a_split)
      out += self.lora_scale * self._apply(low, self.lora_b[...], 1, b_split)
    return out

  def _apply(
    self, x: jax.Array, kernel: jax.Array, contract: int, split: int | None
  ) -> jax.Array:
    out = _project(x, kernel.astype(self.dtype), contract, split)
    # By name: a policy of dots does not see into a gradient of our own.
    return checkpoint_name(out, PROJECTED)


@dataclasses.dataclass(frozen=True)
class Place:
  """Where tokens stand, the same for all layers.

  Attributes:
    positions: i32 [B, T].
    rotation: what queries and keys turn by, or None.
    local_rotation: the same in local layers, or None if it is the same.
    rows: packed rows, where there is no cache.
  """

  positions: jax.Array
  rotation: rotary.Rotation | None
  local_rotation: rotary.Rotation | None
  rows: attention.Rows | None


class Layer(nnx.Module):
  """Attention and a feed-forward layer, with the norms that the family has."""

  def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs):
    self.config = config
    for name in config.layer_norms():
      setattr(self, name, Norm(config))
    for name in config.projection_shapes():
      setattr(self, name, Projection(name, config, rngs=rngs))
    if config.qk_norm:
      for name, heads in (
        ("query_norm", config.num_heads),
        ("key_norm", config.num_kv_heads),
      ):
        shape = (config.head_dim,)
        if config.qk_norm == "full":
          shape = (heads, *shape)
        setattr(self, name, Norm(config, shape))

  def __call__(
    self,
    x: jax.Array,
    place: Place,
    window: jax.Array | None,
    cache: Cache | None,
  ) -> tuple[jax.Array, Cache | None]:
    c = self.config
    read = self.attention_norm(x) if c.pre_norm else x
    written, cache = self._attend(read, place, window, cache)
    if c.post_norm:
      written = self.attention_post_norm(written)
    if not c.is_parallel:
      x = x + written
    if c.pre_norm and not c.is_norm_shared:
      read = self.mlp_norm(x)
    elif not c.is_norm_shared:
      read = x
    fed = self._feed_forward(read)
    if c.post_norm:
      fed = self.mlp_post_norm(fed)
    return (x + written + fed if c.is_parallel else x + fed), cache

  @jax.named_scope("attention")
  def _attend(
    self,
    x: jax.Array,
    place: Place,
    window: jax.Array | None,
    cache: Cache | None,
  ) -> tuple[jax.Array, Cache | None]:
    c = self.config
    queries, keys, values = self.query(x), self.key(x), self.value(x)
    if c.qk_norm:
      queries, keys = self.query_norm(queries), self.key_norm(keys)
    by = place.rotation
    if place.local_rotation is not None:
      is_local = window < _EVERYTHING
      by = jax.tree.map(
        lambda local, whole: jnp.where(is_local, local, whole),
        place.local_rotation,
        by,
      )
    if by is not None:
      queries, keys = rotary.rotate(queries, by), rotary.rotate(keys, by)
    knobs = dict(scale=c.scale, soft_cap=c.attention_soft_cap)
    if cache is None:
      out = attention.attend_rows(
        queries, keys, values, place.rows, window=window, **knobs
      )
      return self.attention_out(out), None
    # A sequence's cache slot is its position: ragged prompts need no left
    # padding, and what a padded prompt wrote is overwritten before any later
    # token may look at it.
    rows = jnp.arange(x.shape[0])[:, None]
    keys = cache[0].at[rows, place.positions].set(keys)
    values = cache[1].at[rows, place.positions].set(values)
    slots = jnp.arange(keys.shape[1])[None]
    mask = slots[:, None] <= place.positions[..., None]
    if window is not None:
      mask &= attention.in_window(place.positions, slots, window)
    out = attention.attend(queries, keys, values, mask, **knobs)
    return self.attention_out(out), (keys, values)

  @jax.named_scope("feed_forward")
  def _feed_forward(self, x: jax.Array) -> jax.Array:
    activate = _ACTIVATIONS[self.config.activation]
    if self.config.is_gated:
      return self.down(activate(self.gate(x)) * self.up(x))
    return self.down(activate(self.up(x)))


class Decoder(nnx.Module):
  """Token ids to hidden states."""

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
    dtype = jnp.dtype(config.compute_dtype)
    # Gather, then cast: the other way round copies the whole embedding.
    x = self.embedding[...][tokens].astype(dtype)
    if config.is_embedding_scaled:
      # Rounded as checkpoints of the family were trained.
      x *= jnp.asarray(math.sqrt(config.d_model), dtype)
    if config.has_learned_positions:
      x += self.position_embedding[...][positions].astype(dtype)
    graph, stacked = nnx.split(self.layers)
    place = Place(positions, *rotary.rotations(config, positions), rows)
    windows = None
    if config.local_layers:
      local = jnp.array(config.local_layers)
      windows = jnp.where(local, config.window, _EVERYTHING)

    def body(x, scanned):
      params, window, layer_cache = scanned
      layer = nnx.merge(graph, params)
      return layer(keep_rows_apart(x), place, window, layer_cache)

    kept = REMAT_POLICIES[config.remat]
    if kept is not None:
      policy = checkpoint_policies.save_only_these_names(*kept)
      body = jax.checkpoint(body, policy=policy, prevent_cse=False)
    x, cache = jax.lax.scan(body, x, (stacked, windows, cache))
    return self.final_norm(x), cache


def keep_rows_apart(x: jax.Array) -> jax.Array:
  """Pins rows and tokens of activations [R, T, D] to the mesh's axes.

  Without it the partitioner may follow a sharded kernel instead, and gather
  the batch. Outside a mesh, and under pmap, there is nothing to pin.
  """
  sizes = active_mesh.free_axes()
  axes = tuple(name for name in active_mesh.ROW_AXES if name in sizes)
  if not axes:
    return x
  # A token that is sampled has no T to split.
  is_split = "context" in sizes and x.shape[1] % sizes["context"] == 0
  context = "context" if is_split else None
  return jax.lax.with_sharding_constraint(x, PartitionSpec(axes, context))


@flax.struct.dataclass
class Readout:
  """From hidden states to logits.

  Attributes:
    kernel: [D, V] in the compute dtype.
    bias: f32 [V], or None.
    soft_cap: see ModelConfig.logits_soft_cap.
  """

  kernel: jax.Array
  bias: jax.Array | None = None
  soft_cap: float | None = flax.struct.field(pytree_node=False, default=None)

  def logits(self, hidden: jax.Array) -> jax.Array:
    """[..., D] -> f32 [..., V]."""
    logits = jnp.einsum(
      "...d,dv->...v",
      hidden,
      self.kernel,
      preferred_element_type=jnp.float32,
    )
    return self.finish(logits)

  def finish(self, products: jax.Array) -> jax.Array:
    """Adds the bias to products with the kernel, and caps them."""
    logits = products
    if self.bias is not None:
      logits += self.bias
    if self.soft_cap is not None:
      logits = self.soft_cap * jnp.tanh(logits / self.soft_cap)
    return logits


@dataclasses.dataclass(frozen=True)
class Policy:
  """The decoder as functions of a parameter tree.

  A tree without adapters is the policy with its adapters off.
  """

  config: ModelConfig

  @functools.cached_property
  def _graph_and_state(self) -> tuple[Any, Any]:
    return nnx.split(
      nnx.eval_shape(lambda: Decoder(self.config, rngs=nnx.Rngs(0)))
    )

  def abstract_params(self) -> Any:
    """Nested dict of ShapeDtypeStructs.

    Where a part is frozen, what is trained is float32 whatever `param_dtype`
    says: a step is far smaller than what bfloat16 tells apart.
    """

    def with_dtype(path, x):
      return jax.ShapeDtypeStruct(x.shape, self._dtype(path, x))

    tree = nnx.to_pure_dict(self._graph_and_state[1])
    return jax.tree_util.tree_map_with_path(with_dtype, tree)

  def init(self, key: jax.Array) -> Any:
    """Random parameters, a nested dict."""
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
    """The same decoder with its adapters off."""
    return Policy(dataclasses.replace(self.config, lora=None))

  def _bind(self, params: Any) -> Decoder:
    if self.config.lora is not None and not lora.has_adapters(params):
      return self.without_adapters._bind(params)
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
    *,
    groups_per_row: int = 1,
  ) -> jax.Array:
    """Hidden states of packed rows: i32 [R, T] each -> [R, T, D]; see
    `attention.make_rows` for groups_per_row."""
    rows = attention.make_rows(
      positions,
      segments,
      branches,
      backend=self.config.attention,
      groups_per_row=groups_per_row,
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

  def readout(self, params: Any) -> Readout:
    """What turns hidden states into logits."""
    config = self.config
    kernel = params["embedding"].T if config.tie_embeddings else params["head"]
    bias = params["head_bias"].astype(jnp.float32) if config.head_bias else None
    return Readout(
      kernel.astype(config.compute_dtype), bias, config.logits_soft_cap
    )
