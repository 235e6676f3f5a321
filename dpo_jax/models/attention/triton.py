"""Attention over packed rows on NVIDIA GPUs, by kernels in Pallas-Triton.

A token sees two intervals of its row: its own prompt or response up to itself,
and its prompt. A block visits the blocks from the first to the last that its
tokens see, see `visits`; those that all of them see whole without a mask.
Nothing of T x T exists, in memory or in the table of visits.

  forward, for each block of queries:
    m, s, out = lowest, 0, 0                       # running maximum and sum
    for key block in its visits:
      scores = log2(e) * cap(scale * q @ k.T)      # masked where not whole
      new_m  = max(m, max(scores))
      p      = exp2(scores - new_m)
      s      = s * exp2(m - new_m) + sum(p)        # rescale
      out    = out * exp2(m - new_m) + p @ v
      m      = new_m
    out = out / s;  lse = m + log2(s)              # log-sum-exp, base 2
  backward, with delta = sum(out * dout):
    for each block of queries:
      for key block in its visits:
        p  = exp2(scores - lse)                    # recomputed
        ds = p * (dout @ v.T - delta) * slope of the cap
        dq += ds @ k
      dq = scale * dq
    for each block of keys, transposed so that nothing is transposed back:
      for each head of the group, for query block in its visits:
        p.T, ds.T as above
        dv += p.T @ dout;  dk += ds.T @ q
      dk = scale * dk

Dao 2023, arXiv:2307.08691, has this order of loops, for causal masks.
"""

import functools

import jax
from jax.ad_checkpoint import checkpoint_name
import jax.numpy as jnp

from dpo_jax.models.attention import triton_kernels, visits
from dpo_jax.models.attention.masks import Labels
from dpo_jax.models.attention.triton_tiles import (
  Kernels,
  Settings,
  choose_kernels,
)
from dpo_jax.models.config import ATTENDED
from dpo_jax.parallel import active_mesh
from dpo_jax.system import compat

# Rows are padded to a multiple, and parts of rows have to be one.
_MULTIPLE = 128
MAX_HEAD_DIM = 256
MIN_CAPABILITY = (8, 0)  # Ampere


def obstacle(head_dim: int) -> str:
  """Says why the kernels cannot run on the device compiled for; "" if they can.

  Args:
    head_dim: channels of a head.
  """
  capability = compat.compute_capability()
  if capability is None:
    return "it needs an NVIDIA GPU"
  if capability < MIN_CAPABILITY:
    have, want = (".".join(map(str, x)) for x in (capability, MIN_CAPABILITY))
    return f"it needs compute capability {want} (Ampere); this GPU has {have}"
  if not triton_kernels.HAS_BACKEND:
    return f"jax {jax.__version__} has no jax.experimental.pallas.triton"
  return _too_large(head_dim)


def _too_large(head_dim: int) -> str:
  """Says that heads are too large; "" if they are not."""
  if head_dim <= MAX_HEAD_DIM:
    return ""
  return f"it takes heads of up to {MAX_HEAD_DIM} channels; got {head_dim}"


def is_divisible(length: int) -> bool:
  """Returns whether blocks divide a slice of `length` queries of a row."""
  return length % _MULTIPLE == 0


@functools.partial(jax.custom_vjp, nondiff_argnums=(6,))
def _attend(queries, keys, values, labels, window, first_query, settings):
  arguments = queries, keys, values, labels, window, first_query
  return _forward(*arguments, settings)[0]


def _forward(queries, keys, values, labels, window, first_query, settings):
  tiles = settings.kernels.forward
  spans = visits.spans(labels, window, first_query, queries.shape[1])
  found = visits.visits_of_queries(spans, tiles.queries, tiles.keys)
  return triton_kernels.forward(found, spans, queries, keys, values, settings)


def _attend_fwd(queries, keys, values, labels, window, first_query, settings):
  arguments = queries, keys, values, labels, window, first_query
  out, lse = _forward(*arguments, settings)
  out, lse = checkpoint_name((out, lse), ATTENDED)
  return out, (*arguments, out, lse)


def _attend_bwd(settings, residuals, dout):
  queries, keys, values, labels, window, first_query, out, lse = residuals
  # Sum over the keys of weights times their gradients.
  delta = jnp.einsum(
    "rthd,rthd->rht", out.astype(jnp.float32), dout.astype(jnp.float32)
  )
  saved = queries, keys, values, dout, lse, delta
  num_queries = queries.shape[1]
  spans = visits.spans(labels, window, first_query, num_queries)
  tiles = settings.kernels.dq
  found = visits.visits_of_queries(spans, tiles.queries, tiles.keys)
  dq = triton_kernels.query_gradient(found, spans, saved, settings)
  tiles = settings.kernels.dkv
  found = visits.visits_of_keys(
    labels, window, first_query, num_queries, tiles.queries, tiles.keys
  )
  dk, dv = triton_kernels.key_gradients(found, spans, saved, settings)
  return dq, dk, dv, None, None, None


_attend.defvjp(_attend_fwd, _attend_bwd)


def attend_triton(
  queries: jax.Array,
  keys: jax.Array,
  values: jax.Array,
  labels: Labels,
  *,
  window: jax.Array | None,
  scale: float,
  soft_cap: float | None,
  first_query: jax.Array | int = 0,
  kernels: Kernels | None = None,
) -> jax.Array:
  """Computes `attention.attend_rows` for the rows and heads of one device.

  JAX interprets the kernels where the device is not a GPU.

  Args:
    queries: [R, Tq, H, head_dim], of all tokens of a row or of a slice of as
      many as `is_divisible` accepts.
    keys, values, window, scale, soft_cap: see `attention.attend_rows`.
    labels: labels of whole rows.
    first_query: index in the row of the first query.
    kernels: tiles; None for those of `choose_kernels`.

  Raises:
    ValueError: heads of more than MAX_HEAD_DIM channels.
  """
  length, head_dim = queries.shape[1], queries.shape[3]
  if reason := _too_large(head_dim):
    raise ValueError(f"attention='triton' cannot run: {reason}")
  width = max(1 << (head_dim - 1).bit_length(), triton_kernels.MIN_HEAD_DIM)
  padding = -keys.shape[1] % _MULTIPLE
  settings = Settings(
    scale=float(scale),
    soft_cap=soft_cap,
    kernels=kernels or choose_kernels(width, queries.dtype),
    interpret=active_mesh.platform() != "gpu",
  )

  def padded(x):
    rest = 0 if x is queries and is_divisible(length) else padding
    return jnp.pad(x, ((0, 0), (0, rest), (0, 0), (0, width - head_dim)))

  out = _attend(
    *map(padded, (queries, keys, values)),
    tuple(jnp.pad(x, ((0, 0), (0, padding))) for x in labels),
    window,
    first_query,
    settings,
  )
  return out[:, :length, :, :head_dim]
