"""The reference: its log-probs, and how it follows the policy."""

from collections.abc import Callable, Collection
import dataclasses
import functools
import hashlib
import json
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dpo_jax.data.loader import Loader
from dpo_jax.data.scoring import score_all
from dpo_jax.models import logps as logps_lib
from dpo_jax.models.config import ModelConfig
from dpo_jax.models.decoder import Policy
from dpo_jax.parallel.mesh import on_mesh
from dpo_jax.parallel.placement import Placement


def make_update(config: Any) -> Callable[[Any, Any, jax.Array], Any] | None:
  """Builds the update of a reference that follows the policy: TR-DPO.

  Every `config.every_steps` steps each parameter of the reference becomes
  alpha * policy + (1 - alpha) * reference; at other steps it stays. The sum is
  in float32: optax.incremental_update would take the parameters' own dtype.

  Gorbatovski et al. 2024, arXiv:2404.09656.

  Args:
    config: `config.reference`, resolved.

  Returns:
    (ref_params, params, step) -> ref_params, to be called after every step
    with the number of steps so far. None unless `config.kind` is "ema".
  """
  if config.kind != "ema":
    return None
  alpha, every_steps = config.alpha, config.every_steps

  def follow(ref_params, params):
    def mix(old, new):
      wide = (1.0 - alpha) * old.astype(jnp.float32)
      return (wide + alpha * new.astype(jnp.float32)).astype(old.dtype)

    return jax.tree.map(mix, ref_params, params)

  def update(ref_params, params, step):
    return jax.lax.cond(
      step % every_steps == 0, follow, lambda old, _: old, ref_params, params
    )

  return update


def cache_key(
  weights_digest: str, config: ModelConfig, store_digest: str
) -> str:
  """Computes the digest of all that decides cached log-probs: 32 hex digits.

  Settings that change only how they are computed (remat, attention, mesh,
  layout) are left out; dtypes are included.
  """
  shape = dataclasses.asdict(config)
  del shape["remat"], shape["attention"], shape["frozen"]
  key = json.dumps([weights_digest, shape, store_digest])
  return hashlib.sha256(key.encode()).hexdigest()[:32]


def make_logps_step(
  policy: Policy, placement: Placement, chunk_size: int
) -> Callable[..., jax.Array]:
  """Compiles (params, batch) -> f32 [B, K] log-probs, forward only."""

  def score_logps(params, batch):
    by_row = logps_lib.response_logps(
      policy, params, batch, chunk_size=chunk_size
    )
    return by_row.reshape(-1, by_row.shape[-1])

  return on_mesh(placement.mesh)(
    jax.jit(score_logps, out_shardings=placement.replicated)
  )


def compute_logps(
  step: Callable[..., jax.Array],
  params: Any,
  loader: Loader,
  placement: Placement,
  *,
  label: str = "",
  batches: Collection[int] | None = None,
) -> np.ndarray:
  """Computes the log-probs of a loader's groups.

  Args:
    step: step from `make_logps_step`.
    params: parameters of the model that scores.
    loader: groups; its eval batches cover each once.
    placement: mesh.
    label: name of the work for `progress.track`; "" shows nothing.
    batches: indices of the batches to score; None: all.

  Returns:
    f32 [N, K] over the whole store, NaN where no batch has the group.
  """
  ids, logps = score_all(
    functools.partial(step, params),
    loader,
    placement,
    label=label,
    batches=batches,
  )
  out = np.full(loader.store.score.shape, np.nan, np.float32)
  out[ids] = logps
  return out
