"""Parameter trees: names of leaves, joining, digests."""

import hashlib
import json
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

# Nested dict of arrays, or of their shapes or shardings.
Params = dict[str, Any]


def path_name(path: Any) -> str:
  """Returns the name of a key path, such as 'layers/query/kernel'."""
  return jax.tree_util.keystr(path, simple=True, separator="/")


def join_trees(one: Params, other: Params | None) -> Params:
  """Joins two nested dicts that share no leaf; None for the second is empty."""
  if other is None:
    return one
  joined = dict(other)
  for key, value in one.items():
    joined[key] = join_trees(value, other[key]) if key in other else value
  return joined


@jax.jit
def all_finite(tree: Any) -> jax.Array:
  """Returns whether all floating-point leaves of a tree are finite: bool []."""
  is_finite = [
    jnp.isfinite(leaf).all()
    for leaf in jax.tree.leaves(tree)
    if jnp.issubdtype(leaf.dtype, jnp.floating)
  ]
  return jnp.array(is_finite).all()


def params_digest(params: Params) -> str:
  """Computes a digest of parameters that is independent of their sharding.

  It is a SHA-256 in hexadecimal of paths, shapes, dtypes and values. Checksums
  of the values are computed on the devices, in integers modulo 2^32, whose sum
  does not round and does not depend on the order. Only they are sent to the
  host.
  """
  digest = hashlib.sha256()
  for path, leaf in jax.tree_util.tree_leaves_with_path(params):
    sums = np.asarray(_checksum(leaf)).tolist()
    digest.update(
      json.dumps(
        [path_name(path), list(leaf.shape), str(leaf.dtype), sums]
      ).encode()
    )
  return digest.hexdigest()


@jax.jit
def _checksum(x: jax.Array) -> jax.Array:
  """Computes two sums of bits mixed with their indices: u32 [2]."""
  width = x.dtype.itemsize * 8
  bits = jax.lax.bitcast_convert_type(x, jnp.dtype(f"uint{width}"))
  bits = bits.astype(jnp.uint32)
  # Flat indices, computed axis by axis: flattening a sharded array would gather
  # it on every device.
  indices = jnp.zeros((), jnp.uint32)
  for axis in range(x.ndim):
    stride = math.prod(x.shape[axis + 1 :]) % 2**32
    iota = jax.lax.broadcasted_iota(jnp.uint32, x.shape, axis)
    indices = indices + iota * jnp.uint32(stride)
  mixed = (bits ^ (indices * jnp.uint32(2654435761))) * jnp.uint32(0x85EBCA6B)
  mixed = (mixed ^ (mixed >> 15)) * jnp.uint32(0xC2B2AE35)
  return jnp.stack([mixed.sum(), (mixed ^ (mixed >> 13)).sum()])
