"""The TPU launcher: its commands, and its watch on a stand-in for gcloud."""

import contextlib
import importlib.util
import io
import json
import os
import pathlib
import shlex
import shutil
import signal
import subprocess
import sys
import threading
import time

import pytest

_ROOT = pathlib.Path(__file__).parents[1]
_PATH = _ROOT / "scripts" / "launch_tpu.py"


@pytest.fixture(scope="module")
def launch():
  spec = importlib.util.spec_from_file_location("launch_tpu", _PATH)
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  return module


def printed(launch, capsys, *argv):
  """Returns the commands of a dry run, each as a list of words."""
  common = ["--name=dpo", "--zone=us-west4-a", "--dry_run"]
  split = argv.index("--") if "--" in argv else len(argv)
  code = launch.main([*argv[:split], *common, *argv[split:]])
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
def test_create_requests_the_slice(
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


def test_two_slices_are_one_request_and_both_are_started(launch, capsys):
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


def test_a_planned_watch_creates_starts_and_deletes(launch, capsys):
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


def test_workers_get_python_3_12(launch, capsys):
  commands = printed(launch, capsys, "install")
  assert "--python 3.12" in commands[-1][-2]


# The run of the stand-in's workers, in place of "python" of their venv.
_FINISHES = """\
mkdir -p $BUCKET/b/run
[ $WORKER = 0 ] && printf '{"total_steps": 4, "finished_at": "%s"}' \\
  $(date -u +%Y-%m-%dT%H:%M:%S.%6NZ) >$BUCKET/b/run/finished.json
exit 0
"""
_WAITS_THEN_FINISHES = "sleep 1\n" + _FINISHES
_TRAIN = ("--", "--config=c.py:a b", "--workdir=gs://b/run")


def _make_checkout(folder):
  """Makes a git repository with the launcher in its last commit."""
  for room in ("planning", "system"):
    (folder / "dpo_jax" / room).mkdir(parents=True)
  shutil.copytree(
    _ROOT / "scripts",
    folder / "scripts",
    ignore=shutil.ignore_patterns("__pycache__"),
  )
  for name in (
    ".gitignore",
    "dpo_jax/__init__.py",
    "dpo_jax/planning/topology.py",
    "dpo_jax/system/chips.py",
  ):
    shutil.copy(_ROOT / name, folder / name)
  for command in (
    "init --quiet",
    "add .",
    "-c user.name=t -c user.email=t@t commit --quiet -m first",
  ):
    subprocess.run(["git", "-C", folder, *command.split()], check=True)


class Cloud:
  """The stand-in for gcloud in a folder, a checkout, and its launcher."""

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
    self.checkout = folder / "checkout"
    _make_checkout(self.checkout)

  def stage(self, name, *options, events=None):
    """Runs a stage of the launcher, and returns the finished process."""
    (self.folder / "events.json").write_text(json.dumps(events or {}))
    environment = os.environ | {
      "PATH": f"{self.folder / 'bin'}:{os.environ['PATH']}"
    }
    return subprocess.run(
      [
        sys.executable,
        self.checkout / "scripts" / "launch_tpu.py",
        name,
        "--name=dpo",
        "--zone=z",
        *options,
      ],
      cwd=self.checkout,
      env=environment,
      capture_output=True,
      text=True,
      timeout=120,
      check=False,
    )

  def watch(self, *options, **events):
    """Watches; returns the exit code and the output."""
    waits = ("--poll_s=0.2", "--timeout_s=8")
    done = self.stage("watch", *waits, *options, *_TRAIN, events=events)
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
  # Kill supervisors and runs that a test left on the workers.
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
  """Lost connections on the way do not change this."""
  found = cloud(_WAITS_THEN_FINISHES)
  code, text = found.watch(**events)
  assert code == 0, text
  assert not found.is_there
  assert found.count("create") == 1
  run = "-m dpo_jax.train --config=c.py:a b --workdir=gs://b/run"
  assert found.runs() == [run], text


@pytest.mark.slow
def test_a_late_answer_leaves_the_state_unknown(cloud):
  found = cloud(_FINISHES)
  code, text = found.watch("--timeout_s=3", describe=["ok", "slow"])
  assert code == 0 and "UNKNOWN, no answer after 3 s" in text
  assert not found.is_there


@pytest.mark.slow
@pytest.mark.parametrize("exit_code", [2, 137])
def test_a_run_that_ends_with_an_error_keeps_the_machines(cloud, exit_code):
  found = cloud(f"echo 'no such flag'; exit {exit_code}\n")
  code, text = found.watch()
  assert code == exit_code and found.is_there
  assert "no such flag" in text and "The machines are kept" in text
  # Another watch keeps them too, unless --delete is given.
  assert found.watch()[0] == exit_code and found.is_there
  assert found.watch("--delete")[0] == exit_code and not found.is_there


@pytest.mark.slow
def test_an_end_without_finished_json_keeps_the_machines(cloud):
  found = cloud("exit 0\n")
  code, text = found.watch()
  assert code == 1 and found.is_there
  assert "finished.json does not exist" in text


@pytest.mark.slow
@pytest.mark.parametrize("options", [(), ("--delete",)], ids=str)
def test_machines_that_cannot_be_installed_are_kept(cloud, options):
  found = cloud(_FINISHES)
  code, text = found.watch(*options, scp=["drop"] * 9)
  assert code == 255 and found.is_there
  assert "3 times in a row" in text


@pytest.mark.slow
def test_a_preempted_spot_machine_is_created_again(cloud):
  """Its data are copied to it again too."""
  found = cloud(
    "[ $(grep -c create $BUCKET/../calls) = 2 ] || sleep 5\n"
    "[ -e local/pairs.jsonl ] || exit 9\n" + _FINISHES
  )
  write(found.checkout / "local" / "pairs.jsonl", "{}")
  code, text = found.watch(
    "--spot",
    "--file=local/pairs.jsonl",
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
def test_a_failed_request_stops_the_watch(cloud, events, options, message):
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
def test_finished_json_older_than_the_machines_deletes_nothing(cloud):
  """An earlier run was finished; this one has more steps to take."""
  found = cloud("sleep 1\nexit 3\n")
  mark = found.folder / "buckets" / "b" / "run" / "finished.json"
  mark.parent.mkdir(parents=True)
  mark.write_text('{"total_steps": 2, "finished_at": "2020-01-01T00:00:00Z"}')
  found.watch()  # creates nothing
  found.stage("create")
  code, text = found.watch()
  assert code == 3 and found.is_there
  assert "older than these machines" in text


@pytest.mark.slow
def test_a_run_whose_supervisor_was_killed_is_restarted(cloud):
  """The run outlives the connection; the watch finds that it is lost."""
  found = cloud("[ $(wc -l <$HOME/calls) = 1 ] && sleep 60\n" + _FINISHES)
  stage = found.stage
  assert stage("create").returncode == 0
  assert stage("train", *_TRAIN).returncode == 0
  assert stage("status").stdout.count(" running") == 2
  again = stage("train", *_TRAIN)
  assert again.returncode and "a run is on this worker already" in again.stderr
  worker = found.folder / "workers" / "1"
  os.kill(int((worker / "run.pid").read_text()), signal.SIGKILL)
  assert " lost" in stage("status").stdout
  code, text = found.watch()
  assert code == 0 and "the run is lost on a worker" in text
  assert len(found.runs()) == 2 and not found.is_there


@pytest.mark.slow
def test_the_supervisor_restarts_a_run_only_after_preemption(cloud):
  found = cloud("[ $(wc -l <$HOME/calls) -lt 3 ] && exit 75\nexit 3\n")
  code, _ = found.watch()
  assert code == 3 and found.is_there
  assert len(found.runs()) == 3


@pytest.mark.slow
def test_a_stopped_run_stays_stopped(cloud):
  """`stop` sends SIGTERM; the run exits with 75, and nothing is deleted."""
  found = cloud("trap 'exit 75' TERM\nsleep 60 & wait $!\n")
  watching = threading.Thread(
    target=lambda: found.__dict__.update(result=found.watch("--delete"))
  )
  watching.start()
  for _ in range(200):
    if len(list((found.folder / "workers").glob("*/run.child"))) == 2:
      break
    time.sleep(0.1)
  assert found.stage("stop").returncode == 0
  watching.join()
  assert found.result[0] == 75, found.result[1]
  assert found.is_there and len(found.runs()) == 1, found.result[1]


def write(path, text):
  path.parent.mkdir(parents=True, exist_ok=True)
  path.write_text(text)


def files_below(folder):
  paths = [path for path in folder.rglob("*") if path.is_file()]
  return {str(p.relative_to(folder)): p.read_text() for p in paths}


def test_ship_gives_every_worker_the_same_files(cloud):
  found = cloud(_FINISHES)
  found.stage("create")
  model = found.checkout / "local" / "a model"
  write(model / "config.json", "1")
  write(model / "old.safetensors", "2")
  write(found.folder / "buckets" / "b" / "data" / "pairs.jsonl", "3")
  files = ("--file=local/a model/", "--file=gs://b/data/pairs.jsonl")
  assert found.stage("ship", *files).returncode == 0
  (model / "old.safetensors").unlink()
  write(model / "part" / "new.safetensors", "4")
  assert found.stage("ship", *files).returncode == 0
  for worker in ("0", "1"):
    assert files_below(found.folder / "workers" / worker / "dpo_jax") == {
      "local/a model/config.json": "1",
      "local/a model/part/new.safetensors": "4",
      "local/pairs.jsonl": "3",
    }


def test_ship_fails_when_a_copy_fails(cloud):
  found = cloud(_FINISHES)
  found.stage("create")
  write(found.checkout / "local" / "pairs.jsonl", "{}")
  done = found.stage(
    "ship", "--file=local/pairs.jsonl", events={"scp": ["drop"]}
  )
  assert done.returncode == 255


@pytest.mark.parametrize(
  ("files", "message"),
  [
    ([], "name what to copy"),
    (["/etc/hosts"], "must be below"),
    (["."], "must be below"),
    (["local/nothing"], "does not exist"),
    (["gs://bucket/"], "must name a path in the bucket"),
    (["gs://a/model", "gs://b/model/"], "two of --file would be local/model"),
  ],
)
def test_ship_refuses_files_that_workers_could_not_find(
  launch, capsys, monkeypatch, files, message
):
  monkeypatch.chdir(_ROOT)
  with pytest.raises(SystemExit, match=message):
    printed(launch, capsys, "ship", *(f"--file={file}" for file in files))


def test_install_refuses_uncommitted_files(cloud):
  found = cloud(_FINISHES)
  found.stage("create")
  assert found.stage("install").returncode == 0
  write(found.checkout / ".gitignore", "/local/\n")
  write(found.checkout / "configs" / "mine.py", "")
  write(found.checkout / "local" / "pairs.jsonl", "")  # ignored by git
  copies = found.count("scp")
  listed = "   M .gitignore\n  ?? configs/\n"
  for stage in ("install", "watch"):
    done = found.stage(stage, *(_TRAIN if stage == "watch" else ()))
    assert done.returncode == 1 and listed in done.stderr
    assert found.count("scp") == copies
  done = found.stage("install", "--allow_dirty")
  assert done.returncode == 0 and listed in done.stderr
  assert found.count("scp") == copies + 1


def test_status_prints_the_step_and_the_state_of_each_host(cloud):
  found = cloud(
    "printf 'dpo:   1%%\\rdpo:  50%%'\n"
    "[ $WORKER = 0 ] && sleep 60\n"
    "printf '\\nerror: no such file\\n(--debug shows where)\\n'; exit 3\n"
  )
  found.stage("create")
  assert found.stage("status").stdout.count(" none") == 2
  found.stage("train", *_TRAIN)
  exit_code = found.folder / "workers" / "1" / "run.exit"
  wait_for(exit_code.exists)
  lines = found.stage("status").stdout.splitlines()
  assert lines[:2] == [
    "dpo: ACTIVE",
    "no step yet: gs://b/run/metrics.jsonl does not exist",
  ]
  hosts = [line.split(maxsplit=1)[1] for line in lines[2:]]
  assert hosts == ["running    dpo:  50%", "ended 3    error: no such file"]
  rows = [
    {"step": step, "split": "train", "loss": 0.693, "pad": "x" * 5000}
    for step in (1, 2)
  ]
  metrics = "".join(json.dumps(row) + "\n" for row in rows)
  write(found.folder / "buckets" / "b" / "run" / "metrics.jsonl", metrics)
  assert "train step 2, loss 0.693" in found.stage("status").stdout


def wait_for(is_true):
  for _ in range(200):
    if is_true():
      return
    time.sleep(0.1)
  raise AssertionError("the condition did not become true in 20 s")


def test_logs_show_only_the_last_state_of_a_bar(cloud):
  found = cloud(_FINISHES)
  found.stage("create")
  bar = "".join(f"\rdpo: {i}%" for i in range(300)) + "\n"
  text = "reading\n" * 200 + bar + "\nlast\r\n\rsft: 1%\rsft: 2%"
  with (found.folder / "workers" / "0" / "run.log").open("w", newline="") as f:
    f.write(text)
  shown = found.stage("logs").stdout.splitlines()[1:]
  assert shown[-4:] == ["reading", "dpo: 299%", "last", "sft: 2%"]
  assert len(shown) == 100


def test_a_followed_bar_prints_one_line_each_period(launch, monkeypatch):
  clock = iter(range(100))
  monkeypatch.setattr(time, "monotonic", lambda: next(clock))
  pieces = io.StringIO("a\n\r1%\r2%\r3%\r4%\r5%\nb", newline="")
  lines = list(launch.tpu_state.readable_lines(pieces, 4.0))
  assert lines == ["a", "3%", "5%", "b"]


@pytest.mark.parametrize(
  "argv",
  [
    ("train", "--file=local/model", *_TRAIN),
    ("create", "--follow"),
    ("status", "--delete"),
    ("install", "--spot"),
    ("ship", "--allow_dirty"),
    ("logs", "--", "--config=c.py"),
  ],
  ids=" ".join,
)
def test_a_stage_refuses_options_that_it_does_not_read(launch, capsys, argv):
  with pytest.raises(SystemExit):
    printed(launch, capsys, *argv)
  assert f"not by {argv[0]}" in capsys.readouterr().err


def test_a_local_workdir_is_refused(launch, capsys):
  with pytest.raises(SystemExit, match="must be among the flags"):
    printed(launch, capsys, "train", "--", "--workdir=runs/here")


def test_topologies_that_cannot_be_rented_are_refused(launch, capsys):
  with pytest.raises(SystemExit, match="is unknown"):
    printed(launch, capsys, "create", "--topology=v9-1")
  with pytest.raises(SystemExit, match="Kubernetes"):
    printed(launch, capsys, "create", "--topology=tpu7x-8")


def test_the_launcher_does_not_import_jax():
  code = (
    "import runpy, sys; sys.argv = ['x', '--help']\n"
    f"try: runpy.run_path({str(_PATH)!r}, run_name='__main__')\n"
    "except SystemExit: pass\nassert 'jax' not in sys.modules"
  )
  subprocess.run(
    [sys.executable, "-c", code], check=True, stdout=subprocess.DEVNULL
  )
