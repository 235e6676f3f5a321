"""Links map the rewards of a group's responses to the group's loss.

A margin link takes `margins`, f32 [B], chosen minus rejected reward, nats. A
group link takes `rewards`, f32 [B, K], and the sequences they came from. A
link with state takes it after the sequences and returns it after the loss.
The loss is f32 [B], nats; the caller takes the mean over groups. Keyword-only
arguments are knobs.

A module for each kind of group has its functions and their rows of the table.
"""

from dpo_jax.losses.links import margins, pairs, rankings, samples, unpaired
from dpo_jax.losses.links.base import Link

LINKS: dict[str, Link] = {
  **margins.LINKS,
  **pairs.LINKS,
  **unpaired.LINKS,
  **rankings.LINKS,
  **samples.LINKS,
}

__all__ = ["LINKS", "Link"]
