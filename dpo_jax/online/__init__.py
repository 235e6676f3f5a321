"""Batches of responses that the policy itself gives."""

from dpo_jax.online.loader import DriftError, OnPolicy, Snapshot

__all__ = ["DriftError", "OnPolicy", "Snapshot"]
