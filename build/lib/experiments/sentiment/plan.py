"""Sizes, paths and the base config of the sentiment experiment."""

import dataclasses
import json
from typing import Any

from dpo_jax import judges, model_sources
from dpo_jax.config import default_config
from dpo_jax.data import tokenizers
from dpo_jax.models.decoder import Policy
from experiments import trained
from experiments.sweep import Settings

# Sizes by scale. Those of "paper" are from the paper's sec. 6.1 and app. C.1.
SIZES: dict[str, dict[str, Any]] = {
  "tiny": dict(
    prompts=512,
    eval_prompts=192,
    prefix_tokens=8,
    response_tokens=40,
    steps=150,
    every=50,
    batch_size=64,
    learning_rate=1e-4,
    dpo=(0.1, 0.5, 1.0),
    unlikelihood=(0.1, 0.5),
    kl_targets=(3.0, 6.0),
    seeds=1,
    best_of=(4, 16),
    reviews=8_000,
  ),
  "paper": dict(
    prompts=25_000,
    eval_prompts=1024,
    prefix_tokens=8,
    response_tokens=48,
    steps=2400,
    every=100,
    batch_size=64,
    learning_rate=1e-6,
    dpo=(0.05, 0.1, 1.0, 5.0),
    unlikelihood=(0.05, 0.1, 0.5, 1.0),
    kl_targets=(3.0, 6.0, 9.0, 12.0),
    seeds=3,
    best_of=(4, 16, 64),
    reviews=25_000,
  ),
}


@dataclasses.dataclass(frozen=True)
class Plan:
  """Names of everything in one sweep, by the settings of the command line."""

  settings: Settings

  @property
  def size(self) -> dict[str, Any]:
    return SIZES[self.settings.scale]

  @property
  def root(self) -> str:
    return self.settings.workdir

  @property
  def is_tuned(self) -> bool:
    """Whether the reference is fine-tuned first."""
    return not self.settings.policy or self.settings.scale == "paper"

  @property
  def reference(self) -> str:
    """Model source of the reference."""
    if self.is_tuned:
      return f"run:{self.root}/reference"
    return f"hf:{self.settings.policy}"

  @property
  def tokenizer(self) -> str:
    return self.settings.policy or "bytes"

  @property
  def labeller(self) -> str:
    """Judge that orders the pairs."""
    if self.settings.reviews:
      return f"classifier:{self.root}/classifiers/labeller.npz"
    return "sentiment"

  @property
  def gold(self) -> str:
    """Judge that measures policies."""
    if self.settings.reviews:
      return f"classifier:{self.root}/classifiers/gold.npz"
    return "sentiment"

  @property
  def response_tokens(self) -> int:
    """Most tokens of a sample; 80 bytes are about as much text as 40 tokens."""
    return 80 if self.tokenizer == "bytes" else self.size["response_tokens"]

  def base_config(self, steps: int) -> Any:
    """Returns the config that all runs begin with."""
    size, config = self.size, default_config()
    config.policy.init = self.reference
    config.policy.preset = "1m"
    config.data.tokenizer = self.tokenizer
    config.data.max_tokens = 160 if self.tokenizer == "bytes" else 64
    config.data.max_prompt_tokens = config.data.max_tokens // 2
    config.data.eval_fraction = 0.0
    config.data.cache_dir = f"{self.root}/cache"
    config.reference.cache_dir = f"{self.root}/reference_logps"
    # A pair in bytes is twice as long.
    config.batch_size = size["batch_size"] // (1 if self.settings.policy else 2)
    config.total_steps = steps
    config.optimizer.learning_rate = size["learning_rate"]
    config.optimizer.warmup_steps = 10 if self.settings.scale == "tiny" else 150
    config.eval.every_steps = 0
    config.checkpoint.every_steps = size["every"]
    config.checkpoint.keep = 1 + steps // size["every"]
    config.log.every_steps = 10
    config.log.progress = False
    return config

  def load_reference(self) -> tuple[Policy, Any]:
    """Loads the reference's decoder and parameters."""
    config = self.base_config(1)
    source = model_sources.parse(self.reference)
    decoder = source.policy(config.policy)
    params = source.load(decoder, trained.data_mesh(), seed=0)
    return decoder, params

  def load_bench(self) -> trained.Bench:
    """Loads the held-out prompts, the gold judge and the reference."""
    with open(f"{self.root}/pairs/eval_prompts.json", encoding="utf-8") as file:
      prompts = json.load(file)
    policy, params = self.load_reference()
    return trained.Bench(
      tokenizers.load_tokenizer(self.tokenizer),
      prompts,
      judges.get_judge(self.gold, key="gold"),
      policy,
      params,
      self.response_tokens,
    )
