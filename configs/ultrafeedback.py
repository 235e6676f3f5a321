"""UltraFeedback (Tunstall et al. 2023, arXiv:2310.16944): DPO of a 7B model.

  python -m dpo_jax.train --config=configs/ultrafeedback.py \
      --workdir=gs://BUCKET/ultrafeedback

Values are those of the alignment-handbook's recipe for Zephyr 7B beta: 8 GPUs,
8 pairs each, 2 microbatches. Its model and data are read from the Hub by name;
the log and config.json record their commits.

Hardware: sized for v5e-16, a row of up to 2,048 tokens on each chip. Plan it
first, on any machine:

  python -m dpo_jax.plan --config=configs/ultrafeedback.py \
      --config.policy.init=random --config.policy.preset=mistral-7b \
      --topology=v5e-16 --rows=64 --row_tokens=2048 --vocab_size=32000 \
      --config.epochs=0 --config.total_steps=478

This config has not been run, so there is no expected result.
"""

from dpo_jax.config import default_config

_DATA = "hub:HuggingFaceH4/ultrafeedback_binarized@main"


def get_config():
  """Returns the config of DPO from Zephyr's SFT model."""
  config = default_config()
  config.policy.init = "hub:alignment-handbook/zephyr-7b-sft-full@main"
  config.policy.compute_dtype = "bfloat16"
  config.data.source = f"{_DATA}:train_prefs"
  config.data.eval_source = f"{_DATA}:test_prefs"
  config.data.max_tokens = 1024
  config.data.max_prompt_tokens = 512
  config.loss.beta = 0.01
  config.batch_size = 128
  config.accumulation_steps = 4
  config.mesh = {"data": 1, "fsdp": -1, "tensor": 1, "context": 1}
  config.epochs = 1.0
  config.optimizer.name = "adamw"
  config.optimizer.b2 = 0.999
  config.optimizer.learning_rate = 5e-7
  config.optimizer.schedule = "cosine"
  config.optimizer.warmup_steps = 48  # 10 % of the 478 steps
  config.optimizer.max_grad_norm = 1.0
  config.eval.every_steps = 100
  config.checkpoint.every_steps = 100
  return config
