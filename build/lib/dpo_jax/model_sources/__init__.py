"""Model sources: the shape, tokenizer and weights that a run starts from."""

from dpo_jax.model_sources.base import (
  TOKENIZER_KEYS,
  ModelSource,
  open_tokenizer,
)
from dpo_jax.model_sources.huggingface_model import HuggingFaceModel
from dpo_jax.model_sources.moved import MovedSource
from dpo_jax.model_sources.parse import (
  KINDS,
  TrainedRun,
  check_frozen,
  parse,
)

__all__ = [
  "KINDS",
  "TOKENIZER_KEYS",
  "HuggingFaceModel",
  "ModelSource",
  "MovedSource",
  "TrainedRun",
  "check_frozen",
  "open_tokenizer",
  "parse",
]
