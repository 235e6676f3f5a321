"""Batches sampled from the policy: PPO, RLOO, on-policy DPO.

The loop asks for batch(step), as it does of any loader. Every
`online.every_steps` steps it passes `begin` the policy's parameters, and
responses for all batches until the next time are sampled and judged. They are
kept in WORKDIR/online/STEP.npz, with `online.replay` those of all samplings so
far, so a run that stops in between resumes with the same batches.
"""

from collections.abc import Sequence
import dataclasses
from typing import Any

from etils import epath
import jax
import numpy as np

from dpo_jax import judges
from dpo_jax.data import batch_plan
from dpo_jax.data.loader import Loader
from dpo_jax.data.store import Store, part_starts
from dpo_jax.data.tokenizers import Tokenizer
from dpo_jax.losses import policy_gradient
from dpo_jax.online import mixing, rollouts
from dpo_jax.online.snapshot import Snapshot
from dpo_jax.records.workdir import Workdir
from dpo_jax.training.program import Program
from dpo_jax.types import Batch


class DriftError(RuntimeError):
  """The policy's KL to its reference is above `online.max_kl`."""


class OnPolicyLoader:
  """A loader of responses that the policy itself gives."""

  def __init__(
    self,
    config: Any,
    workdir: Workdir,
    prompts: Loader,
    *,
    program: Program,
    ref_params: Any,
    tokenizer: Tokenizer,
    judge: judges.Judge,
  ):
    """Plans the batches; samples nothing yet.

    Args:
      config: resolved.
      workdir: run directory.
      prompts: loader of the training data, whose prompts are used.
      program: program of the run.
      ref_params: parameters of the reference.
      tokenizer: tokenizer of the policy.
      judge: gives the rewards.

    Raises:
      ValueError: no prompt leaves room for a response.
    """
    self._settings, self._config = config.online, config
    self._folder = workdir.online
    self._program, self._ref_params = program, ref_params
    self._tokenizer, self._judge = tokenizer, judge
    self._source = prompts
    self._snapshot: Snapshot | None = None
    self._loader: Loader | None = None
    fraction = self._settings.offline_fraction or 0.0
    self._num_offline = round(fraction * config.batch_size)
    self._num_own = config.batch_size - self._num_offline
    # As many prompts a sampling as its batches need.
    num_groups = self._settings.every_steps * self._num_own
    usable = self._usable_prompts()
    self._prompts = dataclasses.replace(
      prompts,
      indices=usable,
      batch_size=num_groups // self._settings.epochs,
      ref_logps=None,
      mixture=prompts.mixture and prompts.mixture.keep(usable),
    )
    self.plan = self._make_plan()
    self._measure = rollouts.make_measure(
      program, self._settings.max_response_tokens
    )

  def _usable_prompts(self) -> np.ndarray:
    """Returns the prompts that leave room for the longest response: i64 [n]."""
    most = self._settings.max_response_tokens
    max_positions = self._program.policy.config.max_positions
    lengths = self._source.store.lengths[self._source.indices, 0]
    indices = self._source.indices[lengths <= max_positions - most]
    if not len(indices):
      raise ValueError(
        f"online.max_response_tokens={most} leaves {max_positions - most} of"
        f" the model's {max_positions} positions, and the shortest prompt takes"
        f" {lengths.min()}: lower it"
      )
    return indices

  def _make_plan(self) -> batch_plan.Plan:
    """Plans shapes that hold the longest responses that there can be."""
    config, settings = self._config, self._settings
    num_slots = 2 if settings.kind == "pairs" else settings.num_samples
    lengths = self._prompts.store.lengths[:, :1]
    longest = np.full(
      (len(lengths), num_slots), settings.max_response_tokens, np.int32
    )
    indices = self._prompts.indices
    if self._num_offline:
      longest = mixing.larger(longest, self._source.store.lengths[:, 1:])
      indices = self._source.indices
    lengths = np.concatenate([lengths, longest], 1)
    imagined = dataclasses.replace(
      self._prompts.store,
      starts=part_starts(lengths),
      lengths=lengths,
      score=np.zeros(longest.shape, np.float32),
      scored=None,
      digest="longest",
    )
    return batch_plan.make_plan(
      imagined,
      indices,
      batch_size=config.batch_size,
      row_tokens=config.data.row_tokens,
      row_multiple=self._program.placement.num_row_shards
      * config.accumulation_steps,
      layout=config.data.layout,
      max_shapes=config.data.max_shapes,
    )

  def begin(
    self, step: int, params: Any, *, oldest: int
  ) -> tuple[int, dict[str, float]]:
    """Samples, or reads from its file, what the batches from `step` on hold.

    Args:
      step: next step to be trained.
      params: parameters of the policy at that step, on the mesh.
      oldest: earliest checkpoint; older samples are deleted, but for the last.

    Returns:
      The step at which `begin` is due again; and metrics of the samples, see
      `_sample`, empty where they were sampled before.

    Raises:
      ValueError: a judge that gives no number, or a lost snapshot.
      DriftError: a KL above `online.max_kl`.
    """
    every = self._settings.every_steps
    first = step - step % every
    metrics: dict[str, float] = {}
    if self._snapshot is None or self._snapshot.step != first:
      if step == first:
        sampled, metrics = self._sample(first, params)
        if self._settings.replay and first:
          sampled = sampled.after(self._snapshot_at(first - every))
        self._snapshot = sampled
        if jax.process_index() == 0:
          self._snapshot.write(self._path(first))
          self._delete_before(oldest - every)
      else:
        self._snapshot = self._snapshot_at(first)
      self._loader = self._loader_of(self._snapshot)
    return first + every, metrics

  def order(self, step: int) -> np.ndarray:
    """Returns the groups whose prompts a step has: i64 [batch_size]."""
    chosen = self._loader.order(step - self._snapshot.step)
    return self._snapshot.prompts[chosen]

  def addresses(self, example_ids: Sequence[int]) -> list[str]:
    """Returns file and line of the prompts of a batch's groups."""
    return self._source.addresses(self._snapshot.prompts[list(example_ids)])

  @property
  def process_count(self) -> int:
    """Number of hosts; each fills its own block of a batch's rows."""
    return self._source.process_count

  def num_tokens(self, step: int) -> int:
    """Counts the tokens of a step, over all processes, padding left out."""
    return self._loader.num_tokens(step - self._snapshot.step)

  def batch(self, step: int) -> Batch:
    """Returns the batch of a step: this process's rows, numpy."""
    batch = self._loader.batch(step - self._snapshot.step)
    is_group = batch.example_ids >= 0
    fields = {}
    for name, values in self._snapshot.fields.items():
      mask = np.expand_dims(is_group, tuple(range(2, values.ndim + 1)))
      found = np.where(mask, values[batch.example_ids], 0.0)
      fields[name] = found.astype(np.float32)
    return batch.replace(on_policy=fields)

  def _snapshot_at(self, step: int) -> Snapshot:
    """Returns the snapshot of a step, from memory or from its file."""
    if self._snapshot is not None and self._snapshot.step == step:
      return self._snapshot
    return Snapshot.read(self._path(step))

  def _path(self, step: int) -> epath.Path:
    return self._folder / f"{step}.npz"

  def _delete_before(self, step: int) -> None:
    for path in self._folder.glob("*.npz"):
      if path.stem.isdecimal() and int(path.stem) < step:
        path.unlink()

  def _seed(self, step: int, purpose: int) -> int:
    """Derives a seed; purpose is 0 for batch order, 1 samples, 2 labels."""
    state = np.random.SeedSequence((self._config.seed, step, purpose))
    return int(state.generate_state(1)[0] >> 1)

  def _loader_of(self, snapshot: Snapshot) -> Loader:
    is_cached = self._config.reference.kind == "cached"
    loader = self._make_loader(
      snapshot.step,
      snapshot.prompts,
      snapshot.responses,
      snapshot.score,
      snapshot.ref_logps if is_cached else None,
    )
    return mixing.mix(
      loader,
      self._prompts.batch_size,
      num_own=self._num_own,
      num_offline=self._num_offline,
    )

  def _make_loader(
    self,
    step: int,
    prompts: np.ndarray,
    responses: np.ndarray,
    score: np.ndarray,
    ref_logps: np.ndarray | None = None,
  ) -> Loader:
    """Returns a loader of groups of a prompt and its sampled responses."""
    store = self._source.store
    groups = [
      [store.group(index)[0], *(row[row >= 0] for row in group)]
      for index, group in zip(prompts, responses, strict=True)
    ]
    return dataclasses.replace(
      self._source,
      store=Store.from_groups(groups, score),
      indices=np.arange(len(prompts)),
      plan=self.plan,
      batch_size=self._config.batch_size,
      seed=self._seed(step, 0),
      ref_logps=ref_logps,
      mixture=None,
    )

  def _sample(
    self, step: int, params: Any
  ) -> tuple[Snapshot, dict[str, float]]:
    """Samples, judges and measures the responses of a step.

    Metrics: reward, reward_deviation, tokens, kl; ties (pairs) or kl_weight.
    """
    settings = self._settings
    prompts = self._prompts.order(step // settings.every_steps)
    responses, rewards = rollouts.sample_responses(
      self._program,
      params,
      [self._source.store.group(index)[0].tolist() for index in prompts],
      self._tokenizer,
      self._judge,
      seed=self._seed(step, 1),
      num_samples=settings.num_samples,
      max_tokens=settings.max_response_tokens,
      temperature=settings.temperature if settings.kind == "pairs" else 1.0,
      label="sampling" if self._config.log.progress else "",
    )
    metrics = {
      "reward": float(rewards.mean()),
      "reward_deviation": float(rewards.std()),
      "tokens": float((responses >= 0).sum(-1).mean()),
    }
    score, num_own = rewards, len(prompts)
    if settings.kind == "pairs":
      prompts, responses, score, is_tied = self._make_pairs(
        step, prompts, responses, rewards
      )
      metrics["ties"] = float(is_tied.mean())
    loader = self._make_loader(step, prompts, responses, score)
    measured = self._measure(params, self._ref_params, loader)
    is_there = (responses >= 0).any(-1)
    log_ratios = measured["logps"] - measured["ref_logps"]
    log_ratios = np.where(is_there, log_ratios, 0)
    metrics["kl"] = kl = rollouts.mean_kl(
      responses[:num_own], log_ratios[:num_own]
    )
    self._check_drift(step, kl)
    kl_weight = self._kl_weight(step)
    fields = self._fields(rewards, responses, measured, kl_weight)
    if settings.kind == "rollouts":
      metrics["kl_weight"] = kl_weight
      score = rewards - kl_weight * log_ratios
    snapshot = Snapshot(
      step,
      prompts,
      responses,
      score.astype(np.float32),
      measured["ref_logps"],
      self._next_kl_weight(kl_weight, kl),
      fields,
    )
    return snapshot, metrics

  def _make_pairs(
    self,
    step: int,
    prompts: np.ndarray,
    responses: np.ndarray,
    rewards: np.ndarray,
  ) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Labels samples as pairs, and adds groups of the data to them.

    Returns:
      Prompts, responses and scores of all groups; which sampled ones are ties.
    """
    settings = self._settings
    responses, score, is_tied = rollouts.label_pairs(
      responses,
      rewards,
      label=settings.label,
      flips=settings.flips,
      rng=np.random.default_rng(self._seed(step, 2)),
    )
    if self._num_offline:
      prompts, responses, score = mixing.add_groups(
        dataclasses.replace(self._source, batch_size=self._num_offline),
        range(step, step + settings.every_steps),
        prompts,
        responses,
        score,
      )
    return prompts, responses, score, is_tied

  def _check_drift(self, step: int, kl: float) -> None:
    if not abs(kl) <= self._settings.max_kl:  # NaN included
      raise DriftError(
        f"step {step}: the policy's KL to its reference is {kl:.1f} nats a"
        f" response, and online.max_kl={self._settings.max_kl:g}. Checkpoints"
        " and metrics so far are kept. A larger kl_weight, a kl_target, or a"
        " lower optimizer.learning_rate keeps the policy closer"
      )

  def _fields(
    self,
    rewards: np.ndarray,
    responses: np.ndarray,
    measured: dict[str, np.ndarray],
    kl_weight: float,
  ) -> dict[str, np.ndarray]:
    """Computes the arrays of `Batch.on_policy` that the loss needs, by name."""
    fields, needs = {}, self._program.training_objective.needs
    if "advantages" in needs:
      fields = rollouts.advantage_fields(
        rewards,
        measured,
        rollouts.are_cut(responses, self._tokenizer),
        kl_weight=kl_weight,
        discount=self._settings.discount,
        gae_lambda=self._settings.gae_lambda,
      )
    if "old_logps" in needs:
      fields["old_logps"] = measured["logps"]
    if "sample_weight" in needs:
      fields["sample_weight"] = mixing.sample_weights(
        responses, len(rewards), self._num_own / self._config.batch_size
      )
    return fields

  def _kl_weight(self, step: int) -> float:
    """Returns the KL weight of a step's sampling; 0 for pairs."""
    if self._settings.kind != "rollouts":
      return 0.0
    if step == 0 or not self._settings.kl_target:
      return self._settings.kl_weight
    return self._snapshot_at(step - self._settings.every_steps).kl_weight

  def _next_kl_weight(self, kl_weight: float, kl: float) -> float:
    """Updates the KL weight: it rises where the KL is above its target."""
    settings = self._settings
    if settings.kind != "rollouts" or not settings.kl_target:
      return kl_weight
    return float(
      policy_gradient.update_kl_coef(
        np.float32(kl_weight),
        np.float32(kl),
        target=settings.kl_target,
        gain=settings.kl_gain,
      )
    )
