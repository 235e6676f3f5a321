"""Experiments: python -m experiments.NAME."""

from dpo_jax.system import signals

# At import, since the imports of a command itself take seconds. It does nothing
# unless this process is a command.
signals.end_with_preempted()
