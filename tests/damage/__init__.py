"""Fault harness: damages files and kills processes at random, and compares."""
