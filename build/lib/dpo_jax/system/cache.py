"""Cache of compiled programs, shared by the runs of a machine."""

import os

import jax
from jax.experimental.compilation_cache import compilation_cache

from dpo_jax.system import files


def use_compilation_cache(directory: str) -> None:
  """Keeps compiled programs for later runs.

  Args:
    directory: folder; "" for the default, "off" for none. A folder that JAX
      already has, from JAX_COMPILATION_CACHE_DIR or code, is kept.
  """
  if directory == "off" or jax.config.jax_compilation_cache_dir:
    return
  directory = directory or os.path.join(files.cache_dir(), "compiled")
  jax.config.update("jax_compilation_cache_dir", directory)
  jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
  jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
  # JAX fixes its cache at the first compilation; reset it.
  compilation_cache.reset_cache()
