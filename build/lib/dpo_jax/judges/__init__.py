"""Judges: functions that score or compare the responses to a prompt."""

from dpo_jax.judges.base import Judge, ask, per_text
from dpo_jax.judges.get_judge import KINDS, get_eval_judge, get_judge
from dpo_jax.judges.orders import (
  Comparer,
  JudgeError,
  Wins,
  compare_in_both_orders,
)
from dpo_jax.judges.reward_model import RewardModel

__all__ = [
  "KINDS",
  "Comparer",
  "Judge",
  "JudgeError",
  "RewardModel",
  "Wins",
  "ask",
  "compare_in_both_orders",
  "get_eval_judge",
  "get_judge",
  "per_text",
]
