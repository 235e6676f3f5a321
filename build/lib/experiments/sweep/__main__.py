"""Trains a config at several values of its keys, and compares the runs.

  python -m experiments.sweep --config=configs/hh.py:dpo --sweep=betas.json \
      --workdir=runs/betas

`grid` has the form of the file. Flags of the config hold for all runs. Finished
runs are skipped and an interrupted one resumes; `--shard=i/n` shares the runs
among n workers. Writes WORKDIR/sweep.png, .pdf and .csv.
"""

from absl import flags
from ml_collections import config_flags

from dpo_jax import command_line
from dpo_jax import config as config_lib
from experiments.sweep.command import define_flags, run_command
from experiments.sweep.grid import Grid, read_choices
from experiments.sweep.runs import Settings


def main() -> None:
  given = flags.FLAGS
  config_lib.check_keys(given.config)
  grid = Grid(given.config, read_choices(given.sweep))
  settings = Settings(given.workdir, given.scale)
  raise SystemExit(run_command(grid, grid.table, "sweep", settings))


if __name__ == "__main__":
  config_flags.DEFINE_config_file(
    "config", None, "path of a config file; it is executed as Python"
  )
  flags.DEFINE_string("sweep", None, "JSON file: values of each key")
  define_flags("sweep")
  flags.mark_flags_as_required(["config", "sweep"])
  command_line.run(main)
