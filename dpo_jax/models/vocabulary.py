"""Figures of a softmax over the vocabulary, without the softmax in memory.

A chunk of positions meets the vocabulary a block at a time. The forward pass
keeps running sums, the backward pass computes a block's logits once more and
adds to that block's columns of the gradient in place: neither an array of
positions x vocabulary nor one of chunk x vocabulary exists. Blocks of the
vocabulary rather than of positions alone, since every chunk of positions
reads and writes all of the unembedding's gradient.
"""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from dpo_jax.models import partition
from dpo_jax.models.decoder import Readout

# Logits that exist at a time, over the rows of a device: 16 MiB of float32,
# about what a core's share of the cache holds.
BLOCK_LOGITS = 4 * 2**20
# Of a block, whatever it takes: whole lanes, and what keeps a matmul busy.
LEAST_COLUMNS = 256
_ROW_AXES = ("data", "fsdp")


def figures(
  hidden: jax.Array,
  readout: Readout,
  targets: jax.Array,
  reference: tuple[jax.Array, Readout] | None,
  is_used: jax.Array,
  wanted: frozenset[str],
) -> dict[str, jax.Array]:
  """What `logps.chunked_token_figures` gives, of chunks.

  Args:
    hidden: [C, R, S, D] states that predict, C chunks one after the other.
    readout: to V logits; V may be split over the mesh axis `tensor`.
    targets: i32 [C, R, S].
    reference: the reference's hidden and readout, without a gradient, or
      None.
    is_used: bool [C], chunks that are worth computing; the others give zeros.
    wanted: of "logps", "ref_logps", "alignment" and "kl".

  Returns:
    Those figures, f32 [C, R, S] each, nats. Gradients flow through "logps"
    and "kl" into hidden and readout.
  """
  logps, kl, others = _figures(
    hidden, readout, targets, reference, is_used, wanted
  )
  out = {"logps": logps, "kl": kl, **others}
  return {name: out[name] for name in wanted}


def is_head_split() -> bool:
  """Whether devices hold parts of the head that each of them needs whole.

  Every chunk of positions then gathers all of it, and scatters its gradient.
  """
  return partition.free_axes().get("fsdp", 1) > 1


def _num_data_shards(num_rows: int) -> int:
  size = partition.free_axes().get("data", 1)
  return size if num_rows % size == 0 else 1


def _by_data(x: jax.Array, *axes: Any) -> jax.Array:
  """[R, S, ...] -> [N, R / N, S, ...], a part for each of N data shards."""
  parts = x.reshape(_num_data_shards(len(x)), -1, *x.shape[1:])
  return _pin(parts, "data", "fsdp", None, *axes)


def _pin(x: jax.Array, *axes: Any) -> jax.Array:
  """Lays x over those axes of the mesh that there are."""
  sizes = partition.free_axes()
  if math.prod(sizes.values()) == 1:
    return x
  spec = []
  for size, axis in zip(x.shape, axes, strict=True):
    names = (axis,) if isinstance(axis, str) else axis or ()
    names = tuple(name for name in names if name in sizes)
    divides = size % math.prod(sizes[name] for name in names) == 0
    spec.append(names if names and divides else None)
  return jax.lax.with_sharding_constraint(x, PartitionSpec(*spec))


class _Columns:
  """The vocabulary in blocks, each with a part of every device's share.

  [D, V] is seen as [D, P, V / P], P devices on the axis `tensor`; a block is
  `size` columns of all P parts. The last block of a part may be smaller.
  """

  def __init__(self, readout: Readout, num_positions: int):
    self.depth, self.vocab_size = readout.kernel.shape
    parts = partition.free_axes().get("tensor", 1)
    self.parts = parts if self.vocab_size % parts == 0 else 1
    self.width = self.vocab_size // self.parts
    shards = math.prod(
      size for name, size in partition.free_axes().items() if name in _ROW_AXES
    )
    size = BLOCK_LOGITS * shards // max(num_positions, 1)
    size = max(size // LEAST_COLUMNS, 1) * LEAST_COLUMNS
    num_blocks = -(-self.width // size)
    # Blocks of equal size, where that wastes nothing.
    even = -(-self.width // num_blocks)
    self.size = even if even * num_blocks == self.width else size
    self.size = min(self.size, self.width)

  def split(self, readout: Readout) -> Readout:
    """Kernel [D, P, V / P], bias [P, V / P]."""
    shape = (self.parts, self.width)
    bias = readout.bias
    return readout.replace(
      kernel=readout.kernel.reshape(self.depth, *shape),
      bias=None if bias is None else bias.reshape(shape),
    )

  def block(self, readout: Readout, start: Any, size: int) -> Readout:
    """`size` columns of each part, on every device that holds rows."""
    cut = functools.partial(
      jax.lax.dynamic_slice_in_dim, start_index=start, slice_size=size, axis=-1
    )
    bias = readout.bias
    return readout.replace(
      kernel=_pin(cut(readout.kernel), None, "tensor", None),
      bias=None if bias is None else _pin(cut(bias), "tensor", None),
    )

  def ids(self, start: Any, size: int) -> jax.Array:
    """i32 [P, size], which tokens a block's columns are."""
    parts = jnp.arange(self.parts, dtype=jnp.int32)[:, None] * self.width
    return parts + start + jnp.arange(size, dtype=jnp.int32)

  def scan(self, body: Any, carry: Any) -> Any:
    """carry = body(carry, start, size) over all blocks."""
    num_blocks, rest = divmod(self.width, self.size)
    carry = jax.lax.fori_loop(
      0, num_blocks, lambda i, c: body(c, i * self.size, self.size), carry
    )
    if rest:
      carry = body(carry, self.width - rest, rest)
    return carry


def _logits(hidden: jax.Array, block: Readout) -> jax.Array:
  """[R, S, D] and a block -> f32 [R, S, P, size]."""
  logits = jnp.einsum(
    "rsd,dpv->rspv", hidden, block.kernel, preferred_element_type=jnp.float32
  )
  logits = block.finish(logits)
  return _pin(logits, _ROW_AXES, None, "tensor", None)


# Sums of exponentials: the peak that they are above, and its power.
_PEAKS = {
  "sum": ("peak", 1),
  "squares": ("peak", 2),
  "ref_sum": ("ref_peak", 1),
  "gap": ("ref_peak", 1),
}


def _above(
  sums: dict[str, jax.Array], peaks: dict[str, jax.Array]
) -> dict[str, jax.Array]:
  """Sums of exponentials above their own peaks, as sums above `peaks`."""
  out = {**sums, **peaks}
  for name in sums.keys() & _PEAKS.keys():
    peak, power = _PEAKS[name]
    out[name] = sums[name] * jnp.exp(power * (sums[peak] - peaks[peak]))
  return out


def _chunk_figures(hidden, readout, targets, reference, wanted):
  """f32 [R, S] each: logps, kl, the others, and the log-sum-exps."""
  columns = _Columns(readout, targets.size)
  readout = columns.split(readout)
  with_alignment = "alignment" in wanted
  if reference is not None:
    ref_hidden, ref_readout = reference[0], columns.split(reference[1])

  def body(carry, start, size):
    is_target = columns.ids(start, size) == targets[..., None, None]

    def pick(logits):
      return jnp.where(is_target, logits, 0.0).sum(-1)

    logits = _logits(hidden, columns.block(readout, start, size))
    peaks = {"peak": jnp.maximum(carry["peak"], logits.max(-1))}
    if reference is not None:
      ref = _logits(ref_hidden, columns.block(ref_readout, start, size))
      peaks["ref_peak"] = jnp.maximum(carry["ref_peak"], ref.max(-1))
    new = _above(carry, peaks)
    new["target"] += pick(logits)
    weights = jnp.exp(logits - peaks["peak"][..., None])
    new["sum"] += weights.sum(-1)
    if with_alignment:
      new["squares"] += jnp.square(weights).sum(-1)
    if reference is not None:
      new["ref_target"] += pick(ref)
      weights = jnp.exp(ref - peaks["ref_peak"][..., None])
      new["ref_sum"] += weights.sum(-1)
      if "kl" in wanted:
        new["gap"] += (weights * (ref - logits)).sum(-1)
    return new

  names = ["peak", "target", "sum"]
  names += ["squares"] * with_alignment
  if reference is not None:
    names += ["ref_peak", "ref_target", "ref_sum", "gap"]
  # [R, S, P]: every part sums its own, so that devices that hold parts talk
  # once a chunk and not once a block.
  zeros = jnp.zeros((*targets.shape, columns.parts), jnp.float32)
  zeros = _pin(zeros, _ROW_AXES, None, "tensor")
  sums = columns.scan(
    body,
    {name: zeros - jnp.inf if "peak" in name else zeros for name in names},
  )
  peaks = {name: sums[name].max(-1) for name in names if "peak" in name}
  sums = _above(sums, {name: x[..., None] for name, x in peaks.items()})
  sums = {name: x.sum(-1) for name, x in sums.items()} | peaks
  lse = sums["peak"] + jnp.log(sums["sum"])
  logps = sums["target"] - lse
  kl = ref_lse = jnp.zeros_like(lse)
  others = {}
  if with_alignment:
    collision = 2 * sums["peak"] + jnp.log(sums["squares"]) - 2 * lse
    others["alignment"] = logps - collision
  if reference is not None:
    ref_lse = sums["ref_peak"] + jnp.log(sums["ref_sum"])
    others["ref_logps"] = sums["ref_target"] - ref_lse
    if "kl" in wanted:
      kl = sums["gap"] / sums["ref_sum"] - ref_lse + lse
  return (logps, kl, others), (lse, ref_lse)


def _forward(hidden, readout, targets, reference, is_used, wanted):
  ref_hidden, ref_readout = reference or (None, None)

  def compute(chunk, chunk_targets, ref_chunk):
    ref = None if ref_chunk is None else (ref_chunk, ref_readout)
    return _chunk_figures(chunk, readout, chunk_targets, ref, wanted)

  def one_chunk(scanned):
    used, *chunk = scanned
    shapes = jax.eval_shape(compute, *chunk)
    return jax.lax.cond(
      used,
      compute,
      lambda *_: jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes),
      *chunk,
    )

  return jax.lax.map(one_chunk, (is_used, hidden, targets, ref_hidden))


@functools.partial(jax.custom_vjp, nondiff_argnums=(5,))
def _figures(hidden, readout, targets, reference, is_used, wanted):
  return _forward(hidden, readout, targets, reference, is_used, wanted)[0]


def _figures_fwd(hidden, readout, targets, reference, is_used, wanted):
  out, sums = _forward(hidden, readout, targets, reference, is_used, wanted)
  return out, (hidden, readout, targets, reference, is_used, sums)


def _figures_bwd(wanted, saved, gradients):
  hidden, readout, targets, reference, is_used, (lse, ref_lse) = saved
  logps_gradient, kl_gradient, _ = gradients
  columns = _Columns(readout, targets[0].size)
  split = columns.split(readout)
  with_kl = "kl" in wanted
  ref_hidden = None
  if with_kl:
    ref_hidden, ref_readout = reference[0], columns.split(reference[1])

  def compute(readout_gradient, scanned):
    chunk, its_targets, its_lse, pull, ref_chunk, its_ref_lse, kl_pull = scanned

    def body(carry, start, size):
      readout_gradient, by_part = carry
      block = columns.block(split, start, size)
      logits = _logits(chunk, block)
      probs = jnp.exp(logits - its_lse[..., None, None])
      is_target = columns.ids(start, size) == its_targets[..., None, None]
      slope = jnp.where(is_target, 1.0 - probs, -probs) * pull[..., None, None]
      if with_kl:
        ref = _logits(ref_chunk, columns.block(ref_readout, start, size))
        ref_probs = jnp.exp(ref - its_ref_lse[..., None, None])
        slope += (probs - ref_probs) * kl_pull[..., None, None]
      if block.soft_cap is not None:
        slope *= 1.0 - jnp.square(logits / block.soft_cap)
      slopes = _by_data(slope, "tensor", None)
      bias_added = slopes.sum((1, 2))
      slope = slope.astype(chunk.dtype)
      product = functools.partial(
        jnp.einsum, preferred_element_type=jnp.float32
      )
      by_part += product("rspv,dpv->prsd", slope, block.kernel)
      added = product(
        "nrsd,nrspv->ndpv", _by_data(chunk, None), slopes.astype(chunk.dtype)
      )
      added = _pin(added, "data", "fsdp", "tensor", None)
      kernel, bias = readout_gradient
      kernel = _add_columns(kernel, added, start)
      bias = None if bias is None else _add_columns(bias, bias_added, start)
      return (kernel, bias), by_part

    by_part = jnp.zeros((columns.parts, *chunk.shape), jnp.float32)
    by_part = _pin(by_part, "tensor", _ROW_AXES, None, None)
    readout_gradient, by_part = columns.scan(body, (readout_gradient, by_part))
    return readout_gradient, by_part.sum(0).astype(chunk.dtype)

  def one_chunk(gradient, scanned):
    used, *scanned = scanned
    return jax.lax.cond(
      used,
      compute,
      lambda gradient, scanned: (gradient, jnp.zeros_like(scanned[0])),
      gradient,
      scanned,
    )

  # A sum for each shard of `data`, so that they meet once a step and not once
  # a chunk.
  def zeros(x, *axes):
    shape = (_num_data_shards(targets.shape[1]), *x.shape)
    return _pin(jnp.zeros(shape, jnp.float32), "data", *axes)

  empty = (
    zeros(split.kernel, "fsdp", "tensor", None),
    None if split.bias is None else zeros(split.bias, "tensor", None),
  )
  (kernel, bias), hidden_gradient = jax.lax.scan(
    one_chunk,
    empty,
    (
      is_used,
      hidden,
      targets,
      lse,
      logps_gradient,
      ref_hidden,
      ref_lse,
      kl_gradient,
    ),
  )
  gradient = jax.tree.map(
    lambda total, x: total.sum(0).reshape(x.shape).astype(x.dtype),
    readout.replace(kernel=kernel, bias=bias),
    readout,
  )
  return hidden_gradient, gradient, None, None, None


def _add_columns(total: jax.Array, added: jax.Array, start: Any) -> jax.Array:
  size = added.shape[-1]
  before = jax.lax.dynamic_slice_in_dim(total, start, size, total.ndim - 1)
  return jax.lax.dynamic_update_slice_in_dim(
    total, before + added, start, total.ndim - 1
  )


_figures.defvjp(_figures_fwd, _figures_bwd)
