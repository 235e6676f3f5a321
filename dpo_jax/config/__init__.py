"""Config: every key of a run, its default, its range, and its record.

A config is resolved once, by `resolve`, and read-only from there on.
"""

from dpo_jax.config.keys import default_config, flatten, loss_config
from dpo_jax.config.record import (
  compare,
  decides_result,
  settle,
  spellings,
)
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
  parse_pairs,
  parse_steps,
)

__all__ = [
  "CHECKS",
  "LIVE_REFERENCES",
  "VALUES",
  "check_keys",
  "check_schedule",
  "compare",
  "decides_result",
  "default_config",
  "eval_sets",
  "flatten",
  "loss_config",
  "metric_prefix",
  "parse_pairs",
  "parse_steps",
  "resolve",
  "settle",
  "spellings",
  "split_name",
  "with_values",
]
