"""Data of a run: stores of tokens, seen as the loss reads them; loaders."""

from collections.abc import Mapping
import dataclasses
import logging
from typing import Any

import numpy as np

from dpo_jax.cache import default_cache_dir
from dpo_jax.data import loader as loader_lib
from dpo_jax.data import mismatched, sources, store
from dpo_jax.data.tokenizers import Tokenizer
from dpo_jax.losses import Objective, WeightedSum
from dpo_jax.mesh import Placement
from dpo_jax.types import token_masks

_LOG = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Data:
  """Batches to train on, held-out batches, and their tokenizer.

  Attributes:
    tokenizer: tokenizer of both.
    train: groups; for on-policy training, their prompts.
    eval: held-out groups.
    is_measured: whether the loss can be measured on the held-out groups, or
      only their prompts are used.
  """

  tokenizer: Tokenizer
  train: loader_lib.Loader
  eval: loader_lib.Loader | None
  is_measured: bool = True

  def identity(self) -> dict[str, Any]:
    """Returns what all hosts, and all starts of a run, must have in common."""
    loaders = {"train": self.train, "eval": self.eval}
    splits = {
      name: {
        "content": loader.store.report["content"],
        "store": loader.store.digest,
        "groups": len(loader.indices),
      }
      for name, loader in loaders.items()
      if loader is not None
    }
    return {**splits, "tokenizer": dict(self.tokenizer.parts)}


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

  config: Any
  tokenizer: Tokenizer
  objective: Objective | WeightedSum
  needs: frozenset[str]
  vocab_size: int
  placement: Placement

  @property
  def is_offline(self) -> bool:
    """Whether responses are read, and not sampled."""
    return self.config.online.kind == "none"

  def build(self) -> Data:
    """Opens the data of the config.

    Raises:
      ValueError: data that the loss, the model or the mesh cannot take.
      FileNotFoundError: a file that does not exist.
    """
    settings = self.config.data
    groups, is_usable = self.open_groups(settings.source)
    if settings.eval_source:
      eval_groups, is_usable_eval = self.open_groups(settings.eval_source)
      train, held_out = np.arange(len(groups)), np.arange(len(eval_groups))
    else:
      eval_groups, is_usable_eval = groups, is_usable
      train, held_out = groups.split(settings.eval_fraction)
    is_measured = self.is_offline or (
      self.objective.group != "samples" and groups.num_slots == 2
    )
    if self.is_offline:
      train = train[is_usable[train]]
    if is_measured:
      held_out = held_out[is_usable_eval[held_out]]
    if not len(train):
      raise ValueError(
        f"data.eval_fraction={settings.eval_fraction} holds out all of the"
        f" {len(groups)} groups that loss {self.objective.name!r} can use"
      )
    if self.config.eval.max_groups:
      held_out = held_out[: self.config.eval.max_groups]
    train_loader = self.make_loader(
      groups, train, self.config.batch_size, self.config.accumulation_steps
    )
    eval_loader = None
    if len(held_out):
      eval_loader = self.make_loader(
        eval_groups, held_out, self.config.eval.batch_size
      )
    return Data(self.tokenizer, train_loader, eval_loader, is_measured)

  def open_groups(self, spec: str) -> tuple[store.Store, np.ndarray]:
    """Opens a source as the loss reads it.

    Args:
      spec: see `sources`.

    Returns:
      The groups, and bool [N], from which of them the loss learns.
    """
    config, objective = self.config, self.objective
    opened = store.build_store(
      sources.open_source(spec),
      self.tokenizer,
      store.Limits(config.data.max_tokens, config.data.max_prompt_tokens),
      config.data.cache_dir or default_cache_dir(),
      config.data.scored_turns,
    )
    self._check_ids(opened)
    reasons = {}
    is_pair = opened.num_slots == 2
    if config.data.split_pairs and is_pair and objective.group == "single":
      reasons["tied_scores"] = opened.tied_pairs().repeat(2)
      opened = opened.split_pairs()
    if self.is_offline:
      objective.check_group_size(opened.num_slots)
    reasons |= objective.unusable(opened.score, opened.lengths[:, 1:] > 0)
    is_usable = self._drop_unusable(reasons, spec)
    opened = opened.first_slots(objective.num_slots or opened.num_slots)
    if "mismatched_logps" in objective.needs:
      opened = mismatched.add_slot(
        opened, seed=config.seed, max_tokens=config.data.max_tokens
      )
    return opened, is_usable

  def make_loader(
    self,
    groups: store.Store,
    indices: np.ndarray,
    batch_size: int,
    microbatches: int = 1,
  ) -> loader_lib.Loader:
    """Plans batches of some groups.

    Args:
      groups: store.
      indices: groups to load.
      batch_size: groups a batch.
      microbatches: parts that the rows of a batch are split into.
    """
    settings = self.config.data
    plan = loader_lib.make_plan(
      groups,
      indices,
      batch_size=batch_size,
      row_tokens=settings.row_tokens,
      row_multiple=self.placement.num_row_shards * microbatches,
      layout=settings.layout,
      max_shapes=settings.max_shapes,
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
    )

  def _drop_unusable(
    self, reasons: Mapping[str, np.ndarray], spec: str
  ) -> np.ndarray:
    """Returns which groups teach the loss something, and logs the others.

    Args:
      reasons: reason -> bool [N].
      spec: source of the groups, for messages.

    Raises:
      ValueError: none is left, where responses are read.
    """
    is_unusable = np.any(list(reasons.values()), axis=0)
    counts = {name: int(mask.sum()) for name, mask in reasons.items()}
    text = ", ".join(f"{n} {name}" for name, n in counts.items() if n)
    name = self.objective.name
    if self.is_offline and is_unusable.all():
      raise ValueError(
        f"{spec}: loss {name!r} learns nothing from any of the"
        f" {len(is_unusable)} groups: {text}"
      )
    if self.is_offline and text:
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
    largest = int(groups.tokens.max())
    if largest >= self.vocab_size:
      position = int(np.argmax(groups.tokens))
      group = int(np.searchsorted(groups.starts[:, 0], position, "right")) - 1
      raise ValueError(
        f"{groups.report['source']}: group {group} holds the token id"
        f" {largest}, and the model's vocabulary has {self.vocab_size}: the"
        " tokenizer is not the model's"
      )
