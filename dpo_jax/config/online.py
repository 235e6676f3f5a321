"""Resolves the keys of on-policy batches: `config.online`."""

from collections.abc import Mapping
import math
from typing import Any

from dpo_jax.losses import Objective, WeightedSum

_SHARED = dict(
  judge="",
  every_steps=1,
  epochs=1,
  num_samples=2,
  max_response_tokens=128,
  max_kl=200.0,
)
_ONLINE: dict[str, dict[str, Any]] = {
  "none": {},
  "pairs": _SHARED
  | dict(
    temperature=1.0,
    label="argmax",
    flips=0.0,
    offline_fraction=None,
    replay=None,
    kl_weight=None,
  ),
  "rollouts": _SHARED | dict(kl_weight=0.05, kl_target=0.0, kl_gain=0.1),
}
_GAE = dict(discount=1.0, gae_lambda=0.95)  # arXiv:1707.06347, sec. 5


def resolve_online(
  settings: dict[str, Any], objective: Objective | WeightedSum
) -> None:
  """Fills in the knobs of on-policy batches; checks that they fit the loss.

  Args:
    settings: all settings of a run; unset knobs of "online" that its kind
      reads are set in place.
    objective: loss of the run.

  Raises:
    ValueError: a kind that does not fit the loss, knobs that are set and not
      read, or values that do not go together.
  """
  online, group = settings["online"], objective.group
  kind = online["kind"]
  if (group == "samples") != (kind == "rollouts"):
    raise ValueError(
      f"loss {objective.name!r} with online.kind={kind!r}: the losses that"
      " learn from rewarded samples, such as ppo and reinforce, require"
      " online.kind='rollouts', and it requires one of them"
    )
  if kind == "pairs" and group not in ("pair", "ranking", "first"):
    raise ValueError(
      f"loss {objective.name!r} reads groups of the kind {group!r}, and"
      " online.kind='pairs' gives a chosen and a rejected response"
    )
  knobs = dict(_ONLINE[kind])
  if "advantages" in objective.needs:
    knobs |= _GAE
  for name, value in online.items():
    if name != "kind" and value is not None and name not in knobs:
      raise ValueError(
        f"online.{name}={value} is set, and online.kind={kind!r} with loss"
        f" {objective.name!r} does not read it. It reads:"
        f" {', '.join(sorted(knobs)) or 'nothing'}"
      )
  for name, value in knobs.items():
    if online[name] is None:
      online[name] = value
  has_kl = isinstance(objective, Objective) and objective.needs_reference
  if kind == "pairs" and online["kl_weight"] and not has_kl:
    raise ValueError(
      f"online.kl_weight={online['kl_weight']} adds a KL to the reference, and"
      f" requires a single loss that reads a reference; got {objective.name!r}:"
      " unset it, or choose another loss"
    )
  if kind == "pairs" and objective.uses_ties:
    _check_order_is_unset(online, objective.name)
  if kind != "none":
    _check_online(online, settings["batch_size"])


def _check_order_is_unset(online: Mapping[str, Any], loss: str) -> None:
  """Refuses noise in the order of a pair, which the loss does not read."""
  for name, allowed in (("flips", 0.0), ("label", "argmax")):
    if online[name] != allowed:
      raise ValueError(
        f"online.{name}={online[name]!r} changes the order of a pair alone, and"
        f" loss {loss!r} reads its gap in score in either order: unset it"
      )


def _check_online(online: Mapping[str, Any], batch_size: int) -> None:
  if not online["judge"]:
    raise ValueError(
      "online.judge is not set: name the judge that rewards responses, such as"
      " reward:WORKDIR"
    )
  if online["kind"] == "pairs" and online["num_samples"] < 2:
    raise ValueError(
      f"online.num_samples={online['num_samples']} must be at least 2 for"
      " online.kind='pairs'"
    )
  if online["label"] == "bradley_terry" and online["num_samples"] != 2:
    raise ValueError(
      "online.label='bradley_terry' draws a label for a pair, and"
      f" online.num_samples={online['num_samples']}: set it to 2"
    )
  if online["replay"] and online["offline_fraction"]:
    raise ValueError(
      "online.replay=True draws batches from all samplings, and"
      f" online.offline_fraction={online['offline_fraction']} mixes data into"
      " the latest: unset one of the two"
    )
  num_offline = (online["offline_fraction"] or 0.0) * batch_size
  if not math.isclose(num_offline, round(num_offline)):
    raise ValueError(
      f"online.offline_fraction={online['offline_fraction']} of batch_size="
      f"{batch_size} is {num_offline:g} groups: choose a fraction that gives"
      " whole groups"
    )
  num_groups = online["every_steps"] * (batch_size - round(num_offline))
  if num_groups % online["epochs"]:
    raise ValueError(
      f"online.epochs={online['epochs']} must divide online.every_steps *"
      f" batch_size = {num_groups}, without groups of the data"
    )
