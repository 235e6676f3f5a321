"""Draws rows that are averaged over seeds, and saves plots."""

from collections.abc import Sequence
import os
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from experiments.sweep.report import write_csv
from experiments.sweep.runs import Row


def colour(number: int) -> Any:
  """Returns the colour of a plot's line; the first twenty differ."""
  # The ten strong colours of tab20, then their ten pale ones.
  strong, pale = range(0, 20, 2), range(1, 20, 2)
  return matplotlib.colormaps["tab20"]([*strong, *pale][number % 20])


def draw(
  axis: Any,
  rows: Sequence[Row],
  x: str,
  y: str,
  *,
  by: str = "method",
  order: str = "",
) -> None:
  """Draws a line for each value of `by`, with the spread over seeds as bars.

  Args:
    axis: matplotlib axes.
    rows: means and spreads, from `mean_and_spread`.
    x: column on the horizontal axis.
    y: column on the vertical axis.
    by: column whose values are the lines.
    order: column by which the points of a line are joined; "": x.
  """
  for number, name in enumerate(dict.fromkeys(row[by] for row in rows)):
    mine = sorted(
      (r for r in rows if r[by] == name), key=lambda r: r[order or x]
    )
    axis.errorbar(
      [r[x] for r in mine],
      [r[y] for r in mine],
      yerr=[r.get(f"{y}_spread", 0.0) for r in mine],
      xerr=[r.get(f"{x}_spread", 0.0) for r in mine],
      marker="os^Dv"[number % 5],
      color=colour(number),
      linestyle=":" if number < 10 else "-.",
      markersize=5,
      capsize=2,
      label=str(name),
    )
  axis.grid(alpha=0.3)


def label_curves(axis: Any, *, room: float = 0.3, size: float = 8.0) -> None:
  """Writes the label of each line at its right end, in its colour.

  Labels that would overlap move apart, inside the axes.

  Args:
    axis: matplotlib axes with labelled lines and a linear x axis.
    room: width that the axes gain for the labels, as a share of what they had.
    size: font size, points.
  """
  left, right = axis.get_xlim()
  axis.set_xlim(left, right + room * (right - left))
  to_axes = axis.transData + axis.transAxes.inverted()
  ends = []
  for handle, name in zip(*axis.get_legend_handles_labels(), strict=True):
    line = handle[0] if isinstance(handle, tuple) else handle
    x, y = line.get_xydata()[-1]
    ends.append((*to_axes.transform((x, y)), name, line.get_color()))
  height = axis.get_window_extent().height * 72 / axis.figure.dpi
  ends.sort(key=lambda end: end[1])
  heights = _spread([end[1] for end in ends], 1.3 * size / height)
  for (x, _, name, color), y in zip(ends, heights, strict=True):
    axis.annotate(
      name,
      (x, y),
      xytext=(7, 0),
      xycoords="axes fraction",
      textcoords="offset points",
      color=color,
      fontsize=size,
      va="center",
    )


def _spread(heights: Sequence[float], gap: float) -> list[float]:
  """Moves heights at least `gap` apart, up and then below 1.

  Args:
    heights: ascending.
    gap: least distance.
  """
  found: list[float] = []
  for y in heights:
    found.append(max(y, found[-1] + gap) if found else y)
  above = reversed(range(len(found)))
  return [
    min(y, 1.0 - gap * (n + 0.5)) for n, y in zip(above, found, strict=True)
  ]


def save_figure(figure: Any, rows: Sequence[Row], path: str) -> list[str]:
  """Writes PATH.png, PATH.pdf and the rows as PATH.csv; closes the figure.

  Args:
    figure: matplotlib figure.
    rows: data that it shows.
    path: path without an extension.

  Returns:
    The three paths.
  """
  os.makedirs(os.path.dirname(os.path.abspath(path)), exist_ok=True)
  figure.savefig(f"{path}.png", dpi=90)
  # Without the date the same rows give the same file.
  figure.savefig(f"{path}.pdf", metadata={"CreationDate": None})
  plt.close(figure)
  write_csv(rows, f"{path}.csv")
  return [f"{path}.{extension}" for extension in ("png", "pdf", "csv")]
