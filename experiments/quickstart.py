"""From nothing to an aligned policy: SFT, DPO, evaluation and a figure.

  python -m experiments.quickstart [--workdir=runs/quickstart]

Trains a byte-level model of 1M parameters on the synthetic review task, whose
ground-truth reward is known. Prints a table of the policy before and after
DPO, and writes quickstart.png, and dpo/displacement.png: where chosen and
rejected log-probs went. Minutes on two CPU cores; started again, it goes on
where it stopped.
"""

import json
import os
import textwrap
from typing import Any

from absl import flags
import matplotlib

from configs import reviews
from dpo_jax import command_line
from dpo_jax.metrics import format_table, read_metrics
from dpo_jax.train import show_progress_logs, train
from experiments import replay

matplotlib.use("Agg")
import matplotlib.pyplot as plt


def run(workdir: str, *, seed: int) -> None:
  """Trains both stages; a stage that is finished is not run again."""
  for stage in ("sft", "dpo"):
    config = reviews.get_config(stage)
    config.seed = seed
    if stage == "dpo":
      config.policy.init = f"run:{workdir}/sft"
    train(config, f"{workdir}/{stage}")


def collect(workdir: str) -> list[dict[str, Any]]:
  """The policy before and after DPO: rows of the table."""
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


def read_samples(workdir: str, num: int) -> list[dict[str, Any]]:
  """The first prompts with the responses before and after."""
  with open(f"{workdir}/dpo/samples.jsonl", encoding="utf-8") as file:
    rows = [json.loads(line) for line in file]
  last = max(row["step"] for row in rows)
  before = [row for row in rows if row["step"] == 0]
  after = [row for row in rows if row["step"] == last]
  return [
    {
      "prompt": b["prompt"],
      "sft": b["response"],
      "sft_reward": b["reward"],
      "dpo": a["response"],
      "dpo_reward": a["reward"],
    }
    for b, a in list(zip(before, after, strict=False))[:num]
  ]


def format_samples(samples: list[dict[str, Any]]) -> str:
  """Prompt, then both responses with their rewards."""
  blocks = [
    f"{s['prompt']} ...\n"
    f"  SFT {s['sft_reward']:+.2f} {s['sft'].strip()!r}\n"
    f"  DPO {s['dpo_reward']:+.2f} {s['dpo'].strip()!r}"
    for s in samples
  ]
  return "\n".join(blocks)


def plot(workdir: str, path: str) -> None:
  """Curves of both stages, and samples as text."""
  sft = read_metrics(f"{workdir}/sft", "train")
  dpo = read_metrics(f"{workdir}/dpo", "train")
  held_out = read_metrics(f"{workdir}/dpo", "eval")
  figure, axes = plt.subplots(2, 3, figsize=(13, 7), layout="constrained")
  panels = (
    ("SFT loss (nats per token)", sft, {"loss": ""}),
    ("DPO loss (nats)", dpo, {"loss": ""}),
    ("DPO accuracy", dpo, {"reward/accuracy": ""}),
    (
      "log-ratio to the reference (nats)",
      dpo,
      {"log_ratio/chosen": "chosen, ", "log_ratio/rejected": "rejected, "},
    ),
  )
  for axis, (title, rows, lines) in zip(axes.flat, panels, strict=False):
    for name, label in lines.items():
      curves = [(rows, "-", "training batch")]
      curves += [(held_out, "o--", "held out")] if rows is dpo else []
      for points, style, split in curves:
        steps = [row["step"] for row in points]
        figures = [row[name] for row in points]
        axis.plot(steps, figures, style, label=f"{label}{split}")
    axis.set(title=title, xlabel="step")
    axis.legend()
    axis.grid(alpha=0.3)
  rows = collect(workdir)
  axis = axes.flat[4]
  bars = axis.bar(
    [row["policy"] for row in rows],
    [row["reward"] for row in rows],
    color=("tab:gray", "tab:blue"),
  )
  axis.bar_label(bars, fmt="%.2f", padding=2)
  axis.margins(y=0.12)
  axis.axhline(0, color="black", linewidth=0.8)
  axis.set(title="ground-truth reward of samples")
  text = "\n".join(
    textwrap.fill(line, 62, subsequent_indent="      ")
    for line in format_samples(read_samples(workdir, 4)).splitlines()
  )
  axes.flat[5].axis("off")
  axes.flat[5].text(0, 1, text, va="top", family="monospace", fontsize=7)
  figure.savefig(path, dpi=110)
  plt.close(figure)


def main() -> None:
  show_progress_logs()
  workdir = flags.FLAGS.workdir
  run(workdir, seed=flags.FLAGS.seed)
  print("\n" + format_samples(read_samples(workdir, 3)) + "\n")
  print(format_table(collect(workdir)))
  path = os.path.join(workdir, "quickstart.png")
  plot(workdir, path)
  print(f"\nfigures: {path}, {replay.draw(f'{workdir}/dpo')}")


if __name__ == "__main__":
  flags.DEFINE_string("workdir", "runs/quickstart", "folder of both runs")
  flags.DEFINE_integer("seed", 0, "of weights, data order and samples")
  command_line.run(main)
