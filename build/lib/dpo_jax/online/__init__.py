"""Batches of responses that the policy itself gives."""

from dpo_jax.online.loader import DriftError, OnPolicyLoader
from dpo_jax.online.open_loaders import open_loaders
from dpo_jax.online.snapshot import Snapshot

__all__ = ["DriftError", "OnPolicyLoader", "Snapshot", "open_loaders"]
