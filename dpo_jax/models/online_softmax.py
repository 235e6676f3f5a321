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

from dpo_jax.models.decoder import Readout
from dpo_jax.parallel import active_mesh
from dpo_jax.parallel.active_mesh import ROW_AXES

# Of a block, whatever it takes: whole lanes, and what keeps a matmul busy.
LEAST_COLUMNS = 256
# A peak of nothing: finite, so that no difference is NaN.
_LOWEST = -0.4 * float(jnp.finfo(jnp.float32).max)


@dataclasses.dataclass(frozen=True)
class Sizes:
  """Of the loops, on one device.

  Attributes:
    positions: of a chunk, at the most. The block's gradient is read and
      written once a chunk, which the chunk's work must outweigh; chunks behind
      the last scored position are passed over.
    logits: that exist at a time.
  """

  positions: int
  logits: int

  def chunk(self, num_rows: int, length: int) -> int:
    """Positions of a row that go together, of rows of `length` positions."""
    most = -(-self.positions // num_rows)
    return -(-length // -(-length // most))  # chunks of equal size

  def columns(self, num_positions: int) -> int:
    """Of a block that meets so many positions at a time."""
    size = self.logits // max(num_positions, 1)
    return max(size // LEAST_COLUMNS, 1) * LEAST_COLUMNS


# 4 MiB of float32, about what a core's share of the cache holds.
CPU = Sizes(positions=256, logits=2**20)
ACCELERATOR = Sizes(positions=2048, logits=4 * 2**20)


def sizes() -> Sizes:
  """What suits the device that is compiled for."""
  return CPU if active_mesh.platform() == "cpu" else ACCELERATOR


@functools.partial(jax.custom_vjp, nondiff_argnums=(5,))
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
    wanted: "logps", and any of "ref_logps", "alignment" and "kl".

  Returns:
    Those figures, f32 [C, R, S] each, nats. Gradients flow through "logps"
    and "kl" into hidden and readout.
  """
  return _forward(hidden, readout, targets, reference, is_used, wanted)[0]


def _pin(x: jax.Array, *axes: Any) -> jax.Array:
  """Lays x over those axes of the mesh that there are."""
  shape = active_mesh.free_axes()
  if math.prod(shape.values()) == 1:
    return x
  spec = []
  for size, axis in zip(x.shape, axes, strict=True):
    names = (axis,) if isinstance(axis, str) else axis or ()
    names = tuple(name for name in names if name in shape)
    divides = size % math.prod(shape[name] for name in names) == 0
    spec.append(names if names and divides else None)
  return jax.lax.with_sharding_constraint(x, PartitionSpec(*spec))


def _by_shard(x: jax.Array, *axes: Any) -> jax.Array:
  """[R, S, ...] -> [N, R / N, S, ...], a part for each of N row shards."""
  parts = x.reshape(active_mesh.num_row_shards(len(x)), -1, *x.shape[1:])
  return _pin(parts, ROW_AXES, None, None, *axes)


class _Columns:
  """The vocabulary in blocks, each with a part of every device's share.

  [D, V] is seen as [D, P, V / P], P devices on the axis `tensor`; a block is
  `size` columns of all P parts. The last block of a part may be smaller.
  """

  def __init__(self, readout: Readout, targets: jax.Array):
    """For chunks of positions: i32 [C, R, S]."""
    vocab_size = readout.kernel.shape[1]
    parts = active_mesh.free_axes().get("tensor", 1)
    self.parts = parts if vocab_size % parts == 0 else 1
    self.width = vocab_size // self.parts
    # An axis of one element is not free: a CPU copies the kernel for it, and
    # without it a TPU writes the gather of a block as an all-reduce.
    self.has_axis = self.parts > 1 or active_mesh.platform() != "cpu"
    _, num_rows, length = targets.shape
    num_rows //= active_mesh.num_row_shards(num_rows)
    size = sizes().columns(num_rows * length)
    num_blocks = -(-self.width // size)
    # Blocks of equal size, where that wastes nothing.
    even = -(-self.width // num_blocks)
    self.size = even if even * num_blocks == self.width else size
    self.size = min(self.size, self.width)

  def split(self, readout: Readout) -> Readout:
    """Kernel [D, P, V / P] and bias [P, V / P], or as they are."""
    if not self.has_axis:
      return readout
    return jax.tree.map(
      lambda x: x.reshape(*x.shape[:-1], self.parts, self.width), readout
    )

  def cut(self, split: Readout, start: Any, size: int) -> Readout:
    """A block of each part, on every device that holds rows: [D, P, size]."""

    def part(x):
      block = jax.lax.dynamic_slice_in_dim(x, start, size, axis=-1)
      return block if self.has_axis else block[..., None, :]

    # Cut first: else all of the kernel is gathered for every block.
    block = jax.tree.map(part, split)
    kernel = _pin(block.kernel, "fsdp", "tensor", None)
    return block.replace(
      kernel=_pin(kernel, None, "tensor", None),
      bias=None if block.bias is None else _pin(block.bias, "tensor", None),
    )

  def zeros(self, readout: Readout) -> Readout:
    """Float32 in the shapes of `split`, laid out as the kernel is."""
    split = jax.tree.map(
      lambda x: jnp.zeros(x.shape, jnp.float32), self.split(readout)
    )
    tensor = ("tensor",) if self.has_axis else ()
    return Readout(_pin(split.kernel, "fsdp", *tensor, None), split.bias)

  def put(self, split: Readout, block: Readout, start: Any) -> Readout:
    """`split` with a block of each part in its place."""
    return jax.tree.map(
      lambda total, x: jax.lax.dynamic_update_slice_in_dim(
        total, x.reshape(*total.shape[:-1], x.shape[-1]), start, total.ndim - 1
      ),
      split,
      block,
    )

  def scan(self, body: Any, carry: Any, *readouts: Readout | None) -> Any:
    """carry = body(carry, start, ids, *blocks) over all blocks.

    `ids`, i32 [P, size], are the tokens that a block's columns are.
    """
    split = [None if x is None else self.split(x) for x in readouts]
    parts = jnp.arange(self.parts, dtype=jnp.int32)[:, None] * self.width

    def with_block(carry, start, size):
      blocks = [None if x is None else self.cut(x, start, size) for x in split]
      ids = parts + start + jnp.arange(size, dtype=jnp.int32)
      return body(carry, start, ids, *blocks)

    num_blocks, rest = divmod(self.width, self.size)
    carry = jax.lax.fori_loop(
      0, num_blocks, lambda i, c: with_block(c, i * self.size, self.size), carry
    )
    if rest:
      carry = with_block(carry, self.width - rest, rest)
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
  sums = _above(sums, peaks)
  sums["target"] += pick(logits)
  weights = jnp.exp(logits - peaks["peak"][..., None])
  sums["sum"] += weights.sum(-1)
  if "squares" in sums:
    sums["squares"] += jnp.square(weights).sum(-1)
  if ref_block is not None:
    sums["ref_target"] += pick(ref)
    weights = jnp.exp(ref - peaks["ref_peak"][..., None])
    sums["ref_sum"] += weights.sum(-1)
  if "gap" in sums:
    sums["gap"] += (weights * (ref - logits)).sum(-1)
  return sums


def _forward(hidden, readout, targets, reference, is_used, wanted):
  """The figures, and what the backward pass needs: (lse, ref_lse)."""
  columns = _Columns(readout, targets)
  ref_hidden, ref_readout = reference or (None, None)
  names = ["peak", "target", "sum"] + ["squares"] * ("alignment" in wanted)
  if reference is not None:
    names += ["ref_peak", "ref_target", "ref_sum"] + ["gap"] * ("kl" in wanted)

  def with_block(sums, _, ids, *blocks):
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
  lowest = jnp.full_like(zeros, _LOWEST)
  sums = columns.scan(
    with_block,
    {name: lowest if "peak" in name else zeros for name in names},
    readout,
    ref_readout,
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
  out = {name: jnp.where(used, out[name], 0.0) for name in wanted}
  return out, (lse, ref_lse)


def _figures_fwd(hidden, readout, targets, reference, is_used, wanted):
  out, sums = _forward(hidden, readout, targets, reference, is_used, wanted)
  return out, (hidden, readout, targets, reference, is_used, sums)


def _logits_gradient(chunk, ref_chunk, ids, block, ref_block):
  """f32 [R, S, P, size]: of a chunk's logits in a block of the vocabulary."""
  hidden, targets, lse, logps_gradient = chunk
  logits = _logits(hidden, block)
  probs = jnp.exp(logits - lse[..., None, None])
  is_target = ids == targets[..., None, None]
  gradient = jnp.where(is_target, 1.0 - probs, -probs)
  gradient *= logps_gradient[..., None, None]
  if ref_chunk is not None:
    ref_hidden, ref_lse, kl_gradient = ref_chunk
    ref = _logits(ref_hidden, ref_block)
    ref_probs = jnp.exp(ref - ref_lse[..., None, None])
    gradient += (probs - ref_probs) * kl_gradient[..., None, None]
  if block.soft_cap is not None:
    gradient *= 1.0 - jnp.square(logits / block.soft_cap)
  return gradient


def _empty_block(num_rows, depth, ids, has_bias):
  """A gradient of a block's columns for each shard of the rows, so that these
  meet once a block and not once a chunk."""
  num_shards = active_mesh.num_row_shards(num_rows)
  kernel = jnp.zeros((num_shards, depth, *ids.shape), jnp.float32)
  bias = None
  if has_bias:
    bias = jnp.zeros((num_shards, *ids.shape), jnp.float32)
    bias = _pin(bias, ROW_AXES, "tensor", None)
  return Readout(_pin(kernel, ROW_AXES, None, "tensor", None), bias)


def _add_products(block_gradient, hidden_gradient, hidden, logits_gradient, w):
  """The gradients of a block's columns and of a chunk's states, with what
  those of its logits add; w: the block's kernel, [P, size, D]."""
  product = functools.partial(jnp.einsum, preferred_element_type=jnp.float32)
  by_shard = _by_shard(logits_gradient, "tensor", None)
  kernel, bias = block_gradient.kernel, block_gradient.bias
  kernel += product(
    "nrsd,nrspv->ndpv", _by_shard(hidden, None), by_shard.astype(hidden.dtype)
  )
  if bias is not None:
    bias += by_shard.sum((1, 2))
  logits_gradient = logits_gradient.astype(hidden.dtype)
  hidden_gradient += product("rspv,pvd->prsd", logits_gradient, w)
  return Readout(kernel, bias), hidden_gradient


def _figures_bwd(wanted, saved, gradients):
  hidden, readout, targets, reference, is_used, (lse, ref_lse) = saved
  columns = _Columns(readout, targets)
  ref_chunks = ref_readout = None
  if "kl" in wanted:
    ref_hidden, ref_readout = reference
    ref_chunks = (ref_hidden, ref_lse, gradients["kl"])
  chunks = (hidden, targets, lse, gradients["logps"])
  num_chunks, num_rows, _, depth = hidden.shape

  def with_block(carry, start, ids, *blocks):
    readout_gradient, hidden_gradient = carry
    # Once a block: a CPU would transpose it for every chunk.
    transposed = blocks[0].kernel.transpose(1, 2, 0)

    def add(block_gradient, chunk_gradient, chunk, ref_chunk):
      logits_gradient = _logits_gradient(chunk, ref_chunk, ids, *blocks)
      return _add_products(
        block_gradient, chunk_gradient, chunk[0], logits_gradient, transposed
      )

    def with_chunk(carry, scanned):
      block_gradient, hidden_gradient = carry
      index, used, *chunk = scanned
      block_gradient, chunk_gradient = jax.lax.cond(
        used,
        add,
        lambda *given: given[:2],
        block_gradient,
        hidden_gradient[index],
        *chunk,
      )
      hidden_gradient = jax.lax.dynamic_update_index_in_dim(
        hidden_gradient, chunk_gradient, index, 0
      )
      return (block_gradient, hidden_gradient), None

    empty = _empty_block(num_rows, depth, ids, readout.bias is not None)
    (block_gradient, hidden_gradient), _ = jax.lax.scan(
      with_chunk,
      (empty, hidden_gradient),
      (jnp.arange(num_chunks), is_used, chunks, ref_chunks),
    )
    block_gradient = jax.tree.map(lambda x: x.sum(0), block_gradient)
    block_gradient = block_gradient.replace(
      kernel=_pin(block_gradient.kernel, "fsdp", "tensor", None)
    )
    readout_gradient = columns.put(readout_gradient, block_gradient, start)
    return readout_gradient, hidden_gradient

  zeros = columns.zeros(readout)
  # [C, P, R, S, D], see `_forward`.
  hidden_zeros = jnp.zeros(
    (num_chunks, columns.parts, *hidden.shape[1:]), jnp.float32
  )
  hidden_zeros = _pin(hidden_zeros, None, "tensor", ROW_AXES, None, None)
  readout_gradient, hidden_gradient = columns.scan(
    with_block, (zeros, hidden_zeros), readout, ref_readout
  )
  readout_gradient = readout_gradient.replace(soft_cap=readout.soft_cap)
  readout_gradient = jax.tree.map(
    lambda total, x: total.reshape(x.shape).astype(x.dtype),
    readout_gradient,
    readout,
  )
  hidden_gradient = hidden_gradient.sum(1).astype(hidden.dtype)
  return hidden_gradient, readout_gradient, None, None, None


figures.defvjp(_figures_fwd, _figures_bwd)
