"""Every loss of the catalogue for a few steps, from one SFT policy.

  python -m experiments.loss_table [--workdir=runs/loss_table] [--steps=30]
      [--losses=dpo,ipo]

Each loss is trained by its name alone, with its own defaults, on the synthetic
review task. Finished runs are skipped. This checks that each loss trains at one
learning rate; it does not compare losses.
"""

from collections.abc import Sequence
import math
import os
from typing import Any

from absl import flags

from configs import reviews
from dpo_jax import command_line
from dpo_jax.losses import CATALOGUE
from dpo_jax.records.metrics import format_table, read_metrics
from dpo_jax.train import train

# Folder of the SFT policy; must differ from the name of every loss.
_START = "start"


def sft_config(steps: int) -> Any:
  """Returns the config of the policy that every loss starts from."""
  config = reviews.get_config("sft")
  config.total_steps = steps
  return config


def loss_config(workdir: str, name: str, steps: int) -> Any:
  """Returns the config of a loss, by its name alone."""
  config = reviews.get_config("dpo")
  config.loss.name = name
  config.policy.init = f"run:{workdir}/{_START}"
  config.total_steps = steps
  config.data.source = "synthetic:review_pairs:1500"
  config.eval.every_steps = 0
  config.eval.max_groups = 128
  config.eval.num_samples = 64
  config.checkpoint.best_metric = "eval/loss"
  config.checkpoint.best_is_lower = True
  return config


def collect(workdir: str, name: str) -> dict[str, Any]:
  """Returns a loss's row of the table, from the metrics of its run.

  Returns:
    "loss", its name; "finite", "yes" if all losses and gradient norms are
    finite, and "NO"; "first" and "last", training losses; "accuracy", "margin",
    "KL" and "reward" of the last evaluation; "groups/s", the median. All are
    text, "-" where there is no number.
  """
  train_rows = read_metrics(f"{workdir}/{name}", "train")
  last = read_metrics(f"{workdir}/{name}", "eval")[-1]
  values = [v for row in train_rows for v in (row["loss"], row["grad_norm"])]
  speeds = sorted(row["groups_per_second"] for row in train_rows[1:])
  is_finite = all(v is not None and math.isfinite(v) for v in values)
  return {
    "loss": name,
    "finite": "yes" if is_finite else "NO",
    "first": f"{train_rows[0]['loss']:.4g}",
    "last": f"{train_rows[-1]['loss']:.4g}",
    "accuracy": _format(last.get("reward/accuracy")),
    "margin": _format(last.get("reward/margin")),
    "KL": _format(last.get("kl")),
    "reward": _format(last.get("sample/reward")),
    "groups/s": f"{speeds[len(speeds) // 2]:.1f}" if speeds else "-",
  }


def _format(value: float | None) -> str:
  return "-" if value is None else f"{value:.3f}"


def run(
  workdir: str, names: Sequence[str], *, steps: int, sft_steps: int
) -> list[dict[str, Any]]:
  """Trains the SFT policy, and every loss from it; finished runs are skipped.

  Args:
    workdir: folder of all runs.
    names: losses.
    steps: training steps of each loss.
    sft_steps: training steps of the SFT policy.

  Returns:
    One row for each loss, see `collect`.
  """
  train(sft_config(sft_steps), os.path.join(workdir, _START))
  rows = []
  for name in names:
    train(loss_config(workdir, name, steps), os.path.join(workdir, name))
    rows.append(collect(workdir, name))
  return rows


def main() -> None:
  workdir = flags.FLAGS.workdir
  # Losses of samples also need a judge.
  names = flags.FLAGS.losses or [
    name for name, row in CATALOGUE.items() if row.group != "samples"
  ]
  rows = run(
    workdir, names, steps=flags.FLAGS.steps, sft_steps=flags.FLAGS.sft_steps
  )
  table = format_table(rows)
  with open(os.path.join(workdir, "table.txt"), "w", encoding="utf-8") as file:
    file.write(table + "\n")
  print("\n" + table)


if __name__ == "__main__":
  flags.DEFINE_string("workdir", "runs/loss_table", "folder of all runs")
  flags.DEFINE_integer("steps", 30, "training steps of each loss")
  flags.DEFINE_integer(
    "sft_steps", 400, "training steps of the policy that all start from"
  )
  flags.DEFINE_list(
    "losses", [], "names of losses; all that need no judge if empty"
  )
  command_line.run(main)
