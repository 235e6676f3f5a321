"""UltraFeedback: Zephyr 7B (arXiv:2310.16944) and SimPO's (arXiv:2405.14734).

  python -m dpo_jax.train --config=configs/ultrafeedback.py \
      --workdir=gs://BUCKET/ultrafeedback
  python -m dpo_jax.train --config=configs/ultrafeedback.py:llama3-base_simpo \
      --workdir=gs://BUCKET/simpo

`zephyr`, the default, is the alignment-handbook's recipe for Zephyr 7B beta: 8
GPUs, 8 pairs each, 2 microbatches. The other variants are SETTING_LOSS, with a
setting of SimPO's paper. Expected, by princeton-nlp/SimPO's README: win rates
of AlpacaEval 2, controlled for length, %:

| setting | start | dpo | ipo | kto | orpo | r_dpo | simpo |
|---|---|---|---|---|---|---|---|
| mistral-base | 8.4 | 15.1 | 11.8 | 13.1 | | 17.4 | 21.4 |
| mistral-instruct | 17.1 | 26.8 | 20.3 | 24.5 | 24.5 | 27.3 | 32.1 |
| llama3-base | 6.2 | 18.2 | 14.4 | 14.2 | 12.2 | 17.6 | 22.0 |
| llama3-instruct | 26.0 | 40.3 | 35.6 | 33.1 | 28.5 | 41.1 | 44.7 |
| llama3-instruct-v0.2 | 26.0 | 48.2 | 46.8 | 34.1 | 38.1 | 48.0 | 53.7 |
| gemma2 | 51.1 | 67.8 | | | | | 72.4 |

Learning rates, beta and gamma of DPO and SimPO are that README's; lengths,
batch and schedule those of its training_configs. It gives no values of the
other losses: they have DPO's rate, beta of KTO and R-DPO is DPO's, and the rest
are this package's defaults, IPO's with means over tokens as in TRL. No source
confirms these; sweep them. Warm-up is 10 % of the 478 steps of
ultrafeedback_binarized, also where the data are others.

Hardware: sized for v5e-16. `plan` says of llama3-base_simpo, with 64 rows of
2,048 tokens: 11.9 of 16 GiB, and 0.34 hours as the lower bound of 478 steps. No
source has hours. Plan another variant first, on any machine:

  python -m dpo_jax.plan --config=configs/ultrafeedback.py \
      --config.policy.init=random --config.policy.preset=mistral-7b \
      --topology=v5e-16 --rows=64 --row_tokens=2048 --vocab_size=32000 \
      --config.epochs=0 --config.total_steps=478

Models and data are read from the Hub by name; the log and config.json record
their commits. None of these was run here.
"""

import dataclasses

from dpo_jax.config import default_config, loss_config

_BINARIZED = "HuggingFaceH4/ultrafeedback_binarized"
_LOSSES = ("dpo", "ipo", "kto", "orpo", "r_dpo", "simpo")


@dataclasses.dataclass(frozen=True)
class _Setting:
  """Policy and data, with the learning rate of DPO and the knobs of SimPO."""

  init: str
  data: str
  dpo_rate: float
  simpo_rate: float
  simpo_beta: float
  gamma_over_beta: float


_ZEPHYR = "alignment-handbook/zephyr-7b-sft-full"
_MISTRAL = "mistralai/Mistral-7B-Instruct-v0.2"
_LLAMA = "meta-llama/Meta-Llama-3-8B-Instruct"
_SETTINGS = {
  "mistral-base": _Setting(_ZEPHYR, _BINARIZED, 5e-7, 3e-7, 2.0, 0.8),
  "mistral-instruct": _Setting(
    _MISTRAL,
    "princeton-nlp/mistral-instruct-ultrafeedback",
    *(5e-7, 5e-7, 2.5, 0.1),
  ),
  "llama3-base": _Setting(
    "princeton-nlp/Llama-3-Base-8B-SFT",
    _BINARIZED,
    *(5e-7, 6e-7, 2.0, 0.5),
  ),
  "llama3-instruct": _Setting(
    _LLAMA,
    "princeton-nlp/llama3-ultrafeedback",
    *(7e-7, 1e-6, 2.5, 0.55),
  ),
  "llama3-instruct-v0.2": _Setting(
    _LLAMA,
    "princeton-nlp/llama3-ultrafeedback-armorm",
    *(3e-7, 1e-6, 10.0, 0.3),
  ),
  "gemma2": _Setting(
    "google/gemma-2-9b-it",
    "princeton-nlp/gemma2-ultrafeedback-armorm",
    *(5e-7, 8e-7, 10.0, 0.5),
  ),
}
VARIANTS = (
  "zephyr",
  *(f"{setting}_{loss}" for setting in _SETTINGS for loss in _LOSSES),
)


def get_config(variant: str = "zephyr"):
  """Returns the config of one of VARIANTS."""
  if variant not in VARIANTS:
    raise ValueError(
      f"ultrafeedback.py:{variant} must be zephyr, or one of"
      f" {', '.join(_SETTINGS)} with one of {', '.join(_LOSSES)}, such as"
      " llama3-base_simpo"
    )
  is_zephyr = variant == "zephyr"
  name, _, loss = ("mistral-base_dpo" if is_zephyr else variant).partition("_")
  setting = _SETTINGS[name]
  train, test = "train", "test"
  if setting.data == _BINARIZED:
    train, test = "train_prefs", "test_prefs"
  config = default_config()
  config.policy.init = f"hub:{setting.init}@main"
  config.policy.compute_dtype = "bfloat16"
  config.policy.remat = "attention"  # "dots" takes 21.8 GiB of a v5e-16 chip
  config.data.source = f"hub:{setting.data}@main:{train}"
  config.data.eval_source = f"hub:{setting.data}@main:{test}"
  is_short = name == "mistral-base"
  config.data.max_tokens = 1024 if is_short else 2048
  config.data.max_prompt_tokens = 512 if is_short else 1800
  config.loss = loss_config(loss)
  config.batch_size = 128
  config.accumulation_steps = 4
  config.mesh = {"data": 1, "fsdp": -1, "tensor": 1, "context": 1}
  config.epochs = 1.0
  config.optimizer.name = "adamw"
  config.optimizer.b2 = 0.999
  config.optimizer.learning_rate = setting.dpo_rate
  config.optimizer.schedule = "cosine"
  config.optimizer.warmup_steps = 48  # 10 % of the 478 steps
  config.optimizer.max_grad_norm = 1.0
  config.eval.every_steps = 100 if is_zephyr else 400
  config.checkpoint.every_steps = 100 if is_zephyr else 400
  if loss in ("dpo", "kto", "r_dpo"):
    config.loss.beta = 0.01
  if loss == "ipo":
    config.loss.length_normalize = True
  if loss == "simpo":
    config.optimizer.learning_rate = setting.simpo_rate
    config.loss.beta = setting.simpo_beta
    config.loss.gamma_over_beta = setting.gamma_over_beta
  return config
