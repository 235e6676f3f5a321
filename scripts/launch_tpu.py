"""Runs training on Cloud TPU: create, install, ship, train, watch, delete.

  python scripts/launch_tpu.py create --name=dpo --zone=us-west4-a \
      --topology=v5e-16 --spot
  python scripts/launch_tpu.py install --name=dpo --zone=us-west4-a
  python scripts/launch_tpu.py ship --name=dpo --zone=us-west4-a \
      --file=local/pairs.jsonl.gz --file=gs://BUCKET/llama
  python scripts/launch_tpu.py train --name=dpo --zone=us-west4-a -- \
      --config=configs/hh.py:dpo --workdir=gs://BUCKET/dpo \
      --config.policy.init=hf:local/llama \
      --config.data.source=jsonl:local/pairs.jsonl.gz
  python scripts/launch_tpu.py status --name=dpo --zone=us-west4-a
  python scripts/launch_tpu.py logs --follow --name=dpo --zone=us-west4-a
  python scripts/launch_tpu.py delete --name=dpo --zone=us-west4-a

Every stage runs gcloud commands, and with --dry_run only prints them. `train`
starts the run detached on the workers: it outlives the connection, and `logs
--follow` attaches to it.

`watch` does all stages, and creates a spot machine again after a preemption. It
deletes the machines when the run has written WORKDIR/finished.json; with
--delete also when the run has ended with an error. It deletes nothing after a
lost connection, a failed start or an unknown end. See docs/tpu.md.
"""

import argparse
import pathlib
import shlex
import sys

sys.path.insert(0, str(pathlib.Path(__file__).parent))

import tpu_commands
import tpu_state
import tpu_watch

# The commands of each stage, in the order in which they are used.
STAGES = {
  "create": tpu_commands.create,
  "install": tpu_commands.install,
  "ship": tpu_commands.ship,
  "train": tpu_commands.train,
  "status": lambda o: tpu_commands.describe(o) + tpu_commands.report(o),
  "logs": tpu_commands.logs,
  "stop": tpu_commands.stop,
  "delete": tpu_commands.delete,
  "watch": tpu_watch.planned,
}
# Stages that read the answers of their commands.
_RUNNERS = {
  "status": tpu_state.show_status,
  "logs": tpu_state.show_logs,
  "watch": lambda options: tpu_watch.Watch(options).run(),
}
# Stages that read an option; others refuse it.
_READ_BY = {
  "spot": ("create", "watch"),
  "image": ("create", "watch"),
  "service_account": ("create", "watch"),
  "file": ("ship", "watch"),
  "allow_dirty": ("install", "watch"),
  "follow": ("logs",),
  "delete": ("watch",),
  "flags": ("train", "watch"),
}


def _make_parser() -> argparse.ArgumentParser:
  """Makes the parser of all stages and options."""
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument("stage", choices=list(STAGES))
  parser.add_argument(
    "--name", required=True, help="name of the queued resource"
  )
  parser.add_argument("--zone", required=True, help="as in us-west4-a")
  parser.add_argument("--project", default="", help="default: that of gcloud")
  parser.add_argument(
    "--topology", default="v5e-16", help="as in v5e-16 or 2xv5p-128"
  )
  parser.add_argument(
    "--image", default="", help="runtime version; default: JAX's"
  )
  parser.add_argument(
    "--spot", action="store_true", help="cheaper machines that may be preempted"
  )
  parser.add_argument("--service_account", default="")
  parser.add_argument(
    "--dry_run", action="store_true", help="only print the commands"
  )
  parser.add_argument(
    "--file",
    action="append",
    default=[],
    help="ship, watch: a model folder or data file, local or gs://; repeatable",
  )
  parser.add_argument(
    "--allow_dirty",
    action="store_true",
    help="install, watch: leave uncommitted files behind",
  )
  parser.add_argument("--follow", action="store_true", help="logs: stream")
  parser.add_argument(
    "--delete",
    action="store_true",
    help="watch: delete the machines also when the run has ended with an error",
  )
  parser.add_argument(
    "--poll_s",
    type=float,
    default=60,
    help="watch: seconds between two looks at the run",
  )
  parser.add_argument(
    "--timeout_s",
    type=float,
    default=120,
    help="most seconds to wait for an answer of gcloud",
  )
  parser.add_argument(
    "--work_timeout_s",
    type=float,
    default=3600,
    help="watch: most seconds to create, install, start or delete",
  )
  return parser


def parse(argv: list[str]) -> argparse.Namespace:
  """Parses the command line; the flags of the run follow `--`.

  Raises:
    SystemExit: an option that the stage does not read.
  """
  parser = _make_parser()
  if "--" in argv:
    split = argv.index("--")
    argv, rest = argv[:split], argv[split + 1 :]
  else:
    rest = []
  options = parser.parse_args(argv)
  options.flags = rest
  for name, stages in _READ_BY.items():
    if getattr(options, name) and options.stage not in stages:
      option = "flags after --" if name == "flags" else f"--{name}"
      parser.error(
        f"{option}: read by {' and '.join(stages)}, not by {options.stage}"
      )
  return options


def main(argv: list[str]) -> int:
  options = parse(argv)
  try:
    tpu_commands.parse_topology(options.topology)
  except ValueError as error:
    raise SystemExit(str(error)) from None
  commands = STAGES[options.stage](options)
  if options.stage in _READ_BY["allow_dirty"]:
    tpu_commands.check_committed(options)
  if options.dry_run:
    for command in commands:
      tpu_state.say("$ " + shlex.join(command))
    return 0
  if options.stage in _RUNNERS:
    return _RUNNERS[options.stage](options)
  return tpu_state.run_all(commands)


if __name__ == "__main__":
  sys.exit(main(sys.argv[1:]))
