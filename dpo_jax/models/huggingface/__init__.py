"""Checkpoints of the Hugging Face formats, read and written."""

from dpo_jax.models.huggingface.read import download, load_config, load_params
from dpo_jax.models.huggingface.write import save_params

__all__ = ["download", "load_config", "load_params", "save_params"]
