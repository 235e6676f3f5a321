"""Runs training on Cloud TPU: create, install, train, watch, delete.

  python scripts/launch_tpu.py create --name=dpo --zone=us-west4-a \
      --topology=v5e-16 --spot
  python scripts/launch_tpu.py install --name=dpo --zone=us-west4-a
  python scripts/launch_tpu.py train --name=dpo --zone=us-west4-a -- \
      --config=configs/hh.py:dpo --workdir=gs://BUCKET/dpo
  python scripts/launch_tpu.py logs --follow --name=dpo --zone=us-west4-a
  python scripts/launch_tpu.py delete --name=dpo --zone=us-west4-a

Every stage runs gcloud commands, and with --dry_run only prints them. `train`
starts the run detached on the workers: it outlives the connection, and `logs
--follow` attaches to it. `watch` does all of it, and creates a spot machine
again when it was taken away. It deletes the machines when the run has written
WORKDIR/finished.json; with --delete also when the run has ended with an error.
A lost connection, a start that failed or an unknown end deletes nothing.
docs/tpu.md tells the story.
"""

import argparse
import datetime
import json
import pathlib
import re
import shlex
import subprocess
import sys
import time
from typing import NamedTuple

ROOT = pathlib.Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from dpo_jax.command_line import EXIT_PREEMPTED  # noqa: E402
from dpo_jax.topology import Topology, parse_topology  # noqa: E402

# The images that Google names for JAX: docs.cloud.google.com/tpu/docs/runtimes.
_IMAGES = {
  "v4": "tpu-ubuntu2204-base",
  "v5e": "v2-alpha-tpuv5-lite",
  "v5p": "v2-alpha-tpuv5",
  "v6e": "v2-alpha-tpuv6e",
}
_ARCHIVE = "/tmp/dpo_jax.tar.gz"
# Failures in a row, of creating, installing or starting, that end a watch; and
# starts again of a run whose process was lost.
_MOST_FAILURES = 3
_MOST_RESTARTS = 5

# On a worker: the supervisor, which starts the training again after a
# preemption and records its exit code; and what tells whether it runs.
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
nohup setsid bash ~/run.sh </dev/null >>~/run.log 2>&1 &
echo $! >~/run.pid
"""
# Whether it runs first: it records its exit code before it is gone.
_REPORT = f"""\
if {_IS_RUNNING}; then state=running
elif [ -e ~/run.exit ]; then state="ended $(cat ~/run.exit)"
elif [ -e ~/run.pid ]; then state=lost
else state=none; fi
echo "dpo_jax-run $(hostname) $state"
"""
# The mark keeps the supervisor from starting the run again.
_STOP = "touch ~/run.stop; kill -TERM $(cat ~/run.child)"
_KILL = (
  "touch ~/run.stop; kill -KILL $(cat ~/run.pid) $(cat ~/run.child)"
  " 2>/dev/null; rm -f ~/run.pid ~/run.exit; true"
)
# The images' Python is older than ours: uv brings one.
_INSTALL = (
  f"set -e; mkdir -p ~/dpo_jax && tar xzf {_ARCHIVE} -C ~/dpo_jax;"
  " python3 -m pip install --user --quiet uv;"
  " python3 -m uv venv --quiet --allow-existing --python 3.12 ~/venv;"
  " python3 -m uv pip install --quiet --python ~/venv/bin/python"
  " -r ~/dpo_jax/requirements-tpu.txt"
)

Commands = list[list[str]]


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


def create(options: argparse.Namespace) -> Commands:
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


def on_workers(
  options: argparse.Namespace, text: str, worker: str = "all"
) -> Commands:
  """Runs a script on the workers of every slice."""
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


def install(options: argparse.Namespace) -> Commands:
  """Copies this commit to all workers and gives them a Python of its own."""
  pack = ["git", "-C", str(ROOT), "archive", "--format=tar.gz", "-o", _ARCHIVE]
  copies = [
    gcloud(
      options,
      "tpu-vm",
      "scp",
      _ARCHIVE,
      f"{node}:{_ARCHIVE}",
      "--worker=all",
      "--quiet",
    )
    for node in nodes(options)
  ]
  return [[*pack, "HEAD"], *copies, *on_workers(options, _INSTALL)]


def workdir(options: argparse.Namespace) -> str:
  """The run's workdir, which all workers and this machine can read."""
  found = [""]
  for flag, following in zip(
    options.flags, [*options.flags[1:], ""], strict=True
  ):
    name, is_set, value = flag.lstrip("-").partition("=")
    if name == "workdir":
      found.append(value if is_set else following)
  if not found[-1].startswith("gs://"):
    raise SystemExit(
      f"{options.stage}: all workers write one workdir: --workdir=gs://BUCKET/"
      f"RUN must be among the flags after --, and they are {options.flags}"
    )
  return found[-1].rstrip("/")


def train(options: argparse.Namespace) -> Commands:
  """Starts the run on all workers, detached; again after exit code 75."""
  workdir(options)
  run = shlex.join(["python", "-m", "dpo_jax.train", *options.flags])
  supervisor = _SUPERVISOR.format(run=run, preempted=EXIT_PREEMPTED)
  text = _START.replace("{supervisor}", shlex.quote(supervisor))
  return on_workers(options, text)


def describe(options: argparse.Namespace) -> list[str]:
  found = gcloud(options, "queued-resources", "describe", options.name)
  return [*found, "--format=json"]


def status(options: argparse.Namespace) -> Commands:
  """State of the request, and of the run on each worker."""
  return [describe(options), *on_workers(options, _REPORT)]


def logs(options: argparse.Namespace) -> Commands:
  """The last lines of the first worker's log; --follow stays with it."""
  follow = " -F" if options.follow else ""
  text = f"tail -n 100{follow} ~/run.log"
  return on_workers(options, text, worker="0")[:1]


def stop(options: argparse.Namespace) -> Commands:
  """SIGTERM: the run saves, and the machines stay."""
  return on_workers(options, _STOP)


def delete(options: argparse.Namespace) -> Commands:
  """Deletes the machines and the request, so that nothing more is paid."""
  remove = gcloud(options, "queued-resources", "delete", options.name)
  return [[*remove, "--force", "--quiet"]]


STAGES = {
  stage.__name__: stage
  for stage in (create, install, train, status, logs, stop, delete)
}


def say(text: str) -> None:
  print(text, flush=True)


def run_all(commands: Commands, *, timeout_s: float | None = None) -> int:
  """Runs commands one after the other; stops at the first that fails."""
  for command in commands:
    line, _, rest = shlex.join(command).partition("\n")
    say(f"$ {line[:100]}{' ...' if rest or line[100:] else ''}")
    try:
      code = subprocess.run(command, check=False, timeout=timeout_s).returncode
    except subprocess.TimeoutExpired:
      say(f"no answer after {timeout_s:g} s")
      return 1
    if code:
      return code
  return 0


class Answer(NamedTuple):
  """Answer of a command; code None: nothing within the time."""

  code: int | None
  out: str
  error: str

  @property
  def is_absent(self) -> bool:
    """Whether Google said that it does not exist."""
    words = ("not_found", "not found", "no urls matched", "no objects")
    return bool(self.code) and any(w in self.error.lower() for w in words)


def ask(command: list[str], timeout_s: float) -> Answer:
  try:
    done = subprocess.run(
      command, capture_output=True, text=True, check=False, timeout=timeout_s
    )
  except subprocess.TimeoutExpired:
    return Answer(None, "", f"no answer after {timeout_s:g} s")
  return Answer(done.returncode, done.stdout, done.stderr.strip())


class Request(NamedTuple):
  """The queued request: its state, or ABSENT, or UNKNOWN."""

  state: str
  reason: str = ""
  created_at: datetime.datetime | None = None

  def describe(self) -> str:
    return f"{self.state}, {self.reason}" if self.reason else self.state


def parse_time(text: str) -> datetime.datetime:
  """An RFC 3339 time; ValueError if it is none, or has no zone."""
  # Google gives nanoseconds, which are more than datetime takes.
  text = re.sub(r"(\.\d{6})\d+", r"\1", text)
  time_ = datetime.datetime.fromisoformat(text)
  if time_.tzinfo is None:
    raise ValueError(f"{text!r} has no time zone")
  return time_


class Watch:
  """One watch over a request and its run.

  What is not known, because a connection was lost or an answer is late, is
  asked again after `poll_s`; only what Google or the run has said is acted on.
  """

  def __init__(self, options: argparse.Namespace):
    self._options = options
    self._mark = f"{workdir(options)}/finished.json"
    self._suspended = self._failures = self._ends = 0
    self._lost = self._restarts = 0

  def run(self) -> int:
    """Watches until the run is finished or has failed: the exit code."""
    while True:
      code = self._look()
      if code is not None:
        return code
      time.sleep(self._options.poll_s)

  def _look(self) -> int | None:
    request = self._request()
    say(f"{self._options.name}: {request.describe()}")
    finished_at = self._finished_at()
    if finished_at and request.state == "ABSENT":
      say(
        f"{self._mark} says that the run is finished: nothing is created. To"
        f" train on, for more steps: gcloud storage rm {self._mark}"
      )
      return 0
    if finished_at and request.created_at:
      if finished_at >= request.created_at:
        say(f"{self._mark} says that the run is finished")
        run_all(delete(self._options), timeout_s=self._options.work_timeout_s)
        return None  # until Google says that nothing is left
      say(f"{self._mark} is older than these machines: the run goes on")
    if request.state == "FAILED":
      say(f"the request failed: {request.reason}. It is left as it is")
      return 1
    if request.state == "SUSPENDED":
      return self._suspend()
    if request.state != "UNKNOWN":
      self._suspended = 0
    if request.state == "ABSENT":
      return self._try(create(self._options), "be created")
    return self._tend() if request.state == "ACTIVE" else None

  def _finished_at(self) -> datetime.datetime | None:
    """When the run wrote that it is finished; None: it has not, as far as is
    known."""
    command = ["gcloud", "storage", "cat", self._mark]
    answer = ask(command, self._options.timeout_s)
    if answer.code == 0:
      try:
        return parse_time(json.loads(answer.out)["finished_at"])
      except (ValueError, KeyError, TypeError):
        say(f"{self._mark} is not understood: {answer.out!r:.200}")
    elif not answer.is_absent:
      say(f"{self._mark}: unknown, {answer.error}")
    return None

  def _request(self) -> Request:
    """State of the request, as Google reports it."""
    answer = ask(describe(self._options), self._options.timeout_s)
    if answer.is_absent:
      return Request("ABSENT")
    if answer.code != 0:
      return Request("UNKNOWN", answer.error)
    try:
      found = json.loads(answer.out)
      name = found["state"]["state"]
      data = found["state"].get(f"{name.lower()}Data") or {}
      reason = (data.get("error") or {}).get("message", "")
      return Request(name, reason, parse_time(found["createTime"]))
    except (ValueError, KeyError, TypeError, AttributeError):
      return Request("UNKNOWN", f"not understood: {answer.out!r:.200}")

  def _suspend(self) -> int | None:
    if not self._options.spot:
      say(
        "the request is suspended, and it is not a spot machine: see Google's"
        " console. It is left as it is"
      )
      return 1
    self._suspended += 1
    if self._suspended < 2:
      return None
    say("suspended twice: the spot machine was taken away")
    run_all(delete(self._options), timeout_s=self._options.work_timeout_s)
    self._suspended = 0
    return None

  def _try(self, commands: Commands, what: str) -> int | None:
    code = run_all(commands, timeout_s=self._options.work_timeout_s)
    self._failures = self._failures + 1 if code else 0
    if self._failures < _MOST_FAILURES:
      return None
    say(
      f"the machines could not {what}, {_MOST_FAILURES} times in a row. They"
      " are left as they are"
    )
    return code

  def _tend(self) -> int | None:
    """Starts the run where it is not, and looks how it does."""
    states = self._worker_states()
    if not states:
      return None
    say(f"workers: {', '.join(states)}")
    ended = sorted({int(s.split()[1]) for s in states if s.startswith("ended")})
    if any(ended):
      return self._end(max(ended))
    if ended and set(states) == {"ended 0"}:
      self._ends += 1
      if self._ends < 2:
        return None  # finished.json is asked for once more
      say(f"the run has ended with 0, and {self._mark} is not there")
      return self._end(1)
    if set(states) <= {"running", "ended 0"}:
      self._lost = 0
      return None
    if set(states) != {"none"}:
      self._lost += 1
      if self._lost < 2:
        return None  # it may be about to start
      self._lost = 0
      self._restarts += 1
      if self._restarts > _MOST_RESTARTS:
        say(f"the run was lost {_MOST_RESTARTS} times")
        return self._end(1)
      say("the run is lost on a worker: starting it again on all")
      if run_all(
        on_workers(self._options, _KILL), timeout_s=self._options.timeout_s
      ):
        return None
    commands = install(self._options) + train(self._options)
    return self._try(commands, "be made to start the run")

  def _worker_states(self) -> list[str]:
    """States of the run on all workers, or [] where they are not known."""
    states = []
    for command in on_workers(self._options, _REPORT):
      answer = ask(command, self._options.timeout_s)
      if answer.code != 0:
        say(f"workers: unknown, {answer.error}")
        return []
      for line in answer.out.splitlines():
        mark, _, rest = line.partition(" ")
        if mark == "dpo_jax-run":
          states.append(rest.partition(" ")[2])
    return states

  def _end(self, code: int) -> int:
    """Ends the watch over a run that will not go on by itself."""
    run_all(logs(self._options), timeout_s=self._options.timeout_s)
    say(f"the run has ended with exit code {code}")
    options = self._options
    if options.delete and code != EXIT_PREEMPTED:
      run_all(delete(options), timeout_s=options.work_timeout_s)
      return code
    where = f"--name={options.name} --zone={options.zone}"
    say("The machines stay, and cost. To delete them:")
    say(f"  python scripts/launch_tpu.py delete {where}")
    return code


def print_all(commands: Commands) -> int:
  for command in commands:
    say("$ " + shlex.join(command))
  return 0


def watch(options: argparse.Namespace) -> int:
  """Creates, installs and trains until the run has finished, then deletes."""
  if options.dry_run:
    mark = f"{workdir(options)}/finished.json"
    commands = [["gcloud", "storage", "cat", mark], describe(options)]
    for stage in (create, install, train):
      commands += stage(options)
    commands += on_workers(options, _REPORT) + delete(options)
    return print_all(commands)
  return Watch(options).run()


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
  parser.add_argument("--follow", action="store_true", help="logs: stay")
  parser.add_argument(
    "--delete",
    action="store_true",
    help="watch: delete the machines also when the run has ended with an error",
  )
  parser.add_argument("--poll_s", type=float, default=60, help="watch: period")
  parser.add_argument(
    "--timeout_s", type=float, default=120, help="watch: for an answer"
  )
  parser.add_argument(
    "--work_timeout_s",
    type=float,
    default=3600,
    help="watch: to create, install, start and delete",
  )
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
  commands = STAGES[options.stage](options)
  return print_all(commands) if options.dry_run else run_all(commands)


if __name__ == "__main__":
  sys.exit(main(sys.argv[1:]))
