"""dpo_jax: Direct Preference Optimization research in JAX."""

__version__ = "0.1.0"
