"""TL;DR by a reward model: PPO, RLOO and on-policy DPO of Pythia-1B.

  C=configs/tldr_rlhf.py
  python -m dpo_jax.train --config=$C:sft --workdir=runs/tldr_sft
  python -m dpo_jax.train --config=$C:reward --workdir=runs/tldr_reward \
      --config.policy.init=run:runs/tldr_sft
  python -m dpo_jax.train --config=$C:ppo --workdir=runs/tldr_ppo \
      --config.policy.init=run:runs/tldr_sft \
      --config.online.judge=reward:runs/tldr_reward

Stages `reinforce` (RLOO, two samples of each prompt) and `pairs` (DPO on pairs
that the reward model labels) take the place of `ppo`; `dpo` is offline.

Values are those of vwxyzjn/summarize_from_feedback_details (Huang et al. 2024,
arXiv:2403.17031), sft.py, reward.py, dpo.py and ppo.py: AdamW at 3e-6 with
epsilon 1e-5; a step of 128 demonstrations, 64 comparisons or 512 samples; a
million samples, each used 4 times; KL weight 0.05, 53 tokens. It ran on 8 GPUs,
and prints neither hours nor win rates in its README. Knobs of RLOO and of
`pairs` are those of `ppo` and `dpo`; no source confirms them.

Different from the source: samples are drawn at temperature 1, not 0.7; a
sample without EOS is rewarded as it is, where the source gives -1; the policy
and its value head share their layers; the data are trl-lib's copies. Not run
here, and not planned: `plan` compiles steps without samples.
"""

from dpo_jax.config import default_config, loss_config

_LOSSES = {
  "sft": "sft",
  "dpo": "dpo",
  "reward": "reward_model",
  "ppo": "ppo",
  "reinforce": "reinforce",
  "pairs": "dpo",
}
_BATCH_SIZES = {"sft": 128, "ppo": 512, "reinforce": 256}  # of groups
_NUM_STEPS = 4 * 1_000_000 // 512  # each of a million samples is used 4 times
VARIANTS = tuple(_LOSSES)


def get_config(stage: str = "sft"):
  """Returns the config of one of VARIANTS."""
  if stage not in VARIANTS:
    raise ValueError(
      f"tldr_rlhf.py:{stage} must be one of {', '.join(VARIANTS)}"
    )
  is_rollouts = stage in ("ppo", "reinforce")
  config = default_config()
  config.policy.init = "hub:EleutherAI/pythia-1b-deduped@main"
  config.policy.compute_dtype = "bfloat16"
  name = "tldr-preference" if stage in ("reward", "dpo") else "tldr"
  config.data.source = f"hub:trl-lib/{name}@main:train"
  config.data.eval_source = f"hub:trl-lib/{name}@main:validation"
  config.data.max_tokens = 638
  config.data.max_prompt_tokens = 512
  config.loss = loss_config(_LOSSES[stage])
  config.batch_size = _BATCH_SIZES.get(stage, 64)
  config.epochs = 1.0
  config.optimizer.name = "adamw"
  config.optimizer.b2 = 0.999
  config.optimizer.epsilon = 1e-5
  config.optimizer.learning_rate = 3e-6
  config.optimizer.schedule = "linear" if is_rollouts else "cosine"
  config.optimizer.warmup_steps = 0
  config.optimizer.max_grad_norm = float("inf")
  config.eval.every_steps = 200
  config.eval.max_groups = 1024
  config.checkpoint.every_steps = 200
  if stage in ("dpo", "pairs"):
    config.loss.beta = 0.05
  if stage in ("ppo", "reinforce", "pairs"):
    config.online.kind = "rollouts" if is_rollouts else "pairs"
    config.online.judge = "reward:runs/tldr_reward"
    config.online.max_response_tokens = 53
  if is_rollouts:
    config.epochs = 0.0
    config.total_steps = _NUM_STEPS
    config.online.num_samples = 1 if stage == "ppo" else 2
    config.online.every_steps = 4
    config.online.epochs = 4
    config.online.kl_weight = 0.05
  return config
