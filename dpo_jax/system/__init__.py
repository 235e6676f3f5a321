"""The machine below: JAX, files, caches, progress on a terminal."""
