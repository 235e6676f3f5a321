"""Layers of the decoder: norms, projections, attention and feed-forward."""

import dataclasses
import functools
import math

from flax import nnx
import jax
from jax.ad_checkpoint import checkpoint_name
import jax.numpy as jnp

from dpo_jax.models import attention, rotary
from dpo_jax.models.config import PROJECTED, ModelConfig
from dpo_jax.parallel import active_mesh

# K and V of all layers: f [L, B, C, num_kv_heads, head_dim] each.
Cache = tuple[jax.Array, jax.Array]

# Window of a layer without one: larger than any distance between positions.
NO_WINDOW = 2**30
_ACTIVATIONS = {
  "silu": jax.nn.silu,
  "gelu": functools.partial(jax.nn.gelu, approximate=False),
  "gelu_tanh": functools.partial(jax.nn.gelu, approximate=True),
  "relu": jax.nn.relu,
}


class Norm(nnx.Module):
  """Root-mean-square or layer normalisation, computed in float32."""

  def __init__(self, config: ModelConfig, shape: tuple[int, ...] = ()):
    self.epsilon = config.norm_eps
    self.offset = config.norm_offset
    shape = shape or (config.d_model,)
    self.axes = tuple(range(-len(shape), 0))
    # Initially scale + offset = 1.
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
def project(
  x: jax.Array, kernel: jax.Array, contract: int, fsdp_axis: int | None
) -> jax.Array:
  """Contracts the last axes of x with the first axes of a kernel.

  The gradient equals autodiff's, up to the order of the operands in the
  kernel's gradient. XLA:CPU transposes the first operand of a sum over tokens
  and recomputes the operations fused into it in transposed order. The
  smaller operand therefore comes first.

  Args:
    x: [..., *inputs].
    kernel: [*inputs, *outputs].
    contract: number of input axes.
    fsdp_axis: axis of the kernel that the mesh axis `fsdp` shards, or None.

  Returns:
    [..., *outputs].
  """
  axes = tuple(range(x.ndim - contract, x.ndim))
  return jax.lax.dot_general(
    x,
    active_mesh.gathered(kernel, fsdp_axis),
    ((axes, tuple(range(contract))), ((), ())),
  )


def _project_fwd(x, kernel, contract, fsdp_axis):
  return project(x, kernel, contract, fsdp_axis), (x, kernel)


def _project_bwd(contract, fsdp_axis, saved, gradient):
  x, kernel = saved
  kernel = active_mesh.gathered(kernel, fsdp_axis)
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
    transposed = jax.lax.dot_general(gradient, x, over_tokens)
    inputs = tuple(range(num_outputs, kernel.ndim))
    kernel_gradient = transposed.transpose(inputs + tuple(range(num_outputs)))
  return x_gradient, kernel_gradient


project.defvjp(_project_fwd, _project_bwd)


class Projection(nnx.Module):
  """Linear map, plus a low-rank adapter if the config asks for one."""

  def __init__(self, name: str, config: ModelConfig, *, rngs: nnx.Rngs):
    inputs, outputs = config.projection_shapes()[name]
    self.contract = len(inputs)
    self.dtype = jnp.dtype(config.compute_dtype)
    # Projections that write to the residual stream start smaller in deeper
    # models, so that its variance does not grow with the number of layers.
    writes_residual = name in ("attention_out", "down")
    std = 0.02
    if writes_residual:
      std /= math.sqrt(2 * config.num_layers)
    # Axis that `fsdp` shards, the residual stream's, of kernel, lora_a and
    # lora_b.
    self.fsdp_axes = (-1, None, -1) if writes_residual else (0, 0, None)
    kernel = std * jax.random.normal(rngs.params(), inputs + outputs)
    self.kernel = nnx.Param(kernel.astype(config.param_dtype))
    self.has_bias = config.has_bias(name)
    if self.has_bias:
      self.bias = nnx.Param(jnp.zeros(outputs, config.param_dtype))
    self.lora_scale = None
    if config.lora is not None and config.lora.has(name):
      self.lora_scale = config.lora.scale
      # Adapters are trained, so they are float32 for any dtype of the base.
      bound = 1.0 / math.sqrt(math.prod(inputs))
      shape = (*inputs, config.lora.rank)
      self.lora_a = nnx.Param(
        jax.random.uniform(rngs.params(), shape, minval=-bound, maxval=bound)
      )
      # Zero: the adapter has no effect at the start.
      self.lora_b = nnx.Param(jnp.zeros((config.lora.rank, *outputs)))

  def __call__(self, x: jax.Array) -> jax.Array:
    kernel_axis, a_axis, b_axis = self.fsdp_axes
    out = self._apply(x, self.kernel[...], self.contract, kernel_axis)
    if self.has_bias:
      out += self.bias.astype(self.dtype)
    if self.lora_scale is not None:
      low = self._apply(x, self.lora_a[...], self.contract, a_axis)
      out += self.lora_scale * self._apply(low, self.lora_b[...], 1, b_axis)
    return out

  def _apply(
    self, x: jax.Array, kernel: jax.Array, contract: int, fsdp_axis: int | None
  ) -> jax.Array:
    out = project(x, kernel.astype(self.dtype), contract, fsdp_axis)
    # Tag by name: a checkpoint policy on dots cannot see inside a custom_vjp.
    return checkpoint_name(out, PROJECTED)


@dataclasses.dataclass(frozen=True)
class SharedInputs:
  """Inputs that are the same for all layers.

  Attributes:
    positions: i32 [B, T].
    rotation: rotary embedding of queries and keys, or None.
    local_rotation: rotary embedding of local layers; None if it is `rotation`.
    rows: packed rows; None with a cache.
  """

  positions: jax.Array
  rotation: rotary.Rotation | None
  local_rotation: rotary.Rotation | None
  rows: attention.Rows | None


class Layer(nnx.Module):
  """Attention and a feed-forward network, with the norms of the family."""

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
    shared: SharedInputs,
    window: jax.Array | None,
    cache: Cache | None,
  ) -> tuple[jax.Array, Cache | None]:
    c = self.config
    read = self.attention_norm(x) if c.pre_norm else x
    written, cache = self._attend(read, shared, window, cache)
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
    shared: SharedInputs,
    window: jax.Array | None,
    cache: Cache | None,
  ) -> tuple[jax.Array, Cache | None]:
    c = self.config
    queries, keys, values = self.query(x), self.key(x), self.value(x)
    if c.qk_norm:
      queries, keys = self.query_norm(queries), self.key_norm(keys)
    rotation = shared.rotation
    if shared.local_rotation is not None:
      is_local = window < NO_WINDOW
      rotation = jax.tree.map(
        lambda local, other: jnp.where(is_local, local, other),
        shared.local_rotation,
        rotation,
      )
    if rotation is not None:
      queries = rotary.rotate(queries, rotation)
      keys = rotary.rotate(keys, rotation)
    settings = dict(scale=c.scale, soft_cap=c.attention_soft_cap)
    if cache is None:
      out = attention.attend_rows(
        queries, keys, values, shared.rows, window=window, **settings
      )
      return self.attention_out(out), None
    # A token's cache slot is its position, so prompts of different lengths
    # need no left padding. The entries that a prompt's padding wrote are
    # overwritten before any token can attend to them.
    rows = jnp.arange(x.shape[0])[:, None]
    keys = cache[0].at[rows, shared.positions].set(keys)
    values = cache[1].at[rows, shared.positions].set(values)
    slots = jnp.arange(keys.shape[1])[None]
    mask = slots[:, None] <= shared.positions[..., None]
    if window is not None:
      mask &= attention.in_window(shared.positions, slots, window)
    out = attention.attend(queries, keys, values, mask, **settings)
    return self.attention_out(out), (keys, values)

  @jax.named_scope("feed_forward")
  def _feed_forward(self, x: jax.Array) -> jax.Array:
    activate = _ACTIVATIONS[self.config.activation]
    if self.config.is_gated:
      return self.down(activate(self.gate(x)) * self.up(x))
    return self.down(activate(self.up(x)))
