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
    dict(),
    "-log s(v_w - v_l), v the value head; K > 2 by Plackett-Luce",
    "Rafailov et al. 2023, arXiv:2305.18290, eq. 2 and app. A.3",
    group="ranking",
    scale=None,
  ),
)
