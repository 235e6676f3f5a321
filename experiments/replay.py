"""Computes any loss on saved log-probs, without the model.

  python -m experiments.replay --workdir=runs/dpo [--losses=dpo,ipo:tau=0.2]

Evaluation writes every held-out group's log-probs to WORKDIR/eval_logps. For
each loss that can be computed from them, this prints its value at the first and
the last evaluation, and its gradient weight and accuracy at the last one. The
first row is the run's own loss. Other losses have their defaults, except knobs
that follow a colon.

For pairs it also prints how well sigmoid(beta D) is calibrated, and draws
displacement.png: how chosen and rejected log-probs moved, and the weights of
pairs in the gradient.
"""

import json
from typing import Any

from absl import flags
from etils import epath
import jax
import jax.numpy as jnp
import matplotlib
import numpy as np

from dpo_jax import command_line
from dpo_jax.intervals import wilson_interval
from dpo_jax.losses import (
  CATALOGUE,
  Objective,
  WeightedSum,
  build_objective,
  mean_over_groups,
)
from dpo_jax.records.eval_logps import Records, read_records
from dpo_jax.records.metrics import format_table
from dpo_jax.records.workdir import Workdir
from dpo_jax.training.evaluation import displacement
from dpo_jax.training.measure import measure
from dpo_jax.types import Sequences

matplotlib.use("Agg")
import matplotlib.pyplot as plt


def to_sequences(records: Records) -> Sequences:
  """Converts saved fields to the Sequences that a loss reads."""
  fields = {k: jnp.asarray(v) for k, v in records.items() if k != "example_ids"}
  return Sequences(**fields)


def parse_loss(text: str) -> dict[str, Any]:
  """Parses a loss such as 'ipo:tau=0.2' to its config.

  Raises:
    ValueError: a knob has no value.
  """
  name, *settings = text.split(":")
  config = {"name": name}
  for setting in settings:
    knob, is_set, value = setting.partition("=")
    if not is_set:
      raise ValueError(
        f"--losses: {text!r} must be NAME:KNOB=VALUE:..., as in ipo:tau=0.2"
      )
    try:
      config[knob] = json.loads(value)
    except json.JSONDecodeError:
      config[knob] = value
  return config


def objectives_for(
  sequences: Sequences, configs: dict[str, Any]
) -> tuple[dict[str, Objective | WeightedSum], dict[str, str]]:
  """Builds the losses that can be computed from saved log-probs.

  Args:
    sequences: saved fields.
    configs: configs of losses by name.

  Returns:
    Objectives, and the reasons why others are left out, both by name.
  """
  chosen, left_out = {}, {}
  for name, config in configs.items():
    objective = build_objective(config)
    missing = sorted(
      field for field in objective.needs if getattr(sequences, field) is None
    )
    try:
      objective.check_group_size(sequences.valid.shape[1])
    except ValueError:
      left_out[name] = f"reads groups of the kind {objective.group!r}"
      continue
    if missing:
      left_out[name] = f"reads {', '.join(missing)}, which were not saved"
    else:
      chosen[name] = objective
  return chosen, left_out


def replay(
  objective: Objective | WeightedSum, sequences: Sequences
) -> dict[str, Any]:
  """Computes a loss on saved log-probs.

  Returns:
    "loss" and "gradient weight", means over the groups, see `measure`; and
    "accuracy" and "95 % interval", "" for a loss without them.
  """
  per_group, metrics, _ = objective.apply(sequences, objective.init())
  count = objective.valid_groups(sequences.valid).sum()
  measured = measure(objective, sequences)
  accuracy = np.asarray(metrics.get("reward/accuracy", jnp.array([jnp.nan])))
  accuracy = accuracy[~np.isnan(accuracy)]
  row = {
    "loss": float(mean_over_groups(per_group, count)),
    "gradient weight": float(
      jnp.nanmean(measured[f"{objective.name}/gradient_weight"])
    ),
  }
  if not len(accuracy):
    return row | {"accuracy": "", "95 % interval": ""}
  low, high = wilson_interval(float(accuracy.mean()), len(accuracy))
  return row | {
    "accuracy": float(accuracy.mean()),
    "95 % interval": f"{low:.3f} to {high:.3f}",
  }


def calibration(margins: np.ndarray, num_bins: int = 5) -> list[dict[str, Any]]:
  """Compares predicted probabilities of preferences with their frequencies.

  A pair is predicted in the order that the policy prefers, so p = sigmoid(|z|)
  is at least a half.

  Args:
    margins: f64 [N], z = beta D.
    num_bins: bins of equal width between 0.5 and 1.

  Returns:
    A row for each bin: "predicted", its range as text, "pairs", "mean
    prediction" and "right", the share of pairs with z > 0, ties a half. Empty
    bins are left out.
  """
  confidence = 1.0 / (1.0 + np.exp(-np.abs(margins)))
  is_right = 0.5 * (np.sign(margins) + 1.0)
  edges = np.linspace(0.5, 1.0, num_bins + 1)
  bins = np.clip(np.digitize(confidence, edges) - 1, 0, num_bins - 1)
  rows = []
  for index in range(num_bins):
    mask = bins == index
    if not mask.any():
      continue
    rows.append(
      {
        "predicted": f"{edges[index]:.1f} to {edges[index + 1]:.1f}",
        "pairs": int(mask.sum()),
        "mean prediction": float(confidence[mask].mean()),
        "right": float(is_right[mask].mean()),
      }
    )
  return rows


def pair_margins(records: Records, beta: float) -> np.ndarray:
  """Returns beta D of every valid pair, f64 [N]."""
  log_ratios = (records["logps"] - records["ref_logps"]).astype(np.float64)
  is_pair = records["valid"].all(1)
  return beta * (log_ratios[is_pair, 0] - log_ratios[is_pair, 1])


def plot(
  by_step: dict[int, Records], beta: float, path: epath.PathLike
) -> None:
  """Writes a PNG file: log-ratios by step, gradient weights, margins, accuracy.

  Args:
    by_step: records of pairs by step.
    beta: beta of the margins.
    path: PNG file.
  """
  figure, axes = plt.subplots(1, 4, figsize=(17, 4), layout="constrained")
  steps = sorted(by_step)
  for slot, name in ((0, "chosen"), (1, "rejected")):
    ratios = [
      (by_step[s]["logps"] - by_step[s]["ref_logps"])[:, slot] for s in steps
    ]
    means = np.array([r.mean() for r in ratios])
    errors = np.array([r.std() / np.sqrt(len(r)) for r in ratios])
    axes[0].errorbar(steps, means, 2 * errors, marker="o", label=name)
  axes[0].axhline(0, color="black", linewidth=0.8)
  axes[0].legend()
  axes[0].set(title="mean log-ratio (nats), 2 standard errors", xlabel="step")
  last = by_step[steps[-1]]
  margins = pair_margins(last, beta)
  weights = 1.0 / (1.0 + np.exp(margins))
  axes[1].hist(weights, bins=np.linspace(0, 1, 11))
  axes[1].set(
    title="weight in the gradient, sigmoid(-beta D)", ylabel="held-out pairs"
  )
  is_pair = last["valid"].all(1)
  gaps = last["num_tokens"][is_pair, 0] - last["num_tokens"][is_pair, 1]
  moved = displacement(margins, last["num_tokens"][is_pair])
  axes[2].scatter(gaps, margins, s=6, alpha=0.5)
  axes[2].set(
    title=f"correlation {moved['length_margin_correlation']:.2f}",
    xlabel="chosen minus rejected length (tokens)",
    ylabel="beta D",
  )
  rates, lows, highs = [], [], []
  for step in steps:
    z = pair_margins(by_step[step], beta)
    rate = float((0.5 * (np.sign(z) + 1)).mean())
    low, high = wilson_interval(rate, len(z))
    rates.append(rate)
    lows.append(rate - low)
    highs.append(high - rate)
  axes[3].errorbar(steps, rates, [lows, highs], marker="o", capsize=3)
  axes[3].axhline(0.5, color="black", linewidth=0.8)
  axes[3].set(title="accuracy, 95 % interval", xlabel="step")
  with epath.Path(path).open("wb") as file:
    figure.savefig(file, dpi=90, format="png")
  plt.close(figure)


def draw(workdir: epath.PathLike) -> epath.Path | None:
  """Writes WORKDIR/displacement.png and returns its path.

  Returns None where the run has no reference or no pairs.
  """
  by_step = read_records(workdir)
  last = by_step[max(by_step)]
  if last.get("ref_logps") is None or last["logps"].shape[1] != 2:
    return None
  path = epath.Path(workdir) / "displacement.png"
  plot(by_step, trained_beta(read_loss(workdir)), path)
  return path


def read_loss(workdir: epath.PathLike) -> Any:
  """Returns the config of a run's loss: a dict, or a list of them."""
  return Workdir.of_run(workdir).read_config()["loss"]


def trained_beta(loss: Any) -> float:
  """Returns the beta of a loss; DPO's default for a list, or without one."""
  own = loss.get("beta") if isinstance(loss, dict) else None
  return own or CATALOGUE["dpo"].defaults["beta"]


def main() -> None:
  workdir = flags.FLAGS.workdir
  by_step = read_records(workdir)
  trained = read_loss(workdir)
  steps = sorted(by_step)
  first, last = (to_sequences(by_step[s]) for s in (steps[0], steps[-1]))
  names = flags.FLAGS.losses or sorted(CATALOGUE)
  configs = {"as trained": trained} | {name: parse_loss(name) for name in names}
  chosen, left_out = objectives_for(last, configs)
  rows = []
  for name, objective in chosen.items():
    before, after = (
      jax.device_get(replay(objective, s)) for s in (first, last)
    )
    rows.append(
      {
        "loss": name,
        f"loss at {steps[0]}": before["loss"],
        f"loss at {steps[-1]}": after["loss"],
        "gradient weight": f"{after['gradient weight']:.2e}",
        "accuracy": after["accuracy"],
        "95 % interval": after["95 % interval"],
      }
    )
  print(format_table(rows))
  for name, reason in left_out.items():
    print(f"left out: {name} {reason}")
  path = draw(workdir)
  if path is not None:
    beta = trained_beta(trained)
    print(f"\ncalibration of sigmoid(beta D), beta {beta:g}")
    print(format_table(calibration(pair_margins(by_step[steps[-1]], beta))))
    print(f"\nplot: {path}")


if __name__ == "__main__":
  flags.DEFINE_string("workdir", None, "run directory", required=True)
  flags.DEFINE_list(
    "losses", [], "NAME[:KNOB=VALUE...],...; the whole catalogue if empty"
  )
  command_line.run(main)
