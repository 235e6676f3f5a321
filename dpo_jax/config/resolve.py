"""Resolves a config: fills in defaults, checks ranges and combinations.

Checks all that does not depend on data, model or devices.
"""

from collections.abc import Mapping
import logging
import math
import re
import types
from typing import Any

import ml_collections

from dpo_jax.config import values
from dpo_jax.config.keys import default_config, flatten
from dpo_jax.config.online import resolve_online
from dpo_jax.losses import Knob, Objective, WeightedSum, build_objective
from dpo_jax.names import did_you_mean
from dpo_jax.types import fields_of

_LOG = logging.getLogger(__name__)
_DEFAULT_STEPS = 1000
_EMA = dict(alpha=0.6, every_steps=512)  # arXiv:2404.09656


def resolve(
  config: ml_collections.ConfigDict,
) -> ml_collections.FrozenConfigDict:
  """Fills in the keys that a config leaves open, and checks it.

  Args:
    config: complete; not changed.

  Returns:
    A copy that cannot be changed, with a value for every knob that the run
    reads. Resolving it again gives the same.

  Raises:
    ValueError: unknown or missing keys, values out of range, knobs that are
      set and not read, or keys that do not go together.
  """
  check_keys(config)
  settings = config.copy_and_resolve_references().to_dict()
  if settings["lora"] is None:
    settings["lora"] = default_config().lora.to_dict()
  _resolve_length(settings)
  _check_values(settings)
  objective = build_objective(config.loss)
  loss = objective.to_dict()
  if isinstance(loss, dict):
    loss = {**settings["loss"], **loss}
  settings["loss"] = loss
  _resolve_data(settings["data"])
  _resolve_reference(settings, objective)
  resolve_online(settings, objective)
  _resolve_best(settings, objective)
  _check_values(settings)
  if settings["total_steps"] is not None:
    check_schedule(settings)
  _warn_of_best(settings)
  values.parse_steps(settings["profile"]["steps"])
  values.parse_allowed(settings["resume"]["allow"])
  values.parse_trackers(settings["log"]["trackers"])
  return _freeze(settings)


def with_values(
  config: ml_collections.FrozenConfigDict, changes: Mapping[str, Any]
) -> ml_collections.FrozenConfigDict:
  """Returns a copy of a resolved config with some values set, unchecked.

  Args:
    config: resolved.
    changes: values by path, such as "policy.init".
  """
  settings = config.to_dict()
  for path, value in changes.items():
    *outer, last = path.split(".")
    node = settings
    for key in outer:
      node = node[key]
    node[last] = value
  return _freeze(settings)


def _freeze(settings: dict[str, Any]) -> ml_collections.FrozenConfigDict:
  """Makes settings read-only, dicts in a list (losses) included."""

  def freeze(value):
    if isinstance(value, dict):
      return {key: freeze(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
      return tuple(
        types.MappingProxyType(dict(item))
        if isinstance(item, Mapping)
        else item
        for item in value
      )
    return value

  return ml_collections.FrozenConfigDict(freeze(settings))


def check_keys(config: ml_collections.ConfigDict) -> None:
  """Checks that a config has all keys of `default_config` and no others.

  The keys within `loss` are not checked. `mesh` may lack axes, and `lora` may
  be None.

  Raises:
    ValueError: names all missing and unknown keys at once, unknown ones with
      the nearest that exists.
  """
  # A loss, or a list of them, is checked by `build_objective`.
  known = dict(flatten(default_config()))
  wanted, found = (
    {k: v for k, v in keys if k.partition(".")[0] != "loss"}
    for keys in (known.items(), flatten(config))
  )
  if "loss" not in config:
    raise ValueError("config.loss is missing")
  if config.get("lora", {}) is None:
    found |= {key: None for key in wanted if key.startswith("lora.")}
    del found["lora"]
  faults = [
    f"config.{key} is unknown.{did_you_mean(key, known)}"
    for key in found
    if key not in wanted
  ]
  # An axis that a config does not name is 1.
  faults += [
    f"config.{key} is missing"
    for key in wanted
    if key not in found and not key.startswith("mesh.")
  ]
  if faults:
    raise ValueError("\n".join(faults))


def _check_values(settings: Mapping[str, Any]) -> None:
  found = dict(flatten(settings))
  for key, knob in values.VALUES.items():
    if found.get(key) is not None:
      knob.check(key, found[key])
  factor = settings["numerics"]["skip_spikes"]
  if 0 < factor <= 1:
    raise ValueError(
      f"numerics.skip_spikes={factor} would skip half of all steps: set it"
      " above 1, or to 0 to skip none"
    )
  data = settings["data"]
  if data["max_prompt_tokens"] >= data["max_tokens"]:
    raise ValueError(
      f"data.max_prompt_tokens={data['max_prompt_tokens']} must be below"
      f" data.max_tokens={data['max_tokens']}"
    )
  values.check_sampling(settings["eval"])


def check_schedule(config: Mapping[str, Any]) -> None:
  """Raises ValueError where warm-up takes all steps of a decaying schedule."""
  schedule, warmup = (
    config["optimizer"][key] for key in ("schedule", "warmup_steps")
  )
  if schedule != "constant" and warmup >= config["total_steps"]:
    raise ValueError(
      f"optimizer.warmup_steps={warmup} must be below"
      f" total_steps={config['total_steps']}, or the schedule never decays"
    )


def _resolve_length(settings: dict[str, Any]) -> None:
  """Sets total_steps or epochs, the other to None; by default 1,000 steps."""
  total_steps, epochs = settings["total_steps"], settings["epochs"]
  if total_steps and epochs:
    raise ValueError(
      f"total_steps={total_steps} and epochs={epochs} both say how long the run"
      " is: set the other to 0"
    )
  # 0 stands for one that is not set, where a config file sets it.
  if epochs == 0:
    settings["epochs"] = None
  elif epochs:
    settings["total_steps"] = None
  if total_steps is None and not epochs:
    settings["total_steps"] = _DEFAULT_STEPS


def _resolve_data(data: dict[str, Any]) -> None:
  """Checks sources, weights and names of sets, and fills in a source."""
  if data["source"] and data["sources"]:
    raise ValueError(
      f"data.source={data['source']!r} and data.sources exclude each other:"
      " put the first into data.sources, with a weight"
    )
  if not data["sources"]:
    data["source"] = data["source"] or "synthetic:review_pairs"
  for entry in data["sources"]:
    if not isinstance(entry, Mapping) or set(entry) != {"source", "weight"}:
      raise ValueError(
        f"data.sources: {entry!r} must have 'source' and 'weight'"
      )
    Knob(float, "share of a batch", low=0, above=True).check(
      f"data.sources: weight of {entry['source']!r}", entry["weight"]
    )
  names = [entry["source"] for entry in data["sources"]]
  if len(set(names)) != len(names):
    raise ValueError(f"data.sources names a source twice: {', '.join(names)}")
  if data["eval_source"] and data["eval_sources"]:
    raise ValueError(
      "data.eval_source and data.eval_sources exclude each other: give the"
      " first a name in data.eval_sources"
    )
  for name, source in eval_sets(data).items():
    if name and not source:
      raise ValueError(f"data.eval_sources: {name!r} has no source")
    if not re.fullmatch(r"[\w-]*", name) or name == "eval":
      raise ValueError(
        f"data.eval_sources: the name {name!r} must be letters, digits, '_' or"
        " '-', and not 'eval'"
      )


def _warn_of_best(settings: Mapping[str, Any]) -> None:
  """Warns where few evaluated steps are saved, as only these can be best."""
  every_eval = settings["eval"]["every_steps"]
  every_save = settings["checkpoint"]["every_steps"]
  if every_eval and every_save and every_save % every_eval:
    _LOG.warning(
      "checkpoint.every_steps=%d is not a multiple of eval.every_steps=%d: only"
      " steps that are evaluated and saved, every %d, can be the best",
      every_save,
      every_eval,
      math.lcm(every_save, every_eval),
    )


def eval_sets(data: Mapping[str, Any]) -> dict[str, str]:
  """Returns the source of each held-out set by name.

  Args:
    data: `config.data`.

  Returns:
    Sources by name, in their order. The one set without a name is "", with
    the source "" where it is a part of the training data.
  """
  if data["eval_sources"]:
    return values.parse_pairs(
      data["eval_sources"],
      "data.eval_sources",
      "helpful=jsonl:a.jsonl,harmless=jsonl:b.jsonl",
    )
  return {"": data["eval_source"]}


def split_name(name: str) -> str:
  """Returns a held-out set's split in metrics.jsonl: 'eval' or 'eval/NAME'."""
  return f"eval/{name}" if name else "eval"


def metric_prefix(name: str) -> str:
  """Returns the prefix of a held-out set's metrics: 'eval/' or 'NAME:'."""
  return f"{name}:" if name else "eval/"


def _resolve_reference(
  settings: dict[str, Any], objective: Objective | WeightedSum
) -> None:
  """Sets `reference.kind` if it is "auto", and the knobs of the kind "ema".

  Raises:
    ValueError: a kind that the loss or the adapters rule out, or knobs of "ema"
      that are set with another kind.
  """
  reference = settings["reference"]
  has_adapters = settings["lora"]["rank"] > 0
  live = sorted(objective.needs & fields_of("live_reference"))
  if reference["kind"] == "auto":
    if not objective.needs_reference:
      reference["kind"] = "none"
    else:
      off = (
        "adapter_off" if has_adapters and not reference["init"] else "frozen"
      )
      reference["kind"] = off if live else "cached"
  kind = reference["kind"]
  if objective.needs_reference and kind == "none":
    raise ValueError(
      f"loss {objective.name!r} compares with a reference: set reference.kind"
      " to 'cached' or 'frozen', or loss.reward to one without a reference"
    )
  if kind == "adapter_off" and (reference["init"] or not has_adapters):
    raise ValueError(
      "reference.kind='adapter_off' is the policy without its adapters: set"
      " lora.rank above 0 and leave reference.init empty"
    )
  if live and kind == "cached":
    raise ValueError(
      f"loss {objective.name!r} reads {', '.join(live)}, and a cache holds"
      " summed log-probs only: set reference.kind='frozen'"
    )
  for knob, default in _EMA.items():
    value = reference[knob]
    if kind != "ema" and value is not None:
      raise ValueError(
        f"reference.{knob}={value} is set, and only reference.kind='ema' reads"
        f" it; the kind is {kind!r}"
      )
    if kind == "ema" and value is None:
      reference[knob] = default


def _resolve_best(
  settings: dict[str, Any], objective: Objective | WeightedSum
) -> None:
  """Fills in the best checkpoint's metric, "" for the latest, and its sign."""
  checkpoint = settings["checkpoint"]
  if checkpoint["best_metric"] is None:
    prefix = metric_prefix(next(iter(eval_sets(settings["data"]))))
    if objective.group in ("single", "pair", "ranking"):
      metric = f"{prefix}reward/accuracy"
    elif objective.group == "first":
      metric = f"{prefix}loss"
    else:
      is_judged = settings["eval"]["num_samples"] and settings["eval"]["judge"]
      compares = settings["eval"]["judge"].startswith("api:")
      name = "win_rate" if compares else "reward"
      metric = f"{prefix}sample/{name}" if is_judged else ""
    checkpoint["best_metric"] = metric
  if checkpoint["best_is_lower"] is None:
    lower = ("loss", "/kl", ":kl")
    checkpoint["best_is_lower"] = checkpoint["best_metric"].endswith(lower)
