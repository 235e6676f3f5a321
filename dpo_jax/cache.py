"""Folders that runs of this machine share: token stores, compiled programs."""

import os

import jax
from jax.experimental.compilation_cache import compilation_cache


def default_cache_dir() -> str:
  """Returns ~/.cache/dpo_jax, or its place under XDG_CACHE_HOME."""
  base = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
  return os.path.join(base, "dpo_jax")


def use_compilation_cache(directory: str) -> None:
  """Keeps compiled programs for later runs.

  Args:
    directory: "" for the default, "off" for none. One that JAX was already
      told, by JAX_COMPILATION_CACHE_DIR or in code, stays.
  """
  if directory == "off" or jax.config.jax_compilation_cache_dir:
    return
  directory = directory or os.path.join(default_cache_dir(), "compiled")
  jax.config.update("jax_compilation_cache_dir", directory)
  jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
  jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
  # JAX decides at its first compilation whether there is a cache.
  compilation_cache.reset_cache()
