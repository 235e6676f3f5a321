"""Addresses of groups: file and line of the records that they were made of."""

from collections.abc import Sequence
import itertools
import logging

import numpy as np

from dpo_jax.data import sources
from dpo_jax.data.store import Store

_LOG = logging.getLogger(__name__)


def find_addresses(store: Store, groups: Sequence[int]) -> list[str]:
  """Finds the address of each group's record, by reading the sources again.

  Args:
    store: groups.
    groups: indices of groups.

  Returns:
    Addresses such as "pairs.jsonl:37"; "" where the store has no numbers of
    records, as those of older versions, or the source has changed or cannot be
    read, of which a warning is logged.
  """
  found = [""] * len(groups)
  if store.records is None:
    return found
  numbers = np.asarray(store.records)[list(groups)]
  start = 0
  for report in store.report.get("sources", [store.report]):
    end = start + report["records"]
    wanted = sorted({int(n) - start for n in numbers if start <= n < end})
    addresses = _read_addresses(report["source"], report["content"], wanted)
    for i, number in enumerate(numbers):
      found[i] = addresses.get(int(number) - start, found[i])
    start = end
  return found


def _read_addresses(
  spec: str, content: str, wanted: Sequence[int]
) -> dict[int, str]:
  """Returns number -> address of records of a source.

  If the source has changed or cannot be read, it warns and returns {}.

  Args:
    spec: see `sources`.
    content: digest that the source had.
    wanted: numbers of records, ascending.
  """
  if not wanted:
    return {}
  # This explains an error, which one of its own must not replace.
  try:
    source = sources.open_source(spec)
    if source.digest != content:
      raise ValueError("its content has changed")
    read = itertools.islice(source, wanted[-1] + 1)
    kept = set(wanted)
    return {i: where for i, (where, _) in enumerate(read) if i in kept}
  except (OSError, ValueError) as error:
    _LOG.warning("%s: no file and line can be given: %s", spec, error)
    return {}
