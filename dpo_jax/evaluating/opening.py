"""Opens a run to evaluate it, without its lock: program, data and state."""

from collections.abc import Mapping
import dataclasses
import logging
from typing import Any

from etils import epath

from dpo_jax import config as config_lib
from dpo_jax import judges, model_sources
from dpo_jax.data.pipeline import Pipeline
from dpo_jax.losses import build_objective
from dpo_jax.records.checkpoint import Checkpoints, open_checkpoints
from dpo_jax.records.resume import as_json
from dpo_jax.records.workdir import Workdir
from dpo_jax.system.files import read_json
from dpo_jax.training import initial_state, setup
from dpo_jax.training.program import Program, build_program, needs_value_head
from dpo_jax.training.setup import EvalRun
from dpo_jax.types import TrainState

_LOG = logging.getLogger(__name__)
_TRIES = 5  # a running run deletes steps while they are read


def open_run(
  recorded: Any, config: Any, workdir: Workdir
) -> tuple[EvalRun, Program]:
  """Builds all that an evaluation of a run reads, without parameters.

  It logs a warning where the held-out records have changed since the run began.

  Args:
    recorded: config of the run.
    config: config of the evaluation.
    workdir: run directory.

  Returns:
    The run to evaluate, with the program of the evaluation's losses; and the
    program with the loss, reference and online settings of the run.

  Raises:
    ValueError: a config, data or a mesh that does not fit the run, or no
      held-out data.
    FileNotFoundError: data or a model that does not exist.
  """
  config, source = setup.resolve_spellings(config, workdir)
  judge = judges.get_eval_judge(config.eval)
  settings = {key: config.data[key] for key in model_sources.TOKENIZER_KEYS}
  tokenizer = model_sources.open_tokenizer(settings)
  theirs = config_lib.resolve(recorded).to_dict()
  theirs = {key: theirs[key] for key in ("loss", "reference", "online")}
  trained = setup.program_for(
    config_lib.with_values(config, theirs | {"eval.losses": ()}),
    source,
    vocab_size=tokenizer.vocab_size,
  )
  _check_value_head(config, trained)
  program = build_program(config, trained.policy, trained.placement)
  data = Pipeline(
    config,
    tokenizer,
    program.objective,
    program.needs,
    program.policy.config.vocab_size,
    program.placement,
  ).build_held_out()
  if not data.eval:
    raise ValueError(
      f"{workdir} has no held-out data: name some with"
      " --config.data.eval_source"
    )
  run = EvalRun(config, workdir, program, data, judge)
  _warn_of_other_data(run, recorded)
  return run, trained


def _check_value_head(config: Any, trained: Program) -> None:
  objective = build_objective(config.loss)
  if needs_value_head(objective) and not trained.policy.config.value_head:
    raise ValueError(
      f"loss {objective.name!r} reads a value head, and the run trained none"
    )


def _warn_of_other_data(run: EvalRun, recorded: Any) -> None:
  """Warns of each held-out set whose records have changed since the run began.

  A set that the evaluation reads from another source is not compared.

  Args:
    run: run to evaluate.
    recorded: config of the run.
  """
  path = run.workdir.data
  before = read_json(path) if path.exists() else {}
  sources = _sources(as_json(recorded)["data"])
  for split, source in _sources(as_json(run.config)["data"]).items():
    then = before.get(split)
    # Runs of older versions recorded a text.
    if source != sources.get(split) or not isinstance(then, Mapping):
      continue
    if then["content"] != run.data.identity()[split]["content"]:
      _LOG.warning(
        "the records of %s have changed since the run began with them", split
      )


def _sources(data: Mapping[str, Any]) -> dict[str, Any]:
  """Returns what each held-out split is read from.

  Args:
    data: `config.data` as JSON.
  """
  return {
    config_lib.split_name(name): source or [data["source"], data["sources"]]
    for name, source in config_lib.eval_sets(data).items()
  }


def load_state(
  run: EvalRun, trained: Program, recorded: Any, wanted: str
) -> tuple[int, TrainState]:
  """Loads the state of a checkpoint onto the mesh.

  A running run may delete a step while it is read; then a step is chosen again.

  Args:
    run: run to evaluate.
    trained: program that it was trained with.
    recorded: config of the run.
    wanted: "best", "latest" or a number, as text.

  Returns:
    The step; and its state without an optimizer state, with all that the
    evaluated loss reads, see `_fit`.

  Raises:
    FileNotFoundError: a run without a checkpoint.
    ValueError: no such step, or a checkpoint of another model.
  """
  target, _ = trained.abstract_state()
  for tries_left in reversed(range(_TRIES)):
    before = _names(run.workdir.checkpoints)
    if not before:  # opening them would make the folder
      raise _no_checkpoint(run.workdir, recorded)
    checkpoints = open_checkpoints(
      run.workdir, recorded, is_reader=True, part=""
    )
    try:
      step = _choose_step(checkpoints, run.workdir, recorded, wanted)
      state = checkpoints.restore_without_optimizer(target, step=step)
      break
    except Exception:  # of Orbax too, where files are gone
      if not tries_left or before == _names(run.workdir.checkpoints):
        raise
      _LOG.warning("a checkpoint was saved or deleted meanwhile: looking again")
    finally:
      checkpoints.close()
  as_trained = dataclasses.replace(run, program=trained)
  state = initial_state.with_frozen(as_trained, state)
  return step, _fit(run, trained, state)


def _names(folder: epath.Path) -> set[str]:
  return {path.name for path in folder.iterdir()} if folder.exists() else set()


def _no_checkpoint(workdir: Workdir, recorded: Any) -> FileNotFoundError:
  if workdir.finished.exists():
    return FileNotFoundError(
      f"{workdir} has lost its checkpoints: none in {workdir.checkpoints} is"
      f" whole, and {workdir.quarantine} holds what was moved aside"
    )
  every_steps = recorded.checkpoint.every_steps or recorded.total_steps
  return FileNotFoundError(
    f"{workdir} has no finished checkpoint yet: the run saves every"
    f" {every_steps} steps"
  )


def _choose_step(
  checkpoints: Checkpoints, workdir: Workdir, recorded: Any, wanted: str
) -> int:
  steps = checkpoints.steps
  if not steps:
    raise _no_checkpoint(workdir, recorded)
  if wanted == "best":
    return checkpoints.best_step
  if wanted == "latest":
    return steps[-1]
  if not wanted.isdecimal() or int(wanted) not in steps:
    raise ValueError(
      f"step={wanted!r} must be best, latest or a step of {workdir}:"
      f" {', '.join(map(str, steps))}"
    )
  return int(wanted)


def _fit(run: EvalRun, trained: Program, state: TrainState) -> TrainState:
  """Adds to a state what the evaluated loss reads and the trained one did not.

  A loss that differs from the trained one starts with its initial loss state. A
  live reference that the checkpoint does not hold is loaded from its source.
  """
  program = run.program
  if program.objective != trained.objective:
    state = state.replace(loss_state=program.objective.init())
  if program.has_live_reference and state.ref_params is None:
    ref_params: Any = {}
    if program.reference_kind != "adapter_off":
      whole = initial_state.load_params(run, run.reference_init)
      ref_params = program.split_params(whole)[0]
    state = state.replace(ref_params=ref_params)
  return state
