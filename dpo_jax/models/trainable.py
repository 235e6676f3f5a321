"""Parameters that are trained, and those that stay as they are."""

from collections.abc import Mapping
import re
from typing import Any

import jax

from dpo_jax.models import lora
from dpo_jax.trees import path_name


def split_params(
  params: Mapping[str, Any], frozen: str
) -> tuple[dict[str, Any], dict[str, Any] | None]:
  """Parameters that are trained, and those that are not.

  Args:
    params: a nested dict. Where it holds adapters, they and a value head are
      trained and nothing else.
    frozen: regular expression; a parameter whose path it finds is not trained;
      "" freezes none.

  Returns:
    Two nested dicts with each leaf in one of them; None for the second if
    there are none.

  Raises:
    ValueError: an expression that finds no parameter, or all of them.
  """
  has_adapters = lora.has_adapters(params)
  try:
    pattern = re.compile(frozen)
  except re.error as error:
    raise ValueError(
      f"policy.frozen={frozen!r} is no regular expression: {error}"
    ) from error
  parts: tuple[dict, dict] = ({}, {})
  names = []
  for path, leaf in jax.tree_util.tree_leaves_with_path(params):
    name = path_name(path)
    names.append(name)
    is_trained = lora.is_trained(name, has_adapters=has_adapters, frozen=frozen)
    node = parts[not is_trained]
    *outer, last = name.split("/")
    for key in outer:
      node = node.setdefault(key, {})
    node[last] = leaf
  if frozen and not any(pattern.search(name) for name in names):
    raise ValueError(
      f"policy.frozen={frozen!r} finds none of {', '.join(names)}"
    )
  if not parts[0]:
    raise ValueError(f"policy.frozen={frozen!r} leaves nothing to train")
  return parts[0], parts[1] or None
