"""The config of an evaluation: that of the run, and what may differ from it."""

from collections.abc import Mapping
from typing import Any

import ml_collections

from dpo_jax.config import default_config, flatten, loss_config
from dpo_jax.records.resume import as_json
from dpo_jax.records.workdir import Workdir

# Keys, or prefixes of keys, that an evaluation may set.
_TAKEN = (
  "eval.",
  "loss.",
  "data.eval_source",  # data.eval_sources too
  "data.cache_dir",
  "data.layout",
  "data.row_tokens",
  "data.max_shapes",
  "data.template_timeout_s",
  "mesh.",
  "logps_chunk",
  "policy.attention",
  "reference.cache_dir",
  "compilation_cache_dir",
  "log.progress",
)
# How records are read: of held-out sets with a source of their own.
_OF_RECORDS = (
  "data.format",
  "data.columns",
  "data.roles",
  "data.scored_turns",
  "data.special_tokens",
  "data.max_broken_records",
  "data.max_tokens",
  "data.max_prompt_tokens",
)
# Settings of a run's own evaluations, which nothing would read.
_UNREAD = ("eval.every_steps", "eval.save_logps")
# References that a checkpoint holds; the others are found by the loss.
_IN_CHECKPOINT = ("frozen", "adapter_off", "ema")


def recorded_config(workdir: Workdir) -> ml_collections.ConfigDict:
  """Returns the config in WORKDIR/config.json, with defaults for missing keys.

  `epochs` is None if the config has total_steps, which follow from it.

  Raises:
    ValueError: a damaged config.json.
  """
  defaults = default_config().copy_and_resolve_references().to_dict()
  settings = _merge(defaults, workdir.read_config())
  if settings["total_steps"]:
    settings["epochs"] = None  # from which the steps were computed
  return ml_collections.ConfigDict(settings)


def _merge(defaults: Mapping[str, Any], recorded: Any) -> dict[str, Any]:
  merged = dict(defaults)
  for key, value in recorded.items():
    if key != "loss" and isinstance(value, Mapping):
      value = _merge(merged.get(key) or {}, value)
    merged[key] = tuple(value) if isinstance(value, list) else value
  return merged


def evaluation_config(
  recorded: ml_collections.ConfigDict, given: Mapping[str, Any]
) -> ml_collections.ConfigDict:
  """Returns the config of an evaluation, which is not resolved yet.

  Args:
    recorded: config of the run.
    given: values by key, such as "eval.num_samples".

  Raises:
    ValueError: keys that would change what was trained, or that nothing would
      read.
  """
  config = ml_collections.ConfigDict(recorded.to_dict())
  with config.ignore_type():
    if "data.eval_source" in given:
      config.data.eval_sources = ""
    if "data.eval_sources" in given:
      config.data.eval_source = ""
    if changes_loss(given):
      _prepare_loss(config, given)
    for key, value in given.items():
      *outer, last = key.split(".")
      node = config
      for name in outer:
        node = node[name]
      node[last] = value
  _check_keys(given, config)
  return config


def check_samples_are_drawn(
  config: ml_collections.ConfigDict, given: Mapping[str, Any], against: str
) -> None:
  """Checks that samples are drawn if a given judge or `against` reads them.

  Args:
    config: config of the evaluation.
    given: values by key.
    against: responses that samples are compared with, see `AGAINST`.

  Raises:
    ValueError: eval.num_samples is 0, and eval.judge is given, or `against` is
      not "reference".
  """
  unread = []
  if against != "reference":
    unread.append(f"against={against!r}")
  if given.get("eval.judge"):
    unread.append(f"eval.judge={given['eval.judge']!r}")
  if unread and not config.eval.num_samples:
    raise ValueError(
      f"{' and '.join(unread)} needs samples, and eval.num_samples=0: set"
      " --config.eval.num_samples"
    )


def changes_loss(given: Mapping[str, Any]) -> bool:
  """Returns whether a given key starts with "loss."."""
  return any(key.startswith("loss.") for key in given)


def _prepare_loss(
  config: ml_collections.ConfigDict, given: Mapping[str, Any]
) -> None:
  """Changes a config in place so that it takes the given keys of a loss.

  A given loss.name resets `loss` to that loss's defaults, and `eval.losses` to
  () unless it is given. `online` gets its defaults, and a reference that no
  checkpoint holds becomes "auto".

  Raises:
    ValueError: the run was trained with a sum of losses, and no name is given.
  """
  if "loss.name" in given:
    config.loss = loss_config(given["loss.name"])
    if "eval.losses" not in given:
      config.eval.losses = ()
  elif not isinstance(config.loss, Mapping | ml_collections.ConfigDict):
    raise ValueError(
      "the run was trained with a sum of losses: name one with"
      " --config.loss.name"
    )
  config.online = default_config().online  # held-out responses are read
  if config.reference.kind not in _IN_CHECKPOINT:
    config.reference.kind = "auto"


def _check_keys(
  given: Mapping[str, Any], config: ml_collections.ConfigDict
) -> None:
  data = config.data
  has_own_source = data.eval_source or data.eval_sources
  taken = _TAKEN + (_OF_RECORDS if has_own_source else ())
  wrong = [key for key in given if not key.startswith(taken)]
  unread = [key for key in given if key in _UNREAD]
  of_records = [key for key in wrong if key.startswith(_OF_RECORDS)]
  if of_records:
    raise ValueError(
      f"{', '.join(of_records)}: the held-out groups are a part of the training"
      " data, and would be others. Name a source with --config.data.eval_source"
    )
  if wrong:
    raise ValueError(
      f"an evaluation does not take {', '.join(wrong)}: it reads a run as it"
      f" was trained. It takes {', '.join(_TAKEN).replace('.,', '.*,')}"
    )
  if unread:
    raise ValueError(
      f"an evaluation does not read {', '.join(unread)}: it measures once, and"
      " writes one file"
    )


def differences(
  recorded: ml_collections.ConfigDict, config: ml_collections.ConfigDict
) -> dict[str, dict[str, Any]]:
  """Returns what an evaluation changes: {"run": ..., "here": ...} by key."""
  before, now = (dict(flatten(as_json(c))) for c in (recorded, config))
  return {
    key: {"run": before.get(key), "here": now.get(key)}
    for key in sorted(before.keys() | now.keys())
    if before.get(key) != now.get(key)
  }
