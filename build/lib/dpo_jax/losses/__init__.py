"""Losses as pure functions of arrays.

`dpo_loss`, `ipo_loss` and the others in `functions` take plain arrays.
`build_objective` makes an objective from a config: the form that training
uses, and the only one for a loss that has a state or couples the batch.
"""

from dpo_jax.losses import functions
from dpo_jax.losses.build import build_objective, with_sampled_kl
from dpo_jax.losses.catalogue import CATALOGUE, Loss

# Generated, and with a list of its own names.
from dpo_jax.losses.functions import *  # noqa: F403
from dpo_jax.losses.knobs import KNOBS, Knob
from dpo_jax.losses.objective import (
  Objective,
  WeightedSum,
  mean_over_groups,
)

__all__ = [
  "CATALOGUE",
  "KNOBS",
  "Knob",
  "Loss",
  "Objective",
  "WeightedSum",
  "build_objective",
  "mean_over_groups",
  "with_sampled_kl",
  *functions.__all__,
]
