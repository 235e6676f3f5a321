"""Skips steps whose gradient is far larger than those of the steps before.

A step that is skipped leaves parameters, optimizer, loss state and reference as
they were. optax.skip_large_updates compares with a constant, and what wraps an
optimizer, such as optax.conditionally_mask, does not see the other three.
"""

import dataclasses

import flax.struct
import jax
import jax.numpy as jnp

from dpo_jax.types import TrainState


@flax.struct.dataclass
class SpikeState:
  """Gradient norms of the latest steps, part of a checkpoint.

  Attributes:
    norms: f32 [window], the latest last; inf before there were so many.
    skipped_steps: i32 [], steps that were skipped so far.
  """

  norms: jax.Array
  skipped_steps: jax.Array


@dataclasses.dataclass(frozen=True)
class SpikeRule:
  """Skips a step whose gradient norm is above `factor` times the median.

  The median is of the latest steps, skipped ones included: a few spikes do not
  move it, and norms that stay large are followed after half a window. No step
  is skipped before more than half of the window is known.

  Attributes:
    factor: multiple of the median, above 1.
    window: number of steps that the median is of.
  """

  factor: float
  window: int

  def init(self) -> SpikeState:
    """Returns the state before the first step."""
    norms = jnp.full(self.window, jnp.inf, jnp.float32)
    return SpikeState(norms, jnp.zeros((), jnp.int32))

  def choose(
    self, before: TrainState, after: TrainState, norm: jax.Array
  ) -> tuple[TrainState, dict[str, jax.Array]]:
    """Returns the state after a step, or before it if its gradient spikes.

    Args:
      before: state before the step.
      after: state after it.
      norm: f32 [], norm of its gradient.

    Returns:
      The state, one step further in any case, and metrics: `spike_limit`, the
      norm above which a step is skipped, and `skipped_steps` so far.
    """
    norms = before.spikes.norms
    limit = self.factor * jnp.sort(norms)[self.window // 2]
    is_spike = norm > limit
    skipped = before.spikes.skipped_steps + is_spike.astype(jnp.int32)
    kept = {
      name: jax.tree.map(
        lambda old, new: jnp.where(is_spike, old, new),
        getattr(before, name),
        getattr(after, name),
      )
      for name in ("params", "opt_state", "loss_state", "ref_params")
    }
    spikes = SpikeState(jnp.append(norms[1:], norm), skipped)
    metrics = {
      "spike_limit": limit,
      "skipped_steps": skipped.astype(jnp.float32),
    }
    return after.replace(**kept, spikes=spikes), metrics
