"""From a config to the function that the step differentiates."""

from collections.abc import Mapping, Sequence
import dataclasses
import functools
import operator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dpo_jax.losses.catalogue import CATALOGUE, Loss, knobs_of
from dpo_jax.losses.knobs import KNOBS
from dpo_jax.losses.links import LINKS
from dpo_jax.losses.rewards import REWARDS
from dpo_jax.names import did_you_mean
from dpo_jax.types import Sequences

Metrics = dict[str, jax.Array]


@dataclasses.dataclass(frozen=True)
class Objective:
  """A loss with its knobs set.

  Attributes:
    loss: the row of the catalogue.
    knobs: a value for every knob that the row reads.
  """

  loss: Loss
  knobs: Mapping[str, Any]

  @property
  def name(self) -> str:
    return self.loss.name

  def to_dict(self) -> dict[str, Any]:
    """What `build_objective` makes this objective of."""
    row, knobs = self.loss, self.knobs
    read = {k: v for k, v in knobs.items() if row.is_read(k, knobs)}
    return {"name": row.name, "reward": row.reward, "link": row.link, **read}

  @property
  def needs(self) -> frozenset[str]:
    """Optional fields of `Sequences` that the loss reads."""
    return self.loss.needs(self.knobs)

  @property
  def needs_reference(self) -> bool:
    return bool(self.needs & {"ref_logps", "kl"})

  @property
  def is_coupled(self) -> bool:
    """Whether a group's loss depends on the rest of the batch."""
    return self.loss.link_row.is_coupled

  @property
  def group(self) -> str:
    return self.loss.group

  @property
  def num_slots(self) -> int | None:
    """Responses of a group that the loss reads; None is all of them."""
    return {"first": 1, "single": 1, "pair": 2}.get(self.loss.group)

  def init(self) -> Any:
    """State that the loss carries from step to step: a tree, () if none."""
    make = self.loss.link_row.init
    return make() if make else ()

  def valid_groups(self, valid: jax.Array) -> jax.Array:
    """Which groups the loss can read: bool [B, K] -> bool [B].

    A ranking needs two responses, samples one, every other loss all that it
    reads.
    """
    if self.loss.group == "ranking":
      return valid.sum(-1) >= 2
    if self.loss.group == "samples":
      return valid.any(-1)
    return valid[:, : self.num_slots].all(-1)

  def unusable(
    self, score: np.ndarray, present: np.ndarray
  ) -> dict[str, np.ndarray]:
    """Groups of a data set from which this loss learns nothing, by reason.

    Args:
      score: f32 [N, K].
      present: bool [N, K], which slots hold a response.

    Returns:
      reason -> bool [N]; a group counts under the first reason that it meets.
      "too_few_responses"; "tied_scores", where all responses score the same;
      "chosen_scores_lower", for a loss that needs the chosen to score higher;
      "undesirable_response", a single response with label False, for a loss
      that makes responses more likely. A tie within a longer ranking stays.
    """
    reasons = {"too_few_responses": ~self.valid_groups(present)}
    if self.group in ("pair", "ranking"):
      highest = np.where(present, score, -np.inf).max(1)
      lowest = np.where(present, score, np.inf).min(1)
      reasons["tied_scores"] = highest == lowest
    if self.loss.link_row.needs_ordered_scores:
      reasons["chosen_scores_lower"] = score[:, 0] < score[:, 1]
    if self.group == "first":
      is_alone = present.sum(1) == 1
      reasons["undesirable_response"] = is_alone & (score[:, 0] == 0.0)
    return first_reasons(reasons)

  def scored_tokens(self, num_tokens: jax.Array, valid: jax.Array) -> jax.Array:
    """Tokens that a per-token mean divides by: [B, K] each -> f32 [].

    Those of all samples; of any other group the first response's, which is
    all that a per-token term reads.
    """
    is_counted = valid & self.valid_groups(valid)[:, None]
    slots = None if self.loss.group == "samples" else 1
    return jnp.where(is_counted, num_tokens, 0.0)[:, :slots].sum()

  def apply(
    self, sequences: Sequences, loss_state: Any
  ) -> tuple[jax.Array, Metrics, Any]:
    """Loss of every group.

    The objective is `mean_over_groups` of it, over the valid groups of the
    global batch. Where `sequences` is a part of that batch, its `num_groups`
    and `total_tokens` say how large the whole is.

    Args:
      sequences: fields f32 [B, K].
      loss_state: from `init` or the step before.

    Returns:
      per_group: f32 [B] loss, 0 for a group that is not valid.
      metrics: name -> f32 [B], one figure a group, nats; NaN where a group
        has none.
      loss_state: for the next step.

    Raises:
      ValueError: K does not suit the loss, or a field that it reads is None.
    """
    self.check_group_size(sequences.valid.shape[1])
    self._check_fields(sequences)
    is_valid = self.valid_groups(sequences.valid)
    sequences = _blank(self._counted(sequences, is_valid))
    reward = self.loss.reward_row.function
    rewards = reward(sequences, **self._knobs_for(reward))
    # A reward of what is blank need not be 0.
    rewards = jnp.where(sequences.valid, rewards, 0.0)
    per_group, loss_state = self._link(rewards, sequences, loss_state)
    for regularizer in self.loss.regularizers:
      per_group += regularizer(sequences, **self._knobs_for(regularizer))
    if self.loss.is_per_token and not self.knobs.get("per_sequence"):
      # Turns the mean over groups into a mean over tokens.
      total_tokens = jnp.maximum(sequences.total_tokens, 1.0)
      per_group = per_group * (sequences.num_groups / total_tokens)
    per_group = jnp.where(is_valid, per_group, 0.0)
    return per_group, self._metrics(sequences, rewards, is_valid), loss_state

  def check_group_size(self, num_responses: int) -> None:
    """Raises ValueError unless groups of that size suit the loss."""
    fits = {
      "first": num_responses >= 1,
      "single": num_responses == 1,
      "pair": num_responses == 2,
      "ranking": num_responses >= 2,
      "samples": num_responses >= 1,
    }[self.loss.group]
    if not fits:
      wanted = {
        "first": "at least 1 response",
        "single": "1 response with a label",
        "pair": "2 responses, the chosen first",
        "ranking": "2 or more responses, best first",
        "samples": "at least 1 response of the policy",
      }[self.loss.group]
      raise ValueError(
        f"loss {self.name!r} reads groups of {wanted}, and these hold"
        f" {num_responses}: choose a loss for groups of that size, or other"
        " data"
      )

  def _check_fields(self, sequences: Sequences) -> None:
    missing = sorted(
      field for field in self.needs if getattr(sequences, field) is None
    )
    if "ref_logps" in missing:
      raise ValueError(
        f"loss {self.name!r} compares with a reference, and ref_logps is None:"
        " set reference.kind to 'cached' or 'frozen'"
      )
    if missing:
      raise ValueError(
        f"loss {self.name!r} reads {', '.join(missing)} of the sequences, and"
        " they are None"
      )

  def _knobs_for(self, function: Any) -> dict[str, Any]:
    return {name: self.knobs[name] for name in knobs_of(function)}

  def _link(
    self, rewards: jax.Array, sequences: Sequences, loss_state: Any
  ) -> tuple[jax.Array, Any]:
    link = self.loss.link_row
    knobs = self._knobs_for(link.function)
    if link.kind == "margin":
      return link.function(rewards[:, 0] - rewards[:, 1], **knobs), loss_state
    if link.init is not None:
      return link.function(rewards, sequences, loss_state, **knobs)
    return link.function(rewards, sequences, **knobs), loss_state

  def _counted(self, sequences: Sequences, is_valid: jax.Array) -> Sequences:
    """Fills in the size of the batch where these sequences are all of it."""
    if sequences.num_groups is not None:
      return sequences
    return sequences.replace(
      num_groups=is_valid.sum(),
      total_tokens=self.scored_tokens(sequences.num_tokens, sequences.valid),
    )

  def _metrics(
    self, sequences: Sequences, rewards: jax.Array, is_valid: jax.Array
  ) -> Metrics:
    sequences, rewards = jax.lax.stop_gradient((sequences, rewards))
    scale = self.knobs[self.loss.scale] if self.loss.scale else 1.0
    figures = {"logps": sequences.logps}
    if self.loss.group == "samples":
      figures["score"] = sequences.score
    elif self.loss.group != "first":
      figures["reward"] = scale * rewards
    if sequences.ref_logps is not None:
      figures["log_ratio"] = sequences.logps - sequences.ref_logps
    if self.loss.group == "samples":
      metrics = _sample_metrics(figures, sequences)
    elif self.loss.group == "first":
      metrics = {f"{k}/chosen": v[:, 0] for k, v in figures.items()}
    elif self.loss.group == "single":
      metrics = _label_metrics(figures, sequences)
    else:
      metrics = _order_metrics(figures, sequences)
    return {
      name: jnp.where(is_valid, figure, jnp.nan)
      for name, figure in metrics.items()
    }


def first_reasons(reasons: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
  """Keeps each group under the first reason that it meets: bool [N] each."""
  seen: np.ndarray | bool = False
  first = {}
  for reason, mask in reasons.items():
    first[reason] = mask & ~np.asarray(seen)
    seen = seen | mask
  return first


def _blank(sequences: Sequences) -> Sequences:
  """0 wherever a slot holds no response, whatever stood there.

  What is masked afterwards only would still send NaN through the gradient of
  the branch that `where` drops.
  """
  valid = sequences.valid

  def blank(x):
    if x is None or x.ndim == 0:
      return x
    # [B], [B, K] or [B, K, M].
    mask = {1: valid[:, 0], 2: valid, 3: valid[..., None]}[x.ndim]
    return jnp.where(mask, x, 0)

  return sequences.replace(
    **{
      field.name: blank(getattr(sequences, field.name))
      for field in dataclasses.fields(sequences)
      if field.name != "valid"
    }
  )


def _label_metrics(
  figures: Mapping[str, jax.Array], sequences: Sequences
) -> Metrics:
  """Chosen are the desirable responses, rejected the others."""
  is_desirable = sequences.score[:, 0] > 0.5
  metrics = {}
  for name, figure in figures.items():
    figure = figure[:, 0]
    metrics[f"{name}/chosen"] = jnp.where(is_desirable, figure, jnp.nan)
    metrics[f"{name}/rejected"] = jnp.where(is_desirable, jnp.nan, figure)
  sign = jnp.where(is_desirable, 1.0, -1.0)
  metrics["reward/accuracy"] = 0.5 * (
    jnp.sign(sign * figures["reward"][:, 0]) + 1.0
  )
  return metrics


def _sample_metrics(
  figures: Mapping[str, jax.Array], sequences: Sequences
) -> Metrics:
  """Means over a prompt's samples, of which none is chosen."""
  count = jnp.maximum(sequences.valid.sum(-1), 1)
  return {
    f"{name}/mean": jnp.where(sequences.valid, figure, 0.0).sum(-1) / count
    for name, figure in figures.items()
  }


def _order_metrics(
  figures: Mapping[str, jax.Array], sequences: Sequences
) -> Metrics:
  """Chosen is slot 0, rejected the mean of the others; ties count a half."""
  others = sequences.valid.at[:, 0].set(False)
  count = jnp.maximum(others.sum(-1), 1)
  metrics = {}
  for name, figure in figures.items():
    metrics[f"{name}/chosen"] = figure[:, 0]
    metrics[f"{name}/rejected"] = jnp.where(others, figure, 0.0).sum(-1) / count
  metrics["reward/margin"] = (
    metrics["reward/chosen"] - metrics["reward/rejected"]
  )
  reward, num_slots = figures["reward"], sequences.valid.shape[1]
  is_pair = jnp.triu(jnp.ones((1, num_slots, num_slots), bool), 1)
  is_pair &= sequences.valid[:, :, None] & sequences.valid[:, None, :]
  if num_slots > 2:
    is_pair &= sequences.score[:, :, None] != sequences.score[:, None, :]
  wins = 0.5 * (jnp.sign(reward[:, :, None] - reward[:, None, :]) + 1.0)
  num_pairs = is_pair.sum((1, 2))
  accuracy = jnp.where(is_pair, wins, 0.0).sum((1, 2)) / num_pairs
  metrics["reward/accuracy"] = jnp.where(num_pairs > 0, accuracy, jnp.nan)
  return metrics


@dataclasses.dataclass(frozen=True)
class WeightedSum:
  """Several losses on the same sequences: sum of weight times loss.

  Wang et al. 2024, MPO (arXiv:2411.10442). It has the interface of
  `Objective`; metrics are those of the first term, with each term's own loss
  beside them.
  """

  terms: tuple[tuple[float, Objective], ...]

  @property
  def name(self) -> str:
    return "+".join(term.name for _, term in self.terms)

  def to_dict(self) -> list[dict[str, Any]]:
    """What `build_objective` makes this objective of."""
    return [{**term.to_dict(), "weight": w} for w, term in self.terms]

  @property
  def needs(self) -> frozenset[str]:
    return frozenset().union(*(term.needs for _, term in self.terms))

  @property
  def needs_reference(self) -> bool:
    return any(term.needs_reference for _, term in self.terms)

  @property
  def is_coupled(self) -> bool:
    return any(term.is_coupled for _, term in self.terms)

  @property
  def group(self) -> str:
    kinds = [term.group for _, term in self.terms]
    return next((kind for kind in kinds if kind != "first"), "first")

  @property
  def num_slots(self) -> int | None:
    slots = [term.num_slots for _, term in self.terms]
    return None if None in slots else max(slots)

  def init(self) -> Any:
    return tuple(term.init() for _, term in self.terms)

  def valid_groups(self, valid: jax.Array) -> jax.Array:
    masks = [term.valid_groups(valid) for _, term in self.terms]
    return functools.reduce(operator.and_, masks)

  def unusable(
    self, score: np.ndarray, present: np.ndarray
  ) -> dict[str, np.ndarray]:
    """As `Objective.unusable`: a group that one term cannot use."""
    reasons: dict[str, np.ndarray] = {}
    for _, term in self.terms:
      for reason, mask in term.unusable(score, present).items():
        reasons[reason] = reasons.get(reason, False) | mask
    return first_reasons(reasons)

  def scored_tokens(self, num_tokens: jax.Array, valid: jax.Array) -> jax.Array:
    """As `Objective.scored_tokens`."""
    is_counted = valid & self.valid_groups(valid)[:, None]
    slots = None if self.group == "samples" else 1
    return jnp.where(is_counted, num_tokens, 0.0)[:, :slots].sum()

  def check_group_size(self, num_responses: int) -> None:
    for _, term in self.terms:
      term.check_group_size(num_responses)

  def apply(
    self, sequences: Sequences, loss_state: Any
  ) -> tuple[jax.Array, Metrics, Any]:
    """As `Objective.apply`."""
    is_valid = self.valid_groups(sequences.valid)
    # A group counts only where every term can read it.
    sequences = sequences.replace(valid=sequences.valid & is_valid[:, None])
    total = jnp.zeros(is_valid.shape)
    metrics, states = {}, []
    for (weight, term), state in zip(self.terms, loss_state, strict=True):
      per_group, term_metrics, state = term.apply(sequences, state)
      total += weight * per_group
      shown = jax.lax.stop_gradient(per_group)
      metrics = term_metrics | metrics
      metrics[f"loss/{term.name}"] = jnp.where(is_valid, shown, jnp.nan)
      states.append(state)
    return jnp.where(is_valid, total, 0.0), metrics, tuple(states)


def mean_over_groups(per_group: jax.Array, num_groups: jax.Array) -> jax.Array:
  """A part's share of the objective: f32 [].

  Args:
    per_group: f32 [B] losses, 0 for a group that is not valid.
    num_groups: f32 [], valid groups of the global batch.
  """
  return per_group.sum() / jnp.maximum(num_groups, 1.0)


def build_objective(config: Any) -> Objective | WeightedSum:
  """Looks a loss up and fills in its defaults, strictly.

  Args:
    config: `name`, any knobs of that loss, and `reward` or `link` to replace
      the row's by another; a dict or a ConfigDict. A value of None counts as
      not set. Or a list of such, each with a `weight`.

  Returns:
    The objective, every knob of its loss set.

  Raises:
    ValueError: unknown loss, reward or link; a combination that makes no
      sense, with the reason; a knob that does not exist, that this loss does
      not read, or whose value is out of range.
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
        f"loss {settings.get('name')!r} of a list needs a weight above 0, and"
        f" has {weight!r}"
      )
    terms.append((float(weight), _build_one(settings)))
  if len({term.name for _, term in terms}) != len(terms):
    raise ValueError("a list of losses names one of them twice")
  kinds = {term.group for _, term in terms} - {"first"}
  if len(kinds) > 1:
    raise ValueError(
      f"the losses of a list read groups of different kinds: {sorted(kinds)}"
    )
  kinds = {term.group for _, term in terms}
  if kinds in ({"first", "single"}, {"first", "samples"}):
    which = "undesirable responses" if "single" in kinds else "every sample"
    raise ValueError(
      f"a loss on groups of the kind {max(kinds)!r} cannot be summed with one"
      f" that makes each first response more likely: {which} would become more"
      " likely too"
    )
  return WeightedSum(tuple(terms))


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
    KNOBS[key].check(f"loss.{key}", value)
    if key in loss.ranges:
      loss.ranges[key].check(f"loss.{key}", value)
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
  """A row with another reward or link, if that makes sense."""
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
      f"link {row.link!r} holds each reward by itself against a constant, so"
      f" 0 must mean that policy and reference agree; reward {row.reward!r} has"
      " no such zero. A margin link would do"
    )
  scale = loss.scale if loss.scale in row.knobs else None
  return dataclasses.replace(row, scale=scale, **_limits(row))


def _limits(row: Loss) -> dict[str, Any]:
  """Ranges and conditions that a reward and a link have in their own rows.

  A knob that is read only sometimes keeps its default there: it could neither
  be set nor left out.
  """
  ranges, conditions, defaults = {}, [], dict(row.defaults)
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
