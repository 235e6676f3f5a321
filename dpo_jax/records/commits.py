"""Commits of the Hub that a run began with; a resumed one keeps them."""

from collections.abc import Mapping
import logging
import re
from typing import Any

import ml_collections

from dpo_jax.config.values import parse_pairs
from dpo_jax.records.workdir import Workdir

_LOG = logging.getLogger(__name__)
_COMMIT = "[0-9a-f]{40}"


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


def recorded_init(key: str, workdir: Workdir) -> str:
  """Returns the policy.init or reference.init that a run began with."""
  return _spellings(workdir.read_config())[key]


def _spellings(settings: Mapping[str, Any]) -> dict[str, str]:
  data, policy, reference = (
    settings.get(key) or {} for key in ("data", "policy", "reference")
  )
  found = {
    "policy.init": policy.get("init") or "",
    "reference.init": reference.get("init") or "",
    "data.source": data.get("source") or "",
    "data.eval_source": data.get("eval_source") or "",
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
