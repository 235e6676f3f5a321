"""Qwen on one machine: 0.5B on one GPU, 4B with adapters on a v5e-8.

  python -m dpo_jax.train --config=configs/qwen.py:qwen2.5-0.5b \
      --workdir=runs/qwen
  python -m dpo_jax.train --config=configs/qwen.py:qwen3-4b-lora \
      --workdir=gs://BUCKET/qwen3

| variant | policy | trained | learning rate | hardware |
|---|---|---|---|---|
| qwen2.5-0.5b | Qwen2.5-0.5B-Instruct | all | 5e-7 | one GPU of 24 GB |
| qwen2.5-0.5b-lora | Qwen2.5-0.5B-Instruct | adapters | 5e-6 | one GPU |
| qwen3-4b-lora | Qwen3-4B | adapters | 5e-6 | v5e-8 |

Values are those of trl/scripts/dpo.py of TRL for Qwen2-0.5B-Instruct: 16 pairs
a step, one epoch of trl-lib/ultrafeedback_binarized, adapters of rank 32 and
alpha 16; the rest are TRL's defaults (docs/from_trl.md), and peft's adapters of
queries and values. TRL's script has Qwen2, not Qwen2.5 or Qwen3. No source has
a result or hours, and none was run here. `plan` says of qwen3-4b-lora on v5e-8:
9.7 of 16 GiB, and 0.44 hours as the lower bound of 3,884 steps. The others were
not planned, so that 24 GB suffice is an estimate.
"""

from dpo_jax.config import default_config

_DATA = "hub:trl-lib/ultrafeedback_binarized@main"
_POLICIES = {
  "qwen2.5-0.5b": "hub:Qwen/Qwen2.5-0.5B-Instruct@main",
  "qwen2.5-0.5b-lora": "hub:Qwen/Qwen2.5-0.5B-Instruct@main",
  "qwen3-4b-lora": "hub:Qwen/Qwen3-4B@main",
}
VARIANTS = tuple(_POLICIES)


def get_config(variant: str = "qwen2.5-0.5b"):
  """Returns the config of one of VARIANTS."""
  if variant not in VARIANTS:
    raise ValueError(f"qwen.py:{variant} must be one of {', '.join(VARIANTS)}")
  config = default_config()
  config.policy.init = _POLICIES[variant]
  config.policy.compute_dtype = "bfloat16"
  config.data.source = f"{_DATA}:train"
  config.data.eval_source = f"{_DATA}:test"
  config.data.max_tokens = 1024
  config.data.max_prompt_tokens = 512
  config.batch_size = 16
  config.mesh = {"data": 1, "fsdp": -1, "tensor": 1, "context": 1}
  config.epochs = 1.0
  config.optimizer.name = "adamw"
  config.optimizer.b2 = 0.999
  config.optimizer.learning_rate = 5e-7
  config.optimizer.schedule = "linear"
  config.optimizer.warmup_steps = 0
  config.optimizer.max_grad_norm = 1.0
  config.eval.every_steps = 500
  config.eval.max_groups = 256
  if variant.endswith("-lora"):
    config.policy.param_dtype = "bfloat16"
    config.lora.rank = 32
    config.lora.alpha = 16.0
    config.lora.targets = "query|value"
    config.optimizer.learning_rate = 5e-6
  return config
