"""build_objective: from a config to an objective, strict about its keys."""

from collections.abc import Mapping, Sequence
import dataclasses
from typing import Any

from dpo_jax.losses import regularizers
from dpo_jax.losses.catalogue import CATALOGUE, Loss
from dpo_jax.losses.catalogue.row import knobs_of
from dpo_jax.losses.knobs import KNOBS
from dpo_jax.losses.links import LINKS
from dpo_jax.losses.objective import Objective, WeightedSum
from dpo_jax.losses.rewards import REWARDS
from dpo_jax.names import did_you_mean


def build_objective(config: Any) -> Objective | WeightedSum:
  """Looks up a loss and fills in its defaults.

  Args:
    config: `name`, any knobs of that loss, and `reward` or `link` to replace
      the row's own; a dict or a ConfigDict. A value of None counts as not
      set. Or a list of such, each with a `weight` above 0.

  Returns:
    The objective, with every knob of its loss set; a WeightedSum for a list.

  Raises:
    ValueError: unknown loss, reward or link; a combination that is not
      defined; a knob that does not exist, that this loss does not read, that
      has no default and is not set, or whose value is out of range; a list
      that cannot be summed.
  """
  if not isinstance(config, Sequence):
    return _build_one(config)
  if not config:
    raise ValueError("a list of losses must hold at least one")
  terms = []
  for entry in config:
    settings = dict(entry.items())
    weight = settings.pop("weight", None)
    if not isinstance(weight, int | float) or not 0 < weight < float("inf"):
      raise ValueError(
        f"loss {settings.get('name')!r} of a list needs a weight above 0; got"
        f" {weight!r}"
      )
    terms.append((float(weight), _build_one(settings)))
  _check_sum([term for _, term in terms])
  return WeightedSum(tuple(terms))


def with_sampled_kl(objective: Objective, kl_weight: float) -> Objective:
  """Returns a loss with `regularizers.sampled_kl` added.

  Its `to_dict` has "kl_weight", which `build_objective` does not take.

  Args:
    objective: loss of on-policy batches that compares with a reference.
    kl_weight: weight of a nat; 0 returns the loss itself.
  """
  if not kl_weight:
    return objective
  terms = (*objective.loss.regularizers, regularizers.sampled_kl)
  return Objective(
    dataclasses.replace(objective.loss, regularizers=terms),
    {**objective.knobs, "kl_weight": kl_weight},
  )


def _check_sum(terms: Sequence[Objective]) -> None:
  """Checks that losses can be summed.

  Raises:
    ValueError: a loss is named twice; they read groups of several kinds, apart
      from "first"; or "first" is combined with "single" or "samples".
  """
  if len({term.name for term in terms}) != len(terms):
    raise ValueError("a list of losses must not name one of them twice")
  kinds = {term.group for term in terms}
  if len(kinds - {"first"}) > 1:
    raise ValueError(
      "the losses of a list must read groups of one kind; these read"
      f" {sorted(kinds - {'first'})}"
    )
  if kinds in ({"first", "single"}, {"first", "samples"}):
    which = "undesirable responses" if "single" in kinds else "every sample"
    raise ValueError(
      f"a loss on groups of the kind {max(kinds)!r} cannot be summed with one"
      f" that makes each first response more likely: {which} would become more"
      " likely too"
    )


def _build_one(config: Mapping[str, Any]) -> Objective:
  given = {k: v for k, v in config.items() if v is not None}
  name = given.pop("name", None)
  if name not in CATALOGUE:
    raise ValueError(
      f"loss.name={name!r} is not in the catalogue."
      f"{did_you_mean(str(name), CATALOGUE)} Known: {', '.join(CATALOGUE)}"
    )
  loss = _recombine(
    CATALOGUE[name], given.pop("reward", None), given.pop("link", None)
  )
  for key, value in given.items():
    if key not in KNOBS:
      raise ValueError(
        f"loss.{key} is not a hyper-parameter of any loss."
        f"{did_you_mean(key, KNOBS)} {name!r} reads: {_listed(loss.knobs)}"
      )
    if key not in loss.knobs:
      raise ValueError(
        f"loss.{key}={value} is set, but loss {name!r} does not read it."
        f" It reads: {_listed(loss.knobs)}"
      )
    loss.check(f"loss.{key}", key, value)
  knobs = {k: v for k, v in loss.defaults.items() if k in loss.knobs} | given
  unset = [key for key in loss.knobs if key not in knobs]
  if unset:
    raise ValueError(
      f"loss {name!r} with reward {loss.reward!r} and link {loss.link!r} has"
      f" no default for {_listed(unset)}: set it"
    )
  for key in given:
    if not loss.is_read(key, knobs):
      raise ValueError(
        f"loss.{key}={given[key]} is set, but loss {name!r} reads it only with"
        + ", ".join(
          f" {knob}={value!r}"
          for what, knob, value in loss.conditions
          if what == key
        )
      )
  return Objective(loss, knobs)


def _recombine(loss: Loss, reward: str | None, link: str | None) -> Loss:
  """Returns the row with another reward or link.

  Raises:
    ValueError: unknown reward or link, or a combination that is not defined.
  """
  for kind, chosen, known in (
    ("reward", reward, REWARDS),
    ("link", link, LINKS),
  ):
    if chosen is not None and chosen not in known:
      raise ValueError(
        f"loss.{kind}={chosen!r} is unknown.{did_you_mean(chosen, known)}"
        f" Known: {', '.join(known)}"
      )
  if reward in (None, loss.reward) and link in (None, loss.link):
    return loss
  row = dataclasses.replace(
    loss, reward=reward or loss.reward, link=link or loss.link
  )
  if link is not None and LINKS[link].kind != loss.link_row.kind:
    raise ValueError(
      f"loss {loss.name!r} cannot take link {link!r}: it is a"
      f" {LINKS[link].kind} link, and the row's is a {loss.link_row.kind} link"
    )
  for name in dict.fromkeys((loss.link, row.link)):
    if LINKS[name].fixes_reward:
      raise ValueError(
        f"link {name!r} sorts the log-probs of a batch: it takes no other"
        " reward, and its loss takes no other link"
      )
  if row.link_row.needs_anchor and not row.reward_row.is_anchored:
    raise ValueError(
      f"link {row.link!r} compares single rewards with a constant, so 0 must"
      f" mean that policy and reference agree; reward {row.reward!r} has no"
      " such zero: choose another reward, or a margin link"
    )
  scale = loss.scale if loss.scale in row.knobs else None
  return dataclasses.replace(row, scale=scale, **_limits(row))


def _limits(row: Loss) -> dict[str, Any]:
  """Returns `ranges`, `conditions` and `defaults` of a row with other parts.

  They are joined from the catalogue's rows with the same reward or link. A knob
  that is read only under a condition keeps its default from there: otherwise it
  could neither be set nor left out.
  """
  ranges: dict[str, Any] = {}
  conditions, defaults = [], dict(row.defaults)
  for part in ("reward", "link"):
    name = getattr(row, part)
    own = knobs_of(getattr(row, f"{part}_row").function)
    homes = [r for r in CATALOGUE.values() if getattr(r, part) == name]
    for home in homes:
      ranges |= {k: v for k, v in home.ranges.items() if k in own}
      conditions += [c for c in home.conditions if c[1] in own]
      sometimes = {what for what, *_ in home.conditions if what in own}
      defaults = {k: home.defaults[k] for k in sometimes} | defaults
  return {
    "ranges": ranges,
    "conditions": tuple(dict.fromkeys(conditions)),
    "defaults": defaults,
  }


def _listed(names: Sequence[str]) -> str:
  return ", ".join(names) if names else "no hyper-parameters"
