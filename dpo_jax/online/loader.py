"""Batches that are sampled from the policy: PPO, RLOO, on-policy DPO.

The loop asks for batch(step), as it does of a loader. Every so many steps it
tells `begin` where the policy stands; responses are sampled and judged then,
and all batches until the next time are cut from them. So a batch is a function
of (seed, step, the parameters at the last sampling), and what was sampled is
kept beside the checkpoints, in WORKDIR/online/STEP.npz: a run that stops
between two samplings goes on with the same batches.
"""

import dataclasses
import functools
import io
import logging
from typing import Any
import zipfile

from etils import epath
import jax
import numpy as np

from dpo_jax import judges
from dpo_jax.data import batch_plan
from dpo_jax.data import loader as loader_lib
from dpo_jax.data.scoring import score_all
from dpo_jax.data.store import Store, part_starts
from dpo_jax.data.tokenizers import Tokenizer
from dpo_jax.losses import policy_gradient
from dpo_jax.models import generate
from dpo_jax.parallel.mesh import on_mesh
from dpo_jax.records.workdir import Workdir
from dpo_jax.system.files import write_atomically
from dpo_jax.training import step as step_lib
from dpo_jax.training.program import Program
from dpo_jax.types import Batch, fields_of

_LOG = logging.getLogger(__name__)

_SAMPLED_AT_ONCE = 1024


class DriftError(RuntimeError):
  """The policy has gone so far from its reference that the run is lost."""


@dataclasses.dataclass(frozen=True)
class Snapshot:
  """What was sampled at a step, all that batches are cut from.

  Attributes:
    step: when.
    prompts: i64 [n], indices of the prompts' groups.
    responses: i32 [n, K, M], -1 behind the end; a group of nothing but -1
      teaches nothing and is left out of the loss.
    score: f32 [n, K].
    ref_logps: f32 [n, K].
    kl_weight: f64 [], of the next sampling.
    fields: on-policy fields of Batch, f32 [n, K] or [n, K, M] each.
  """

  step: int
  prompts: np.ndarray
  responses: np.ndarray
  score: np.ndarray
  ref_logps: np.ndarray
  kl_weight: float
  fields: dict[str, np.ndarray]

  def write(self, path: epath.Path) -> None:
    fields = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
    fields |= fields.pop("fields")
    buffer = io.BytesIO()
    np.savez(buffer, **fields)
    write_atomically(path, buffer.getvalue())

  @classmethod
  def read(cls, path: epath.Path) -> "Snapshot":
    """What `write` wrote; zip keeps a checksum of every array.

    Raises:
      ValueError: it is not there, or damaged.
    """
    try:
      with np.load(io.BytesIO(path.read_bytes())) as file:
        fields = dict(file)
    except (OSError, ValueError, EOFError, zipfile.BadZipFile) as error:
      raise ValueError(
        f"{path} is missing or damaged, and holds the responses that the run's"
        " next steps learn from. Move the checkpoints behind step"
        f" {path.stem} aside, and it goes on from one before: {error}"
      ) from error
    names = fields_of("on_policy") & fields.keys()
    on_policy = {name: fields.pop(name) for name in names}
    return cls(
      step=int(fields.pop("step")),
      kl_weight=float(fields.pop("kl_weight")),
      fields=on_policy,
      **fields,
    )


@jax.jit
def _advantages(
  scores: jax.Array,
  logps: jax.Array,
  ref_logps: jax.Array,
  values: jax.Array,
  last_values: jax.Array,
  mask: jax.Array,
  kl_weight: float,
  discount: float,
  gae_lambda: float,
) -> tuple[jax.Array, jax.Array]:
  """Advantages, whitened over all tokens, and returns: f32 [B, M] each."""
  shaped = policy_gradient.shape_rewards(
    scores, logps, ref_logps, mask, kl_coef=kl_weight, estimator="k1"
  )
  advantages, returns = policy_gradient.gae(
    shaped,
    values,
    mask,
    last_values,
    discount=discount,
    gae_lambda=gae_lambda,
  )
  return policy_gradient.whiten(advantages, mask, shift_mean=True), returns


class OnPolicy:
  """A loader of what the policy itself said."""

  def __init__(
    self,
    config: Any,
    workdir: Workdir,
    prompts: loader_lib.Loader,
    *,
    program: Program,
    ref_params: Any,
    tokenizer: Tokenizer,
    judge: judges.Judge,
  ):
    """Plans the batches; samples nothing yet.

    Args:
      config: of the run, resolved.
      workdir: of the run.
      prompts: the loader of the training data, for its prompts.
      program: what is trained.
      ref_params: the reference's parameters.
      tokenizer: to read responses with.
      judge: who rewards them.

    Raises:
      ValueError: no prompt leaves room for a response.
    """
    self._settings, self._config = config.online, config
    self._folder = workdir.online
    self._program, self._ref_params = program, ref_params
    self._tokenizer, self._judge = tokenizer, judge
    self._source = prompts
    self._snapshot: Snapshot | None = None
    settings = self._settings
    room = program.policy.config.max_positions - settings.max_response_tokens
    lengths = prompts.store.lengths[prompts.indices, 0]
    indices = prompts.indices[lengths <= room]
    if not len(indices):
      raise ValueError(
        f"online.max_response_tokens={settings.max_response_tokens} leaves"
        f" {room} of the model's"
        f" {program.policy.config.max_positions} positions, and"
        f" the shortest prompt takes {lengths.min()}: lower it"
      )
    # Indices of prompts, as many a sampling as its batches need.
    num_groups = settings.every_steps * config.batch_size // settings.epochs
    self._prompts = dataclasses.replace(
      prompts, indices=indices, batch_size=num_groups, ref_logps=None
    )
    self.plan = self._make_plan()

  @property
  def _num_slots(self) -> int:
    return 2 if self._settings.kind == "pairs" else self._settings.num_samples

  def _make_plan(self) -> batch_plan.Plan:
    """Shapes that hold the longest responses that there can be."""
    most = self._settings.max_response_tokens
    lengths = self._prompts.store.lengths[:, :1]
    longest = np.full((len(lengths), self._num_slots), most, np.int32)
    lengths = np.concatenate([lengths, longest], 1)
    imagined = dataclasses.replace(
      self._prompts.store,
      starts=part_starts(lengths),
      lengths=lengths,
      score=np.zeros(longest.shape, np.float32),
      scored=None,
      digest="longest",
    )
    config = self._config
    return batch_plan.make_plan(
      imagined,
      self._prompts.indices,
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
    """Makes the batches from `step` on known.

    Args:
      step: the next to be trained.
      params: the policy's, on the mesh, at that step.
      oldest: the earliest checkpoint there is; what was sampled long before
        it is deleted.

    Returns:
      The step at which `begin` is due again, and figures of the responses:
      empty where they were sampled before.

    Raises:
      ValueError: a judge that gives no number, or a lost snapshot.
      DriftError: a KL above `online.max_kl`.
    """
    every = self._settings.every_steps
    first = step - step % every
    figures: dict[str, float] = {}
    if self._snapshot is None or self._snapshot.step != first:
      if step == first:
        self._snapshot, figures = self._sample(first, params)
        if jax.process_index() == 0:
          self._snapshot.write(self._path(first))
          self._delete_before(oldest - every)
      else:
        self._snapshot = Snapshot.read(self._path(first))
      self.__dict__.pop("_loader", None)
    return first + every, figures

  def order(self, step: int) -> np.ndarray:
    """Indices of the groups whose prompts a step has: i64 [batch_size]."""
    chosen = self._loader.order(step - self._snapshot.step)
    return self._snapshot.prompts[chosen]

  @property
  def process_count(self) -> int:
    return self._source.process_count

  def num_tokens(self, step: int) -> int:
    """Tokens of a step's rows, over all processes."""
    return self._loader.num_tokens(step - self._snapshot.step)

  def batch(self, step: int) -> Batch:
    """The batch of a step: this process's rows, numpy."""
    batch = self._loader.batch(step - self._snapshot.step)
    is_group = batch.example_ids >= 0
    fields = {}
    for name, values in self._snapshot.fields.items():
      mask = np.expand_dims(is_group, tuple(range(2, values.ndim + 1)))
      found = np.where(mask, values[batch.example_ids], 0.0)
      fields[name] = found.astype(np.float32)
    return batch.replace(on_policy=fields)

  @functools.cached_property
  def _loader(self) -> loader_lib.Loader:
    ref_logps = None
    if self._config.reference.kind == "cached":
      ref_logps = self._snapshot.ref_logps
    return self._make_loader(
      self._snapshot.step,
      self._snapshot.prompts,
      self._snapshot.responses,
      self._snapshot.score,
      ref_logps,
    )

  def _path(self, step: int) -> epath.Path:
    return self._folder / f"{step}.npz"

  def _delete_before(self, step: int) -> None:
    for path in self._folder.glob("*.npz"):
      if path.stem.isdecimal() and int(path.stem) < step:
        path.unlink()

  def _seed(self, step: int, what: int) -> int:
    state = np.random.SeedSequence((self._config.seed, step, what))
    return int(state.generate_state(1)[0] >> 1)

  def _make_loader(
    self,
    step: int,
    prompts: np.ndarray,
    responses: np.ndarray,
    score: np.ndarray,
    ref_logps: np.ndarray | None = None,
  ) -> loader_lib.Loader:
    """A loader of groups of one prompt and its sampled responses."""
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
    )

  def _sample(
    self, step: int, params: Any
  ) -> tuple[Snapshot, dict[str, float]]:
    """Samples, judges, and measures what the loss learns from."""
    settings = self._settings
    prompts = self._prompts.order(step // settings.every_steps)
    responses, rewards = self._ask(step, params, prompts)
    figures = {
      "reward": float(rewards.mean()),
      "reward_deviation": float(rewards.std()),
      "tokens": float((responses >= 0).sum(-1).mean()),
    }
    if settings.kind == "pairs":
      responses, score, is_tied = self._label(step, responses, rewards)
      figures["ties"] = float(is_tied.mean())
    else:
      score = rewards
    loader = self._make_loader(step, prompts, responses, score)
    measured = self._measure(params, loader)
    is_there = (responses >= 0).any(-1)
    log_ratios = np.where(
      is_there, measured["logps"] - measured["ref_logps"], 0
    )
    kl = float(log_ratios.sum() / max(is_there.sum(), 1))
    kl_weight = self._kl_weight(step)
    if not abs(kl) <= settings.max_kl:  # NaN included
      raise DriftError(
        f"step {step}: the policy's KL to its reference is {kl:.1f} nats a"
        f" response, and online.max_kl={settings.max_kl:g}. Checkpoints and"
        " metrics so far are kept. A larger kl_weight, a kl_target, or a lower"
        " optimizer.learning_rate holds the policy nearer"
      )
    figures["kl"] = kl
    fields = {}
    next_weight = kl_weight
    if settings.kind == "rollouts":
      figures["kl_weight"] = kl_weight
      if "advantages" in self._program.objective.needs:
        is_cut = self._are_cut(responses)
        fields = self._advantages(rewards, measured, is_cut, kl_weight)
      if "old_logps" in self._program.objective.needs:
        fields["old_logps"] = measured["logps"]
      score = rewards - kl_weight * log_ratios
      if settings.kl_target:
        next_weight = float(
          policy_gradient.update_kl_coef(
            np.float32(kl_weight),
            np.float32(kl),
            target=settings.kl_target,
            gain=settings.kl_gain,
          )
        )
    snapshot = Snapshot(
      step,
      prompts,
      responses,
      score.astype(np.float32),
      measured["ref_logps"],
      next_weight,
      fields,
    )
    return snapshot, figures

  def _are_cut(self, responses: np.ndarray) -> np.ndarray:
    """Returns which responses ended at the limit of tokens.

    Of a tokenizer whose EOS is not in its vocabulary all texts have one
    length, and none of them is cut.

    Args:
      responses: i32 [n, K, M], -1 after the end.

    Returns:
      bool [n, K].
    """
    tokenizer = self._tokenizer
    if tokenizer.eos_id >= tokenizer.vocab_size:
      return np.zeros(responses.shape[:2], bool)
    lengths = (responses >= 0).sum(-1, keepdims=True)
    last = np.take_along_axis(responses, np.maximum(lengths - 1, 0), -1)
    return ~np.isin(last[..., 0], tokenizer.stop_ids)

  def _kl_weight(self, step: int) -> float:
    """As the sampling before left it."""
    if self._settings.kind != "rollouts":
      return 0.0
    if step == 0 or not self._settings.kl_target:
      return self._settings.kl_weight
    before = step - self._settings.every_steps
    if self._snapshot is not None and self._snapshot.step == before:
      return self._snapshot.kl_weight
    return Snapshot.read(self._path(before)).kl_weight

  def _ask(
    self, step: int, params: Any, prompts: np.ndarray
  ) -> tuple[np.ndarray, np.ndarray]:
    """Responses i32 [n, K, M] of the policy, and rewards f64 [n, K]."""
    settings, store = self._settings, self._source.store
    count = settings.num_samples
    asked = [store.group(i)[0].tolist() for i in prompts for _ in range(count)]
    sampled = generate.sample(
      self._program.policy,
      params,
      asked,
      seed=self._seed(step, 1),
      max_response_tokens=settings.max_response_tokens,
      temperature=settings.temperature if settings.kind == "pairs" else 1.0,
      stop_ids=self._tokenizer.stop_ids,
      batch_size=min(len(asked), _SAMPLED_AT_ONCE),
      rows=self._program.placement.row_sharding,
      label="sampling" if self._config.log.progress else "",
    )
    rewards = judges.ask(
      self._judge,
      [self._tokenizer.decode(prompt) for prompt in asked],
      [self._tokenizer.decode(response) for response in sampled],
      key="online.judge",
    )
    responses = np.full(
      (len(asked), settings.max_response_tokens), -1, np.int32
    )
    for row, response in zip(responses, sampled, strict=True):
      row[: len(response)] = response
    shape = (len(prompts), count)
    return responses.reshape(*shape, -1), rewards.reshape(shape)

  def _label(
    self, step: int, responses: np.ndarray, rewards: np.ndarray
  ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Pairs, the chosen first; f32 [n, 2] rewards; bool [n] ties."""
    rng = np.random.default_rng(self._seed(step, 2))
    rows = np.arange(len(rewards))
    if self._settings.label == "argmax":
      order = np.argsort(-rewards, 1, kind="stable")[:, [0, -1]]
      is_tied = rewards[rows, order[:, 0]] == rewards[rows, order[:, 1]]
    else:
      gap = rewards[:, 0] - rewards[:, 1]
      wins = rng.random(len(gap)) < 1.0 / (1.0 + np.exp(-gap))
      order = np.where(wins[:, None], [[0, 1]], [[1, 0]])
      is_tied = np.zeros(len(gap), bool)
    is_flipped = rng.random(len(rewards)) < self._settings.flips
    order = np.where(is_flipped[:, None], order[:, ::-1], order)
    pairs = responses[rows[:, None], order]
    # Of two equal responses, or two equally good ones, none is to be preferred.
    is_tied |= (pairs[:, 0] == pairs[:, 1]).all(-1)
    pairs = np.where(is_tied[:, None, None], -1, pairs)
    return pairs, rewards[rows[:, None], order].astype(np.float32), is_tied

  @functools.cached_property
  def _read(self) -> Any:
    """Compiled (params, ref_params, batch) -> what the policy said and how."""
    needs = set()
    if "advantages" in self._program.objective.needs:
      needs = {"token_logps", "token_values", "values"}

    def read(params, ref_params, batch):
      sequences = step_lib.read_sequences(
        self._program.policy,
        params,
        ref_params,
        batch,
        chunk_size=self._program.chunk_size,
        needs=frozenset(needs),
        max_tokens=self._settings.max_response_tokens,
      )
      names = ("logps", "ref_logps", "token_mask", "token_logps")
      names += ("ref_token_logps", "token_values", "values")
      found = {name: getattr(sequences, name) for name in names}
      return {k: v for k, v in found.items() if v is not None}

    return on_mesh(self._program.placement.mesh)(
      jax.jit(read, out_shardings=self._program.placement.replicated)
    )

  def _measure(
    self, params: Any, loader: loader_lib.Loader
  ) -> dict[str, np.ndarray]:
    """Fields of Sequences of all groups, [n, K] or [n, K, M]."""
    read = functools.partial(self._read, params, self._ref_params)
    ids, found = score_all(read, loader, self._program.placement)

    def of_all(values: np.ndarray) -> np.ndarray:
      # A tie has no responses, so that no batch has it.
      out = np.zeros((len(loader.indices), *values.shape[1:]), values.dtype)
      out[ids] = values
      return out

    return jax.tree.map(of_all, found)

  def _advantages(
    self,
    rewards: np.ndarray,
    measured: dict[str, np.ndarray],
    is_cut: np.ndarray,
    kl_weight: float,
  ) -> dict[str, np.ndarray]:
    """On-policy fields of Batch, f32 [n, K, M]: GAE, whitened over all.

    A response that was cut off goes on, at what the value head says.
    """
    settings = self._settings
    shape = measured["token_logps"].shape
    flat = {
      name: values.reshape(-1, shape[-1])
      for name, values in measured.items()
      if values.ndim == 3
    }
    advantages, returns = _advantages(
      rewards.reshape(-1).astype(np.float32),
      flat["token_logps"],
      flat["ref_token_logps"],
      flat["token_values"],
      np.where(is_cut, measured["values"], 0.0).reshape(-1),
      flat["token_mask"],
      kl_weight,
      settings.discount,
      settings.gae_lambda,
    )
    return {
      "old_token_logps": measured["token_logps"],
      "old_token_values": measured["token_values"],
      "advantages": np.asarray(advantages).reshape(shape),
      "returns": np.asarray(returns).reshape(shape),
    }
