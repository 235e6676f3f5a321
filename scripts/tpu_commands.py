"""The gcloud commands of the launcher's stages, and scripts for workers.

A stage is a function of the options. It returns commands, each a list of words,
in the order in which they run. This module runs none of them.
"""

import argparse
import os
import pathlib
import posixpath
import shlex
import subprocess
import sys

ROOT = pathlib.Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from dpo_jax import EXIT_PREEMPTED  # noqa: E402
from dpo_jax.planning.topology import Topology, parse_topology  # noqa: E402

# Google's images for JAX: docs.cloud.google.com/tpu/docs/runtimes.
_IMAGES = {
  "v4": "tpu-ubuntu2204-base",
  "v5e": "v2-alpha-tpuv5-lite",
  "v5p": "v2-alpha-tpuv5",
  "v6e": "v2-alpha-tpuv6e",
}
_ARCHIVE = "/tmp/dpo_jax.tar.gz"

# Scripts of a worker. The supervisor starts the training again after a
# preemption, and records its exit code.
_SUPERVISOR = """\
cd ~/dpo_jax && . ~/venv/bin/activate
code={preempted}
while [ $code -eq {preempted} ] && [ ! -e ~/run.stop ]; do
  {run} >>~/run.log 2>&1 & echo $! >~/run.child
  wait $!; code=$?
done
echo $code >~/run.exit.tmp; mv ~/run.exit.tmp ~/run.exit
"""
_IS_RUNNING = (
  "{ [ -e ~/run.pid ] && grep -q run.sh /proc/$(cat ~/run.pid)/cmdline"
  " 2>/dev/null; }"
)
_START = f"""\
if {_IS_RUNNING}; then
  echo "a run is on this worker already: stop it first" >&2; exit 1
fi
rm -f ~/run.stop ~/run.exit ~/run.child
printf %s {{supervisor}} >~/run.sh
printf %s {{workdir}} >~/run.workdir
nohup setsid bash ~/run.sh </dev/null >>~/run.log 2>&1 &
echo $! >~/run.pid
"""
# First word of a worker's answer; distinguishes it from messages of ssh.
REPORT_MARK = "dpo_jax-run"
# Running is tested first, since the supervisor records the exit code before it
# ends. The last line omits the hint that ends every error of a command.
_REPORT = f"""\
if {_IS_RUNNING}; then state=running
elif [ -e ~/run.exit ]; then state="ended $(cat ~/run.exit)"
elif [ -e ~/run.pid ]; then state=lost
else state=none; fi
last=$(tail -c 4000 ~/run.log 2>/dev/null | tr '\\r\\t' '\\n ' \
  | grep '[^ ]' | grep -vF '(--debug shows where)' | tail -n 1)
printf '{REPORT_MARK}\\t%s\\t%s\\t%s\\t%s\\n' "$(hostname)" "$state" \
  "$(cat ~/run.workdir 2>/dev/null)" "$last"
"""
# The mark keeps the supervisor from starting the run again.
_STOP = "touch ~/run.stop; kill -TERM $(cat ~/run.child)"
_KILL = (
  "touch ~/run.stop; kill -KILL $(cat ~/run.pid) $(cat ~/run.child)"
  " 2>/dev/null; rm -f ~/run.pid ~/run.exit; true"
)
# The Python of the images is too old; uv installs another.
_INSTALL = (
  f"set -e; mkdir -p ~/dpo_jax && tar xzf {_ARCHIVE} -C ~/dpo_jax;"
  " python3 -m pip install --user --quiet uv;"
  " python3 -m uv venv --quiet --allow-existing --python 3.12 ~/venv;"
  " python3 -m uv pip install --quiet --python ~/venv/bin/python"
  " -r ~/dpo_jax/requirements-tpu.txt"
)

Commands = list[list[str]]


def accelerator_type(topology: Topology) -> str:
  """Returns gcloud's name of a topology: v5litepod-16, v5p-128.

  Raises:
    SystemExit: a kind of TPU or GPU that this script cannot rent.
  """
  if topology.kind not in _IMAGES:
    raise SystemExit(
      f"{topology.kind} is rented through Google Kubernetes Engine only, which"
      f" this script does not use. It can rent {', '.join(_IMAGES)}"
    )
  count = topology.name.rpartition("-")[2]
  kind = "v5litepod" if topology.kind == "v5e" else topology.kind
  return f"{kind}-{count}"


def nodes(options: argparse.Namespace) -> list[str]:
  """Returns the names of the machines, one for each slice."""
  count = parse_topology(options.topology).num_slices
  if count == 1:
    return [options.name]
  return [f"{options.name}-{i}" for i in range(count)]


def gcloud(options: argparse.Namespace, *arguments: str) -> list[str]:
  """Returns a gcloud command in the zone and project of the options."""
  where = [f"--zone={options.zone}"]
  if options.project:
    where.append(f"--project={options.project}")
  return ["gcloud", "compute", "tpus", *arguments, *where]


def create(options: argparse.Namespace) -> Commands:
  """Returns the command that requests the machines; the request is queued."""
  topology = parse_topology(options.topology)
  command = gcloud(
    options,
    "queued-resources",
    "create",
    options.name,
    f"--accelerator-type={accelerator_type(topology)}",
    f"--runtime-version={options.image or _IMAGES[topology.kind]}",
  )
  if topology.num_slices == 1:
    command.append(f"--node-id={options.name}")
  else:
    command += [
      f"--node-count={topology.num_slices}",
      f"--node-prefix={options.name}",
    ]
  if options.spot:
    command.append("--spot")
  if options.service_account:
    command.append(f"--service-account={options.service_account}")
  return [command]


def on_workers(
  options: argparse.Namespace, text: str, worker: str = "all"
) -> Commands:
  """Returns commands that run a script on the workers of every slice.

  Args:
    options: parsed options of the launcher.
    text: script for bash.
    worker: index of the worker in its slice, or "all".
  """
  return [
    gcloud(
      options,
      "tpu-vm",
      "ssh",
      node,
      f"--worker={worker}",
      "--quiet",
      f"--command=bash -c {shlex.quote(text)}",
    )
    for node in nodes(options)
  ]


def to_workers(
  options: argparse.Namespace, source: str, target: str, *flags: str
) -> Commands:
  """Returns commands that copy a local file to the workers of every slice.

  Args:
    options: parsed options of the launcher.
    source: path on this machine.
    target: path on the workers.
    *flags: further flags of `gcloud compute tpus tpu-vm scp`.
  """
  return [
    gcloud(
      options,
      "tpu-vm",
      "scp",
      source,
      f"{node}:{target}",
      "--worker=all",
      "--quiet",
      *flags,
    )
    for node in nodes(options)
  ]


def uncommitted() -> list[str]:
  """Lists files that differ from the last commit, as `git status` does.

  Raises:
    SystemExit: the checkout is not a git repository.
  """
  done = subprocess.run(
    ["git", "-C", str(ROOT), "status", "--porcelain"],
    capture_output=True,
    text=True,
    check=False,
  )
  if done.returncode:
    raise SystemExit(
      f"install: workers get the last git commit, and {ROOT} has none:"
      f" {done.stderr.strip()}"
    )
  return done.stdout.splitlines()


def check_committed(options: argparse.Namespace) -> None:
  """Prints the files that workers do not get.

  Raises:
    SystemExit: there are such files, and no --allow_dirty or --dry_run.
  """
  files = uncommitted()
  if not files:
    return
  listed = "\n".join(f"  {line}" for line in files)
  if options.allow_dirty or options.dry_run:
    notice = "These files stay behind, since workers get the last commit:"
    print(f"{notice}\n{listed}", file=sys.stderr)
    return
  raise SystemExit(
    f"{options.stage}: workers get the last commit, without these files:\n"
    f"{listed}\nCommit them, or pass --allow_dirty to leave them behind. Put"
    " models and data into local/, which git ignores and `ship` copies"
  )


def install(options: argparse.Namespace) -> Commands:
  """Returns commands that copy the last commit to all workers and install it.

  The workers get a Python of their own.
  """
  pack = ["git", "-C", str(ROOT), "archive", "--format=tar.gz", "-o", _ARCHIVE]
  return [
    [*pack, "HEAD"],
    *to_workers(options, _ARCHIVE, _ARCHIVE),
    *on_workers(options, _INSTALL),
  ]


def ship(options: argparse.Namespace) -> Commands:
  """Returns commands that copy --file to all workers, below ~/dpo_jax.

  A local path is uploaded from here to each worker, and keeps its path below
  the checkout. A gs:// path is downloaded by each worker, to ~/dpo_jax/local.

  Raises:
    SystemExit: a file that cannot be shipped, two with the same path, or none.
  """
  commands: Commands = []
  for file, target in zip(options.file, _targets(options), strict=True):
    parent = f"dpo_jax/{posixpath.dirname(target)}"
    # Files of an earlier copy would remain otherwise.
    text = (
      f"set -e; cd ~; mkdir -p {shlex.quote(parent)};"
      f" rm -rf {shlex.quote(f'dpo_jax/{target}')}"
    )
    if file.startswith("gs://"):
      words = [file.rstrip("/"), f"{parent}/"]
      text += f"; gcloud storage cp --recursive {shlex.join(words)}"
      commands += on_workers(options, text)
    else:
      commands += on_workers(options, text)
      commands += to_workers(
        options, str(ROOT / target), f"{parent}/", "--recurse"
      )
  return commands


def _targets(options: argparse.Namespace) -> list[str]:
  """Returns paths below ~/dpo_jax at which workers find each --file.

  Raises:
    SystemExit: a file that cannot be shipped, or two with the same path.
  """
  if options.stage == "ship" and not options.file:
    raise SystemExit("ship: name what to copy: --file=PATH or --file=gs://PATH")
  targets: list[str] = []
  for file in options.file:
    target = _target_of_bucket(file) or _target_of_path(file)
    if target in targets:
      raise SystemExit(f"two of --file would be {target} on the workers")
    targets.append(target)
  return targets


def _target_of_bucket(file: str) -> str:
  """Returns the target of a gs:// path, or "" for a local path."""
  if not file.startswith("gs://"):
    return ""
  path = file.removeprefix("gs://").strip("/").partition("/")[2]
  if not path:
    raise SystemExit(f"--file={file} must name a path in the bucket")
  return f"local/{posixpath.basename(path)}"


def _target_of_path(file: str) -> str:
  # Links are not resolved: their targets may be outside the checkout.
  path = pathlib.Path(os.path.abspath(file))
  if not path.is_relative_to(ROOT) or path == ROOT:
    raise SystemExit(
      f"--file={file} must be below {ROOT}, since workers get it at the same"
      f" path: move it to {ROOT / 'local'}, or link it there"
    )
  if not path.exists():
    raise SystemExit(f"--file={file} does not exist")
  return path.relative_to(ROOT).as_posix()


def workdir(options: argparse.Namespace) -> str:
  """Returns the run's workdir, which must be a gs:// path.

  Raises:
    SystemExit: the flags after -- have no such workdir.
  """
  found = [""]
  for flag, following in zip(
    options.flags, [*options.flags[1:], ""], strict=True
  ):
    name, is_set, value = flag.lstrip("-").partition("=")
    if name == "workdir":
      found.append(value if is_set else following)
  if not found[-1].startswith("gs://"):
    raise SystemExit(
      f"{options.stage}: all workers write one workdir, so --workdir=gs://BUCKET/"
      f"RUN must be among the flags after --; got {options.flags}"
    )
  return found[-1].rstrip("/")


def train(options: argparse.Namespace) -> Commands:
  """Returns commands that start the run on all workers, detached.

  The supervisor starts it again after exit code 75, a preemption.

  Raises:
    SystemExit: see `workdir`.
  """
  run = shlex.join(["python", "-m", "dpo_jax.train", *options.flags])
  supervisor = _SUPERVISOR.format(run=run, preempted=EXIT_PREEMPTED)
  text = _START.replace("{workdir}", shlex.quote(workdir(options)))
  return on_workers(
    options, text.replace("{supervisor}", shlex.quote(supervisor))
  )


def describe(options: argparse.Namespace) -> Commands:
  """Returns the command that asks for the state of the request, as JSON."""
  found = gcloud(options, "queued-resources", "describe", options.name)
  return [[*found, "--format=json"]]


def report(options: argparse.Namespace) -> Commands:
  """Returns commands that ask every worker for the state of its run."""
  return on_workers(options, _REPORT)


def last_metrics(workdir: str) -> list[str]:
  """Returns the command that prints the end of a run's metrics.jsonl.

  Its last 8,000 bytes hold at least one whole line.
  """
  file = f"{workdir}/metrics.jsonl"
  return ["gcloud", "storage", "cat", "--range=-8000", file]


def logs(options: argparse.Namespace) -> Commands:
  """Returns the command that prints the end of the first worker's log.

  With --follow it does not end, and prints what is added.
  """
  how = "-c 10000 -F" if options.follow else "-c 200000"
  return on_workers(options, f"tail {how} ~/run.log", worker="0")[:1]


def stop(options: argparse.Namespace) -> Commands:
  """Returns commands that send SIGTERM: the run saves, the machines stay."""
  return on_workers(options, _STOP)


def kill(options: argparse.Namespace) -> Commands:
  """Returns commands that kill a run on all workers, for another start."""
  return on_workers(options, _KILL)


def delete(options: argparse.Namespace) -> Commands:
  """Returns the command that deletes machines and request, to end charges."""
  remove = gcloud(options, "queued-resources", "delete", options.name)
  return [[*remove, "--force", "--quiet"]]
