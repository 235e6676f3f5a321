"""A config -> everything that a run needs, checked before it starts.

What is wrong with a config, its data or its mesh is found here, where nothing
has been compiled, loaded or overwritten yet.
"""

from collections.abc import Callable, Mapping
import dataclasses
import logging
import math
import os
from typing import Any

import jax
from jax.experimental.compilation_cache import compilation_cache
import jax.numpy as jnp
from jax.sharding import Mesh
import numpy as np
import optax

from dpo_jax import config as config_lib
from dpo_jax import (
  judges,
  mesh,
  model_source,
  online,
  optimizer,
  profile,
  reference,
  step,
)
from dpo_jax.data import groups as groups_lib
from dpo_jax.data import loader as loader_lib
from dpo_jax.data import mismatched, sources, store, tokenizers
from dpo_jax.data import reading as reading_lib
from dpo_jax.losses import Objective, WeightedSum, build_objective
from dpo_jax.models.decoder import Policy
from dpo_jax.types import FIELDS, TrainState, fields_of, token_masks
from dpo_jax.workdir import Workdir, read_json, write_json

_LOG = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Data:
  """Batches to train on, held-out batches, and their tokenizer.

  Attributes:
    tokenizer: of both.
    train: groups; of on-policy training, their prompts.
    eval: held-out groups.
    is_measured: whether the loss can be measured on the held-out groups, or
      only their prompts are used.
  """

  tokenizer: tokenizers.Tokenizer
  train: loader_lib.Loader
  eval: loader_lib.Loader | None
  is_measured: bool = True

  def identity(self) -> dict[str, Any]:
    """What all hosts, and all starts of a run, must have in common."""
    loaders = {"train": self.train, "eval": self.eval}
    splits = {
      name: {
        "content": loader.store.report["content"],
        "store": loader.store.digest,
        "groups": len(loader.indices),
      }
      for name, loader in loaders.items()
      if loader is not None
    }
    return {**splits, "tokenizer": dict(self.tokenizer.parts)}


def check_same_data(identity: Mapping[str, Any], workdir: Workdir) -> None:
  """Compares what a run reads with what it began with.

  Args:
    identity: `Data.identity`.
    workdir: run directory.

  Raises:
    ValueError: other data, another tokenizer or another chat template; shows
      the difference.
  """
  if not workdir.data.exists():
    return
  before = read_json(workdir.data)
  if isinstance(before["train"], str):  # as older runs recorded a split
    identity = {
      name: f"{split['store']}, {split['groups']} groups"
      for name, split in identity.items()
      if name != "tokenizer"
    }
  before, now = (dict(config_lib.flatten(x)) for x in (before, identity))
  changed = [
    f"  {key}: {before.get(key)!r} there, {now.get(key)!r} now"
    for key in sorted(before.keys() | now.keys())
    if before.get(key) != now.get(key)
  ]
  if changed:
    raise ValueError(
      f"{workdir} holds a run on other data, or with another tokenizer or chat"
      " template:\n"
      + "\n".join(changed)
      + "\nBring the old files back, or choose another workdir"
    )


def write_data(identity: Mapping[str, Any], workdir: Workdir) -> None:
  """Records what a run reads, once."""
  if not workdir.data.exists():
    write_json(workdir.data, identity)


@dataclasses.dataclass(frozen=True)
class Run:
  """All that is fixed for a run: what to train, on what, and how."""

  config: Any
  workdir: Workdir
  objective: Objective | WeightedSum
  eval_objectives: tuple[Objective, ...]
  placement: mesh.Placement
  policy: Policy
  data: Data | None
  optimizer: optax.GradientTransformation
  schedule: optax.Schedule
  judge: judges.Judge | None
  online_judge: judges.Judge | None

  @property
  def is_writer(self) -> bool:
    return jax.process_index() == 0

  @property
  def has_live_reference(self) -> bool:
    """Whether the reference's parameters are on the devices."""
    is_live = self.config.reference.kind in reference.LIVE_KINDS
    return is_live and self.objective.needs_reference

  def split_params(self, params: Any) -> tuple[Any, Any]:
    """What is trained, and what is not or None."""
    return optimizer.split_params(params, self.config.policy.frozen)

  def fresh_state(self, params: Any, ref_params: Any) -> TrainState:
    """The state before the first step, without the frozen parameters.

    Args:
      params: what is trained.
      ref_params: the same of the reference, or None.
    """
    if self.config.reference.kind == "adapter_off" and ref_params is not None:
      ref_params = {}
    return TrainState(
      step=jnp.zeros((), jnp.int32),
      params=params,
      opt_state=self.optimizer.init(params),
      loss_state=self.objective.init(),
      ref_params=ref_params,
    )

  def abstract_state(self) -> tuple[TrainState, TrainState]:
    """The state as ShapeDtypeStructs on the mesh, and its shardings."""
    params = self.policy.abstract_params()
    trained, frozen = self.split_params(params)
    abstract = jax.eval_shape(
      self.fresh_state, trained, trained if self.has_live_reference else None
    ).replace(frozen_params=frozen)
    shardings = mesh.state_shardings(abstract, params, self.placement.mesh)
    return with_shardings(abstract, shardings), shardings

  def make_train_step(self) -> Callable[..., Any]:
    """(state, batch) -> (state, metrics), not compiled."""
    return step.make_train_step(
      self.policy,
      self.objective,
      self.optimizer,
      self.schedule,
      accumulation_steps=self.config.accumulation_steps,
      chunk_size=self.config.logps_chunk,
      axis_name=self.placement.axis_name,
      update_reference=reference.make_update(self.config.reference),
    )


def with_shardings(abstract: Any, shardings: Any) -> Any:
  """ShapeDtypeStructs that say where they lie."""
  return jax.tree.map(
    lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s),
    abstract,
    shardings,
  )


def build_run(
  config: Any,
  workdir: Workdir,
  *,
  on: Mesh | None = None,
  vocab_size: int | None = None,
) -> Run:
  """Checks a config and builds what it describes, without parameters.

  Args:
    config: complete.
    workdir: of the run.
    on: the mesh to lie on, where it is not one of this machine's devices.
    vocab_size: of the tokenizer, to read neither it nor the data: the run
      then has none, and can be compiled but not trained.

  Returns:
    The run.

  Raises:
    ValueError: whatever is wrong with the config, its data or its mesh.
  """
  config_lib.check_config(config)
  profile.parse_steps(config.profile.steps)
  config = config.copy_and_resolve_references()
  objective = build_objective(config.loss)
  _resolve_loss(config, objective)
  has_adapters = config.lora.rank > 0
  reference.resolve(config.reference, objective, has_adapters=has_adapters)
  online.resolve(config, objective)
  eval_objectives = _eval_objectives(config, objective)
  judge = judges.get_judge(config.eval.judge)
  online_judge = judges.get_judge(config.online.judge, key="online.judge")
  placement = mesh.Placement(
    on or mesh.make_mesh(config.mesh), config.parallelism
  )
  step.check_coupling(objective, placement.axis_name)
  source = model_source.parse(config.policy.init)
  config.policy.init = source.init
  tokenizer = None
  if vocab_size is None:
    settings = source.tokenizer_settings(config.data)
    config.data.update(settings)
    tokenizer = model_source.open_tokenizer(settings)
    source.warn_of_other_ids(settings, tokenizer)
  policy = source.policy(
    config.policy,
    vocab_size=tokenizer.vocab_size if tokenizer else vocab_size,
    value_head=any(FIELDS[n].reads_value_head for n in objective.needs),
    adapters=config.lora,
  )
  _check_parts(config, policy)
  if config.reference.init:
    theirs = model_source.parse(config.reference.init, "reference.init")
    config.reference.init = theirs.init
  mesh.param_shardings(policy.abstract_params(), placement.mesh)
  _check_sizes(config, policy, placement)
  schedule = optimizer.build_schedule(config.optimizer, config.total_steps)
  data = None
  if tokenizer is not None:
    data = _build_data(
      config, tokenizer, objective, eval_objectives, policy, placement
    )
  return Run(
    config=config,
    workdir=workdir,
    objective=objective,
    eval_objectives=eval_objectives,
    placement=placement,
    policy=policy,
    data=data,
    optimizer=optimizer.build_optimizer(config.optimizer, schedule),
    schedule=schedule,
    judge=judge,
    online_judge=online_judge,
  )


def _check_parts(config: Any, policy: Policy) -> None:
  """Whether what is frozen and where the reference runs go together."""
  _, frozen = optimizer.split_params(
    policy.abstract_params(), config.policy.frozen
  )
  dtype = config.policy.param_dtype
  if frozen is None and dtype != "float32":
    raise ValueError(
      f"policy.param_dtype={dtype!r} is the dtype of what is not trained, and"
      " all parameters are trained: in bfloat16 a weight of 0.02 moves in steps"
      " of 1.2e-4, so that updates of a rate such as 1e-6 are lost. Set it to"
      " 'float32'. Adapters (lora.rank), policy.frozen, mesh.fsdp and"
      " optimizer.name='adafactor' do save memory"
    )
  other_start = config.reference.init not in ("", config.policy.init)
  if frozen and other_start and config.reference.kind in reference.LIVE_KINDS:
    raise ValueError(
      f"reference.kind={config.reference.kind!r} shares the frozen parameters"
      f" with the policy, and reference.init={config.reference.init!r} has"
      " others: set reference.kind='cached'"
    )


def _resolve_loss(config: Any, objective: Objective | WeightedSum) -> None:
  """Writes every knob that the loss reads into the config."""
  resolved = objective.to_dict()
  if isinstance(resolved, dict):
    config.loss.update(resolved)
  else:
    with config.ignore_type():
      config.loss = tuple(resolved)


def _eval_objectives(
  config: Any, objective: Objective | WeightedSum
) -> tuple[Objective, ...]:
  """The losses of `eval.losses`, each of which this run can measure."""
  others = tuple(build_objective({"name": n}) for n in config.eval.losses)
  # What depends on the run: the rest comes with every forward pass.
  absent = fields_of("values", "mismatched", "tokens", "on_policy")
  absent -= objective.needs
  if config.reference.kind not in reference.LIVE_KINDS:
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


def _check_sizes(
  config: Any, policy: Policy, placement: mesh.Placement
) -> None:
  """Raises ValueError where lengths or batches do not fit."""
  if config.data.max_tokens > policy.config.max_positions:
    raise ValueError(
      f"data.max_tokens={config.data.max_tokens} exceeds the model's"
      f" max_positions={policy.config.max_positions}"
    )
  shards = placement.num_row_shards
  for key, size in (
    ("batch_size", config.batch_size),
    ("eval.batch_size", config.eval.batch_size),
  ):
    if size % shards:
      below = size // shards * shards
      nearest = f"are {below} and {below + shards}" if below else f"is {shards}"
      raise ValueError(
        f"{key}={size} must be a multiple of the {shards} devices on the mesh"
        f" axes {mesh.ROW_AXES}: nearest {nearest}, or the mesh"
        f" {_mesh_for_rows(placement, size)}"
      )


def _mesh_for_rows(placement: mesh.Placement, size: int) -> Any:
  """The nearest mesh whose row axes divide a batch of this size."""
  return mesh.nearest_mesh(
    placement.mesh.shape,
    placement.mesh.size,
    lambda m: size % math.prod(m[axis] for axis in mesh.ROW_AXES) == 0,
  )


def _build_data(
  config: Any,
  tokenizer: tokenizers.Tokenizer,
  objective: Objective | WeightedSum,
  eval_objectives: tuple[Objective, ...],
  policy: Policy,
  placement: mesh.Placement,
) -> Data:
  read = objective.needs.union(*(o.needs for o in eval_objectives))
  is_offline = config.online.kind == "none"

  def open_store(spec: str) -> tuple[store.Store, np.ndarray]:
    """The groups, and bool [N], from which of them the loss learns."""
    opened = store.build_store(
      sources.open_source(spec),
      tokenizer,
      store.Limits(config.data.max_tokens, config.data.max_prompt_tokens),
      config.data.cache_dir or default_cache_dir(),
      reading_lib.Reading(
        format=config.data.format,
        columns=config.data.columns,
        roles=config.data.roles,
        scored_turns=config.data.scored_turns,
        special_tokens=config.data.special_tokens,
        max_broken_records=config.data.max_broken_records,
      ),
    )
    _check_ids(opened, policy.config.vocab_size)
    _log_report(opened.report)
    is_split = config.data.split_pairs and opened.num_slots == 2
    reasons = {}
    if is_split and objective.group == "single":
      reasons["tied_scores"] = opened.tied_pairs().repeat(2)
      opened = opened.split_pairs()
    if is_offline:
      objective.check_group_size(opened.num_slots)
    reasons |= objective.unusable(opened.score, opened.lengths[:, 1:] > 0)
    is_usable = _drop_unusable(reasons, spec, objective, is_needed=is_offline)
    opened = opened.first_slots(objective.num_slots or opened.num_slots)
    if "mismatched_logps" in objective.needs:
      opened = mismatched.add_slot(
        opened, seed=config.seed, max_tokens=config.data.max_tokens
      )
    return opened, is_usable

  process_index, process_count = placement.row_reader

  def make_loader(
    groups: store.Store, indices: np.ndarray, batch_size: int, parts: int
  ) -> loader_lib.Loader:
    plan = loader_lib.make_plan(
      groups,
      indices,
      batch_size=batch_size,
      row_tokens=config.data.row_tokens,
      row_multiple=placement.num_row_shards * parts,
      layout=config.data.layout,
      max_shapes=config.data.max_shapes,
    )
    for shape in plan.shapes:
      check_context(shape.row.num_tokens, placement)
    return loader_lib.Loader(
      groups,
      indices,
      plan,
      batch_size,
      config.seed,
      process_index=process_index,
      process_count=process_count,
      token_masks=token_masks(read),
    )

  groups, is_usable = open_store(config.data.source)
  is_measured = is_offline or (
    objective.group != "samples" and groups.num_slots == 2
  )
  if config.data.eval_source:
    eval_groups, is_usable_eval = open_store(config.data.eval_source)
    train_indices, eval_indices = (
      np.arange(len(groups)),
      np.arange(len(eval_groups)),
    )
  else:
    eval_groups, is_usable_eval = groups, is_usable
    train_indices, eval_indices = groups.split(config.data.eval_fraction)
  if is_offline:
    train_indices = train_indices[is_usable[train_indices]]
  if is_measured:
    eval_indices = eval_indices[is_usable_eval[eval_indices]]
  if not len(train_indices):
    raise ValueError(
      f"data.eval_fraction={config.data.eval_fraction} holds out all of the"
      f" {len(groups)} groups that loss {objective.name!r} can use"
    )
  if config.eval.max_groups:
    eval_indices = eval_indices[: config.eval.max_groups]
  train_loader = make_loader(
    groups, train_indices, config.batch_size, config.accumulation_steps
  )
  eval_loader = None
  if len(eval_indices):
    eval_loader = make_loader(
      eval_groups, eval_indices, config.eval.batch_size, 1
    )
  return Data(
    tokenizer,
    train_loader,
    eval_loader,
    is_measured=is_measured,
  )


def _drop_unusable(
  reasons: Mapping[str, np.ndarray],
  spec: str,
  objective: Objective | WeightedSum,
  *,
  is_needed: bool,
) -> np.ndarray:
  """Returns which groups teach the loss something, and logs the others.

  Args:
    reasons: reason -> bool [N].
    spec: source of the groups, for messages.
    objective: the loss.
    is_needed: whether the responses are read, and not the prompts alone.

  Raises:
    ValueError: none is left.
  """
  is_unusable = np.any(list(reasons.values()), axis=0)
  counts = {name: int(mask.sum()) for name, mask in reasons.items()}
  text = ", ".join(f"{n} {name}" for name, n in counts.items() if n)
  if is_needed and is_unusable.all():
    raise ValueError(
      f"{spec}: loss {objective.name!r} learns nothing from any of the"
      f" {len(is_unusable)} groups: {text}"
    )
  if is_needed and text:
    _LOG.warning(
      "%s: loss %r learns nothing from %d of %d groups, which are dropped: %s",
      spec,
      objective.name,
      is_unusable.sum(),
      len(is_unusable),
      text,
    )
  return ~is_unusable


def check_context(row_tokens: int, placement: mesh.Placement) -> None:
  """Raises ValueError unless the context axis divides the tokens of a row."""
  size = placement.mesh.shape["context"]
  if row_tokens % size:
    enough = -(-row_tokens // size) * size
    nearest = mesh.nearest_mesh(
      placement.mesh.shape,
      placement.mesh.size,
      lambda m: row_tokens % m["context"] == 0,
    )
    raise ValueError(
      f"rows of {row_tokens} tokens are not divided by the {size} devices on"
      f" the mesh axis 'context': set data.row_tokens={enough}, or the mesh"
      f" {nearest}"
    )


def default_cache_dir() -> str:
  """~/.cache/dpo_jax, or where XDG_CACHE_HOME points."""
  base = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
  return os.path.join(base, "dpo_jax")


def use_compilation_cache(directory: str) -> None:
  """Keeps compiled programs for the runs that come after.

  Args:
    directory: "" for the default, "off" for none. One that JAX was already
      told, by JAX_COMPILATION_CACHE_DIR or in code, stays.
  """
  if directory == "off" or jax.config.jax_compilation_cache_dir:
    return
  directory = directory or os.path.join(default_cache_dir(), "compiled")
  jax.config.update("jax_compilation_cache_dir", directory)
  jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
  jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
  # What was compiled before has settled that there is no cache.
  compilation_cache.reset_cache()


def _check_ids(groups: store.Store, vocab_size: int) -> None:
  largest = int(groups.tokens.max())
  if largest >= vocab_size:
    place = int(np.argmax(groups.tokens))
    group = int(np.searchsorted(groups.starts[:, 0], place, "right")) - 1
    raise ValueError(
      f"{groups.report['source']}: group {group} holds the token id {largest},"
      f" and the model's vocabulary has {vocab_size}: the tokenizer is not"
      " the model's"
    )


def _log_report(report: Mapping[str, Any]) -> None:
  dropped = ", ".join(f"{v} {k}" for k, v in report["dropped"].items())
  _LOG.info(
    "%s: %d groups of %d records (dropped: %s; cut: %d prompts, %d responses)",
    report["source"],
    report["groups"],
    report["records"],
    dropped or "none",
    report["prompts_cut"],
    report["responses_cut"],
  )
  _LOG.info(
    "%s: records by shape: %s; columns that are not read: %s; counted: %s",
    report["source"],
    ", ".join(f"{v} {k}" for k, v in report["shapes"].items()),
    ", ".join(report["unread"]) or "none",
    ", ".join(f"{report[k]} {k}" for k in groups_lib.COUNTS if report[k])
    or "none",
  )
