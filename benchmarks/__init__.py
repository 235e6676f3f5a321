"""Benchmarks: `python -m benchmarks.NAME` writes a table of RESULTS.md."""
