"""A Hugging Face folder, on this machine or from the Hub."""

import dataclasses
from typing import Any

from dpo_jax.data import tokenizers
from dpo_jax.model_sources.base import TOKENIZER_KEYS, ModelSource, is_plain
from dpo_jax.models import huggingface
from dpo_jax.models.config import ModelConfig
from dpo_jax.models.decoder import Policy
from dpo_jax.models.partition_rules import param_shardings


@dataclasses.dataclass(frozen=True)
class HuggingFaceModel(ModelSource):
  """A Hugging Face folder, on this machine or from the Hub.

  Attributes:
    folder: folder on this machine.
    tokenizer: spelling of its tokenizer in `data.tokenizer`.
    name: name of the model: its folder, or ORG/NAME.
    revision: commit of the Hub, or None.
  """

  folder: str
  tokenizer: str
  name: str
  revision: str | None

  @property
  def card_name(self) -> str:
    return self.name

  @property
  def hub_name(self) -> str:
    return self.name if self.revision else ""

  @property
  def has_value_head(self) -> bool:
    return False

  def model_config(
    self, preset: str, vocab_size: int, **ours: Any
  ) -> ModelConfig:
    return huggingface.load_config(self.folder, **ours)

  def own_tokenizer(self) -> dict[str, str]:
    own = dict.fromkeys(TOKENIZER_KEYS, "")
    if tokenizers.has_tokenizer(self.folder):
      own["tokenizer"] = self.tokenizer
    return own

  def _check_tokenizer(self, given: str, own: str) -> None:
    super()._check_tokenizer(given, own)
    unread = tokenizers.unread_file(self.folder)
    if not own and (not given or (unread and is_plain(given))):
      raise ValueError(
        f"policy.init={self.init!r} has no tokenizer.json"
        + (f" ({unread} is not read)" if unread else "")
        + f", and data.tokenizer={given!r}: name the folder of a tokenizer.json"
        + (", as transformers saves it" if unread else ", or 'bytes'")
      )

  def _load(self, policy: Policy, mesh: Any, seed: int) -> Any:
    shardings = param_shardings(policy.abstract_params(), mesh)
    return huggingface.load_params(self.folder, policy, shardings)
