"""Plans for a TPU that is absent: its shape, a compiled step, lower bounds."""
