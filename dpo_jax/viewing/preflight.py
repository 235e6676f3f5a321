"""The preflight report: what a run would learn from, before it starts."""

from collections.abc import Mapping
import dataclasses
from typing import Any

from etils import epath
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
import numpy as np

from dpo_jax.data import checks
from dpo_jax.data.loader import Loader
from dpo_jax.records.metrics import format_table
from dpo_jax.system.files import write_atomically, write_json
from dpo_jax.training import header
from dpo_jax.training.setup import Run

_PERCENTS = {"p5": 5, "median": 50, "p95": 95, "longest": 100}
_COLORS = ("#1f77b4", "#d95f02", "#7570b3", "#e7298a")
_NUM_BINS = 50


@dataclasses.dataclass(frozen=True)
class Report:
  """A preflight report.

  Attributes:
    text: for people.
    facts: the same for programs, as JSON can hold it.
    figure: histograms of the lengths.
    stops: messages of the checks that would stop the run.
  """

  text: str
  facts: dict[str, Any]
  figure: Figure
  stops: list[str]

  def write(self, folder: epath.PathLike) -> None:
    """Writes report.txt, report.json and lengths.png; makes the folder."""
    folder = epath.Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    write_atomically(folder / "report.txt", f"{self.text}\n")
    write_json(folder / "report.json", self.facts)
    with (folder / "lengths.png").open("wb") as file:
      FigureCanvasAgg(self.figure).print_png(file)


def make_report(run: Run) -> Report:
  """Makes the report of a run that is built and not started.

  Its facts are "steps", "batch_size", "tokens_per_step", "steps_per_epoch",
  "length_accuracy", "checks", "reports", and "tokens" by split and kind, see
  `_summarize`.
  """
  results = run.data.checks
  loaders = {"train": run.data.train, **header.held_out(run.data)}
  lengths = {split: _lengths(loader) for split, loader in loaders.items()}
  accuracy = _length_accuracy(run.data.train)
  found = [r for r in results if r.message and r.action != "off"]
  num_groups, batch_size = len(run.data.train.indices), run.config.batch_size
  facts = {
    "steps": run.config.total_steps,
    "batch_size": batch_size,
    "tokens_per_step": header.measure_batches(run.data.train)[0],
    "steps_per_epoch": num_groups / batch_size,
    "length_accuracy": accuracy,
    "checks": [dataclasses.asdict(result) for result in results],
    "reports": {name: dict(r) for name, r in run.data.reports().items()},
    "tokens": {
      split: {name: _summarize(values) for name, values in by_name.items()}
      for split, by_name in lengths.items()
    },
  }
  rows = header.describe_data(run)
  if accuracy is not None:
    text = f"choosing the longer response is right in {100 * accuracy:.1f} % of"
    rows.append(("length", f"{text} the training pairs"))
  parts = [
    "\n".join(header.format_rows(rows)),
    format_table(_length_rows(facts["tokens"])),
    format_table([_check_row(result) for result in results]),
    *(f"{result.action}: {result.message}" for result in found),
  ]
  return Report(
    "\n\n".join(parts),
    facts,
    _plot(lengths["train"], run.config.data),
    [result.message for result in found if result.action == "stop"],
  )


def _summarize(lengths: np.ndarray) -> dict[str, float]:
  """Summarises lengths as their number, "groups", and percentiles.

  The percentiles are "p5", "median", "p95" and "longest", see _PERCENTS.
  """
  values = np.percentile(lengths, list(_PERCENTS.values())).tolist()
  return {"groups": len(lengths), **dict(zip(_PERCENTS, values, strict=True))}


def _length_rows(tokens: Mapping[str, Any]) -> list[dict[str, Any]]:
  """Returns the rows of the table of lengths, one for each split and kind.

  "tokens of" has the split and the kind, other columns those of `_summarize`.

  Args:
    tokens: summaries from `_summarize`, by split and kind.
  """
  return [
    {"tokens of": f"{split} {name}"}
    | {column: round(value) for column, value in summary.items()}
    for split, by_name in tokens.items()
    for name, summary in by_name.items()
  ]


def _lengths(loader: Loader) -> dict[str, np.ndarray]:
  """Returns lengths in tokens by kind: i32, one for each group that has it.

  The kinds are "prompts", and for each slot of responses "response K", or for
  two slots "chosen" and "rejected". A slot that no group fills is left out.
  """
  lengths = np.asarray(loader.store.lengths[loader.indices])
  names = [f"response {k}" for k in range(lengths.shape[1] - 1)]
  if len(names) == 2:
    names = ["chosen", "rejected"]
  found = {"prompts": lengths[:, 0]}
  for k, name in enumerate(names, 1):
    if (lengths[:, k] > 0).any():
      found[name] = lengths[:, k][lengths[:, k] > 0]
  return found


def _length_accuracy(train: Loader) -> float | None:
  """Returns the accuracy of choosing the longer response; None if not pairs."""
  lengths = train.store.lengths[train.indices, 1:]
  if lengths.shape[1] != 2:
    return None
  return checks.length_accuracy(lengths)


def _check_row(result: checks.Result) -> dict[str, Any]:
  verdict = "ok"
  if result.action == "off":
    verdict = "off"
  elif result.message:
    verdict = result.action
  return {
    "check": result.name,
    "where": result.where,
    "value": f"{result.value:.3g}",
    "limit": f"{result.limit:.3g}",
    "result": verdict,
  }


def _plot(lengths: Mapping[str, np.ndarray], data: Any) -> Figure:
  """Plots a histogram of the lengths of each kind, with the limits."""
  figure = Figure(figsize=(8, 2.2 * len(lengths)), layout="constrained")
  axes = figure.subplots(len(lengths), 1, sharex=True, squeeze=False)[:, 0]
  most = max(int(values.max()) for values in lengths.values())
  bins = np.linspace(0, most + 1, _NUM_BINS + 1)
  limits = {"prompts": ("data.max_prompt_tokens", data.max_prompt_tokens)}
  for axis, (name, values), color in zip(
    axes, lengths.items(), _COLORS * len(lengths), strict=False
  ):
    axis.hist(values, bins=bins, color=color)
    median = np.median(values)
    axis.axvline(median, color="black", linewidth=1)
    axis.set_title(
      f"{name}: {len(values):,}, median {median:,.0f} tokens",
      loc="left",
      fontsize=10,
    )
    key, limit = limits.get(name, ("data.max_tokens", data.max_tokens))
    if limit <= most:
      axis.axvline(limit, color="red", linestyle="--", linewidth=1)
      axis.annotate(key, (limit, axis.get_ylim()[1]), fontsize=8, va="top")
    axis.set_ylabel("groups")
    axis.spines[["top", "right"]].set_visible(False)
  axes[-1].set_xlabel("tokens")
  return figure
