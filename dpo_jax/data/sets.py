"""Data of a run: batches to train on, and held-out sets."""

from collections.abc import Mapping
import dataclasses
from typing import Any

from dpo_jax import config as config_lib
from dpo_jax.data import checks
from dpo_jax.data import loader as loader_lib
from dpo_jax.data.tokenizers import Tokenizer


@dataclasses.dataclass(frozen=True)
class HeldOut:
  """Held-out batches, and their tokenizer.

  Attributes:
    tokenizer: tokenizer of the policy.
    eval: held-out groups by the name of their set; "" for the one without a
      name. Empty where nothing is held out.
    measured: names of held-out sets that the loss is measured on; only the
      prompts of the others are used.
  """

  tokenizer: Tokenizer
  eval: Mapping[str, loader_lib.Loader]
  measured: frozenset[str]

  @property
  def first_eval(self) -> loader_lib.Loader | None:
    """Held-out set whose prompts are sampled from; None without one."""
    return next(iter(self.eval.values()), None)

  def identity(self) -> dict[str, Any]:
    """Returns the identity of the data, equal on all hosts and starts.

    Returns:
      Split, such as "eval", -> {"content": digest of the sources, "store":
      digest of the store, "groups": their number}; "tokenizer" -> its `parts`.
    """
    by_split = {
      config_lib.split_name(name): loader for name, loader in self.eval.items()
    }
    splits = {name: _identity(loader) for name, loader in by_split.items()}
    return {**splits, "tokenizer": dict(self.tokenizer.parts)}


def _identity(loader: loader_lib.Loader) -> dict[str, Any]:
  return {
    "content": loader.store.report["content"],
    "store": loader.store.digest,
    "groups": len(loader.indices),
  }


@dataclasses.dataclass(frozen=True)
class Data(HeldOut):
  """Batches to train on, and held-out batches.

  Attributes:
    train: groups; for on-policy training, their prompts.
    checks: results of the checks.
  """

  train: loader_lib.Loader
  checks: list[checks.Result]

  def description(self) -> dict[str, Any]:
    """Returns what data.json holds: `identity()`, "reports" and "checks"."""
    results = [dataclasses.asdict(result) for result in self.checks]
    return {**self.identity(), "reports": self.reports(), "checks": results}

  def reports(self) -> dict[str, Mapping[str, Any]]:
    """Returns each source's report by its spelling; see `groups.tokenize`."""
    reports: dict[str, Mapping[str, Any]] = {}
    for loader in (self.train, *self.eval.values()):
      report = loader.store.report
      reports |= {r["source"]: r for r in report.get("sources", [report])}
    return reports

  def identity(self) -> dict[str, Any]:
    """Returns `HeldOut.identity`, with an entry "train" before it."""
    return {"train": _identity(self.train), **super().identity()}
