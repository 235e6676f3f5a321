"""dpo_jax: Direct Preference Optimization research in JAX."""

__version__ = "0.1.0"

# Exit code of a run that was told to stop and has saved: start it again.
EXIT_PREEMPTED = 75
