"""A sweep of keys of one config, such as beta and learning rate.

The file of a sweep is JSON. An object is a grid, a list of values for each key:

  {"loss.beta": [0.05, 0.1, 0.5], "optimizer.learning_rate": [1e-6, 5e-7]}

and a list of objects names each run:

  [{"loss.name": "dpo"}, {"loss.name": "simpo", "loss.beta": 2.0}]
"""

from collections.abc import Mapping
import dataclasses
import itertools
import json
import math
import pathlib
import re
from typing import Any

import matplotlib.pyplot as plt
import ml_collections

from dpo_jax import config as config_lib
from dpo_jax.names import did_you_mean
from dpo_jax.records.metrics import read_evaluation
from dpo_jax.records.workdir import Workdir
from experiments.sweep.plots import draw, save_figure
from experiments.sweep.report import Collected, collect, mean_and_spread
from experiments.sweep.runs import Row, Run, Settings

# Columns of the table and panels of the figure, after the metric that the
# sweep is judged by.
_METRICS = ("loss", "reward/accuracy", "reward/margin", "logps/chosen", "kl")
# As `checkpoint.best_metric` names those of a held-out set.
_ENDINGS = tuple(f"{mark}{metric}" for mark in "/:" for metric in _METRICS)


def read_choices(path: str) -> list[dict[str, Any]]:
  """Reads the values of each run from the file of a sweep.

  Raises:
    FileNotFoundError: no such file.
    ValueError: not a grid, nor a list of runs; names the file.
  """
  file = pathlib.Path(path)
  if not file.exists():
    raise FileNotFoundError(f"--sweep={path}: the file does not exist")
  try:
    given = json.loads(file.read_text())
  except ValueError as error:
    raise ValueError(f"{path} is not JSON: {error}") from error
  if isinstance(given, dict) and given:
    bad = [k for k, v in given.items() if not isinstance(v, list) or not v]
    if bad:
      raise ValueError(f"{path}: {bad[0]!r} must have a list of values")
    products = itertools.product(*given.values())
    return [dict(zip(given, values, strict=True)) for values in products]
  is_list = isinstance(given, list) and given
  if is_list and all(isinstance(row, dict) for row in given):
    return given
  raise ValueError(
    f"{path} must hold an object with a list of values for each key, or a list"
    " of objects"
  )


@dataclasses.dataclass(frozen=True)
class Grid:
  """Sweep of one config, as an experiment.

  Attributes:
    config: complete config; each run changes some of its keys.
    choices: values of each run by key.
  """

  config: ml_collections.ConfigDict
  choices: list[dict[str, Any]]

  def runs(self, settings: Settings) -> list[Run]:
    """Returns a run for each choice.

    Raises:
      ValueError: an unknown key, or a value that it cannot have; names the run.
    """
    del settings  # of the experiments of papers
    columns = dict.fromkeys(key for choice in self.choices for key in choice)
    return [self._run(choice, short_names(columns)) for choice in self.choices]

  def _run(self, choice: Mapping[str, Any], names: Mapping[str, str]) -> Run:
    for key in names:
      self._check_key(key)
    chosen = [f"{names[key]}={_spell(value)}" for key, value in choice.items()]
    name = re.sub(r"[^\w.=+-]+", "_", ",".join(chosen)) or "unchanged"
    config = self.config.copy_and_resolve_references()
    try:
      for key, value in choice.items():
        value = tuple(value) if isinstance(value, list) else value
        config.update_from_flattened_dict({key: value})
      resolved = config_lib.resolve(config)
    except (ValueError, TypeError, KeyError) as error:
      raise ValueError(f"run {name}: {error}") from error

    metric = resolved.checkpoint.best_metric
    values = dict(config_lib.flatten(resolved))
    labels = {name: _plain(values[key]) for key, name in names.items()}

    def measure(folder: str) -> list[Row]:
      data = Workdir.at(folder).read_config()["data"]
      found = read_evaluation(folder, data)
      kept = [metric, *(m for m in found if m.endswith(_ENDINGS))]
      numbers = {m: found[m] for m in dict.fromkeys(kept) if m in found}
      return [{m: None if math.isnan(x) else x for m, x in numbers.items()}]

    return Run(name, labels, config, measure=measure)

  def _check_key(self, key: str) -> None:
    """Raises ValueError for an unknown key."""
    known = dict(config_lib.flatten(self.config))
    if key not in known:
      raise ValueError(f"config.{key} is unknown.{did_you_mean(key, known)}")

  def collect(self, workdir: str) -> Collected:
    """Reads the rows of finished runs."""
    return collect(workdir)

  def table(self, rows: list[Row]) -> list[Row]:
    """Returns means over seeds, sorted by the first metric, the best last.

    `checkpoint.best_is_lower` says which value is better.
    """
    labels, metrics = split_columns(rows)
    by = [name for name in labels if name != "seed"]
    means = mean_and_spread(rows, by, metrics)
    if not metrics:
      return means
    sign = -1 if config_lib.resolve(self.config).checkpoint.best_is_lower else 1

    def quality(row: Row) -> float:
      value = sign * row[metrics[0]]
      return -math.inf if math.isnan(value) else value

    return sorted(means, key=quality)

  def plot(self, rows: list[Row], path: str) -> list[str]:
    """Plots each metric against the first key of several numbers.

    Without such a key it is against the number of the run. Lines are the values
    of the other keys. Seeds are averaged, and their spread is a bar. Without
    metrics nothing is written, and [] is returned.
    """
    labels, metrics = split_columns(rows)
    if not metrics:
      return []
    labels = [name for name in labels if name != "seed"]
    numeric = [
      name
      for name in labels
      if all(isinstance(row[name], int | float) for row in rows)
      and len({row[name] for row in rows}) > 1
    ]
    x = numeric[0] if numeric else "run"
    means = mean_and_spread(rows, [x, *(n for n in labels if n != x)], metrics)
    for number, row in enumerate(means):
      others = [f"{n}={_spell(row[n])}" for n in labels if n not in (x, "run")]
      row["line"] = ", ".join(others) or "all"
      row["run"] = number
    figure, axes = plt.subplots(
      1,
      len(metrics),
      figsize=(4.5 * len(metrics), 4),
      layout="constrained",
      squeeze=False,
    )
    for axis, metric in zip(axes[0], metrics, strict=True):
      draw(axis, means, x, metric, by="line")
      is_wide = min(row[x] for row in means) > 0 and numeric
      axis.set(xlabel=x, ylabel=metric, xscale="log" if is_wide else "linear")
    axes[0, 0].legend(fontsize=7)
    return save_figure(figure, rows, path)


def split_columns(rows: list[Row]) -> tuple[list[str], list[str]]:
  """Returns the columns that say what was varied, and those of metrics."""
  columns = dict.fromkeys(name for row in rows for name in row)
  # No key of a config has such a mark.
  metrics = [name for name in columns if "/" in name or ":" in name]
  return [n for n in columns if n not in metrics and n != "run"], metrics


def short_names(keys: Mapping[str, Any]) -> dict[str, str]:
  """Returns the last part of each key, or all of it where two would agree."""
  last = [key.rpartition(".")[2] for key in keys]
  return {
    key: name if last.count(name) == 1 else key
    for key, name in zip(keys, last, strict=True)
  }


def _plain(value: Any) -> Any:
  """Returns a value that rows can be grouped by: a list becomes its text."""
  is_plain = isinstance(value, str | int | float | bool | None)
  return value if is_plain else str(value)


def _spell(value: Any) -> str:
  return f"{value:g}" if isinstance(value, float) else str(value)
