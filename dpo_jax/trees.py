"""Trees of parameters: names of leaves, parts, digests."""

import hashlib
import json
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np


def path_name(path: Any) -> str:
  """'layers/query/kernel' from a key path."""
  return jax.tree_util.keystr(path, simple=True, separator="/")


def join_trees(one: Any, other: Any) -> Any:
  """Joins two nested dicts that have no leaf in common."""
  if other is None:
    return one
  joined = dict(other)
  for key, value in one.items():
    joined[key] = join_trees(value, other[key]) if key in other else value
  return joined


def params_digest(params: Any) -> str:
  """Computes a digest of parameters that does not depend on their sharding.

  Checksums are taken on the devices, in integers modulo 2^32, whose sum has
  no rounding and no order; only they travel to the host.
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
  """Sums mixed bits and positions in two ways: u32 [2]."""
  width = x.dtype.itemsize * 8
  bits = jax.lax.bitcast_convert_type(x, jnp.dtype(f"uint{width}"))
  bits = bits.astype(jnp.uint32)
  # Positions are added axis by axis: flattening a sharded array would gather
  # all of it on every device.
  positions = jnp.zeros((), jnp.uint32)
  for axis in range(x.ndim):
    stride = math.prod(x.shape[axis + 1 :]) % 2**32
    iota = jax.lax.broadcasted_iota(jnp.uint32, x.shape, axis)
    positions = positions + iota * jnp.uint32(stride)
  mixed = (bits ^ (positions * jnp.uint32(2654435761))) * jnp.uint32(0x85EBCA6B)
  mixed = (mixed ^ (mixed >> 15)) * jnp.uint32(0xC2B2AE35)
  return jnp.stack([mixed.sum(), (mixed ^ (mixed >> 13)).sum()])
