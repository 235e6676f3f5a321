"""Evaluations of a finished or a running run, which write nothing of it."""
