"""Suggests names in errors."""

from collections.abc import Iterable
import difflib


def did_you_mean(name: str, known: Iterable[str]) -> str:
  """Returns ' Did you mean 'x'?' for the nearest known name, or ''."""
  nearest = difflib.get_close_matches(name, list(known), n=1)
  return f" Did you mean {nearest[0]!r}?" if nearest else ""
