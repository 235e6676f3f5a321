"""Judges: functions that score the responses to a prompt."""

from dpo_jax.judges.base import Judge, ask, per_text
from dpo_jax.judges.get_judge import KINDS, get_judge
from dpo_jax.judges.orders import bootstrap_interval, compare_in_both_orders
from dpo_jax.judges.reward_model import RewardModel

__all__ = [
  "KINDS",
  "Judge",
  "RewardModel",
  "ask",
  "bootstrap_interval",
  "compare_in_both_orders",
  "get_judge",
  "per_text",
]
