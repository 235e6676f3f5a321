"""Losses of rewarded samples of the policy."""

from dpo_jax.losses.catalogue.row import Loss

ROWS: tuple[Loss, ...] = (
  Loss(
    "ppo",
    "logps",
    "clipped_policy_gradient",
    dict(clip=0.2, value_clip=0.2, value_weight=0.1),
    "-min(ratio A, clip(ratio) A) + value_weight (V - R)^2 / 2, per token",
    "Schulman et al. 2017, arXiv:1707.06347, eq. 7 and 9; Ziegler et al. 2019,"
    " arXiv:1909.08593",
    group="samples",
    scale=None,
    is_per_token=True,
    peers="TRL's PPO trainer, whose vf_coef is value_weight",
  ),
  Loss(
    "reinforce",
    "logps",
    "leave_one_out",
    dict(clip=0.2),
    "-min(u A, clip(u, 1 - clip, 1 + clip) A), the mean over the samples; u ="
    " pi / pi_old, A = R - mean of the siblings' R",
    "Ahmadian et al. 2024, arXiv:2402.14740, sec. 3 (RLOO)",
    group="samples",
    scale=None,
    peers="TRL's RLOO trainer, whose epsilon is clip",
  ),
)
