"""Checks of a resumed run: its config and data are those of its workdir."""

from collections.abc import Mapping
import json
import logging
import re
from typing import Any

import ml_collections

from dpo_jax.config.keys import default_config, flatten
from dpo_jax.config.values import parse_pairs
from dpo_jax.losses import build_objective
from dpo_jax.records.workdir import Workdir
from dpo_jax.system.files import read_json, write_json

_LOG = logging.getLogger(__name__)

# Keys, or prefixes of keys, that do not decide what a run learns.
_PLACES = (
  "log.",
  "mesh.",
  "parallelism",
  "logps_chunk",
  "policy.remat",
  "data.max_shapes",
  "data.checks.",
  "profile.",
  "compilation_cache_dir",
  "checkpoint.every_steps",
  "checkpoint.keep",
  "eval.save_logps",
)
# Groups of losses without an accuracy.
_UNRANKED = ("first", "samples")
_COMMIT = "[0-9a-f]{40}"


def decides_result(key: str) -> bool:
  """Returns whether a config key decides what a run learns, beyond rounding."""
  return not key.startswith(_PLACES) and not key.endswith(".cache_dir")


def check_same_config(
  config: ml_collections.ConfigDict, workdir: Workdir
) -> None:
  """Compares a config with the one that a workdir holds, if any.

  Args:
    config: resolved.
    workdir: run directory.

  Raises:
    ValueError: the workdir belongs to a run with another config; shows the
      difference.
  """
  if not workdir.config.exists():
    return
  resolved = _as_json(config)
  before, now = _recorded(workdir), dict(flatten(resolved))
  # Runs once recorded "" for the tokenizer of policy.init.
  before["data.tokenizer"] = before["data.tokenizer"] or now["data.tokenizer"]
  was_accuracy = before["checkpoint.best_metric"] == "eval/reward/accuracy"
  if was_accuracy and build_objective(resolved["loss"]).group in _UNRANKED:
    # Once the default of losses too that have no accuracy.
    for key in ("checkpoint.best_metric", "checkpoint.best_is_lower"):
      before[key] = now[key]
  changed = [
    f"  {key}: {before.get(key)!r} there, {now.get(key)!r} now"
    for key in sorted(before.keys() | now.keys())
    if before.get(key) != now.get(key)
    and decides_result(key)
    and key not in ("total_steps", "epochs")  # a run may take more steps
  ]
  if changed:
    raise ValueError(
      f"{workdir} holds a run with another config:\n"
      + "\n".join(changed)
      + "\nChoose another workdir, or resume with the config that is there"
    )


def record_config(
  config: ml_collections.ConfigDict, workdir: Workdir, *, is_writer: bool
) -> None:
  """Records a config in a workdir, once it is the one there.

  Args:
    config: resolved.
    workdir: run directory.
    is_writer: whether this process writes.

  Raises:
    ValueError: see `check_same_config`.
  """
  check_same_config(config, workdir)
  if is_writer:
    workdir.write_config(_as_json(config))


def recorded_spellings(
  config: ml_collections.ConfigDict, workdir: Workdir
) -> dict[str, str]:
  """Returns the spellings of models and data, with the commits of a run.

  Args:
    config: resolved.
    workdir: run directory.

  Returns:
    Spellings by key; "data.sources.0" and "data.eval_sources.NAME" for one of
    several. A branch of the Hub is the commit that the run began with, where
    the workdir holds one of the same repository and split.
  """
  given = _spellings(config.to_dict())
  if not workdir.config.exists():
    return given
  recorded = _spellings(workdir.read_config())
  return {
    key: _recorded_commit(value, recorded.get(key, ""))
    for key, value in given.items()
  }


def _spellings(settings: Mapping[str, Any]) -> dict[str, str]:
  data = settings["data"]
  found = {
    "policy.init": settings["policy"]["init"],
    "reference.init": settings["reference"]["init"],
    "data.source": data["source"] or "",
    "data.eval_source": data["eval_source"],
  }
  for i, entry in enumerate(data.get("sources", ())):
    found[f"data.sources.{i}"] = entry["source"]
  named = parse_pairs(data.get("eval_sources", ""), "data.eval_sources", "")
  for name, source in named.items():
    found[f"data.eval_sources.{name}"] = source
  return found


def _recorded_commit(given: str, recorded: str) -> str:
  (name, _, rest), (old_name, _, old_rest) = (
    text.partition("@") for text in (given, recorded)
  )
  (revision, _, split), (_, _, old_split) = (
    text.partition(":") for text in (rest, old_rest)
  )
  is_branch = name.startswith("hub:") and not re.fullmatch(_COMMIT, revision)
  # A record names the config of data, and their split, in any case.
  is_same = f"{old_name}/".startswith(f"{name}/") and split in ("", old_split)
  if not (is_branch and is_same):
    return given
  _LOG.info("%r is %s, as when this run began", given, recorded)
  return recorded


def _as_json(config: ml_collections.ConfigDict) -> dict[str, Any]:
  return json.loads(json.dumps(config.to_dict(), default=_plain))


def _recorded(workdir: Workdir) -> dict[str, Any]:
  """Reads a run's config; a key that its version lacked has the default."""
  recorded = workdir.read_config()
  defaults = {
    key: value
    for key, value in flatten(default_config())
    if key.partition(".")[0] != "loss"
  }
  return json.loads(json.dumps(defaults)) | dict(flatten(recorded))


def _plain(value: Any) -> Any:
  return dict(value) if isinstance(value, Mapping) else str(value)


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
  before = {k: v for k, v in before.items() if k not in ("reports", "checks")}
  if isinstance(before["train"], str):  # as older runs recorded a split
    identity = {
      name: f"{split['store']}, {split['groups']} groups"
      for name, split in identity.items()
      if name != "tokenizer"
    }
  before, now = (dict(flatten(x)) for x in (before, identity))
  changed = [
    f"  {key}: {before.get(key)!r} there, {now.get(key)!r} now"
    for key in sorted(before.keys() | now.keys())
    if before.get(key) != now.get(key)
  ]
  is_content = [
    key for key in before.keys() | now.keys() if not key.endswith(".store")
  ]
  if changed and all(before.get(k) == now.get(k) for k in is_content):
    raise ValueError(
      f"{workdir} holds a run whose data are the same, but were tokenized by"
      " another version of dpo_jax: resume it with the version in"
      f" {workdir.git}, or choose another workdir"
    )
  if changed:
    raise ValueError(
      f"{workdir} holds a run on other data, or with another tokenizer or chat"
      " template:\n"
      + "\n".join(changed)
      + "\nRestore the old files, or choose another workdir"
    )


def record_data(description: Mapping[str, Any], workdir: Workdir) -> None:
  """Records what a run reads, at its first start; see `Data.description`."""
  if not workdir.data.exists():
    write_json(workdir.data, description)
