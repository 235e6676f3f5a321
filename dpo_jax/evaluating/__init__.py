"""Evaluations of a finished or a running run; they change none of its files."""
