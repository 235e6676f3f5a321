"""Estimates what a sweep costs, by formula, without running it."""

from collections.abc import Sequence
from typing import Any

from dpo_jax import config as config_lib
from dpo_jax import model_sources
from dpo_jax.records.metrics import format_table
from experiments.sweep.runs import Row, Run

# Assumed by scale: hardware, FLOP/s that training reaches on it, and seconds
# that a run also takes to start, compile, evaluate and save.
_SPEEDS = {
  "tiny": ("2 CPU cores", 3e10, 8.0),
  "paper": ("8 TPU v5e chips at 40 % of their 197 TFLOP/s", 6.3e14, 60.0),
}


def estimate(runs: Sequence[Run], scale: str) -> list[Row]:
  """Estimates FLOPs and hours: 6 N FLOPs a token of a policy of N parameters.

  Sampling and the reference each add 2 N a token in the runs that have them.
  Samples that are only measured take 2 N a token too.

  Args:
    runs: the sweep, or a part.
    scale: "tiny" or "paper", which decides the hardware.

  Returns:
    One row for each run: "run", "after", "FLOPs" (text) and "hours"; if any
    run asks a judge on a server, "questions" and "dollars" too.

  Raises:
    ValueError: a run that has epochs instead of total_steps.
  """
  _, speed, seconds = _SPEEDS[scale]
  rows = []
  asks = any(run.questions for run in runs)
  for run in runs:
    flops = 2.0 * run.num_params * run.sampled_tokens
    if run.config is not None:
      config = config_lib.resolve(run.config)
      if config.total_steps is None:
        raise ValueError(
          f"run {run.name} has epochs, whose steps depend on its data: for an"
          " estimate give --config.epochs=0 --config.total_steps=N"
        )
      num_slots = max(2, config.online.num_samples or 0)
      tokens = run.tokens_per_group or config.data.max_tokens * num_slots
      passes = 6.0 + (2.0 if config.reference.kind != "none" else 0.0)
      passes += 2.0 if config.online.kind != "none" else 0.0
      tokens *= config.batch_size * config.total_steps
      flops += passes * (run.num_params or _num_params(config)) * tokens
    row = {
      "run": run.name,
      "after": ", ".join(run.after) or "-",
      "FLOPs": f"{flops:.2e}",
      "hours": (flops / speed + seconds) / 3600.0,
    }
    if asks:
      row |= {"questions": run.questions, "dollars": run.dollars}
    rows.append(row)
  return rows


def _num_params(config: Any) -> int:
  """Counts the policy's parameters.

  A policy that starts from a run of the sweep has no checkpoint yet, and is
  counted by its preset.
  """
  init = config.policy.init
  source = model_sources.parse("random" if init.startswith("run:") else init)
  settings = source.tokenizer_settings(config.data)
  vocab_size = model_sources.open_tokenizer(settings).vocab_size
  return source.policy(config.policy, vocab_size=vocab_size).config.num_params()


def hardware(scale: str) -> str:
  """Describes the hardware that a scale's estimate assumes."""
  return _SPEEDS[scale][0]


def print_estimate(runs: Sequence[Run], scale: str) -> None:
  """Prints the estimate of each run, and of all together."""
  rows = estimate(runs, scale)
  print(format_table(rows))
  hours = sum(row["hours"] for row in rows)
  flops = sum(float(row["FLOPs"]) for row in rows)
  print(
    f"\n{len(rows)} runs, {flops:.2e} FLOPs, about {hours:.2f} hours on"
    f" {hardware(scale)}"
  )
  if questions := sum(run.questions for run in runs):
    dollars = sum(run.dollars for run in runs)
    cost = f"at most about ${dollars:,.2f}" if dollars else "price not given"
    print(f"{questions:,} questions to the judge, {cost}")
