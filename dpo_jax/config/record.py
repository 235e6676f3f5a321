"""The config that a workdir records, and which keys may change on a resume."""

from collections.abc import Mapping
import json
from typing import Any

import ml_collections

from dpo_jax.config.keys import default_config, flatten
from dpo_jax.workdir import Workdir

# Keys, or their beginnings, that do not decide what a run learns.
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
)


def decides_result(key: str) -> bool:
  """Whether a key decides what a run learns, but for rounding."""
  return not key.startswith(_PLACES) and not key.endswith(".cache_dir")


def settle(
  config: ml_collections.ConfigDict, workdir: Workdir, *, is_writer: bool
) -> None:
  """Records a config in a workdir, or compares it with the one there.

  Args:
    config: resolved.
    workdir: run directory.
    is_writer: whether this process writes.

  Raises:
    ValueError: the workdir belongs to a run with another config; shows the
      difference.
  """
  resolved = json.loads(json.dumps(config.to_dict(), default=_plain))
  if workdir.config.exists():
    before, now = _recorded(workdir), dict(flatten(resolved))
    # Runs once recorded "" for the tokenizer of policy.init.
    before["data.tokenizer"] = before["data.tokenizer"] or now["data.tokenizer"]
    if before["checkpoint.best_metric"] == "eval/reward/accuracy":
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
        + "\nChoose another workdir, or go on with the config that is there"
      )
  if is_writer:
    workdir.write_config(resolved)


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
