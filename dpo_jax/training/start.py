"""Checks that a run starts as its reference: loss log 2, zero margins.

Log-probs of two programs, or of two layouts of a batch, differ by rounding. In
bfloat16 that rounding is large: up to a nat for a response. So cached log-probs
are computed again by the same program in the same layout, and must agree to
1e-5 nats. From another layout, policy and reference are compared in float32.
The rounding between scoring and training is measured and logged.
"""

import dataclasses
import logging
import math
from typing import Any

from etils import epath
import jax
import jax.numpy as jnp
import numpy as np

from dpo_jax.data.loader import Loader
from dpo_jax.models import lora
from dpo_jax.models.decoder import Policy
from dpo_jax.parallel.placement import Placement
from dpo_jax.training import reference
from dpo_jax.types import Sequences

_LOG = logging.getLogger(__name__)

# Largest difference of one program on the same rows, nats.
_SAME_PROGRAM = 1e-5
# Groups that are compared in float32.
_NUM_COMPARED = 64


class StartError(ValueError):
  """The policy does not start as its reference."""


def check_in_its_layout(
  step: Any,
  params: Any,
  loader: Loader,
  logps: np.ndarray,
  placement: Placement,
  path: epath.PathLike,
) -> None:
  """Scores the first and the last batch of a cache again, in its layout.

  Args:
    step: `reference.make_logps_step`.
    params: parameters of the policy, without adapters.
    loader: all groups of the cache, in its layout.
    logps: f32 [N, K], the cache.
    placement: mesh.
    path: file of the cache, for errors.

  Raises:
    StartError: a difference above 1e-5 nats, in any dtype.
  """
  last = loader.num_eval_batches() - 1
  again = reference.compute_logps(
    step, params, loader, placement, batches={0, last}
  )
  is_scored = ~np.isnan(again).all(1)
  difference = np.abs(again - logps)[is_scored]
  if not difference.max() <= _SAME_PROGRAM:  # NaN included
    raise StartError(
      f"the policy does not start as its reference: {is_scored.sum()} groups"
      " scored as the cached log-probs were differ by up to"
      f" {difference.max():.2e} nats, where {_SAME_PROGRAM:g} are allowed. Do"
      f" reference.init and the log-probs of {path} belong to policy.init? If"
      " that file is deleted, they are computed again"
    )


def check_in_float32(
  policy: Policy,
  params: Any,
  ref_params: Any,
  loader: Loader,
  placement: Placement,
  chunk_size: int,
) -> None:
  """Compares policy and reference on about 64 groups, computing in float32.

  Args:
    policy: the decoder, without adapters.
    params: parameters of the policy.
    ref_params: parameters of `reference.init`.
    loader: groups, of which the first batches are scored.
    placement: mesh.
    chunk_size: see `logps.chunked_token_figures`.

  Raises:
    StartError: they differ by more than float32 rounding.
  """
  wide = Policy(dataclasses.replace(policy.config, compute_dtype="float32"))
  step = reference.make_logps_step(wide, placement, chunk_size)
  count = min(-(-_NUM_COMPARED // loader.batch_size), loader.num_eval_batches())
  scores = [
    reference.compute_logps(
      step, p, loader, placement, batches=set(range(count))
    )
    for p in (params, ref_params)
  ]
  is_scored = ~np.isnan(scores[0]).all(1)
  ours, theirs = (x[is_scored] for x in scores)
  allowed = rounding_bound(loader.store.num_scored[is_scored], theirs)
  if not (np.abs(ours - theirs) <= allowed).all():
    raise StartError(
      f"the policy does not start as its reference: {is_scored.sum()} groups"
      " scored by both in float32 differ by up to"
      f" {np.abs(ours - theirs).max():.2e} nats. Does reference.init belong to"
      " policy.init?"
    )


def check_adapters(params: Any) -> None:
  """Raises StartError unless adapters have no effect yet."""
  if not lora.has_adapters(params):
    return
  largest = max(
    float(jnp.abs(leaf).max())
    for path, leaf in jax.tree_util.tree_leaves_with_path(params)
    if getattr(path[-1], "key", "") == "lora_b"
  )
  if largest != 0.0:
    raise StartError(
      "the policy does not start as its reference: its adapters are not zero,"
      f" but up to {largest:.2e}"
    )


def rounding_bound(
  num_tokens: np.ndarray, logps: np.ndarray, dtype: str = "float32"
) -> np.ndarray:
  """Bounds the rounding error of a response's log-prob, in nats.

  Rounding of a token's log-prob is random, so that of a sum grows with the
  root of its length; the sum itself is float32. The factor of 16 is about six
  times the difference of two layouts of the same model in float32.

  Args:
    num_tokens: [B, K] scored tokens.
    logps: f32 [B, K].
    dtype: dtype of the matmuls.

  Returns:
    [B, K]: 16 eps(dtype) sqrt(num_tokens) + 16 eps(float32) |logps|.
  """
  allowed = 16 * float(jnp.finfo(dtype).eps)
  allowed = allowed * np.sqrt(np.maximum(num_tokens, 1.0))
  return allowed + 16 * np.finfo(np.float32).eps * np.abs(logps)


def check_first_batch(
  sequences: Sequences, loss: float, *, dtype: str, is_live: bool
) -> None:
  """Checks that the log-ratios of the first training batch are rounding.

  Args:
    sequences: sequences of the batch, numpy.
    loss: mean loss of the batch.
    dtype: dtype of the matmuls.
    is_live: whether the reference ran in the same program as the policy.

  Raises:
    StartError: a log-ratio is not finite, or larger than rounding explains. For
      cached log-probs in bfloat16, which another program computed, there is no
      bound.
  """
  log_ratios = np.where(
    sequences.valid, sequences.logps - sequences.ref_logps, 0.0
  )
  largest = float(np.abs(log_ratios).max())
  start = f"step 0: loss {loss:.6f}, log 2 is {math.log(2):.6f};"
  allowed = rounding_bound(sequences.num_tokens, sequences.ref_logps, dtype)
  is_bounded = is_live or dtype == "float32"
  if is_bounded and not (np.abs(log_ratios) <= allowed).all():  # NaN included
    raise StartError(
      f"the policy does not start as its reference: {start} largest |log-ratio|"
      f" {largest:.2e} nats, and rounding in {dtype} explains"
      f" {allowed.max():.2e}. Do reference.init and the cached log-probs belong"
      " to policy.init?"
    )
  if not math.isfinite(largest):
    raise StartError(f"{start} a log-ratio is {largest}")
  where = "of one program" if is_live else "between layouts"
  _LOG.info("%s %s rounding %s up to %.2g nats", start, dtype, where, largest)
