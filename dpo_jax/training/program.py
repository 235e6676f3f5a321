"""Program: all that is compiled for a run, without its data.

Training, planning and benchmarks compile the same program.
"""

from collections.abc import Callable
import dataclasses
import functools
from typing import Any

import chex
import jax
import jax.numpy as jnp
import optax

from dpo_jax.config import LIVE_REFERENCES
from dpo_jax.losses import (
  Objective,
  WeightedSum,
  build_objective,
  with_sampled_kl,
)
from dpo_jax.models import partition_rules, trainable
from dpo_jax.models.decoder import Policy
from dpo_jax.parallel import mesh, sharding
from dpo_jax.parallel.placement import Placement
from dpo_jax.training import forward, measure, optimizer, reference, step
from dpo_jax.training.spikes import SpikeRule
from dpo_jax.types import FIELDS, TrainState, fields_of

_MANY_STEPS = 10**9


@dataclasses.dataclass(frozen=True)
class Program:
  """A policy, its objective and optimizer, placed on devices.

  Attributes:
    policy: decoder; says which of its parameters are frozen.
    objective: loss to minimise, without the KL of on-policy batches.
    optimizer: optax chain.
    schedule: learning rate by step, for the metrics.
    placement: mesh, and jit or pmap.
    eval_objectives: losses that an evaluation measures too.
    reference_kind: one of `config.LIVE_REFERENCES`, "cached" or "none".
    update_reference: see `reference.make_update`; None for one that stays.
    accumulation_steps: microbatches of a step.
    chunk_size: see `logps.chunked_token_figures`.
    skip_spikes: rule by which steps are skipped, or None.
    kl_weight: weight of the KL on own samples that training adds to the loss.
  """

  policy: Policy
  objective: Objective | WeightedSum
  optimizer: optax.GradientTransformation
  schedule: optax.Schedule
  placement: Placement
  eval_objectives: tuple[Objective, ...] = ()
  reference_kind: str = "cached"
  update_reference: Callable[[Any, Any, jax.Array], Any] | None = None
  accumulation_steps: int = 1
  chunk_size: int = 0
  skip_spikes: SpikeRule | None = None
  kl_weight: float = 0.0

  @property
  def training_objective(self) -> Objective | WeightedSum:
    """The loss that a step differentiates."""
    if isinstance(self.objective, WeightedSum):
      return self.objective
    return with_sampled_kl(self.objective, self.kl_weight)

  @property
  def has_live_reference(self) -> bool:
    """Whether the reference's parameters are on the devices."""
    is_live = self.reference_kind in LIVE_REFERENCES
    return is_live and self.objective.needs_reference

  @property
  def needs(self) -> frozenset[str]:
    """Optional fields of Sequences that `objective` or an evaluation reads."""
    others = (other.needs for other in self.eval_objectives)
    return self.objective.needs.union(*others)

  def split_params(self, params: Any) -> tuple[Any, Any]:
    """Returns the trained parameters, and the frozen ones or None."""
    return trainable.split_params(params, self.policy.config.frozen)

  def fresh_state(self, params: Any, ref_params: Any) -> TrainState:
    """Returns the state before the first step, without frozen parameters.

    Args:
      params: trained parameters.
      ref_params: those parameters of the reference; None if no reference runs
        in a step.
    """
    if self.reference_kind == "adapter_off" and ref_params is not None:
      ref_params = {}
    return TrainState(
      step=jnp.zeros((), jnp.int32),
      params=params,
      opt_state=self.optimizer.init(params),
      loss_state=self.objective.init(),
      ref_params=ref_params,
      spikes=self.skip_spikes.init() if self.skip_spikes else (),
    )

  def abstract_state(self) -> tuple[TrainState, TrainState]:
    """Returns the state as ShapeDtypeStructs on the mesh, and its shardings."""
    params = self.policy.abstract_params()
    trained, frozen = self.split_params(params)
    abstract = jax.eval_shape(
      self.fresh_state, trained, trained if self.has_live_reference else None
    ).replace(frozen_params=frozen)
    shardings = partition_rules.state_shardings(
      abstract, params, self.placement.mesh
    )
    return sharding.with_shardings(abstract, shardings), shardings

  def make_state(self, params: Any, ref_params: Any) -> TrainState:
    """Makes the first state on the mesh.

    Args:
      params: all parameters of the policy, on the mesh; trained ones are
        copied.
      ref_params: all parameters of the reference; None where it does not run.
    """
    trained, frozen = self.split_params(params)
    if ref_params is not None:
      ref_params = self.split_params(ref_params)[0]
    _, shardings = self.abstract_state()
    make = jax.jit(
      self.fresh_state, out_shardings=shardings.replace(frozen_params=None)
    )
    return make(trained, ref_params).replace(frozen_params=frozen)

  def train_step(self, *, max_traces: int = 0) -> Callable[..., Any]:
    """Returns `step.make_train_step`'s step jitted, the state donated.

    Args:
      max_traces: traces after which the step raises, 0 for no limit: a batch
        of a shape that the plan does not have.
    """
    function = step.make_train_step(
      self.policy,
      self.training_objective,
      self.optimizer,
      self.schedule,
      accumulation_steps=self.accumulation_steps,
      chunk_size=self.chunk_size,
      axis_name=self.placement.axis_name,
      update_reference=self.update_reference,
      skip_spikes=self.skip_spikes,
    )
    if max_traces:
      chex.clear_trace_counter()
      function = chex.assert_max_traces(function, n=max_traces)
    return self.placement.compile_step(function, self.abstract_state()[1])

  @functools.cached_property
  def eval_step(self) -> Callable[..., Any]:
    """Jitted (params, ref_params, batch) -> Sequences, forward only."""
    function = forward.make_eval_step(
      self.policy, chunk_size=self.chunk_size, needs=self.needs
    )
    return self._on_mesh(function)

  @functools.cached_property
  def logps_step(self) -> Callable[..., Any]:
    """Jitted (params, batch) -> f32 [B, K] log-probs, forward only."""
    return reference.make_logps_step(
      self.policy, self.placement, self.chunk_size
    )

  @functools.cached_property
  def measure(self) -> Callable[..., Any]:
    """Jitted (sequences, loss_state) -> losses, metrics and which groups count.

    It measures `objective` and `eval_objectives`, see `measure.make_measure`.
    """
    return measure.make_measure(self.objective, self.eval_objectives)

  def _on_mesh(self, function: Callable[..., Any]) -> Callable[..., Any]:
    jitted = jax.jit(function, out_shardings=self.placement.replicated)
    return mesh.on_mesh(self.placement.mesh)(jitted)


def build_program(config: Any, policy: Policy, placement: Placement) -> Program:
  """Builds the program of a config.

  Args:
    config: resolved.
    policy: decoder of `policy.init`.
    placement: mesh, and jit or pmap.

  Raises:
    ValueError: a loss that pmap cannot train, losses that the run cannot
      measure, a model that the mesh does not divide, trained parameters that
      are not float32, or a reference that starts from other frozen parameters.
  """
  objective = build_objective(config.loss)
  step.check_coupling(objective, placement.axis_name)
  partition_rules.param_shardings(policy.abstract_params(), placement.mesh)
  _check_frozen(config, policy)
  # The steps of `epochs` are known once the data are read.
  schedule = optimizer.build_schedule(
    config.optimizer, config.total_steps or _MANY_STEPS
  )
  return Program(
    policy=policy,
    objective=objective,
    optimizer=optimizer.build_optimizer(config.optimizer, schedule),
    schedule=schedule,
    placement=placement,
    eval_objectives=_eval_objectives(config, objective),
    reference_kind=config.reference.kind,
    update_reference=reference.make_update(config.reference),
    accumulation_steps=config.accumulation_steps,
    chunk_size=config.logps_chunk,
    skip_spikes=_spike_rule(config.numerics),
    kl_weight=_loss_kl_weight(config.online),
  )


def _loss_kl_weight(settings: Any) -> float:
  """Returns the weight of the KL in the loss: `online.kl_weight` of pairs.

  0 for other kinds; of rollouts it is part of the reward.
  """
  return settings.kl_weight or 0.0 if settings.kind == "pairs" else 0.0


def _spike_rule(settings: Any) -> SpikeRule | None:
  if not settings.skip_spikes:
    return None
  return SpikeRule(settings.skip_spikes, settings.spike_window)


def needs_value_head(objective: Objective | WeightedSum) -> bool:
  """Returns whether a loss reads the value head of the policy."""
  return any(FIELDS[name].reads_value_head for name in objective.needs)


def _check_frozen(config: Any, policy: Policy) -> None:
  """Raises ValueError unless the reference and dtypes allow what is frozen.

  `policy.param_dtype` must be float32 if all parameters are trained. A live
  reference must share the frozen parameters of the policy.
  """
  _, frozen = trainable.split_params(
    policy.abstract_params(), policy.config.frozen
  )
  dtype = policy.config.param_dtype
  if frozen is None and dtype != "float32":
    raise ValueError(
      f"policy.param_dtype={dtype!r} is the dtype of frozen parameters, and all"
      " parameters are trained: in bfloat16 a weight of 0.02 moves in steps of"
      " 1.2e-4, so updates at a rate such as 1e-6 are lost. Set it to"
      " 'float32'. Adapters (lora.rank), policy.frozen, mesh.fsdp and"
      " optimizer.name='adafactor' do save memory"
    )
  other_start = config.reference.init not in ("", config.policy.init)
  if frozen and other_start and config.reference.kind in LIVE_REFERENCES:
    raise ValueError(
      f"reference.kind={config.reference.kind!r} shares the frozen parameters"
      f" with the policy, and reference.init={config.reference.init!r} has"
      " others: set reference.kind='cached'"
    )


def _eval_objectives(
  config: Any, objective: Objective | WeightedSum
) -> tuple[Objective, ...]:
  """Builds the losses of `eval.losses`.

  Raises:
    ValueError: a loss that reads fields or groups that the run does not have.
  """
  others = tuple(build_objective({"name": n}) for n in config.eval.losses)
  # Other fields come with every forward pass.
  absent = fields_of("values", "mismatched", "tokens", "on_policy")
  absent -= objective.needs
  if config.reference.kind not in LIVE_REFERENCES:
    absent |= fields_of("live_reference")
  if not objective.needs_reference:
    absent |= fields_of("live_reference", "reference")
  for other in others:
    missing = sorted(other.needs & absent)
    if missing:
      raise ValueError(
        f"eval.losses: {other.name!r} reads {', '.join(missing)}, which a run"
        f" of loss {objective.name!r} with reference.kind="
        f"{config.reference.kind!r} does not have"
      )
    if other.group not in ("first", objective.group):
      raise ValueError(
        f"eval.losses: {other.name!r} reads groups of the kind"
        f" {other.group!r}, and loss {objective.name!r} of the kind"
        f" {objective.group!r}"
      )
  return others
