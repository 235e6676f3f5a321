"""Learning-rate schedule and optax chain."""

from typing import Any

import jax
import jax.numpy as jnp
import optax

from dpo_jax.training import muon
from dpo_jax.trees import path_name


def build_schedule(config: Any, total_steps: int) -> optax.Schedule:
  """Builds the schedule: warm-up, then constant, cosine or linear to zero.

  Args:
    config: learning_rate, schedule, warmup_steps.
    total_steps: step at which a decay ends.

  Returns:
    Step -> learning rate. Step 0 of a warm-up of n steps has 1/n of the peak,
    because a step at rate 0 would be wasted.

  Raises:
    ValueError: an unknown schedule, or a cosine that has no steps left after
      the warm-up.
  """
  peak, warmup = config.learning_rate, config.warmup_steps
  if config.schedule == "constant":
    after = optax.constant_schedule(peak)
  elif config.schedule == "cosine":
    after = optax.cosine_decay_schedule(peak, total_steps - warmup)
  elif config.schedule == "linear":
    after = optax.linear_schedule(peak, 0.0, total_steps - warmup)
  else:
    raise ValueError(f"optimizer.schedule={config.schedule!r} is unknown")
  if not warmup:
    return after
  rise = optax.linear_schedule(peak / warmup, peak, max(warmup - 1, 1))
  return optax.join_schedules([rise, after], [warmup])


def build_optimizer(
  config: Any, schedule: optax.Schedule
) -> optax.GradientTransformation:
  """Builds the optax chain: clipping by global norm, then the optimizer.

  Args:
    config: name, max_grad_norm, weight_decay, b1, b2, epsilon.
    schedule: schedule from `build_schedule`.

  Returns:
    The chain. Norm scales and biases have no weight decay.

  Raises:
    ValueError: an unknown optimizer.
  """
  decay = {"weight_decay": config.weight_decay, "mask": _is_decayed}
  adamw = optax.adamw(
    schedule, b1=config.b1, b2=config.b2, eps=config.epsilon, **decay
  )
  if config.name == "adamw":
    scale = adamw
  elif config.name == "muon":
    matrices = optax.chain(
      muon.scale_by_muon(),
      optax.add_decayed_weights(config.weight_decay),
      optax.scale_by_learning_rate(schedule),
    )
    scale = optax.partition(
      {"muon": matrices, "adamw": adamw}, muon.label_params
    )
  elif config.name == "lion":
    scale = optax.lion(schedule, b1=config.b1, b2=config.b2, **decay)
  elif config.name == "rmsprop":
    # The decay of 0.99 and epsilon outside the root are torch's, with which
    # the DPO paper was run.
    scale = optax.chain(
      optax.scale_by_rms(
        decay=0.99, eps=config.epsilon, eps_in_sqrt=False, bias_correction=False
      ),
      optax.add_decayed_weights(**decay),
      optax.scale_by_learning_rate(schedule),
    )
  elif config.name == "adafactor":
    # Its own weight decay comes after the learning rate and would take that
    # share of the weights in every step. It ends with a change of sign.
    scale = optax.chain(
      optax.adafactor(None, multiply_by_parameter_scale=False),
      optax.add_decayed_weights(-config.weight_decay, mask=_is_decayed),
      optax.scale_by_learning_rate(schedule, flip_sign=False),
    )
  else:
    raise ValueError(f"optimizer.name={config.name!r} is unknown")
  return optax.chain(_clip_by_global_norm(config.max_grad_norm), scale)


def _clip_by_global_norm(max_norm: float) -> optax.GradientTransformation:
  """Clips gradients by their global norm, as one factor.

  XLA fuses a product into the operation that reads it. It materialises the
  quotients of optax.clip_by_global_norm: one more copy of all gradients.
  """

  def clip(updates, params=None):
    del params
    norm = optax.global_norm(updates)
    factor = jnp.where(norm < max_norm, 1.0, max_norm / norm)
    return jax.tree.map(lambda x: (x * factor).astype(x.dtype), updates)

  return optax.stateless(clip)


def _is_decayed(params: Any) -> Any:
  return jax.tree_util.tree_map_with_path(
    lambda path, _: not path_name(path).endswith(("scale", "bias")), params
  )
