"""Training: what is compiled, how a run is set up, started and measured."""
