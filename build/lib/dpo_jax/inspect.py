"""Shows what a run would train on: tokens in colour, and a preflight report.

  python -m dpo_jax.inspect --config=configs/hh.py
  python -m dpo_jax.inspect --config=configs/hh.py --num_groups=2 --ids \
      --out=report
  python -m dpo_jax.inspect --dump=runs/hh/nonfinite/120.npz

Prints groups of a batch as a step gets them, the table of checks, and lengths;
`--out` writes report.txt, report.json and lengths.png. Loads no weights, and
trains nothing. Exit code 1: a check would stop the run. `--dump` shows the
groups of a step that was not finite, the guilty ones first.
"""

from absl import flags
from ml_collections import config_flags

from dpo_jax import command_line
from dpo_jax import config as config_lib
from dpo_jax.viewing import groups
from dpo_jax.viewing.preflight import make_report
from dpo_jax.viewing.terminal import COLORS, make_console


def main() -> None:
  given = flags.FLAGS
  console = make_console(given.color)
  if bool(given.dump) == (given.config is not None):
    raise ValueError("give one of --config and --dump")
  if given.dump:
    unused = [n for n in ("out", "step", "split") if given[n].present]
    if unused:
      raise ValueError(f"--dump takes no --{', --'.join(unused)}")
    groups.show_dump(console, given.dump, given.num_groups, with_ids=given.ids)
    return
  config_lib.check_keys(given.config)
  run = groups.build(given.config)
  groups.show(
    console, run, given.split, given.step, given.num_groups, with_ids=given.ids
  )
  report = make_report(run)
  console.print(report.text, soft_wrap=True)
  if given.out:
    report.write(given.out)
    console.print(f"\n{given.out}: report.txt, report.json, lengths.png")
  if report.stops:
    raise SystemExit(1)


def define_flags() -> None:
  config_flags.DEFINE_config_file(
    "config", None, "path of a config file; it is executed as Python"
  )
  flags.DEFINE_string("dump", "", "WORKDIR/nonfinite/STEP.npz to show")
  flags.DEFINE_integer("num_groups", 5, "groups to show", 0)
  flags.DEFINE_integer("step", 0, "training step whose batch is shown", 0)
  flags.DEFINE_string("split", "train", "train, eval or eval/NAME")
  flags.DEFINE_bool("ids", False, "show the id of each token")
  flags.DEFINE_enum("color", "auto", COLORS, "when to colour the text")
  flags.DEFINE_string("out", "", "folder for report.txt, .json and a figure")


if __name__ == "__main__":
  define_flags()
  command_line.run(main)
