"""Experiments: python -m experiments.NAME."""

from dpo_jax.system import signals

# Before the imports of a command, which take seconds.
signals.resumes()
