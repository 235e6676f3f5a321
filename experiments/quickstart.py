"""Trains and evaluates a policy from nothing: SFT, then DPO, and a plot.

  python -m experiments.quickstart [--workdir=runs/quickstart]

Trains a byte-level model of 1M parameters on the synthetic review task, whose
ground-truth reward is known. Prints a table of the policy before and after
DPO. Writes quickstart.png, and dpo/displacement.png, which shows how chosen and
rejected log-probs moved. Takes minutes on two CPU cores; started again, it
resumes where it stopped.
"""

from collections.abc import Sequence
import json
import os
import textwrap
from typing import Any

from absl import flags
import matplotlib
import numpy as np

from configs import reviews
from dpo_jax import command_line
from dpo_jax.records.metrics import format_table, read_metrics
from dpo_jax.train import train
from experiments import replay

matplotlib.use("Agg")
import matplotlib.pyplot as plt

# Number of logged batches that each point of a curve averages.
_WINDOW = 5
_QUARTILES = (0.25, 0.5, 0.75)
_RULE = "Samples at the 25, 50 and 75 % points of the gain in reward:"


def run(workdir: str, *, seed: int) -> None:
  """Trains WORKDIR/sft, then WORKDIR/dpo from it; skips a finished one."""
  for stage in ("sft", "dpo"):
    config = reviews.get_config(stage)
    config.seed = seed
    if stage == "dpo":
      config.policy.init = f"run:{workdir}/sft"
    train(config, f"{workdir}/{stage}")


def collect(workdir: str) -> list[dict[str, Any]]:
  """Returns rows of the table: the policy before and after DPO.

  Returns:
    "policy" ("SFT" or "DPO"), "reward" (mean true reward of samples), "win rate
    vs SFT", "95 % interval" (text), "KL to SFT (nats)", "pair accuracy".
  """
  evals = read_metrics(f"{workdir}/dpo", "eval")
  rows = []
  for name, row in (("SFT", evals[0]), ("DPO", evals[-1])):
    rows.append(
      {
        "policy": name,
        "reward": row["sample/reward"],
        "win rate vs SFT": row["sample/win_rate"],
        "95 % interval": (
          f"{row['sample/win_rate_low']:.3f} to"
          f" {row['sample/win_rate_high']:.3f}"
        ),
        "KL to SFT (nats)": row["kl"],
        "pair accuracy": row["reward/accuracy"],
      }
    )
  return rows


def pick_samples(workdir: str) -> list[dict[str, Any]]:
  """Returns the samples at the quartiles of the gain in reward from SFT to DPO.

  A quarter of the prompts gained less than the first, half of them less than
  the second, and a quarter gained more than the third.

  Returns:
    "prompt", "sft" and "dpo", the responses, and "sft_reward", "dpo_reward".
  """
  with open(f"{workdir}/dpo/samples.jsonl", encoding="utf-8") as file:
    rows = [json.loads(line) for line in file]
  last = max(row["step"] for row in rows)
  before = [row for row in rows if row["step"] == 0]
  after = [row for row in rows if row["step"] == last]
  gains = np.array(
    [a["reward"] - b["reward"] for b, a in zip(before, after, strict=True)]
  )
  order = np.argsort(gains, kind="stable")
  picked = [order[round(q * (len(order) - 1))] for q in _QUARTILES]
  return [
    {
      "prompt": before[i]["prompt"],
      "sft": before[i]["response"],
      "sft_reward": before[i]["reward"],
      "dpo": after[i]["response"],
      "dpo_reward": after[i]["reward"],
    }
    for i in picked
  ]


def format_samples(samples: list[dict[str, Any]]) -> str:
  """Formats a heading, and each prompt with both responses and rewards."""
  blocks = [
    f"{s['prompt']} ...\n"
    f"  SFT {s['sft_reward']:+.2f} {s['sft'].strip()!r}\n"
    f"  DPO {s['dpo_reward']:+.2f} {s['dpo'].strip()!r}"
    for s in samples
  ]
  return "\n".join([_RULE, *blocks])


def summarise(workdir: str) -> str:
  """Returns one line about the gain in reward, the win rate and the KL."""
  sft, dpo = collect(workdir)
  return (
    f"DPO took the true reward of samples from {sft['reward']:.2f} to"
    f" {dpo['reward']:.2f}; {100 * dpo['win rate vs SFT']:.0f} % of them win"
    f" against SFT's, at a KL of {dpo['KL to SFT (nats)']:.1f} nats"
  )


def smooth(values: Sequence[float]) -> np.ndarray:
  """Returns means of `_WINDOW` neighbours; there must be as many values."""
  kernel = np.ones(_WINDOW)
  sums = np.convolve(values, kernel, "same")
  return sums / np.convolve(np.ones(len(values)), kernel, "same")


def _draw_curves(
  axis: Any, workdir: str, title: str, lines: dict[str, tuple[str, str]]
) -> None:
  """Draws metrics of training as lines, and held-out ones as points.

  Args:
    axis: matplotlib axes.
    workdir: run directory.
    title: title of the axes.
    lines: label and colour by metric.
  """
  train_rows, held_out = (read_metrics(workdir, x) for x in ("train", "eval"))
  for name, (label, color) in lines.items():
    axis.plot(
      [row["step"] for row in train_rows],
      smooth([row[name] for row in train_rows]),
      color=color,
      label=label,
    )
    axis.plot(
      [row["step"] for row in held_out],
      [row[name] for row in held_out],
      "o",
      color=color,
      markeredgecolor="black",
    )
  axis.set(title=title, xlabel="step")
  axis.grid(alpha=0.3)


def plot(workdir: str, path: str) -> None:
  """Writes a PNG file: curves of both stages, sample rewards, and samples."""
  figure, axes = plt.subplots(2, 3, figsize=(13, 7), layout="constrained")
  figure.suptitle(
    f"{summarise(workdir)}\nLines: training, mean of {_WINDOW} logged batches."
    " Points: held out."
  )
  panels = (
    ("sft", "SFT loss (nats a token)", {"loss": ("", "tab:purple")}),
    ("dpo", "DPO loss (nats)", {"loss": ("", "tab:blue")}),
    (
      "dpo",
      "accuracy: pairs in the right order",
      {"reward/accuracy": ("", "tab:blue")},
    ),
    (
      "dpo",
      "log-ratio to SFT (nats)",
      {
        "log_ratio/chosen": ("chosen", "tab:green"),
        "log_ratio/rejected": ("rejected", "tab:red"),
      },
    ),
  )
  for axis, (stage, title, lines) in zip(axes.flat, panels, strict=False):
    _draw_curves(axis, f"{workdir}/{stage}", title, lines)
  axes.flat[0].set_yscale("log")
  axes.flat[3].legend()
  rows = read_metrics(f"{workdir}/dpo", "eval")
  axis = axes.flat[4]
  bars = axis.bar(
    ["SFT", "DPO"],
    [row["sample/reward"] for row in (rows[0], rows[-1])],
    yerr=[2 * row["sample/reward_error"] for row in (rows[0], rows[-1])],
    color=("tab:purple", "tab:blue"),
    capsize=4,
  )
  axis.bar_label(bars, fmt="%.2f", padding=2)
  axis.margins(y=0.12)
  axis.axhline(0, color="black", linewidth=0.8)
  axis.set(title="true reward of samples, 2 standard errors")
  text = "\n".join(
    textwrap.fill(line, 62, subsequent_indent="      ")
    for line in format_samples(pick_samples(workdir)).splitlines()
  )
  axes.flat[5].axis("off")
  axes.flat[5].text(0, 1, text, va="top", family="monospace", fontsize=8.5)
  figure.savefig(path, dpi=80)
  plt.close(figure)


def main() -> None:
  workdir = flags.FLAGS.workdir
  run(workdir, seed=flags.FLAGS.seed)
  print("\n" + format_samples(pick_samples(workdir)) + "\n")
  print(format_table(collect(workdir)))
  print("\n" + summarise(workdir))
  path = os.path.join(workdir, "quickstart.png")
  plot(workdir, path)
  print(f"\nplots: {path}, {replay.draw(f'{workdir}/dpo')}")


if __name__ == "__main__":
  flags.DEFINE_string("workdir", "runs/quickstart", "folder of both runs")
  flags.DEFINE_integer("seed", 0, "seed of weights, data order and samples")
  command_line.run(main)
