"""Builds a run from its config, and checks it before it starts.

Mistakes in a config, its data or its mesh are found here, before anything is
compiled, loaded or overwritten.
"""

from collections.abc import Mapping
import dataclasses
import logging
from typing import Any

import jax
from jax.sharding import Mesh

from dpo_jax import config as config_lib
from dpo_jax import judges, model_sources
from dpo_jax.data import checks, sources
from dpo_jax.data.pipeline import Pipeline
from dpo_jax.data.sets import Data, HeldOut
from dpo_jax.losses import build_objective
from dpo_jax.models import attention
from dpo_jax.parallel import mesh
from dpo_jax.parallel.pmap import make_placement
from dpo_jax.records import commits, resume, tracker
from dpo_jax.records.workdir import Workdir
from dpo_jax.training import evaluation
from dpo_jax.training.program import Program, build_program, needs_value_head

_LOG = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class EvalRun:
  """All that an evaluation reads of a run; it writes nothing.

  Attributes:
    config: resolved.
    workdir: run directory.
    program: all that is compiled.
    data: held-out batches.
    judge: judge of samples, or None.
  """

  config: Any
  workdir: Workdir
  program: Program
  data: HeldOut
  judge: judges.Judge | judges.Comparer | None

  @property
  def is_writer(self) -> bool:
    """Whether this process writes the files of the run."""
    return False

  @property
  def reference_init(self) -> str:
    """Model source of the reference."""
    return self.config.reference.init or self.config.policy.init

  @property
  def starts_as_reference(self) -> bool:
    """Whether policy and reference are equal before the first step."""
    return self.reference_init == self.config.policy.init


@dataclasses.dataclass(frozen=True)
class Run(EvalRun):
  """All that a run consists of: its program, data and judges.

  Attributes:
    data: batches.
    online_judge: judge of sampled responses in training, or None.
  """

  data: Data
  online_judge: judges.Judge | None

  @property
  def is_writer(self) -> bool:
    return jax.process_index() == 0


def resolve(
  config: Any, workdir: Workdir
) -> tuple[Any, model_sources.ModelSource]:
  """Resolves a config, its model sources and its tokenizer.

  Args:
    config: complete.
    workdir: run directory; a run that it holds keeps its commits of the Hub.

  Returns:
    The resolved config: branches of the Hub pinned to commits, the tokenizer
    of the model named. And the source of the policy.

  Raises:
    ValueError: see `resolve_spellings`, `resume.check_same_config`.
    FileNotFoundError: a model that does not exist.
  """
  config, source = resolve_spellings(config, workdir)
  resume.check_same_config(config, workdir)
  return config, source


def resolve_spellings(
  config: Any, workdir: Workdir
) -> tuple[Any, model_sources.ModelSource]:
  """Does what `resolve` does, for a config that need not be the workdir's.

  Raises:
    ValueError: see `config.resolve` and `model_sources.parse`.
    FileNotFoundError: a model that does not exist.
  """
  config = config_lib.resolve(config)
  spelled = commits.recorded_spellings(config, workdir)
  source = _open_source(spelled, "policy.init", workdir)
  settings = source.tokenizer_settings(config.data)
  pinned = {f"data.{key}": value for key, value in settings.items()}
  pinned["policy.init"] = source.init
  if spelled["reference.init"]:
    theirs = _open_source(spelled, "reference.init", workdir)
    pinned["reference.init"] = theirs.init
  pinned |= _pin_data(config.data, spelled)
  return config_lib.with_values(config, pinned), source


def _open_source(
  spelled: Mapping[str, str], key: str, workdir: Workdir
) -> model_sources.ModelSource:
  """Opens the model source of a key; a run that began with it may do without.

  Returns:
    The source; a MovedSource, with a warning, where a resumed run's is gone.

  Raises:
    FileNotFoundError: it does not exist, and the run has not begun with it.
  """
  try:
    return model_sources.parse(spelled[key], key)
  except FileNotFoundError as error:
    is_known = workdir.config.exists() and workdir.model.exists()
    if not is_known or spelled[key] != commits.recorded_init(key, workdir):
      raise
    _LOG.warning("%s. The run resumes without it as far as it can", error)
    return model_sources.MovedSource(spelled[key], workdir, str(error))


def _pin_data(data: Any, spelled: Mapping[str, str]) -> dict[str, Any]:
  """Returns the sources of a config with commits of the Hub, by key."""
  pinned = {
    key: sources.pin(spec)
    for key, spec in spelled.items()
    if key.startswith("data.")
  }
  mixture = [
    {**entry, "source": pinned[f"data.sources.{i}"]}
    for i, entry in enumerate(data.sources)
  ]
  prefix = "data.eval_sources."
  named = [
    f"{key.removeprefix(prefix)}={spec}"
    for key, spec in pinned.items()
    if key.startswith(prefix)
  ]
  return {
    "data.source": pinned["data.source"],
    "data.sources": tuple(mixture),
    "data.eval_source": pinned["data.eval_source"],
    "data.eval_sources": ",".join(named),
  }


def program_for(
  config: Any,
  source: model_sources.ModelSource,
  *,
  vocab_size: int,
  on: Mesh | None = None,
) -> Program:
  """Builds the program of a config on a mesh.

  Args:
    config: resolved.
    source: source of the policy.
    vocab_size: ids that the tokenizer may give.
    on: mesh of other devices than this machine's.

  Raises:
    ValueError: sizes that the model or the mesh cannot take, or see
      `program.build_program`.
  """
  placement = make_placement(
    on or mesh.make_mesh(config.mesh), config.parallelism
  )
  policy = source.policy(
    config.policy,
    vocab_size=vocab_size,
    value_head=needs_value_head(build_objective(config.loss)),
    adapters=config.lora,
  )
  if config.data.max_tokens > policy.config.max_positions:
    raise ValueError(
      f"data.max_tokens={config.data.max_tokens} exceeds the model's"
      f" max_positions={policy.config.max_positions}"
    )
  with jax.set_mesh(placement.mesh):
    attention.check_backend(policy.config.attention, policy.config.head_dim)
  placement.check_batch_size("batch_size", config.batch_size)
  placement.check_batch_size("eval.batch_size", config.eval.batch_size)
  return build_program(config, policy, placement)


def build_run(
  config: Any,
  workdir: Workdir,
  *,
  on: Mesh | None = None,
  acts_on_checks: bool = True,
) -> Run:
  """Checks a config and builds its run, without parameters.

  Args:
    config: complete.
    workdir: run directory.
    on: mesh of other devices than this machine's.
    acts_on_checks: whether findings of the checks of the data warn or stop;
      otherwise they are only recorded.

  Raises:
    ValueError: a mistake in the config, its data or its mesh.
    FileNotFoundError: data or a model that does not exist.
  """
  config, source = resolve(config, workdir)
  if jax.process_index() == 0:
    tracker.check_installed(config.log.trackers)
  judge = judges.get_eval_judge(config.eval)
  online_judge = judges.get_judge(config.online.judge, key="online.judge")
  settings = {key: config.data[key] for key in model_sources.TOKENIZER_KEYS}
  tokenizer = model_sources.open_tokenizer(settings)
  source.warn_of_other_ids(settings, tokenizer)
  program = program_for(config, source, vocab_size=tokenizer.vocab_size, on=on)
  evaluation.check_metric(config, program.objective, program.eval_objectives)
  data = Pipeline(
    config,
    tokenizer,
    program.objective,
    program.needs,
    program.policy.config.vocab_size,
    program.placement,
  ).build()
  if acts_on_checks:
    checks.act(data.checks)
  if config.epochs is not None:
    num_groups = config.epochs * len(data.train.indices)
    total_steps = max(round(num_groups / config.batch_size), 1)
    config = config_lib.with_values(config, {"total_steps": total_steps})
    config_lib.check_schedule(config)
    program = build_program(config, program.policy, program.placement)
  return Run(config, workdir, program, data, judge, online_judge)
