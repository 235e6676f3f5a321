"""The source of a run that has begun, where its files are gone.

A resumed run has its parameters in its checkpoint, and its shape and tokenizer
in its workdir. It needs the files of its source only for frozen parameters and
for a reference whose log-probs are not cached.
"""

import dataclasses
from typing import Any

from dpo_jax.model_sources.base import TOKENIZER_KEYS, ModelSource
from dpo_jax.models.config import ModelConfig
from dpo_jax.records.workdir import Workdir
from dpo_jax.system.files import read_json


@dataclasses.dataclass(frozen=True)
class MovedSource(ModelSource):
  """A source that is known from the workdir of the run that began with it.

  Attributes:
    workdir: run directory.
    reason: why the source cannot be read.
  """

  workdir: Workdir
  reason: str

  @property
  def has_value_head(self) -> bool:
    return self._model.value_head

  @property
  def _model(self) -> ModelConfig:
    return ModelConfig.from_dict(read_json(self.workdir.model))

  def model_config(
    self, preset: str, vocab_size: int, **ours: Any
  ) -> ModelConfig:
    del preset, vocab_size
    return dataclasses.replace(self._model, **ours)

  def own_tokenizer(self) -> dict[str, str]:
    data = self.workdir.read_config().get("data") or {}
    return {key: data.get(key) or "" for key in TOKENIZER_KEYS}

  def _load(self, policy: Any, mesh: Any, seed: int) -> Any:
    raise FileNotFoundError(
      f"{self.reason}. Weights that {self.workdir} did not train, or its"
      " reference, are read from there: put it back, or resume the run with its"
      " new place in policy.init or reference.init, and resume.allow=config"
    )
