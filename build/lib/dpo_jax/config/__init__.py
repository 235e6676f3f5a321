"""Config: every key of a run, its default and its range.

A config is resolved once, by `resolve`, and read-only from there on.
"""

from dpo_jax.config.keys import default_config, flatten, loss_config
from dpo_jax.config.resolve import (
  check_keys,
  check_schedule,
  eval_sets,
  metric_prefix,
  resolve,
  split_name,
  with_values,
)
from dpo_jax.config.values import (
  CHECKS,
  LIVE_REFERENCES,
  VALUES,
  parse_allowed,
  parse_pairs,
  parse_steps,
)

__all__ = [
  "CHECKS",
  "LIVE_REFERENCES",
  "VALUES",
  "check_keys",
  "check_schedule",
  "default_config",
  "eval_sets",
  "flatten",
  "loss_config",
  "metric_prefix",
  "parse_allowed",
  "parse_pairs",
  "parse_steps",
  "resolve",
  "split_name",
  "with_values",
]
