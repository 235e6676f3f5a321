"""Config: every key of a run, its default, its range, and its record.

A config is resolved once, by `resolve`, and read-only from there on.
"""

from dpo_jax.config.keys import default_config, flatten, loss_config
from dpo_jax.config.record import decides_result, settle
from dpo_jax.config.resolve import check_keys, resolve, with_values
from dpo_jax.config.values import LIVE_REFERENCES, VALUES, parse_steps

__all__ = [
  "LIVE_REFERENCES",
  "VALUES",
  "check_keys",
  "decides_result",
  "default_config",
  "flatten",
  "loss_config",
  "parse_steps",
  "resolve",
  "settle",
  "with_values",
]
