"""The table of losses: a variant is a row of data.

A row is a reward of a response, a link over the group, and regularizers. To
add a loss, write its new part as a pure function and add a row. Configs, the
check of knobs, the functions on arrays, the documentation and the tests read
this table.

The modules have the names of those in `dpo_jax.losses.links`: rows of pairs
stand in `margins` if their link reads the margin alone.
"""

from dpo_jax.losses.catalogue import (
  margins,
  pairs,
  rankings,
  samples,
  unpaired,
)
from dpo_jax.losses.catalogue.row import Loss

CATALOGUE: dict[str, Loss] = {
  row.name: row
  for module in (margins, pairs, unpaired, rankings, samples)
  for row in module.ROWS
}

__all__ = ["CATALOGUE", "Loss"]
