"""Gold reward and KL of checkpoints, of the reference, and of Best-of-N."""

import numpy as np

from dpo_jax import judges
from experiments import trained
from experiments.sentiment.plan import Plan
from experiments.sweep import Row

_SHOWN = 5  # samples of each measurement that are written


def measure_steps(folder: str, *, plan: Plan) -> list[Row]:
  """Measures reward and KL of every checkpoint, from new samples of it.

  The first samples of each are written to FOLDER/gold_samples.jsonl.

  Returns:
    A row for each checkpoint: `step` and `Bench.metrics`.
  """
  bench, rows = plan.load_bench(), []
  samples_path = f"{folder}/gold_samples.jsonl"
  open(samples_path, "w", encoding="utf-8").close()
  for step, policy, params in trained.load_steps(folder):
    samples = bench.sample(policy, params, seed=11)
    rows.append({"step": step, **bench.metrics(policy, params, samples)})
    trained.write_samples(samples_path, samples, _SHOWN, {"step": step})
  return rows


def measure_reference(folder: str, *, plan: Plan) -> list[Row]:
  """Measures the reference's reward on new samples; its KL is 0.

  Some are appended to FOLDER/gold_samples.jsonl.

  Returns:
    One row: `step`, 0, `trained.reward_metrics` and `kl`.
  """
  bench = plan.load_bench()
  samples = bench.sample(bench.ref_policy, bench.ref_params, seed=11)
  trained.write_samples(
    f"{folder}/gold_samples.jsonl", samples, _SHOWN, {"step": 0}
  )
  return [{"step": 0, **trained.reward_metrics(samples.rewards), "kl": 0.0}]


def measure_best_of(folder: str, *, plan: Plan, num: int) -> list[Row]:
  """Measures the gold reward of the labeller's best of `num` samples.

  The KL is log N - (N - 1) / N, which is exact where no two rewards tie. Some
  of the best are appended to FOLDER/gold_samples.jsonl.

  Returns:
    One row: `step`, 0, `trained.reward_metrics` and `kl`.
  """
  bench = plan.load_bench()
  drawn = bench.sample(bench.ref_policy, bench.ref_params, seed=13, count=num)
  labeller = judges.get_judge(plan.labeller, key="labeller")
  scores = judges.ask(labeller, drawn.prompt_texts, drawn.texts, key="labeller")
  best = scores.reshape(-1, num).argmax(1) + num * np.arange(len(bench.prompts))
  chosen = bench.judge(
    [drawn.prompts[i] for i in best], [drawn.responses[i] for i in best]
  )
  trained.write_samples(
    f"{folder}/gold_samples.jsonl", chosen, _SHOWN, {"step": 0}
  )
  kl = float(np.log(num) - (num - 1) / num)
  return [{"step": 0, **trained.reward_metrics(chosen.rewards), "kl": kl}]
