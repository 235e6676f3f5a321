"""Held-out metrics of a policy."""

import dataclasses
import functools
import math
from typing import Any

import jax
import numpy as np

from dpo_jax import config as config_lib
from dpo_jax.data.loader import Loader
from dpo_jax.data.scoring import score_all
from dpo_jax.intervals import wilson_interval
from dpo_jax.losses import Objective, WeightedSum
from dpo_jax.names import did_you_mean
from dpo_jax.parallel.hosts import to_host
from dpo_jax.records.eval_logps import Records
from dpo_jax.training.measure import make_measure
from dpo_jax.training.program import Program
from dpo_jax.training.samples import SAMPLE_METRICS
from dpo_jax.types import Sequences, fields_of


def evaluate(
  program: Program,
  params: Any,
  ref_params: Any,
  loss_state: Any,
  loader: Loader,
  *,
  label: str = "",
) -> tuple[dict[str, float], Records]:
  """Computes the means of metrics over a held-out set.

  Every group counts once. Losses are measured on the whole set at once, so a
  loss that couples the batch, such as `kto` or `aot`, does not depend on
  `eval.batch_size`.

  Args:
    program: policy, and the losses to measure.
    params: parameters of the policy.
    ref_params: parameters of the reference, or None where it is cached or
      absent.
    loss_state: state of the objective.
    loader: held-out groups.
    label: name of the work for `progress.track`; "" shows nothing.

  Returns:
    The metrics: `loss`, the objective's own, those of `measure.measure` for
    each of `eval.losses`, `num_groups` (groups that the loss can read), with a
    margin `displacement`'s, and with an accuracy the bounds of its 95 %
    interval, `reward/accuracy_low` and `reward/accuracy_high`. NaN marks a
    metric that no group has. Then the records: `example_ids`, and the fields of
    Sequences by name, a row for each group.
  """
  read = functools.partial(program.eval_step, params, ref_params)
  ids, sequences = score_all(read, loader, program.placement, label=label)
  per_group, metrics, is_valid = jax.tree.map(
    np.asarray, program.measure(sequences, jax.tree.map(to_host, loss_state))
  )
  records = {"example_ids": ids} | {
    field.name: getattr(sequences, field.name)
    for field in dataclasses.fields(sequences)
    if getattr(sequences, field.name) is not None
  }
  columns = {name: x.astype(np.float64) for name, x in metrics.items()}
  means = _means(
    columns,
    per_group.astype(np.float64),
    records["num_tokens"],
    int(is_valid.sum()),
  )
  return means, records


def _means(
  columns: dict[str, np.ndarray],
  per_group: np.ndarray,
  num_tokens: np.ndarray,
  count: int,
) -> dict[str, float]:
  """Computes the metrics of a held-out set from those of its groups.

  Args:
    columns: f64 [N] by name, NaN where a group has no value.
    per_group: f64 [N], losses.
    num_tokens: f32 [N, K].
    count: groups that the loss can read.

  Returns:
    The means of the columns, and all that `evaluate` adds to them.
  """
  metrics = {
    # NaN where no group has the metric.
    name: float(np.nansum(x) / ((~np.isnan(x)).sum() or math.nan))
    for name, x in columns.items()
  }
  # Groups that the loss cannot read have a loss of 0, and do not count.
  metrics["loss"] = float(per_group.sum() / max(count, 1))
  if "reward/accuracy" in metrics:
    num = int((~np.isnan(columns["reward/accuracy"])).sum())
    low, high = wilson_interval(metrics["reward/accuracy"], num)
    metrics |= {"reward/accuracy_low": low, "reward/accuracy_high": high}
  if "reward/margin" in columns:
    metrics |= displacement(columns["reward/margin"], num_tokens)
  return metrics | {"num_groups": count}


def metric_names(
  objective: Objective | WeightedSum, others: tuple[Objective, ...] = ()
) -> list[str]:
  """Names the metrics that `evaluate` gives, without data.

  Args:
    objective: loss that is trained.
    others: losses that are measured too.

  Returns:
    Sorted names; none for a loss that learns from samples, which held-out
    groups do not have.
  """
  if objective.group == "samples":
    return []
  num_slots = objective.num_slots or 2
  needs = objective.needs.union(*(other.needs for other in others))

  def abstract(*shape: int, dtype: Any = np.float32) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct((1, *shape), dtype)

  names = ("logps", "num_tokens", "score", *needs)
  fields = {name: abstract(num_slots) for name in names}
  fields |= {name: abstract() for name in needs & fields_of("mismatched")}
  sequences = Sequences(**fields, valid=abstract(num_slots, dtype=bool))
  measure = make_measure(objective, others)
  _, metrics, _ = jax.eval_shape(measure, sequences, objective.init())
  columns = {name: np.zeros(1) for name in metrics}
  return sorted(_means(columns, np.zeros(1), np.ones((1, num_slots)), 1))


def check_metric(
  config: Any,
  objective: Objective | WeightedSum,
  others: tuple[Objective, ...],
) -> None:
  """Raises ValueError if `checkpoint.best_metric` is set and not measured."""
  wanted = config.checkpoint.best_metric
  prefixes = [
    config_lib.metric_prefix(n) for n in config_lib.eval_sets(config.data)
  ]
  names = metric_names(objective, others)
  known = [f"{prefix}{name}" for prefix in prefixes for name in names]
  if config.eval.num_samples:
    # The first set's prompts are sampled from.
    known += [f"{prefixes[0]}{name}" for name in SAMPLE_METRICS]
  if wanted and wanted not in known:
    raise ValueError(
      f"checkpoint.best_metric={wanted!r} is not measured."
      f"{did_you_mean(wanted, known)} Measured: {', '.join(known)}"
    )


def displacement(
  margins: np.ndarray, num_tokens: np.ndarray
) -> dict[str, float]:
  """Measures which groups dominate the gradient, and the length bias.

  Args:
    margins: f64 [N], beta D, the margin of rewards; NaN where there is none.
    num_tokens: f32 [N, K], slot 0 chosen.

  Returns:
    `pull/0.0` to `pull/1.0`: fraction of groups whose weight in DPO's gradient,
    sigmoid(-beta D), rounds to that value. A policy that equals its reference
    has all groups in `pull/0.5`. And `length_margin_correlation`: correlation
    of the chosen minus the mean rejected length with the margin, 0 where either
    is constant (margins: to 1e-4) or fewer than two groups have a margin.
  """
  is_counted = ~np.isnan(margins)
  margins = margins[is_counted]
  others = num_tokens[is_counted, 1:]
  present = np.maximum((others > 0).sum(1), 1)
  gaps = num_tokens[is_counted, 0] - others.sum(1) / present
  weights = 0.5 * (1.0 - np.tanh(0.5 * margins))
  counts = np.bincount(np.rint(10 * weights).astype(int), minlength=11)
  metrics = {
    f"pull/{tenth / 10:.1f}": float(n / max(len(margins), 1))
    for tenth, n in enumerate(counts)
  }
  # Margins of a policy at its reference differ by rounding alone.
  varies = len(margins) > 1 and margins.std() > 1e-4 and gaps.std() > 0
  correlation = np.corrcoef(gaps, margins)[0, 1] if varies else 0.0
  return metrics | {"length_margin_correlation": float(correlation)}
