"""Attention over packed rows with shared prompts, by several backends."""

from dpo_jax.models.attention.dense import attend
from dpo_jax.models.attention.masks import in_window, shared_prompt_mask
from dpo_jax.models.attention.rows import (
  Rows,
  attend_rows,
  check_backend,
  make_rows,
)

__all__ = [
  "Rows",
  "attend",
  "attend_rows",
  "check_backend",
  "in_window",
  "make_rows",
  "shared_prompt_mask",
]
