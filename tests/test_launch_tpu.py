"""The launcher: its commands, and its watch over a stand-in for gcloud."""

import contextlib
import importlib.util
import json
import os
import pathlib
import shlex
import signal
import subprocess
import sys
import threading
import time

import pytest

_PATH = pathlib.Path(__file__).parents[1] / "scripts" / "launch_tpu.py"


@pytest.fixture(scope="module")
def launch():
  spec = importlib.util.spec_from_file_location("launch_tpu", _PATH)
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  return module


def printed(launch, capsys, *argv):
  """Commands of a dry run, each as a list of words."""
  common = ["--name=dpo", "--zone=us-west4-a", "--dry_run"]
  border = argv.index("--") if "--" in argv else len(argv)
  code = launch.main([*argv[:border], *common, *argv[border:]])
  assert code == 0
  out = capsys.readouterr().out
  assert out.startswith("$ ")
  return [shlex.split(text) for text in out[2:].split("\n$ ")]


@pytest.mark.parametrize(
  ("topology", "accelerator", "image"),
  [
    ("v5e-16", "v5litepod-16", "v2-alpha-tpuv5-lite"),
    ("v5litepod-16", "v5litepod-16", "v2-alpha-tpuv5-lite"),
    ("v5p-128", "v5p-128", "v2-alpha-tpuv5"),
    ("v6e-64", "v6e-64", "v2-alpha-tpuv6e"),
    ("v4-8", "v4-8", "tpu-ubuntu2204-base"),
  ],
)
def test_create_asks_for_the_slice(
  launch, capsys, topology, accelerator, image
):
  (command,) = printed(launch, capsys, "create", f"--topology={topology}")
  assert command[:6] == shlex.split(
    "gcloud compute tpus queued-resources create dpo"
  )
  assert f"--accelerator-type={accelerator}" in command
  assert f"--runtime-version={image}" in command
  assert "--node-id=dpo" in command and "--zone=us-west4-a" in command
  assert "--spot" not in command


def test_several_slices_are_one_request_and_each_is_started(launch, capsys):
  (command,) = printed(
    launch, capsys, "create", "--topology=2xv5e-16", "--spot"
  )
  assert {"--node-count=2", "--node-prefix=dpo", "--spot"} <= set(command)
  commands = printed(
    launch,
    capsys,
    "train",
    "--topology=2xv5e-16",
    "--",
    "--config=c.py",
    "--workdir=gs://b/run",
  )
  assert [command[5] for command in commands] == ["dpo-0", "dpo-1"]


def test_watch_goes_from_nothing_and_back(launch, capsys):
  commands = printed(
    launch, capsys, "watch", "--", "--config=c.py", "--workdir=gs://b/run"
  )
  stages = [" ".join(command[3:5]) for command in commands]
  assert stages == [
    "gs://b/run/finished.json",
    "queued-resources describe",
    "queued-resources create",
    "archive --format=tar.gz",
    "tpu-vm scp",
    "tpu-vm ssh",
    "tpu-vm ssh",
    "tpu-vm ssh",
    "queued-resources delete",
  ]


def test_workers_get_a_python_that_the_newest_jax_runs_on(launch, capsys):
  commands = printed(launch, capsys, "install")
  assert "--python 3.12" in commands[-1][-2]


# What the run on the stand-in's workers does: "python" of its venv.
_FINISHES = """\
mkdir -p $BUCKET/b/run
[ $WORKER = 0 ] && printf '{"total_steps": 4, "finished_at": "%s"}' \\
  $(date -u +%Y-%m-%dT%H:%M:%S.%6NZ) >$BUCKET/b/run/finished.json
exit 0
"""
_WAITS_THEN_FINISHES = "sleep 1\n" + _FINISHES


class Cloud:
  """The stand-in for gcloud in a folder, and a watch over it."""

  def __init__(self, folder, run):
    self.folder = folder
    image = folder / "image"
    (image / "dpo_jax").mkdir(parents=True)
    binaries = image / "venv" / "bin"
    binaries.mkdir(parents=True)
    (binaries / "activate").write_text("PATH=$HOME/venv/bin:$PATH\n")
    (binaries / "python").write_text(
      f"#!/bin/bash\nWORKER=$(basename $HOME)\nBUCKET={folder}/buckets\n"
      f'echo "$*" >>$HOME/calls\n{run}'
    )
    (binaries / "python").chmod(0o755)
    command = folder / "bin" / "gcloud"
    command.parent.mkdir()
    stand_in = pathlib.Path(__file__).with_name("gcloud.py")
    command.write_text(
      f'#!/bin/sh\nexec {sys.executable} {stand_in} {folder} "$@"\n'
    )
    command.chmod(0o755)

  def watch(self, *options, **events):
    """Watches: the exit code, and what was printed."""
    (self.folder / "events.json").write_text(json.dumps(events))
    environment = os.environ | {
      "PATH": f"{self.folder / 'bin'}:{os.environ['PATH']}"
    }
    done = subprocess.run(
      [
        sys.executable,
        _PATH,
        "watch",
        "--name=dpo",
        "--zone=z",
        "--poll_s=0.2",
        "--timeout_s=8",
        *options,
        "--",
        "--config=c.py:a b",
        "--workdir=gs://b/run",
      ],
      env=environment,
      capture_output=True,
      text=True,
      timeout=120,
      check=False,
    )
    return done.returncode, done.stdout + done.stderr

  @property
  def is_there(self):
    return (self.folder / "request").exists()

  def count(self, kind):
    return (self.folder / "calls").read_text().split().count(kind)

  def runs(self, worker=0):
    path = self.folder / "workers" / str(worker) / "calls"
    return path.read_text().splitlines() if path.exists() else []


@pytest.fixture
def cloud(tmp_path):
  clouds = []

  def make(run):
    clouds.append(Cloud(tmp_path / "cloud", run))
    return clouds[-1]

  (tmp_path / "cloud").mkdir()
  yield make
  # Supervisors and runs that a test left on the workers.
  for one in clouds:
    for name in ("run.pid", "run.child"):
      for path in (one.folder / "workers").glob(f"*/{name}"):
        with contextlib.suppress(ProcessLookupError):
          os.kill(int(path.read_text()), signal.SIGKILL)


@pytest.mark.slow
@pytest.mark.parametrize(
  "events",
  [
    {},
    {"describe": ["ok", "WAITING_FOR_RESOURCES", "PROVISIONING"]},
    {"describe": ["drop", "drop", "ok", "drop", "ok", "drop"]},
    {"ssh": ["drop", "ok", "drop", "drop_after", "drop"]},
    {"cat": ["drop"] * 6, "scp": ["drop", "drop"]},
    {"create": ["drop_after"], "delete": ["drop", "drop_after"]},
  ],
  ids=str,
)
def test_a_watch_deletes_when_the_run_is_finished(cloud, events):
  """However often the connection is lost on the way."""
  found = cloud(_WAITS_THEN_FINISHES)
  code, text = found.watch(**events)
  assert code == 0, text
  assert not found.is_there
  assert found.count("create") == 1
  run = "-m dpo_jax.train --config=c.py:a b --workdir=gs://b/run"
  assert found.runs() == [run], text


@pytest.mark.slow
def test_an_answer_that_comes_late_is_none(cloud):
  found = cloud(_FINISHES)
  code, text = found.watch("--timeout_s=3", describe=["ok", "slow"])
  assert code == 0 and "UNKNOWN, no answer after 3 s" in text
  assert not found.is_there


@pytest.mark.slow
@pytest.mark.parametrize("exit_code", [2, 137])
def test_a_run_that_ends_with_an_error_leaves_the_machines(cloud, exit_code):
  found = cloud(f"echo 'no such flag'; exit {exit_code}\n")
  code, text = found.watch()
  assert code == exit_code and found.is_there
  assert "no such flag" in text and "The machines stay, and cost" in text
  # Nor are they deleted when it is looked at again, but if that is asked for.
  assert found.watch()[0] == exit_code and found.is_there
  assert found.watch("--delete")[0] == exit_code and not found.is_there


@pytest.mark.slow
def test_an_end_without_its_mark_leaves_the_machines(cloud):
  found = cloud("exit 0\n")
  code, text = found.watch()
  assert code == 1 and found.is_there
  assert "finished.json is not there" in text


@pytest.mark.slow
@pytest.mark.parametrize("options", [(), ("--delete",)], ids=str)
def test_machines_that_cannot_be_installed_stay(cloud, options):
  found = cloud(_FINISHES)
  code, text = found.watch(*options, scp=["drop"] * 9)
  assert code == 255 and found.is_there
  assert "3 times in a row" in text


@pytest.mark.slow
def test_a_spot_machine_that_was_taken_away_is_created_again(cloud):
  found = cloud(
    "[ $(grep -c create $BUCKET/../calls) = 2 ] || sleep 5\n" + _FINISHES
  )
  code, text = found.watch(
    "--spot",
    describe=["ok", "SUSPENDED", "ACTIVE", "SUSPENDED", "drop", "SUSPENDED"],
  )
  assert code == 0, text
  assert found.count("create") == 2
  assert "suspended twice" in text and not found.is_there


@pytest.mark.slow
@pytest.mark.parametrize(
  ("events", "options", "message"),
  [
    (["ok", "SUSPENDED", "SUSPENDED"], (), "it is not a spot machine"),
    (["ok", "FAILED: no quota in z"], ("--spot",), "failed: no quota in z"),
  ],
)
def test_what_will_not_come_stops_the_watch(cloud, events, options, message):
  found = cloud(_FINISHES)
  code, text = found.watch(*options, describe=events)
  assert code == 1 and message in text
  assert found.is_there and found.count("delete") == 0


@pytest.mark.slow
def test_a_finished_run_is_not_created_again(cloud):
  found = cloud(_FINISHES)
  assert found.watch()[0] == 0
  code, text = found.watch()
  assert code == 0 and "nothing is created" in text
  assert found.count("create") == 1


@pytest.mark.slow
def test_a_mark_older_than_the_machines_deletes_nothing(cloud):
  """The run of before was finished; this one has more steps to take."""
  found = cloud("sleep 1\nexit 3\n")
  mark = found.folder / "buckets" / "b" / "run" / "finished.json"
  mark.parent.mkdir(parents=True)
  mark.write_text('{"total_steps": 2, "finished_at": "2020-01-01T00:00:00Z"}')
  found.watch()  # creates nothing
  subprocess.run(
    [found.folder / "bin" / "gcloud", "queued-resources", "create"], check=True
  )
  code, text = found.watch()
  assert code == 3 and found.is_there
  assert "older than these machines" in text


@pytest.mark.slow
def test_a_run_outlives_the_connection_and_starts_again_when_it_is_lost(cloud):
  """Its supervisor is killed; a watch finds that, and starts it once more."""
  found = cloud("[ $(wc -l <$HOME/calls) = 1 ] && sleep 60\n" + _FINISHES)
  (found.folder / "events.json").write_text("{}")
  environment = os.environ | {
    "PATH": f"{found.folder / 'bin'}:{os.environ['PATH']}"
  }

  def stage(name, *flags):
    command = [sys.executable, _PATH, name, "--name=dpo", "--zone=z", *flags]
    return subprocess.run(
      command, env=environment, capture_output=True, text=True, check=False
    )

  flags = ("--", "--config=c.py:a b", "--workdir=gs://b/run")
  assert stage("create").returncode == 0
  assert stage("train", *flags).returncode == 0
  assert stage("status").stdout.count(" running") == 2
  again = stage("train", *flags)
  assert again.returncode and "a run is on this worker already" in again.stderr
  worker = found.folder / "workers" / "1"
  os.kill(int((worker / "run.pid").read_text()), signal.SIGKILL)
  assert " lost" in stage("status").stdout
  code, text = found.watch()
  assert code == 0 and "the run is lost on a worker" in text
  assert len(found.runs()) == 2 and not found.is_there


@pytest.mark.slow
def test_the_run_is_started_again_after_a_preemption_only(cloud):
  found = cloud("[ $(wc -l <$HOME/calls) -lt 3 ] && exit 75\nexit 3\n")
  code, _ = found.watch()
  assert code == 3 and found.is_there
  assert len(found.runs()) == 3


@pytest.mark.slow
def test_a_run_that_was_told_to_stop_is_left_stopped(cloud):
  """`stop` sends SIGTERM; the run exits with 75, and nothing is deleted."""
  found = cloud("trap 'exit 75' TERM\nsleep 60 & wait $!\n")
  (found.folder / "events.json").write_text("{}")
  watching = threading.Thread(
    target=lambda: found.__dict__.update(result=found.watch("--delete"))
  )
  watching.start()
  for _ in range(200):
    if len(list((found.folder / "workers").glob("*/run.child"))) == 2:
      break
    time.sleep(0.1)
  environment = os.environ | {
    "PATH": f"{found.folder / 'bin'}:{os.environ['PATH']}"
  }
  subprocess.run(
    [sys.executable, _PATH, "stop", "--name=dpo", "--zone=z"],
    env=environment,
    check=True,
    capture_output=True,
  )
  watching.join()
  assert found.result[0] == 75, found.result[1]
  assert found.is_there and len(found.runs()) == 1, found.result[1]


def test_a_workdir_on_one_workers_disk_is_refused(launch, capsys):
  with pytest.raises(SystemExit, match="must be among the flags"):
    printed(launch, capsys, "train", "--", "--workdir=runs/here")


def test_unknown_topologies_and_gke_only_ones_are_refused(launch, capsys):
  with pytest.raises(SystemExit, match="is unknown"):
    printed(launch, capsys, "create", "--topology=v9-1")
  with pytest.raises(SystemExit, match="Kubernetes"):
    printed(launch, capsys, "create", "--topology=tpu7x-8")


def test_the_launcher_does_not_wait_for_jax():
  code = (
    "import runpy, sys; sys.argv = ['x', '--help']\n"
    f"try: runpy.run_path({str(_PATH)!r}, run_name='__main__')\n"
    "except SystemExit: pass\nassert 'jax' not in sys.modules"
  )
  subprocess.run(
    [sys.executable, "-c", code], check=True, stdout=subprocess.DEVNULL
  )
