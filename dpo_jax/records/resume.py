"""Identity of a run: a resumed one has the config and data of its workdir."""

from collections.abc import Callable, Collection, Mapping
import json
import logging
from typing import Any

import ml_collections

from dpo_jax.config.keys import default_config, flatten
from dpo_jax.config.values import parse_allowed
from dpo_jax.losses import CATALOGUE, build_objective
from dpo_jax.records import history
from dpo_jax.records.workdir import Workdir
from dpo_jax.system.files import write_json

_LOG = logging.getLogger(__name__)

# Keys, or prefixes of keys, that do not decide what a run learns.
_PLACES = (
  "hosts.",
  "log.",
  "mesh.",
  "parallelism",
  "logps_chunk",
  "policy.remat",
  "data.max_shapes",
  "data.checks.",
  "data.template_timeout_s",
  "profile.",
  "workdir.",
  "numerics.max_log_ratio",
  "compilation_cache_dir",
  "checkpoint.every_steps",
  "checkpoint.keep",
  "eval.save_logps",
  "eval.api.",
  "resume.",
)
# Groups of losses without an accuracy.
_UNRANKED = ("first", "samples")
# Kinds of differences of a config, by the beginnings of keys; the rest is
# "config".
_KINDS = {
  "data": ("data.source", "data.eval_source"),
  "tokenizer": (
    *("data.tokenizer", "data.chat_template", "data.eos_token"),
    "data.template_date",
  ),
}
_KINDS_OF_DATA = {"data", "format", "tokenizer"}


def decides_result(key: str) -> bool:
  """Returns whether a config key decides what a run learns, beyond rounding."""
  return not key.startswith(_PLACES) and not key.endswith(".cache_dir")


def check_same_config(
  config: ml_collections.ConfigDict, workdir: Workdir
) -> dict[str, list[str]]:
  """Compares a config with the one that a workdir holds, if any.

  Keys that do not decide a result, `total_steps` and `epochs` are ignored.

  Args:
    config: resolved.
    workdir: run directory.

  Returns:
    The differences that `resume.allow` accepts: lines by kind, "config",
    "data" or "tokenizer".

  Raises:
    ValueError: other differences; shows them.
  """
  if not workdir.config.exists():
    return {}
  resolved = as_json(config)
  before = with_defaults(dict(flatten(workdir.read_config())))
  now = dict(flatten(resolved))
  # Runs once recorded "" for the tokenizer of policy.init.
  before["data.tokenizer"] = before["data.tokenizer"] or now["data.tokenizer"]
  was_accuracy = before["checkpoint.best_metric"] == "eval/reward/accuracy"
  if was_accuracy and build_objective(resolved["loss"]).group in _UNRANKED:
    # Once the default of losses too that have no accuracy.
    for key in ("checkpoint.best_metric", "checkpoint.best_is_lower"):
      before[key] = now[key]
  keys = {
    key
    for key in before.keys() | now.keys()
    # A run may take more steps; `_compare_schedules` says of which schedule.
    if decides_result(key) and key not in ("total_steps", "epochs")
  }
  accepted = {}
  of_kind = {
    kind: {key for key in keys if key.startswith(names)}
    for kind, names in _KINDS.items()
  }
  rest = keys.difference(*of_kind.values())
  for kind, its_keys in {"config": rest, **of_kind}.items():
    accepted |= _accept(
      kind,
      _differences(before, now, its_keys),
      config,
      f"{workdir} holds a run with another config",
      "Choose another workdir, or resume with the config that is there",
    )
  return accepted


def check_same(
  config: ml_collections.ConfigDict,
  identity: Mapping[str, Any],
  workdir: Workdir,
  build_schedule: Callable[[Any, int], Callable[[int], Any]],
) -> dict[str, list[str]]:
  """Compares a run with the one that its workdir holds, if any.

  Args:
    config: resolved.
    identity: `Data.identity`.
    workdir: run directory.
    build_schedule: (`config.optimizer`, steps) -> rate by step.

  Returns:
    The differences that `resume.allow` accepts: lines by kind, "config",
    "data", "tokenizer", "total_steps" or "format"; `record` writes them.

  Raises:
    ValueError: another config, data, tokenizer or template, or another number
      of steps under a schedule; shows the difference.
  """
  accepted: dict[str, list[str]] = {}
  for found in (
    check_same_config(config, workdir),
    _compare_schedules(config, workdir, build_schedule),
    _compare_data(config, identity, workdir),
  ):
    for kind, lines in found.items():
      accepted[kind] = accepted.get(kind, []) + lines
  return accepted


def _accept(
  kind: str, changed: list[str], config: Any, what: str, remedy: str
) -> dict[str, list[str]]:
  """Returns {kind: changed} if `resume.allow` has the kind; {} if all is equal.

  Args:
    kind: kind of the differences, see `config.DIFFERENCES`.
    changed: a line for each difference.
    config: resolved.
    what: beginning of an error's message.
    remedy: advice at the end of it.

  Raises:
    ValueError: they are not allowed.
  """
  if not changed:
    return {}
  if kind not in parse_allowed(config["resume"]["allow"]):
    lines = "\n".join(f"  {line}" for line in changed)
    raise ValueError(
      f"{what}:\n{lines}\n{remedy}. --config.resume.allow={kind} takes the"
      " difference"
    )
  return {kind: changed}


def _differences(
  before: Mapping[str, Any], now: Mapping[str, Any], keys: Collection[str]
) -> list[str]:
  return [
    f"{key}: {before.get(key)!r} there, {now.get(key)!r} now"
    for key in sorted(keys)
    if before.get(key) != now.get(key)
  ]


def _compare_schedules(
  config: Any,
  workdir: Workdir,
  build_schedule: Callable[[Any, int], Callable[[int], Any]],
) -> dict[str, list[str]]:
  """Compares total_steps, which decides the rates of a schedule that decays.

  Each curve is that of its own optimizer.

  Returns:
    As `_accept`, of kind "total_steps"; {} for a constant schedule.
  """
  if config["optimizer"]["schedule"] == "constant":
    return {}
  if not workdir.config.exists():
    return {}
  known = workdir.read_config()
  before = known.get("total_steps")
  if not isinstance(before, int):
    raise ValueError(
      f"{workdir.config} is damaged: total_steps={before!r} must be a number."
      " Restore it from a copy"
    )
  now = config["total_steps"]
  if before == now:
    return {}
  optimizer = ml_collections.ConfigDict(
    {
      key.removeprefix("optimizer."): value
      for key, value in with_defaults(dict(flatten(known))).items()
      if key.startswith("optimizer.")
    }
  )
  curves = [
    build_schedule(optimizer, before),
    build_schedule(config["optimizer"], now),
  ]
  longest = max(before, now)
  rates = [
    (step, *(float(curve(step)) for curve in curves))
    for step in (longest * quarter // 4 for quarter in range(5))
  ]
  return _accept(
    "total_steps",
    [
      f"total_steps: {before} there, {now} now",
      *(f"rate at step {n}: {a:.3g} there, {b:.3g} now" for n, a, b in rates),
    ],
    config,
    f"{workdir} holds a run whose learning rate follows another curve",
    "Resume with the total_steps that are there, or choose another workdir",
  )


def record(
  config: ml_collections.ConfigDict,
  description: Mapping[str, Any],
  accepted: Mapping[str, list[str]],
  workdir: Workdir,
  *,
  step: int | None = None,
) -> None:
  """Records a run in its workdir, at each start: config.json and data.json.

  data.json gets the description if it has none, or if other data are accepted;
  its history gets the differences and the step.

  Args:
    config: resolved.
    description: `Data.description`.
    accepted: differences that `check_same` has returned.
    workdir: run directory.
    step: step that the run has gone back to, from `go_back_to`.
  """
  workdir.write_config(as_json(config))
  known = history.read_data(workdir)
  if not history.is_described(known) or _KINDS_OF_DATA & accepted.keys():
    changes = history.read_history(workdir)
    write_json(workdir.data, {**description, "history": changes})
  if accepted or step:
    history.add_to_history(workdir, accepted, step)


def go_back_to(
  config: ml_collections.ConfigDict,
  accepted: Mapping[str, list[str]],
  workdir: Workdir,
) -> int | None:
  """Returns `resume.step`; None if it is not set, or the run went back to it.

  That is so if the history ends with that step, and no difference is accepted
  now. A job that is started again with the same command would otherwise never
  pass the step.

  Args:
    config: resolved.
    accepted: differences that `check_same` has returned.
    workdir: run directory.
  """
  step = config["resume"]["step"]
  # A reference that is taken has an entry after that of the step.
  changes = [
    entry
    for entry in history.read_history(workdir)
    if set(entry.get("accepted", ())) != {"reference"}
  ]
  last = changes[-1] if changes else {}
  if step is None or accepted or last.get("step") != step:
    return step
  _LOG.warning(
    "resume.step=%d was done at %s, and a restart does not repeat it. To go"
    ' back once more, delete that entry of "history" in %s',
    step,
    last.get("at"),
    workdir.data,
  )
  return None


def as_json(config: ml_collections.ConfigDict) -> dict[str, Any]:
  """Returns a config as config.json holds it, with `resume` at its defaults."""
  settings = config.to_dict() | {"resume": default_config().resume.to_dict()}
  return json.loads(json.dumps(settings, default=_plain))


def with_defaults(recorded: Mapping[str, Any]) -> dict[str, Any]:
  """Adds defaults for the keys that a recorded config lacks.

  An older version may have recorded it, which did not have these keys.

  Args:
    recorded: leaves of the config, as JSON, by path.
  """
  defaults = {
    key: value
    for key, value in flatten(default_config())
    if key.partition(".")[0] != "loss"
  }
  loss = CATALOGUE.get(recorded.get("loss.name", ""))
  if loss is not None:  # a list of losses has no name
    defaults |= {f"loss.{key}": value for key, value in loss.defaults.items()}
  return json.loads(json.dumps(defaults)) | dict(recorded)


def _plain(value: Any) -> Any:
  return dict(value) if isinstance(value, Mapping) else str(value)


def _compare_data(
  config: Any, identity: Mapping[str, Any], workdir: Workdir
) -> dict[str, list[str]]:
  """Compares data, tokenizer and template with what a run began with.

  Returns:
    As `_accept`, of kinds "data" and "tokenizer", or "format" where only the
    tokenized store differs.
  """
  before = history.read_data(workdir)
  if not history.is_described(before):
    is_new = not (workdir.saves.exists() or workdir.finished.exists())
    return _accept(
      "data",
      [] if is_new else [f"{workdir.data}: no digests there"],
      config,
      f"{workdir} does not tell on which data it was trained",
      "Restore data.json from a copy, or choose another workdir",
    )
  others = ("reports", "checks", "history")
  before = {k: v for k, v in before.items() if k not in others}
  if isinstance(before["train"], str):  # as older runs recorded a split
    identity = {
      name: f"{split['store']}, {split['groups']} groups"
      for name, split in identity.items()
      if name != "tokenizer"
    }
  before, now = (dict(flatten(x)) for x in (before, identity))
  keys = before.keys() | now.keys()
  of_text = {key for key in keys if key.startswith("tokenizer.")}
  # A store follows from all others, and from the code that made it.
  of_store = {key for key in keys if key.endswith(".store")}
  tokenizer = _differences(before, now, of_text)
  data = _differences(before, now, keys - of_text - of_store)
  store = _differences(before, now, of_store)
  remedy = "Restore the old files, or choose another workdir"
  accepted = _accept(
    "data", data, config, f"{workdir} holds a run on other data", remedy
  ) | _accept(
    "tokenizer",
    tokenizer,
    config,
    f"{workdir} holds a run with another tokenizer or chat template",
    remedy,
  )
  if store and not accepted:
    return _accept(
      "format",
      store,
      config,
      f"{workdir} holds a run whose data are the same, but were tokenized by"
      " another version of dpo_jax",
      f"Resume it with the version in {workdir.git}, or choose another workdir",
    )
  return accepted
