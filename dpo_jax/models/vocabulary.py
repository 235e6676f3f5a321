"""Figures of a softmax over the vocabulary, without the softmax in memory.

A block of the vocabulary meets the positions a chunk at a time. The forward
pass keeps running sums of every position, the backward pass computes the
logits once more and sums the block's columns of the gradient: neither an
array of positions x vocabulary nor one of chunk x vocabulary exists. Blocks
are the outer loop, so that each is gathered from the devices that hold it
once, and its gradient is summed over devices once.
"""

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from dpo_jax.models import partition
from dpo_jax.models.decoder import Readout
from dpo_jax.models.partition import ROW_AXES

# Of a block, whatever it takes: whole lanes, and what keeps a matmul busy.
LEAST_COLUMNS = 256


@dataclasses.dataclass(frozen=True)
class Sizes:
  """Of the loops, on one device.

  Attributes:
    positions: of a chunk. The block's gradient is read and written once a
      chunk, which the chunk's work must outweigh; what is behind the last
      scored position fills the last chunk up.
    logits: that exist at a time.
  """

  positions: int
  logits: int


# 4 MiB of float32, about what a core's share of the cache holds.
CPU = Sizes(positions=256, logits=2**20)
ACCELERATOR = Sizes(positions=2048, logits=4 * 2**20)


def _sizes() -> Sizes:
  return CPU if partition.platform() == "cpu" else ACCELERATOR


def chunk_size(num_rows: int, length: int) -> int:
  """Positions of a row that go together, for rows of `length` positions."""
  num_rows //= partition.num_row_shards(num_rows)
  return min(-(-_sizes().positions // num_rows), length)


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
  return _figures(hidden, readout, targets, reference, is_used, wanted)


def _by_shard(x: jax.Array, *axes: Any) -> jax.Array:
  """[R, S, ...] -> [N, R / N, S, ...], a part for each of N row shards."""
  parts = x.reshape(partition.num_row_shards(len(x)), -1, *x.shape[1:])
  return _pin(parts, ROW_AXES, None, None, *axes)


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
    """For so many positions of a chunk on a device."""
    self.depth, self.vocab_size = readout.kernel.shape
    parts = partition.free_axes().get("tensor", 1)
    self.parts = parts if self.vocab_size % parts == 0 else 1
    self.width = self.vocab_size // self.parts
    size = _sizes().logits // max(num_positions, 1)
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
    # Cut first: else all of the kernel is gathered for every block.
    kernel = _pin(cut(readout.kernel), "fsdp", "tensor", None)
    return readout.replace(
      kernel=_pin(kernel, None, "tensor", None),
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
  return _pin(logits, ROW_AXES, None, "tensor", None)


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


def _columns(readout: Readout, targets: jax.Array) -> _Columns:
  _, num_rows, length = targets.shape
  return _Columns(
    readout, num_rows * length // partition.num_row_shards(num_rows)
  )


def _add_block(chunk, sums, ids, block, ref_block):
  """Sums of a chunk, f32 [R, S, P] each, with a block of the vocabulary."""
  hidden, targets, ref_hidden = chunk
  is_target = ids == targets[..., None, None]

  def pick(logits):
    return jnp.where(is_target, logits, 0.0).sum(-1)

  logits = _logits(hidden, block)
  peaks = {"peak": jnp.maximum(sums["peak"], logits.max(-1))}
  if ref_block is not None:
    ref = _logits(ref_hidden, ref_block)
    peaks["ref_peak"] = jnp.maximum(sums["ref_peak"], ref.max(-1))
  new = _above(sums, peaks)
  new["target"] += pick(logits)
  weights = jnp.exp(logits - peaks["peak"][..., None])
  new["sum"] += weights.sum(-1)
  if "squares" in sums:
    new["squares"] += jnp.square(weights).sum(-1)
  if ref_block is not None:
    new["ref_target"] += pick(ref)
    weights = jnp.exp(ref - peaks["ref_peak"][..., None])
    new["ref_sum"] += weights.sum(-1)
  if "gap" in sums:
    new["gap"] += (weights * (ref - logits)).sum(-1)
  return new


def _forward(hidden, readout, targets, reference, is_used, wanted):
  """f32 [C, R, S] each: logps, kl, the others, and the log-sum-exps."""
  columns = _columns(readout, targets)
  split = columns.split(readout)
  ref_hidden, ref_readout = reference or (None, None)
  names = ["peak", "target", "sum"] + ["squares"] * ("alignment" in wanted)
  if reference is not None:
    ref_readout = columns.split(ref_readout)
    names += ["ref_peak", "ref_target", "ref_sum"] + ["gap"] * ("kl" in wanted)

  def with_block(sums, start, size):
    blocks = [
      None if x is None else columns.block(x, start, size)
      for x in (split, ref_readout)
    ]
    ids = columns.ids(start, size)

    def with_chunk(_, scanned):
      used, *chunk_and_sums = scanned
      return None, jax.lax.cond(
        used,
        lambda chunk, sums: _add_block(chunk, sums, ids, *blocks),
        lambda _, sums: sums,
        *chunk_and_sums,
      )

    chunks = (hidden, targets, ref_hidden)
    return jax.lax.scan(with_chunk, None, (is_used, chunks, sums))[1]

  # [C, R, S, P]: every part sums its own, so that devices that hold parts
  # talk once and not once a block.
  zeros = jnp.zeros((*targets.shape, columns.parts), jnp.float32)
  zeros = _pin(zeros, None, ROW_AXES, None, "tensor")
  sums = columns.scan(
    with_block,
    {name: zeros - jnp.inf if "peak" in name else zeros for name in names},
  )
  peaks = {name: sums[name].max(-1) for name in names if "peak" in name}
  sums = _above(sums, {name: x[..., None] for name, x in peaks.items()})
  sums = {name: x.sum(-1) for name, x in sums.items()} | peaks
  # What nobody computed is finite, and given as 0.
  used = is_used[:, None, None]
  sums = {name: jnp.where(used, x, 1.0) for name, x in sums.items()}
  lse = sums["peak"] + jnp.log(sums["sum"])
  out = {"logps": sums["target"] - lse}
  if "alignment" in wanted:
    collision = 2 * sums["peak"] + jnp.log(sums["squares"]) - 2 * lse
    out["alignment"] = out["logps"] - collision
  ref_lse = None
  if reference is not None:
    ref_lse = sums["ref_peak"] + jnp.log(sums["ref_sum"])
    out["ref_logps"] = sums["ref_target"] - ref_lse
    if "kl" in wanted:
      out["kl"] = sums["gap"] / sums["ref_sum"] - ref_lse + lse
  out = {name: jnp.where(used, x, 0.0) for name, x in out.items()}
  return out, (lse, ref_lse)


@functools.partial(jax.custom_vjp, nondiff_argnums=(5,))
def _figures(hidden, readout, targets, reference, is_used, wanted):
  return _forward(hidden, readout, targets, reference, is_used, wanted)[0]


def _figures_fwd(hidden, readout, targets, reference, is_used, wanted):
  out, sums = _forward(hidden, readout, targets, reference, is_used, wanted)
  return out, (hidden, readout, targets, reference, is_used, sums)


def _figures_bwd(wanted, saved, gradients):
  hidden, readout, targets, reference, is_used, (lse, ref_lse) = saved
  columns = _columns(readout, targets)
  split = columns.split(readout)
  ref_hidden = ref_readout = None
  if "kl" in wanted:
    ref_hidden, ref_readout = reference[0], columns.split(reference[1])
  chunks = (
    (hidden, targets, lse, gradients["logps"]),
    (ref_hidden, ref_lse, gradients["kl"]) if "kl" in wanted else None,
  )
  product = functools.partial(jnp.einsum, preferred_element_type=jnp.float32)

  def add_block(added, pulled, chunk, ids, turned, block, ref_block):
    """The gradients of a block's columns, and of a chunk's states."""
    (states, its_targets, its_lse, pull), ref_chunk = chunk
    logits = _logits(states, block)
    probs = jnp.exp(logits - its_lse[..., None, None])
    is_target = ids == its_targets[..., None, None]
    slope = jnp.where(is_target, 1.0 - probs, -probs) * pull[..., None, None]
    if ref_chunk is not None:
      ref_states, its_ref_lse, kl_pull = ref_chunk
      ref = _logits(ref_states, ref_block)
      ref_probs = jnp.exp(ref - its_ref_lse[..., None, None])
      slope += (probs - ref_probs) * kl_pull[..., None, None]
    if block.soft_cap is not None:
      slope *= 1.0 - jnp.square(logits / block.soft_cap)
    by_shard = _by_shard(slope, "tensor", None)
    kernel, bias = added
    if bias is not None:
      bias += by_shard.sum((1, 2))
    slope = slope.astype(states.dtype)
    kernel += product(
      "nrsd,nrspv->ndpv", _by_shard(states, None), by_shard.astype(states.dtype)
    )
    pulled += product("rspv,pvd->prsd", slope, turned)
    return (kernel, bias), pulled

  def with_block(carry, start, size):
    (kernel, bias), pulled = carry
    blocks = [
      None if x is None else columns.block(x, start, size)
      for x in (split, ref_readout)
    ]
    ids = columns.ids(start, size)
    # Once a block: a CPU would transpose it for every chunk.
    turned = blocks[0].kernel.transpose(1, 2, 0)

    def with_chunk(added, scanned):
      used, pulled, chunk = scanned
      return jax.lax.cond(
        used,
        lambda *given: add_block(*given, ids, turned, *blocks),
        lambda added, pulled, chunk: (added, pulled),
        added,
        pulled,
        chunk,
      )

    # A sum for each shard of the rows, so that they meet once a block and not
    # once a chunk.
    num_shards = partition.num_row_shards(targets.shape[1])
    width = (columns.parts, size)
    new_kernel = jnp.zeros((num_shards, columns.depth, *width), jnp.float32)
    new_kernel = _pin(new_kernel, ROW_AXES, None, "tensor", None)
    new_bias = None
    if bias is not None:
      new_bias = jnp.zeros((num_shards, *width), jnp.float32)
      new_bias = _pin(new_bias, ROW_AXES, "tensor", None)
    (new_kernel, new_bias), pulled = jax.lax.scan(
      with_chunk, (new_kernel, new_bias), (is_used, pulled, chunks)
    )
    new_kernel = _pin(new_kernel.sum(0), "fsdp", "tensor", None)
    kernel = _set_columns(kernel, new_kernel, start)
    if bias is not None:
      bias = _set_columns(bias, new_bias.sum(0), start)
    return (kernel, bias), pulled

  kernel = jnp.zeros(split.kernel.shape, jnp.float32)
  pulled = jnp.zeros(
    (len(hidden), columns.parts, *hidden.shape[1:]), jnp.float32
  )
  (kernel, bias), pulled = columns.scan(
    with_block,
    (
      (
        _pin(kernel, "fsdp", "tensor", None),
        None if split.bias is None else jnp.zeros_like(split.bias),
      ),
      _pin(pulled, None, "tensor", ROW_AXES, None, None),
    ),
  )
  gradient = jax.tree.map(
    lambda total, x: total.reshape(x.shape).astype(x.dtype),
    readout.replace(kernel=kernel, bias=bias),
    readout,
  )
  hidden_gradient = pulled.sum(1).astype(hidden.dtype)
  return hidden_gradient, gradient, None, None, None


def _set_columns(total: jax.Array, block: jax.Array, start: Any) -> jax.Array:
  return jax.lax.dynamic_update_slice_in_dim(
    total, block, start, total.ndim - 1
  )


_figures.defvjp(_figures_fwd, _figures_bwd)
