"""Anthropic-HH dialogue (Rafailov et al. 2023, sec. 6): SFT, then DPO.

  python -m dpo_jax.train --config=configs/hh.py:sft --workdir=runs/hh_sft \
      --config.policy.init=hf:MODEL_FOLDER
  python -m dpo_jax.train --config=configs/hh.py:dpo --workdir=runs/hh_dpo \
      --config.policy.init=run:runs/hh_sft

The policy is any Hugging Face folder (docs/models.md). The data come from TFDS;
`python -m dpo_jax.data.tfds_builders` says where to put the release's files. Or
use your own file: --config.data.source=jsonl:PATH.

Values are the paper's (app. B). Where it gives none, they are those of its
repository (eric-mitchell/direct-preference-optimization). Hardware of the
paper: 4 A100-80G for Pythia-2.8B, SFT 1 h 30, DPO 2 h 45. Its result: 62.9 %
wins against the chosen response at temperature 1 (fig. 3), judged by GPT-4.
docs/real_data.md has our results with a model of 260k parameters.
"""

from dpo_jax.config import default_config, loss_config

VARIANTS = ("sft", "dpo")


def get_config(stage: str = "dpo"):
  """Returns the config of a stage, "sft" or "dpo"."""
  config = default_config()
  config.data.source = "tfds:hh_rlhf/helpful_base"
  config.data.eval_fraction = 0.05
  config.data.max_tokens = 512
  config.data.max_prompt_tokens = 256
  config.batch_size = 64
  config.optimizer.name = "rmsprop"
  config.optimizer.learning_rate = 1e-6
  config.optimizer.warmup_steps = 150
  config.optimizer.max_grad_norm = 10.0
  config.eval.every_steps = 300
  config.eval.num_samples = 16
  config.checkpoint.every_steps = 300
  # One epoch of helpful_base's 43,835 pairs.
  config.total_steps = 685
  if stage == "sft":
    config.loss = loss_config("sft")
  elif stage != "dpo":
    raise ValueError(f"hh.py:{stage}: the stage must be 'sft' or 'dpo'")
  return config
