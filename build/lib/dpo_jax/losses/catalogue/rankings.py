"""Losses of rankings, the best response first; two responses are a pair."""

from dpo_jax.losses.catalogue.row import Loss

ROWS: tuple[Loss, ...] = (
  Loss(
    "plackett_luce",
    "log_ratio",
    "plackett_luce",
    dict(beta=0.1),
    "-sum_k [beta r_k - logsumexp_{j >= k} beta r_j]",
    "Rafailov et al. 2023, arXiv:2305.18290, app. A.3, eq. 20",
    group="ranking",
  ),
  Loss(
    "reward_model",
    "values",
    "bradley_terry",
    dict(margin_weight=0.0, center_weight=0.0),
    "-log s(v_w - v_l - margin_weight (score_w - score_l))"
    " + center_weight (v_w + v_l)^2, v the value head; K > 2 by Plackett-Luce",
    "Rafailov et al. 2023, arXiv:2305.18290, eq. 2 and app. A.3; the margin"
    " Touvron et al. 2023 (Llama 2), arXiv:2307.09288, eq. 2; the square"
    " Eisenstein et al. 2023, arXiv:2312.09244",
    group="ranking",
    scale=None,
    peers="TRL `RewardTrainer`: the column `margin` with margin_weight=1, and"
    " center_rewards_coefficient",
  ),
)
