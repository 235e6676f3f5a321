"""Checks of the data before training: one table.

Each check has a measure, a limit and an action: nothing, a warning, or a stop.
`data.checks.NAME` sets the action to "off", "warn" or "stop".
"""

from collections.abc import Callable, Iterable, Mapping
import dataclasses
import logging
from typing import Any

import ml_collections
import numpy as np

from dpo_jax import config as config_lib
from dpo_jax.data.loader import Loader
from dpo_jax.losses import Objective, WeightedSum

_LOG = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Check:
  """Check of the table.

  Attributes:
    measure: report of a source, the training loader, or a pair of that and the
      loader of a held-out set -> value.
    limit: value above which it acts.
    message: the finding, with {value} as a number and {share} in per cent,
      and how to fix it.
  """

  measure: Callable[[Any], float]
  limit: float
  message: str


@dataclasses.dataclass(frozen=True)
class Result:
  """Result of a check.

  Attributes:
    name: name of the check.
    where: source, or split such as "train" or "eval".
    value: measure.
    limit: value above which the check acts.
    action: "off", "warn" or "stop".
    message: the finding and how to fix it; "" within the limit.
  """

  name: str
  where: str
  value: float
  limit: float
  action: str
  message: str


def _share(key: str, of: str = "groups") -> Callable[[Mapping], float]:
  return lambda report: report[key] / max(report[of], 1)


def _dropped(reason: str) -> Callable[[Mapping], float]:
  return lambda report: (
    report["dropped"].get(reason, 0) / max(report["records"], 1)
  )


# Checks of a source's report.
SOURCE_CHECKS: dict[str, Check] = {
  "broken": Check(
    _share("broken", "records"),
    0.0,
    "{share} of the records are broken, and are dropped: fix the file, or"
    " lower data.max_broken_records to stop at them",
  ),
  "identical": Check(
    _dropped("identical_responses"),
    0.1,
    "{share} of the records have the same response twice, and are dropped: see"
    " that data.columns names two different columns",
  ),
  "empty": Check(
    _dropped("empty_response"),
    0.1,
    "{share} of the records have an empty response, and are dropped: see that"
    " data.columns names the column of the text",
  ),
  "prompts_cut": Check(
    _share("prompts_cut"),
    0.1,
    "{share} of the prompts lost their beginning: raise data.max_tokens, or"
    " data.max_prompt_tokens",
  ),
  "responses_cut": Check(
    _share("responses_cut"),
    0.1,
    "responses lost their end, {value:.2f} of them a group: raise"
    " data.max_tokens",
  ),
  "special_tokens": Check(
    _share("special_tokens"),
    0.5,
    "{share} of the groups spell special tokens, which are read as letters: if"
    " a chat template wrote this text, set data.special_tokens=read",
  ),
  "duplicates": Check(
    _share("duplicates"),
    0.05,
    "{share} of the groups repeat an earlier one, and are trained on more"
    " often: remove them from the file",
  ),
  "contradictions": Check(
    _share("contradictions"),
    0.01,
    "{share} of the groups are contradicted by another with the same prompt"
    " and responses: remove them, or choose a loss for noisy labels, such as"
    " loss.name=robust_dpo",
  ),
  "ties": Check(
    _share("ties"),
    0.1,
    "{share} of the groups have responses of equal score, whose order says"
    " nothing: remove them",
  ),
  "chosen_scores_lower": Check(
    _share("chosen_scores_lower"),
    0.01,
    "{share} of the pairs have a chosen response that scores below the"
    " rejected one: swap them, or see data.columns",
  ),
}


def _overlap(pair: tuple[Loader, Loader | None]) -> float:
  """Returns the share of held-out groups whose prompts are trained on.

  Prompts are compared by their hashes. Without a held-out set it is 0.

  Args:
    pair: loader of the training groups, and that of a held-out set or None.
  """
  train, held_out = pair
  if held_out is None:
    return 0.0
  ours, theirs = held_out.store.prompt_hashes, train.store.prompt_hashes
  assert ours is not None and theirs is not None
  is_known = np.isin(ours[held_out.indices], theirs[train.indices])
  return float(is_known.mean())


def _missing_groups(pair: tuple[Loader, Loader | None]) -> float:
  """Returns how many groups a held-out set lacks of 30; below 0 for more.

  Args:
    pair: loader of the training groups, and that of a held-out set or None.
  """
  _, held_out = pair
  return 30 - (0 if held_out is None else len(held_out.indices))


def _length_bias(train: Loader) -> float:
  """Returns how far the accuracy of choosing by length is from 0.5.

  It is in [0, 0.5], and 0 for groups that are not pairs.
  """
  lengths = train.store.lengths[train.indices, 1:]
  if lengths.shape[1] != 2:
    return 0.0
  return abs(length_accuracy(lengths) - 0.5)


def length_accuracy(lengths: np.ndarray) -> float:
  """Returns the accuracy of always choosing the longer response.

  Args:
    lengths: [N, 2], tokens of chosen and rejected; a tie counts a half.
  """
  longer = np.sign(lengths[:, 0].astype(np.int64) - lengths[:, 1])
  return float(0.5 * (longer + 1).mean())


def _repeats(train: Loader) -> float:
  return train.batch_size / len(train.indices)


def _default_scores(train: Loader) -> float:
  """Returns the share of pairs with the scores of a pair without any: 1, 0."""
  score = train.store.score[train.indices]
  if score.shape[1] != 2:
    return 0.0
  return float((score == (1.0, 0.0)).all(1).mean())


# Checks of the training groups; a measure gets their loader.
TRAIN_CHECKS: dict[str, Check] = {
  "length_bias": Check(
    _length_bias,
    0.2,
    "choosing by length alone is right or wrong far more often than chance:"
    " {share} from a half. Compare with a loss that takes the length out, such"
    " as loss.name=simpo",
  ),
  "small_data": Check(
    _repeats,
    1.0,
    "a batch has {value:.1f} times the groups there are, so it repeats them:"
    " lower batch_size",
  ),
  "default_scores": Check(
    _default_scores,
    0.01,
    "{share} of the pairs have the scores 1 and 0, as those without scores, and"
    " this loss reads the gap in score: see that each has the columns"
    " score_chosen and score_rejected, or margin",
  ),
}

# Checks of each held-out set; a measure gets the training loader and the
# set's, None where a set was asked for and no group is left for it.
HELD_OUT_CHECKS: dict[str, Check] = {
  "overlap": Check(
    _overlap,
    0.01,
    "{share} of the held-out prompts are trained on: remove them from one of"
    " the two",
  ),
  "few_held_out": Check(
    _missing_groups,
    0.0,
    "fewer than 30 groups are held out ({value:.0f} are missing), so that"
    " held-out metrics say little: raise data.eval_fraction, or name a larger"
    " data.eval_source",
  ),
}


def choose_actions(
  config: ml_collections.FrozenConfigDict,
  objective: Objective | WeightedSum,
  *,
  reads_responses: bool,
) -> dict[str, str]:
  """Returns the action of each check, "off" for those that mean nothing here.

  Checks of pairs need pairs that are read, default_scores a loss that reads the
  gap in score, ties one that reads the order alone, and few_held_out a held-out
  set that `eval.max_groups` does not keep small.

  Args:
    config: resolved config of a run.
    objective: its loss.
    reads_responses: whether responses of training batches are read from data.
  """
  actions = dict(config.data.checks)
  if objective.group == "single":
    actions["length_bias"] = "off"  # there are no pairs
  of_pairs = ("length_bias", "ties", "contradictions", "chosen_scores_lower")
  if not reads_responses or objective.group == "first":
    # Rejected responses are not read.
    actions |= dict.fromkeys(of_pairs, "off")
  if not (reads_responses and objective.reads_gap):
    actions["default_scores"] = "off"
  if objective.uses_ties:
    actions["ties"] = "off"
  is_wanted = config.data.eval_fraction or any(
    config_lib.eval_sets(config.data).values()
  )
  if not is_wanted or 0 < config.eval.max_groups < 30:
    actions["few_held_out"] = "off"
  return actions


def run_checks(
  actions: Mapping[str, str],
  reports: Iterable[Mapping[str, Any]],
  loaders: Mapping[str, Loader],
) -> list[Result]:
  """Runs the table.

  Args:
    actions: `data.checks`: action by name of the check.
    reports: reports of the sources, see `groups.tokenize`.
    loaders: by split, "train" among them.

  Returns:
    A result for each check of each source, of the training groups and of each
    held-out set, those that are "off" too. Without a held-out set its checks
    run once, for "eval".
  """
  results = [
    _run(name, check, report, report["source"], actions[name])
    for report in reports
    for name, check in SOURCE_CHECKS.items()
  ]
  train = loaders["train"]
  results += [
    _run(name, check, train, "train", actions[name])
    for name, check in TRAIN_CHECKS.items()
  ]
  held_out: dict[str, Loader | None] = {
    name: loader for name, loader in loaders.items() if name != "train"
  }
  held_out = held_out or {"eval": None}
  results += [
    _run(name, check, (train, loader), split, actions[name])
    for split, loader in held_out.items()
    for name, check in HELD_OUT_CHECKS.items()
  ]
  return results


def act(results: Iterable[Result]) -> None:
  """Warns of findings, or stops at them, as the action of their check says.

  Args:
    results: results of `run_checks`.

  Raises:
    ValueError: findings of checks whose action is "stop"; names all.
  """
  found = [result for result in results if result.message]
  for result in found:
    if result.action == "warn":
      _LOG.warning("%s", result.message)
  stops = [result.message for result in found if result.action == "stop"]
  if stops:
    raise ValueError("\n".join(stops))


def _run(
  name: str, check: Check, facts: Any, where: str, action: str
) -> Result:
  value = float(check.measure(facts))
  message = ""
  if value > check.limit:
    text = check.message.format(value=value, share=f"{100 * value:.1f} %")
    message = f"{where}: {text} (data.checks.{name}={action})"
  return Result(name, where, value, check.limit, action, message)
