"""Plans a run for TPUs or GPUs that are not here: will it fit, how fast.

  python -m dpo_jax.plan --config=configs/hh.py --topology=v5e-64

compiles the very step of that config for that TPU, on a machine without one
(libtpu from requirements-tpu.txt), and prints tables. --topology=h200-8 is a
host with eight GPUs (pip install 'jax[cuda12]', also without a GPU).

Where this machine cannot read the config's data, --row_tokens, --rows and
--vocab_size replace what they would have said.
"""

import functools
import os

from absl import flags
from ml_collections import config_flags

from dpo_jax import command_line
from dpo_jax.planning import (
  topology,
)
from dpo_jax.planning.compilation import Request
from dpo_jax.planning.report import in_child, report
from dpo_jax.planning.sweep import sweep
from dpo_jax.records.metrics import format_table


def main() -> None:
  values = flags.FLAGS
  request = Request(
    config=values.config,
    topology=topology.parse_topology(values.topology),
    rows=values.rows,
    row_tokens=values.row_tokens,
    scored_tokens=values.scored_tokens,
    vocab_size=values.vocab_size,
    mfu=values.mfu,
    price=values.price_per_chip_hour,
  )
  isolated = functools.partial(in_child, report)
  if values.sweep:
    rows = sweep(request, values.sweep_limit, isolated)
    text, fits = format_table(rows), rows[0]["fits"] == "yes"
  else:
    made = isolated(request)
    text, fits = made.text, made.fits
  print(text)
  if not fits:
    raise SystemExit(1)


def define_flags() -> None:
  config_flags.DEFINE_config_file("config", None, "path of a config file")
  flags.DEFINE_string("topology", None, "v5e-64, v5p:4x4x4, 2xv6e-256, h200-8")
  flags.DEFINE_integer("rows", 0, "rows of a batch, if the data are not here")
  flags.DEFINE_integer("row_tokens", 0, "tokens of a row, likewise")
  flags.DEFINE_integer("scored_tokens", 0, "scored tokens of a row; 0: all")
  flags.DEFINE_integer("vocab_size", 0, "ids of the tokenizer; 0: 128,256")
  flags.DEFINE_float("mfu", 0.4, "model FLOPs utilisation to expect", 0.01, 1.0)
  flags.DEFINE_float("price_per_chip_hour", 0.0, "price of a chip-hour")
  flags.DEFINE_bool("sweep", False, "compile likely meshes and rank them")
  flags.DEFINE_integer("sweep_limit", 4, "meshes to compile", 1)
  flags.mark_flags_as_required(["config", "topology"])


if __name__ == "__main__":
  # Devices are compiled for, not looked for.
  os.environ["JAX_PLATFORMS"] = "cpu"
  define_flags()
  command_line.run(main)
