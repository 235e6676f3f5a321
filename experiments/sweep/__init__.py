"""Sweeps: runs that are executed once, resumed, collected and plotted.

An experiment is a module with three functions:

  runs(settings) -> list[Run]      what to train, and the order
  collect(workdir) -> Collected    rows of finished runs, and what is missing
  plot(rows, path) -> list[str]    a pure function of the rows; files written

`runs` executes nothing. The `path` of `plot` has no extension: PATH.png,
PATH.pdf and PATH.csv, the rows, are written, and these paths are returned. Many
modules also have `table(rows)`, which returns the rows of the printed table:
text or numbers by column. Tables and plots show means over seeds.

`main` gives the module a command line:

  python -m experiments.NAME --workdir=W --scale=tiny|paper [--dry_run]
      [--only=ID,...] [--shard=i/n] [--plot]

Each run has its own folder, WORKDIR/NAME, on a disk that all workers see. A
mounted bucket will do, if it supports flock. Finished runs are skipped and an
interrupted one resumes, so the same command is given until all is done.
`--shard=i/n` makes a worker the i-th (from 0) of n on one workdir. A worker
waits for a run that it starts from and that another worker trains.
"""

from experiments.sweep.command import main
from experiments.sweep.cost import estimate, hardware
from experiments.sweep.execution import (
  Locked,
  compile_once,
  compile_soon,
  execute,
)
from experiments.sweep.plots import colour, draw, label_curves, save_figure
from experiments.sweep.report import (
  Collected,
  collect,
  mean_and_spread,
  write_csv,
)
from experiments.sweep.runs import (
  SCALES,
  Row,
  Run,
  Settings,
  choose,
  in_order,
)

__all__ = [
  "SCALES",
  "Collected",
  "Locked",
  "Row",
  "Run",
  "Settings",
  "choose",
  "collect",
  "colour",
  "compile_once",
  "compile_soon",
  "draw",
  "estimate",
  "execute",
  "hardware",
  "in_order",
  "label_curves",
  "main",
  "mean_and_spread",
  "save_figure",
  "write_csv",
]
