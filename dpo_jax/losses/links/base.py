"""Link: a function from the rewards of a group to its loss, and its needs."""

from collections.abc import Callable
import dataclasses
from typing import Any

from dpo_jax.losses.links.running import State


@dataclasses.dataclass(frozen=True)
class Link:
  """A link and what it requires.

  Attributes:
    function: as `dpo_jax.losses.links` describes.
    kind: "margin" or "group".
    needs: optional fields of Sequences that it reads.
    needs_anchor: whether it compares single rewards with a constant, so that
      a reward of 0 must mean that policy and reference agree.
    gap_weight: knob that weighs the gap in score; None for a link that reads
      the order alone.
    uses_ties: whether a pair learns from its gap in score, in either order: one
      of equal scores is kept, and the accuracy goes by the scores.
    needs_ordered_scores: whether a pair has a gradient only where the chosen
      response scores higher.
    is_coupled: whether a group's loss depends on the other groups.
    fixes_reward: whether it works with the reward of its own row only.
    init: returns the state at the first step; None for a link without state.
  """

  function: Callable[..., Any]
  kind: str
  needs: frozenset[str] = frozenset()
  needs_anchor: bool = False
  gap_weight: str | None = None
  uses_ties: bool = False
  needs_ordered_scores: bool = False
  is_coupled: bool = False
  fixes_reward: bool = False
  init: Callable[[], State] | None = None


def margin_links(*functions: Callable[..., Any]) -> dict[str, Link]:
  """Returns rows of the link table for functions of the margin, by name."""
  return {f.__name__: Link(f, "margin") for f in functions}


def group_links(
  *functions: Callable[..., Any], needs: tuple[str, ...] = (), **attributes: Any
) -> dict[str, Link]:
  """Returns rows for functions of a group that share these attributes."""
  return {
    f.__name__: Link(f, "group", needs=frozenset(needs), **attributes)
    for f in functions
  }
