"""What is optimised: pure functions of arrays."""

from dpo_jax.losses.catalogue import CATALOGUE, KNOBS, Knob, Loss
from dpo_jax.losses.objective import Objective, WeightedSum, build_objective
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
]
