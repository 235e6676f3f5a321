"""Reads and writes Hugging Face checkpoints."""

from dpo_jax.models.huggingface.read import download, load_config, load_params
from dpo_jax.models.huggingface.write import save_params

__all__ = ["download", "load_config", "load_params", "save_params"]
