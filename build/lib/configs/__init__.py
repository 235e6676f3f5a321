"""Configs: get_config() each, built on dpo_jax.config.default_config()."""
