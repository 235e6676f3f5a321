"""A run on Cloud TPU: create, install, train, watch, delete.

  python scripts/launch_tpu.py create --name=dpo --zone=us-west4-a \
      --topology=v5e-16 --spot
  python scripts/launch_tpu.py install --name=dpo --zone=us-west4-a
  python scripts/launch_tpu.py train --name=dpo --zone=us-west4-a -- \
      --config=configs/hh.py:dpo --workdir=gs://BUCKET/dpo
  python scripts/launch_tpu.py delete --name=dpo --zone=us-west4-a

Every stage runs gcloud commands, and with --dry_run only prints them. `watch`
does it all, and again from the start whenever a spot machine is taken away:
the run goes on from its last checkpoint. docs/tpu.md tells the story.
"""

import argparse
import pathlib
import shlex
import subprocess
import sys
import time

ROOT = pathlib.Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from dpo_jax.topology import Topology, parse_topology  # noqa: E402

# The images that Google names for JAX: docs.cloud.google.com/tpu/docs/runtimes.
_IMAGES = {
  "v4": "tpu-ubuntu2204-base",
  "v5e": "v2-alpha-tpuv5-lite",
  "v5p": "v2-alpha-tpuv5",
  "v6e": "v2-alpha-tpuv6e",
}
_ARCHIVE = "/tmp/dpo_jax.tar.gz"
# The run's exit code when it was told to stop and has saved.
_EXIT_PREEMPTED = 75
_POLL_S = 60


def accelerator_type(topology: Topology) -> str:
  """As gcloud spells it: v5litepod-16, v5p-128."""
  if topology.kind not in _IMAGES:
    raise SystemExit(
      f"{topology.kind} is rented through Google Kubernetes Engine only, which"
      " this script does not speak"
    )
  count = topology.name.rpartition("-")[2]
  kind = "v5litepod" if topology.kind == "v5e" else topology.kind
  return f"{kind}-{count}"


def nodes(options: argparse.Namespace) -> list[str]:
  """Names of the machines, one for each slice."""
  count = parse_topology(options.topology).num_slices
  if count == 1:
    return [options.name]
  return [f"{options.name}-{i}" for i in range(count)]


def gcloud(options: argparse.Namespace, *arguments: str) -> list[str]:
  where = [f"--zone={options.zone}"]
  if options.project:
    where.append(f"--project={options.project}")
  return ["gcloud", "compute", "tpus", *arguments, *where]


def create(options: argparse.Namespace) -> list[list[str]]:
  """A queued request, which waits for its turn."""
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


def on_all_workers(options: argparse.Namespace, text: str) -> list[list[str]]:
  return [
    gcloud(options, "tpu-vm", "ssh", node, "--worker=all", f"--command={text}")
    for node in nodes(options)
  ]


def install(options: argparse.Namespace) -> list[list[str]]:
  """This commit, and a Python of its own, on all workers."""
  pack = ["git", "-C", str(ROOT), "archive", "--format=tar.gz", "-o", _ARCHIVE]
  copies = [
    gcloud(
      options, "tpu-vm", "scp", _ARCHIVE, f"{node}:{_ARCHIVE}", "--worker=all"
    )
    for node in nodes(options)
  ]
  # The images' Python is older than ours: uv brings one.
  text = (
    "set -e; mkdir -p ~/dpo_jax && tar xzf /tmp/dpo_jax.tar.gz -C ~/dpo_jax;"
    " python3 -m pip install --user --quiet uv;"
    " python3 -m uv venv --quiet --allow-existing --python 3.11 ~/venv;"
    " python3 -m uv pip install --quiet --python ~/venv/bin/python"
    " -r ~/dpo_jax/requirements-tpu.txt"
  )
  return [[*pack, "HEAD"], *copies, *on_all_workers(options, text)]


def train(options: argparse.Namespace) -> list[list[str]]:
  """The run on all workers, until it ends; started again after exit 75."""
  if not any(flag.startswith("--workdir=gs://") for flag in options.flags):
    raise SystemExit(
      "train: all workers write one workdir: --workdir=gs://BUCKET/RUN must be"
      f" among the flags after --, and they are {options.flags}"
    )
  run = shlex.join(["python", "-m", "dpo_jax.train", *options.flags])
  text = (
    "cd ~/dpo_jax && . ~/venv/bin/activate; rm -f ~/run.stop; code=75;"
    f" while [ $code -eq {_EXIT_PREEMPTED} ] && [ ! -e ~/run.stop ]; do"
    f" {run} > >(tee -a ~/run.log) 2>&1 & echo $! > ~/run.pid;"
    " wait $!; code=$?; done; exit $code"
  )
  commands = on_all_workers(options, f"bash -c {shlex.quote(text)}")
  if len(commands) > 1:
    # Slices wait for each other: all must be started before any ends.
    lines = " & ".join(shlex.join(command) for command in commands)
    return [["bash", "-c", f"{lines} & wait"]]
  return commands


def status(options: argparse.Namespace) -> list[list[str]]:
  """ACTIVE, WAITING_FOR_RESOURCES, SUSPENDED, FAILED, ..."""
  describe = gcloud(options, "queued-resources", "describe", options.name)
  return [[*describe, "--format=value(state.state)"]]


def logs(options: argparse.Namespace) -> list[list[str]]:
  """What the first worker has said."""
  return [
    gcloud(
      options,
      "tpu-vm",
      "ssh",
      nodes(options)[0],
      "--worker=0",
      "--command=tail -n 100 ~/run.log",
    )
  ]


def stop(options: argparse.Namespace) -> list[list[str]]:
  """SIGTERM: the run saves, and the machines stay."""
  # The mark keeps its shell from starting the run again.
  text = "touch ~/run.stop; kill -TERM $(cat ~/run.pid)"
  return on_all_workers(options, text)


def delete(options: argparse.Namespace) -> list[list[str]]:
  """The machines and the request, so that nothing is paid any more."""
  remove = gcloud(options, "queued-resources", "delete", options.name)
  return [[*remove, "--force", "--quiet"]]


STAGES = {
  stage.__name__: stage
  for stage in (create, install, train, status, logs, stop, delete)
}


def run_all(commands: list[list[str]], *, dry_run: bool) -> int:
  """Runs commands one after the other, or prints them; stops at a failure."""
  for command in commands:
    print("$ " + shlex.join(command), flush=True)
    if not dry_run:
      code = subprocess.run(command, check=False).returncode
      if code:
        return code
  return 0


def state(options: argparse.Namespace) -> str:
  done = subprocess.run(
    status(options)[0], capture_output=True, text=True, check=False
  )
  return done.stdout.strip() or "ABSENT"


def watch(options: argparse.Namespace) -> int:
  """Creates, installs and trains until the run has ended, then deletes."""
  if options.dry_run:
    for stage in (create, status, install, train, delete):
      run_all(stage(options), dry_run=True)
    return 0
  while True:
    found = state(options)
    print(f"{options.name}: {found}", flush=True)
    if found in ("SUSPENDED", "FAILED"):
      run_all(delete(options), dry_run=False)
      found = "ABSENT"
    if found == "ABSENT":
      if code := run_all(create(options), dry_run=False):
        return code
    elif found == "ACTIVE" and not run_all(install(options), dry_run=False):
      code = run_all(train(options), dry_run=False)
      # A machine that is still there did not lose the run: it ended.
      if state(options) == "ACTIVE":
        run_all(delete(options), dry_run=False)
        return code
    time.sleep(_POLL_S)


def parse(argv: list[str]) -> argparse.Namespace:
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument("stage", choices=[*STAGES, "watch"])
  parser.add_argument("--name", required=True, help="of the queued resource")
  parser.add_argument("--zone", required=True)
  parser.add_argument("--project", default="", help="default: gcloud's own")
  parser.add_argument("--topology", default="v5e-16", help="v5e-16, 2xv5p-128")
  parser.add_argument("--image", default="", help="runtime version")
  parser.add_argument("--spot", action="store_true", help="may be taken away")
  parser.add_argument("--service_account", default="")
  parser.add_argument("--dry_run", action="store_true", help="only print")
  if "--" in argv:
    border = argv.index("--")
    argv, rest = argv[:border], argv[border + 1 :]
  else:
    rest = []
  options = parser.parse_args(argv)
  options.flags = rest
  return options


def main(argv: list[str]) -> int:
  options = parse(argv)
  try:
    parse_topology(options.topology)
  except ValueError as error:
    raise SystemExit(str(error)) from None
  if options.stage == "watch":
    return watch(options)
  return run_all(STAGES[options.stage](options), dry_run=options.dry_run)


if __name__ == "__main__":
  sys.exit(main(sys.argv[1:]))
