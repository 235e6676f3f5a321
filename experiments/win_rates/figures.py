"""Curves and tables of win rates, averaged over seeds."""

from collections.abc import Callable, Sequence
import math
from typing import Any

from experiments import sweep
from experiments.sweep import Row

_METRICS = ("win_rate", "win_rate_low", "win_rate_high")
# A method has one colour in all figures.
_COLOURS = {
  "DPO": 0,
  "PPO": 1,
  "Best-of-N": 2,
  "Preferred-FT": 3,
  "SFT": 4,
}


def draw(
  axis: Any, rows: Sequence[Row], x: str, *, by: str = "method", **labels: Any
) -> None:
  """Draws a curve for each value of `by`, with its name at its right end.

  Bars are the spread over seeds. Bands are the 95 % interval of one seed.

  Args:
    axis: matplotlib axes.
    rows: rows of all seeds.
    x: column on the horizontal axis.
    by: column whose values are the curves.
    **labels: keywords of `axis.set`.
  """
  means = sweep.mean_and_spread(rows, (by, x), _METRICS)
  ends = []
  for number, name in enumerate(dict.fromkeys(row[by] for row in means)):
    mine = sorted((r for r in means if r[by] == name), key=lambda r: r[x])
    method = "Best-of-N" if str(name).startswith("Best-of-") else name
    color = sweep.colour(_COLOURS.get(method, number))
    points = [row[x] for row in mine]
    values, low, high, spread = (
      [row[key] for row in mine] for key in (*_METRICS, "win_rate_spread")
    )
    axis.fill_between(points, low, high, color=color, alpha=0.1, linewidth=0)
    axis.errorbar(
      points,
      values,
      yerr=spread,
      color=color,
      marker="os^Dv"[number % 5],
      markersize=4,
      capsize=2,
    )
    ends.append((values[-1], points[-1], str(name), color))
  axis.axhline(0.5, color="black", linewidth=0.8, linestyle=":")
  lowest = min([0.45, *(row["win_rate_low"] for row in means)])
  axis.set(**{"ylim": (lowest - 0.02, 1), "ylabel": "win rate", **labels})
  axis.grid(alpha=0.3)
  _label(axis, ends)


def _label(axis: Any, ends: Sequence[tuple[float, float, str, Any]]) -> None:
  """Writes names to the right of curves, in their colours, without overlap."""
  low, high = axis.get_ylim()
  height = -math.inf
  for value, point, name, color in sorted(ends):
    height = max(value, height + 0.05 * (high - low))
    axis.annotate(
      name,
      (point, height),
      xytext=(6, 0),
      textcoords="offset points",
      color=color,
      fontsize=8,
      va="center",
      annotation_clip=False,
    )


def pivot(
  rows: Sequence[Row],
  by: Sequence[str],
  column: str,
  header: Callable[[Any], str],
) -> list[Row]:
  """Makes a table of win rates: a row for each group, a column for each value.

  Args:
    rows: rows of all seeds with a `win_rate`, see `measured`.
    by: columns that define a group.
    column: column whose values become columns, ascending.
    header: value -> name of its column.

  Returns:
    The columns of `by`, then win rates as text: "mean +- spread" of several
    seeds, the rate alone of one, and "-" where there is no row.
  """
  means = sweep.mean_and_spread(rows, (*by, column), _METRICS)
  headers = {mean[column]: header(mean[column]) for mean in means}
  blank = {headers[value]: "-" for value in sorted(headers)}
  out: dict[tuple[Any, ...], Row] = {}
  for mean in means:
    key = tuple(mean[name] for name in by)
    row = out.setdefault(key, dict(zip(by, key, strict=True)) | blank)
    text = f"{mean['win_rate']:.3f}"
    if mean["seeds"] > 1:
      text += f" +- {mean['win_rate_spread']:.3f}"
    row[headers[mean[column]]] = text
  return list(out.values())


def measured(rows: Sequence[Row]) -> list[Row]:
  """Returns the rows that have a win rate."""
  return [row for row in rows if "win_rate" in row]


def draw_bars(axis: Any, rows: Sequence[Row], x: str) -> None:
  """Draws bars of each method for each value of `x`, with its name above.

  Lines are the spread over seeds.
  """
  means = sweep.mean_and_spread(rows, ("method", x), _METRICS)
  groups = list(dict.fromkeys(row[x] for row in means))
  methods = list(dict.fromkeys(row["method"] for row in means))
  width = 0.8 / max(len(methods), 1)
  for row in means:
    place = groups.index(row[x]) + width * methods.index(row["method"])
    axis.bar(
      place,
      row["win_rate"],
      width,
      yerr=row["win_rate_spread"],
      color=sweep.colour(_COLOURS.get(row["method"], 5)),
      capsize=3,
    )
    top = row["win_rate"] + row["win_rate_spread"]
    text = f"{row['method']}\n{row['win_rate']:.2f}"
    axis.annotate(text, (place, top + 0.02), ha="center", fontsize=7)
  middles = [i + width * (len(methods) - 1) / 2 for i in range(len(groups))]
  axis.set_xticks(middles, groups)
  axis.axhline(0.5, color="black", linewidth=0.8, linestyle=":")
  axis.set(ylim=(0, 1.05), ylabel="win rate against reference summaries")
