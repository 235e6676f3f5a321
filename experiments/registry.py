"""Registry of the experiments: one table."""

from collections.abc import Sequence
import dataclasses
import inspect
import os
from types import ModuleType

from dpo_jax.names import did_you_mean
from experiments import (
  best_of_n,
  beta_ablation,
  coverage,
  displacement,
  exact_frontier,
  exact_sweep,
  hh_dialogue,
  imdb_sentiment,
  judges,
  label_noise,
  length_bias,
  loss_ablation,
  on_policy_ablation,
  online_vs_offline,
  ood_summaries,
  overoptimisation,
  reference_ablation,
  tldr_temperature,
)
from experiments.sweep import Settings, command

# Workdir of experiments that share their policies.
_SHARED = "win_rates"


@dataclasses.dataclass(frozen=True)
class Experiment:
  """An experiment of the registry.

  Attributes:
    module: module with `runs`, `collect` and `plot`.
    table: rows -> rows of the printed table.
    folder: its folder in the workdir; "" is its name.
    has_judge: whether it takes --config.eval.*.
  """

  module: ModuleType
  table: command.Table
  folder: str = ""
  has_judge: bool = False

  @property
  def name(self) -> str:
    return self.module.__name__.rpartition(".")[2]

  @property
  def sentence(self) -> str:
    """First line of the module's docstring."""
    return (inspect.getdoc(self.module) or "").splitlines()[0]

  def settings(self, whole: Settings) -> Settings:
    """Returns the settings of this experiment, from those of all."""
    return dataclasses.replace(
      whole,
      workdir=os.path.join(whole.workdir, self.folder or self.name),
      evaluation=whole.evaluation if self.has_judge else {},
    )


EXPERIMENTS = (
  Experiment(exact_frontier, exact_sweep.table),
  Experiment(online_vs_offline, exact_sweep.table),
  Experiment(label_noise, exact_sweep.table),
  Experiment(beta_ablation, exact_sweep.table),
  Experiment(loss_ablation, loss_ablation.table),
  Experiment(coverage, exact_sweep.table),
  Experiment(displacement, displacement.table),
  Experiment(length_bias, length_bias.table),
  Experiment(judges, judges.table),
  Experiment(overoptimisation, overoptimisation.table),
  Experiment(reference_ablation, exact_sweep.table),
  Experiment(on_policy_ablation, exact_sweep.table),
  Experiment(imdb_sentiment, imdb_sentiment.table),
  Experiment(tldr_temperature, tldr_temperature.table, _SHARED, True),
  Experiment(hh_dialogue, hh_dialogue.table, _SHARED, True),
  Experiment(best_of_n, best_of_n.table, _SHARED, True),
  Experiment(ood_summaries, ood_summaries.table, _SHARED, True),
)


def choose(names: Sequence[str]) -> list[Experiment]:
  """Chooses experiments by name, in the order of the registry.

  Args:
    names: names; all if empty.

  Raises:
    ValueError: an unknown name.
  """
  known = [experiment.name for experiment in EXPERIMENTS]
  for name in names:
    if name not in known:
      raise ValueError(
        f"--only={name}: no such experiment.{did_you_mean(name, known)} There"
        f" are {', '.join(known)}"
      )
  return [e for e in EXPERIMENTS if not names or e.name in names]
