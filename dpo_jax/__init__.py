"""dpo_jax: Direct Preference Optimization research in JAX."""

import sys

__version__ = "0.1.0"

# Exit code of a run that was told to stop and has saved: start it again.
EXIT_PREEMPTED = 75

# Python's name for a command until it has found the module of `python -m`.
if sys.argv[:1] == ["-m"]:
  from dpo_jax.system import signals

  signals.begin()
