"""dpo_jax: Direct Preference Optimization research in JAX."""

import sys

__version__ = "0.1.0"

# Exit code of a run that was told to stop and has saved: start it again.
EXIT_PREEMPTED = 75

# Of `python -m dpo_jax.train`, this is imported before the module itself, while
# Python still has "-m" for the name of the command. A module of a user may
# import it then too.
if sys.argv[:1] == ["-m"] and "-m" in sys.orig_argv:
  _module = sys.orig_argv[sys.orig_argv.index("-m") + 1]
  if _module.partition(".")[0] in ("dpo_jax", "experiments"):
    from dpo_jax.system import signals

    signals.begin()
