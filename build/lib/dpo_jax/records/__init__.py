"""The record of a run: its folder, checkpoints, metrics and traces."""
