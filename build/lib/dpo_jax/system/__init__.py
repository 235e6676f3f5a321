"""Access to the system: JAX internals, files, caches, progress bars."""
