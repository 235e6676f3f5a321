"""The terminal: its colours and its width, by `rich`."""

import sys

from rich.console import Console

COLORS = ("auto", "always", "never")
_PIPE_WIDTH = 100  # columns where there is no terminal
# Control characters, which would move the cursor, as pictures of themselves.
_PICTURES = {i: 0x2400 + i for i in range(32) if chr(i) not in "\n\t"}
_PICTURES[0x7F] = 0x2421


def visible(text: str) -> str:
  """Replaces control characters, except line breaks and tabs, by pictures."""
  return text.translate(_PICTURES)


def make_console(color: str = "auto") -> Console:
  """Makes a console that prints on stdout.

  Args:
    color: "auto" colours a terminal, unless NO_COLOR is set; "always" and
      "never" say it for a pipe too.

  Raises:
    ValueError: another value.
  """
  if color not in COLORS:
    raise ValueError(f"--color={color} must be one of {', '.join(COLORS)}")
  is_terminal = sys.stdout.isatty()
  return Console(
    force_terminal=True if color == "always" else None,
    no_color=True if color == "never" else None,
    width=None if is_terminal else _PIPE_WIDTH,
    highlight=False,
    emoji=False,
    markup=False,
  )
