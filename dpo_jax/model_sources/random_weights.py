"""Random weights of the shape of a preset."""

from collections.abc import Mapping
import dataclasses
import functools
from typing import Any

import jax

from dpo_jax.data import tokenizers
from dpo_jax.model_sources.base import TOKENIZER_KEYS, ModelSource
from dpo_jax.models.config import ModelConfig
from dpo_jax.models.decoder import Policy
from dpo_jax.models.partition_rules import param_shardings
from dpo_jax.models.presets import PRESETS


@dataclasses.dataclass(frozen=True)
class RandomWeights(ModelSource):
  """Random weights of the shape of a preset."""

  @property
  def card_name(self) -> str:
    return "random weights"

  @property
  def has_value_head(self) -> bool:
    return True

  def model_config(
    self, preset: str, vocab_size: int, **ours: Any
  ) -> ModelConfig:
    if preset not in PRESETS:
      raise ValueError(
        f"policy.preset={preset!r} must be one of {', '.join(PRESETS)}"
      )
    # So that a mesh divides it; a toy alphabet stays as small as it is.
    multiple = 128 if vocab_size > 64 else 8
    rounded = -(-vocab_size // multiple) * multiple
    return ModelConfig(**{**PRESETS[preset], "vocab_size": rounded, **ours})

  def own_tokenizer(self) -> dict[str, str]:
    return dict.fromkeys(TOKENIZER_KEYS, "") | {"tokenizer": "bytes"}

  def _check_tokenizer(self, given: str, own: str) -> None:
    """Accepts any tokenizer: random weights have seen no ids yet."""

  def warn_of_other_ids(
    self, settings: Mapping[str, str], tokenizer: tokenizers.Tokenizer
  ) -> None:
    """Warns of nothing: random weights have seen no ids yet."""

  def _load(self, policy: Policy, mesh: Any, seed: int) -> Any:
    return _jitted_init(policy, mesh)(jax.random.key(seed))


@functools.lru_cache(maxsize=1)
def _jitted_init(policy: Policy, mesh: Any) -> Any:
  """Returns jitted `policy.init`, sharded on a mesh; the last one is kept.

  A run calls it for policy and reference.
  """
  shardings = param_shardings(policy.abstract_params(), mesh)
  return jax.jit(policy.init, out_shardings=shardings)
