"""Losses as pure functions of arrays."""

from dpo_jax.losses.build import build_objective
from dpo_jax.losses.catalogue import CATALOGUE, Loss
from dpo_jax.losses.knobs import KNOBS, Knob
from dpo_jax.losses.objective import (
  Objective,
  WeightedSum,
  mean_over_groups,
)
from dpo_jax.losses.preference import dpo_loss

__all__ = [
  "CATALOGUE",
  "KNOBS",
  "Knob",
  "Loss",
  "Objective",
  "WeightedSum",
  "build_objective",
  "dpo_loss",
  "mean_over_groups",
]
