"""The synthetic review task: SFT, then DPO, on a model of 1M parameters.

  python -m dpo_jax.train --config=configs/reviews.py:sft --workdir=runs/sft
  python -m dpo_jax.train --config=configs/reviews.py:dpo --workdir=runs/dpo \
      --config.policy.init=run:runs/sft

Hardware: two CPU cores. `python -m experiments.quickstart` runs both stages;
the README gives its time and results.
"""

from dpo_jax.config import default_config, loss_config

VARIANTS = ("sft", "dpo")


def get_config(stage: str = "dpo"):
  """Returns the config of a stage, "sft" or "dpo"."""
  config = default_config()
  config.policy.preset = "1m"
  config.data.max_tokens = 160
  config.data.max_prompt_tokens = 80
  config.batch_size = 16 if stage == "sft" else 32
  config.optimizer.name = "adamw"
  config.optimizer.b2 = 0.99
  config.optimizer.max_grad_norm = 1.0
  config.eval.every_steps = 100 if stage == "sft" else 25
  config.eval.max_groups = 256
  config.eval.num_samples = 256
  config.eval.max_response_tokens = 96
  config.eval.judge = "sentiment"
  config.checkpoint.every_steps = 100
  if stage == "sft":
    config.data.source = "synthetic:review_demonstrations:20000"
    config.total_steps = 400
    config.loss = loss_config("sft")
    config.optimizer.learning_rate = 2e-3
    config.optimizer.schedule = "cosine"
    config.optimizer.warmup_steps = 20
    config.eval.num_samples = 0
  elif stage == "dpo":
    config.data.source = "synthetic:review_pairs:4000"
    # Labels follow the Bradley-Terry model, so some prefer the worse response.
    config.data.checks.chosen_scores_lower = "off"
    config.total_steps = 100
    config.log.every_steps = 5
    config.optimizer.learning_rate = 7e-5
    config.optimizer.schedule = "linear"
    config.optimizer.warmup_steps = 10
  else:
    raise ValueError(f"reviews.py:{stage}: the stage must be 'sft' or 'dpo'")
  return config
