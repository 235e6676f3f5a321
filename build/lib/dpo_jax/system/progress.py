"""Progress of a loop: a bar on a terminal, a line a minute elsewhere."""

from collections.abc import Iterable, Iterator
import logging
import time
from typing import TypeVar

from tqdm import tqdm

T = TypeVar("T")

_LOG = logging.getLogger(__name__)
_EVERY_S = 60.0


def format_seconds(seconds: float) -> str:
  """Formats a duration: "8.3 s", "1 min 23 s" or "2 h 05 min"."""
  if seconds < 59.95:
    return f"{seconds:.1f} s"
  minutes, rest = divmod(round(seconds), 60)
  if minutes < 60:
    return f"{minutes} min {rest:02} s"
  return f"{minutes // 60} h {minutes % 60:02} min"


def track(
  items: Iterable[T], label: str, *, total: int | None, unit: str
) -> Iterator[T]:
  """Yields the items and shows how many are done.

  Args:
    items: items of the loop.
    label: name of the work; "" shows nothing.
    total: number of items, or None if it is not known.
    unit: plural noun of an item.
  """
  if not label:
    yield from items
    return
  bar = tqdm(
    items,
    desc=label,
    total=total,
    unit=f" {unit}",
    leave=False,
    disable=None,  # where stderr is not a terminal
    dynamic_ncols=True,
  )
  if not bar.disable:
    yield from bar
    return
  began = reported = time.monotonic()
  for done, item in enumerate(items):
    now = time.monotonic()
    if done and now - reported >= _EVERY_S:
      reported = now
      text = f"{done:,} {unit}"
      if total:
        left = (now - began) / done * (total - done)
        text = f"{done:,} of {total:,} {unit}, {format_seconds(left)} left"
      _LOG.info("%-11s %s", label, text)
    yield item
