"""Splits parameters into those that are trained and those that are not."""

import re

from flax import traverse_util

from dpo_jax.models import lora
from dpo_jax.trees import Params


def split_params(params: Params, frozen: str) -> tuple[Params, Params | None]:
  """Splits parameters into trained and frozen ones.

  Args:
    params: nested dict. If it has adapters, only they and a value head are
      trained.
    frozen: regular expression; parameters whose path it matches anywhere are
      not trained. "" freezes none.

  Returns:
    Two nested dicts with each leaf in one of them; None for the second if
    all are trained.

  Raises:
    ValueError: an invalid expression, one that matches no parameter, or one
      that leaves none to train.
  """
  has_adapters = lora.has_adapters(params)
  try:
    pattern = re.compile(frozen)
  except re.error as error:
    raise ValueError(
      f"policy.frozen={frozen!r} is not a regular expression: {error}"
    ) from error
  leaves = traverse_util.flatten_dict(params, sep="/")
  if frozen and not any(pattern.search(name) for name in leaves):
    raise ValueError(
      f"policy.frozen={frozen!r} matches none of {', '.join(sorted(leaves))}"
    )
  trained, rest = {}, {}
  for name, leaf in leaves.items():
    is_trained = lora.is_trained(name, has_adapters=has_adapters, frozen=frozen)
    (trained if is_trained else rest)[name] = leaf
  if not trained:
    raise ValueError(f"policy.frozen={frozen!r} leaves nothing to train")
  return (
    traverse_util.unflatten_dict(trained, sep="/"),
    traverse_util.unflatten_dict(rest, sep="/") or None,
  )
