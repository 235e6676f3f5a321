"""Builds the data of a run: stores as the loss reads them, and loaders."""

from collections.abc import Mapping, Sequence
import dataclasses
import logging
from typing import Any

import ml_collections
import numpy as np

from dpo_jax import config as config_lib
from dpo_jax.data import batch_plan, checks, mismatched, sources, store
from dpo_jax.data import groups as groups_lib
from dpo_jax.data import loader as loader_lib
from dpo_jax.data.mixture import Mixture
from dpo_jax.data.reading import Reading
from dpo_jax.data.sets import Data, HeldOut
from dpo_jax.data.tokenizers import Tokenizer
from dpo_jax.losses import Objective, WeightedSum
from dpo_jax.parallel.placement import Placement
from dpo_jax.system import files
from dpo_jax.types import token_masks

_LOG = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Groups:
  """Groups of one or several sources, as the loss reads them.

  Attributes:
    store: groups.
    reports: report of each source, see `groups.tokenize`.
    is_usable: bool [N], whether the loss learns from a group.
    source: i64 [N], index of each group's source.
  """

  store: store.Store
  reports: tuple[Mapping[str, Any], ...]
  is_usable: np.ndarray
  source: np.ndarray


# Groups and indices of the held-out ones, by the name of the set.
HeldOutGroups = dict[str, tuple[Groups, np.ndarray]]


@dataclasses.dataclass(frozen=True)
class Pipeline:
  """Reads data for one loss and one placement.

  Attributes:
    config: resolved.
    tokenizer: tokenizer of the policy.
    objective: loss to minimise.
    needs: optional fields of Sequences that training or evaluation reads.
    vocab_size: ids that the model has.
    placement: mesh.
  """

  config: ml_collections.FrozenConfigDict
  tokenizer: Tokenizer
  objective: Objective | WeightedSum
  needs: frozenset[str]
  vocab_size: int
  placement: Placement

  @property
  def reads_responses(self) -> bool:
    """Whether some responses of training batches are read from data."""
    online = self.config.online
    return online.kind == "none" or online.offline_fraction is not None

  def build(self) -> Data:
    """Opens the data to train on and the held-out data, and checks them.

    Sources that are not in the cache of stores are tokenized and written to it.

    Raises:
      ValueError: data that the loss, the model or the mesh cannot take.
      FileNotFoundError: a file that does not exist.
    """
    settings = self.config.data
    groups = self._open_training()
    train, held_out = self._hold_out(groups)
    if self.reads_responses:
      train = train[groups.is_usable[train]]
    if not len(train):
      raise ValueError(
        f"data.eval_fraction={settings.eval_fraction} holds out all of the"
        f" {len(groups.store)} groups that loss {self.objective.name!r} can use"
      )
    train_loader = self.make_loader(
      groups.store,
      train,
      self.config.batch_size,
      microbatches=self.config.accumulation_steps,
      mixture=self._mix(groups, train) if settings.sources else None,
    )
    loaders, measured = self._load_held_out(held_out)
    opened = [groups, *(g for g, _ in held_out.values() if g is not groups)]
    by_split = {config_lib.split_name(n): x for n, x in loaders.items()}
    results = checks.run_checks(
      checks.choose_actions(
        self.config, self.objective, reads_responses=self.reads_responses
      ),
      [report for its_groups in opened for report in its_groups.reports],
      {"train": train_loader, **by_split},
    )
    return Data(self.tokenizer, loaders, measured, train_loader, results)

  def build_held_out(self) -> HeldOut:
    """Opens the held-out data alone, as far as it has sources of its own.

    Otherwise it is a part of the training data, which are opened too.

    Raises:
      ValueError: data that the loss, the model or the mesh cannot take.
      FileNotFoundError: a file that does not exist.
    """
    if any(config_lib.eval_sets(self.config.data).values()):
      held_out = self._limit(self._open_sets())
    else:
      _, held_out = self._hold_out(self._open_training())
    return HeldOut(self.tokenizer, *self._load_held_out(held_out))

  def _open_training(self) -> Groups:
    settings = self.config.data
    entries = settings.sources or ({"source": settings.source},)
    return self.open_groups([entry["source"] for entry in entries])

  def _open_sets(self) -> HeldOutGroups:
    """Opens the held-out sets that have sources of their own."""
    sets = config_lib.eval_sets(self.config.data)
    held_out = {name: self.open_groups([spec]) for name, spec in sets.items()}
    return {n: (g, np.arange(len(g.store))) for n, g in held_out.items()}

  def _load_held_out(
    self, held_out: HeldOutGroups
  ) -> tuple[dict[str, loader_lib.Loader], frozenset[str]]:
    """Makes the loaders of the held-out sets; an empty set gets none.

    Returns:
      Loaders by name of the set, and names of those that the loss measures.
    """
    loaders = {
      name: self.make_loader(
        its_groups.store, indices, self.config.eval.batch_size
      )
      for name, (its_groups, indices) in held_out.items()
      if len(indices)
    }
    measured = frozenset(
      name for name in loaders if self._can_measure(held_out[name][0].store)
    )
    return loaders, measured

  def _hold_out(self, groups: Groups) -> tuple[np.ndarray, HeldOutGroups]:
    """Returns the training indices, and the held-out sets.

    The sets have sources of their own, or are a part of `groups`, named "".
    """
    settings = self.config.data
    if any(config_lib.eval_sets(settings).values()):
      train, held_out = np.arange(len(groups.store)), self._open_sets()
    else:
      train, rest = groups.store.split(settings.eval_fraction)
      held_out = {"": (groups, rest)}
    return train, self._limit(held_out)

  def _limit(self, held_out: HeldOutGroups) -> HeldOutGroups:
    """Returns held-out sets without groups that the loss cannot use.

    Sets that the loss cannot be measured on stay whole. Each keeps its first
    `eval.max_groups`, if that is above 0.

    Raises:
      ValueError: a set with a name has no group left.
    """
    chosen = dict(held_out)
    for name, (its_groups, indices) in held_out.items():
      if self._can_measure(its_groups.store):
        indices = indices[its_groups.is_usable[indices]]
      if self.config.eval.max_groups:
        indices = indices[: self.config.eval.max_groups]
      if name and not len(indices):
        raise ValueError(
          f"data.eval_sources: {name!r} has no group that loss"
          f" {self.objective.name!r} can use"
        )
      chosen[name] = (its_groups, indices)
    return chosen

  def _can_measure(self, held_out: store.Store) -> bool:
    """Returns whether the loss can be measured on held-out groups.

    It can if training reads responses. With on-policy training alone it can for
    pairs, unless the loss reads samples of the policy.
    """
    is_pair = held_out.num_slots == 2
    return self.reads_responses or (
      self.objective.group != "samples" and is_pair
    )

  def _mix(self, groups: Groups, train: np.ndarray) -> Mixture:
    """Returns the mixture of training groups by source, with their weights.

    Args:
      groups: groups of all sources.
      train: i64 [M], indices of the training groups.

    Raises:
      ValueError: a source without training groups.
    """
    entries = self.config.data.sources
    weights = tuple(float(entry["weight"]) for entry in entries)
    parts = tuple(
      train[groups.source[train] == source] for source in range(len(weights))
    )
    for entry, part in zip(entries, parts, strict=True):
      if not len(part):
        raise ValueError(
          f"data.sources: no group of {entry['source']!r} is left to train on"
        )
    return Mixture(parts, weights)

  def open_groups(self, specs: Sequence[str]) -> Groups:
    """Opens sources as the loss reads them, and joins them in their order.

    Adds a slot of mismatched responses if the loss needs it.

    Args:
      specs: see `sources`.
    """
    opened = [self._open(spec) for spec in specs]
    stores = [one for one, _ in opened]
    joined = stores[0] if len(stores) == 1 else store.Store.join(stores)
    if "mismatched_logps" in self.objective.needs:
      joined = mismatched.add_slot(
        joined, seed=self.config.seed, max_tokens=self.config.data.max_tokens
      )
    return Groups(
      joined,
      tuple(one.report for one, _ in opened),
      np.concatenate([is_usable for _, is_usable in opened]),
      np.repeat(np.arange(len(stores)), [len(one) for one in stores]),
    )

  def _open(self, spec: str) -> tuple[store.Store, np.ndarray]:
    """Opens a source as the loss reads it.

    Pairs are split if `data.split_pairs` and the loss ask for it; responses
    that the loss does not read are left out.

    Returns:
      Store of N groups, and bool [N], whether the loss learns from each.

    Raises:
      ValueError: ids that the model does not have, groups of another size, or
        none that the loss learns from.
    """
    config, objective = self.config, self.objective
    opened = store.build_store(
      sources.open_source(spec),
      self.tokenizer,
      groups_lib.Limits(config.data.max_tokens, config.data.max_prompt_tokens),
      config.data.cache_dir or files.cache_dir(),
      Reading(
        format=config.data.format,
        columns=config.data.columns,
        roles=config.data.roles,
        scored_turns=config.data.scored_turns,
        special_tokens=config.data.special_tokens,
        max_broken_records=config.data.max_broken_records,
      ),
      template_timeout_s=config.data.template_timeout_s,
    )
    self._check_ids(opened)
    reasons = {}
    is_pair = opened.num_slots == 2
    if config.data.split_pairs and is_pair and objective.group == "single":
      reasons["tied_scores"] = opened.tied_pairs().repeat(2)
      opened = opened.split_pairs()
    if self.reads_responses:
      objective.check_group_size(opened.num_slots)
    reasons |= objective.unusable(opened.score, opened.lengths[:, 1:] > 0)
    is_usable = self._drop_unusable(reasons, spec)
    return opened.first_slots(
      objective.num_slots or opened.num_slots
    ), is_usable

  def make_loader(
    self,
    groups: store.Store,
    indices: np.ndarray,
    batch_size: int,
    *,
    microbatches: int = 1,
    mixture: Mixture | None = None,
  ) -> loader_lib.Loader:
    """Returns a loader of batches of some groups, with a plan of their shapes.

    Args:
      groups: store.
      indices: groups to load.
      batch_size: groups a batch.
      microbatches: parts that the rows of a batch are split into.
      mixture: shares of several sources, for training.
    """
    settings = self.config.data
    plan = batch_plan.make_plan(
      groups,
      indices,
      batch_size=batch_size,
      row_tokens=settings.row_tokens,
      row_multiple=self.placement.num_row_shards * microbatches,
      layout=settings.layout,
      max_shapes=settings.max_shapes,
      mixture=mixture,
    )
    for shape in plan.shapes:
      self.placement.check_row_tokens(shape.row.num_tokens)
    process_index, process_count = self.placement.row_reader
    return loader_lib.Loader(
      groups,
      indices,
      plan,
      batch_size,
      self.config.seed,
      process_index=process_index,
      process_count=process_count,
      token_masks=token_masks(self.needs),
      mixture=mixture,
    )

  def _drop_unusable(
    self, reasons: Mapping[str, np.ndarray], spec: str
  ) -> np.ndarray:
    """Returns whether the loss learns from each group: bool [N].

    The number of the others is logged, by reason, if responses are read.

    Args:
      reasons: reason -> bool [N], groups that cannot be used.
      spec: source of the groups, for messages.

    Raises:
      ValueError: none is left, where responses are read.
    """
    is_unusable = np.any(list(reasons.values()), axis=0)
    counts = {name: int(mask.sum()) for name, mask in reasons.items()}
    text = ", ".join(f"{n} {name}" for name, n in counts.items() if n)
    name = self.objective.name
    if self.reads_responses and is_unusable.all():
      raise ValueError(
        f"{spec}: loss {name!r} learns nothing from any of the"
        f" {len(is_unusable)} groups: {text}"
      )
    if self.reads_responses and text:
      _LOG.warning(
        "%s: loss %r learns nothing from %d of %d groups, which are dropped:"
        " %s",
        spec,
        name,
        is_unusable.sum(),
        len(is_unusable),
        text,
      )
    return ~is_unusable

  def _check_ids(self, groups: store.Store) -> None:
    assert isinstance(groups.tokens, np.ndarray), "joined before the check"
    largest = int(groups.tokens.max())
    if largest >= self.vocab_size:
      position = int(np.argmax(groups.tokens))
      group = int(np.searchsorted(groups.starts[:, 0], position, "right")) - 1
      raise ValueError(
        f"{groups.report['source']}: group {group} holds the token id"
        f" {largest}, and the model's vocabulary has {self.vocab_size}: the"
        " tokenizer is not the model's"
      )
