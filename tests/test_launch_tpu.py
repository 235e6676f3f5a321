"""The commands that the launcher would run, without gcloud."""

import importlib.util
import pathlib
import shlex
import subprocess
import sys

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
  lines = capsys.readouterr().out.splitlines()
  assert all(line.startswith("$ ") for line in lines)
  return [shlex.split(line[2:]) for line in lines]


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


def test_several_slices_are_one_request_and_start_together(launch, capsys):
  (command,) = printed(
    launch, capsys, "create", "--topology=2xv5e-16", "--spot"
  )
  assert {"--node-count=2", "--node-prefix=dpo", "--spot"} <= set(command)
  (command,) = printed(
    launch,
    capsys,
    "train",
    "--topology=2xv5e-16",
    "--",
    "--config=c.py",
    "--workdir=gs://b/run",
  )
  assert command[:2] == ["bash", "-c"] and command[2].endswith("& wait")
  assert "ssh dpo-0 " in command[2] and "ssh dpo-1 " in command[2]
  subprocess.run(["bash", "-n", "-c", command[2]], check=True)


def test_watch_goes_from_nothing_and_back(launch, capsys):
  commands = printed(
    launch, capsys, "watch", "--", "--config=c.py", "--workdir=gs://b/run"
  )
  stages = [" ".join(command[3:5]) for command in commands]
  assert stages == [
    "queued-resources create",
    "queued-resources describe",
    "archive --format=tar.gz",
    "tpu-vm scp",
    "tpu-vm ssh",
    "tpu-vm ssh",
    "queued-resources delete",
  ]


def test_the_run_is_started_again_after_a_preemption_only(
  launch, capsys, tmp_path
):
  """The command of `train`, with a `python` that exits 75 twice, then 3."""
  (command,) = printed(
    launch,
    capsys,
    "train",
    "--",
    "--config=c.py:a b",
    "--workdir=gs://b/run",
  )
  (remote,) = [w for w in command if w.startswith("--command=")]
  (tmp_path / "dpo_jax").mkdir()
  binaries = tmp_path / "venv" / "bin"
  binaries.mkdir(parents=True)
  (binaries / "activate").write_text(f"PATH={binaries}:$PATH\n")
  fake = binaries / "python"
  fake.write_text(
    '#!/bin/bash\necho "$3" >> ~/calls\n'
    "[ $(wc -l < ~/calls) -lt 3 ] && exit 75\nexit 3\n"
  )
  fake.chmod(0o755)
  done = subprocess.run(
    ["sh", "-c", remote.removeprefix("--command=")],
    env={"HOME": str(tmp_path), "PATH": "/usr/bin:/bin"},
    check=False,
  )
  assert done.returncode == 3
  calls = (tmp_path / "calls").read_text().splitlines()
  assert calls == ["--config=c.py:a b"] * 3


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
