"""Two processes do what one does, and notice where they differ."""

import json
import shutil
import signal
import socket
import subprocess
import sys
import time

import jax
import numpy as np
import pytest

from dpo_jax import EXIT_PREEMPTED
from dpo_jax.parallel import hosts
from dpo_jax.records.metrics import read_metrics
from dpo_jax.training import nonfinite
from tests import faults

_CONFIG = """
from tests import tiny

def get_config():
  return tiny.make_config(
    data__source="synthetic:review_pairs:40",
    data__eval_fraction=0.1,
    optimizer__epsilon=1e-3,
    mesh={"data": 2, "fsdp": 2},
    checkpoint__every_steps=2,
  )
"""
_TIMEOUT_S = 400


def free_port():
  with socket.socket() as sock:
    sock.bind(("127.0.0.1", 0))
    return sock.getsockname()[1]


def start(folder, workdir, num_processes, *flags, own_flags=None, cwds=None):
  """Starts the processes of one run, of four devices together."""
  config = folder / "config.py"
  config.write_text(_CONFIG)
  port = free_port()
  processes = []
  for index in range(num_processes):
    command = [sys.executable, "-m", "dpo_jax.train", f"--config={config}"]
    command += [
      f"--workdir={workdir}",
      *flags,
      *(own_flags or {}).get(index, []),
    ]
    if num_processes > 1:
      command += [
        f"--coordinator_address=127.0.0.1:{port}",
        f"--num_processes={num_processes}",
        f"--process_id={index}",
      ]
    environment = faults.environment(4 // num_processes) | {
      "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
      "XDG_CACHE_HOME": str(folder / "cache"),
    }
    processes.append(
      subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=environment,
        cwd=cwds[index] if cwds else faults.ROOT,
      )
    )
  return processes


def finish(processes):
  """Exit codes and outputs; whoever hangs is killed by its own id."""
  outputs = []
  try:
    for process in processes:
      outputs.append(process.communicate(timeout=_TIMEOUT_S)[0])
  finally:
    for process in processes:
      if process.poll() is None:
        process.kill()
        process.wait()
  return [p.returncode for p in processes], outputs


def run(folder, workdir, num_processes, *flags):
  codes, outputs = finish(start(folder, workdir, num_processes, *flags))
  assert codes == [0] * num_processes, "\n".join(outputs)[-4000:]


def assert_same_curves(one, other, *, since=0):
  for split in ("train", "eval"):
    rows = [
      [row for row in read_metrics(workdir, split) if row["step"] > since]
      for workdir in (one, other)
    ]
    assert rows[0] and len(rows[0]) == len(rows[1])
    for a, b in zip(*rows, strict=True):
      assert a.keys() == b.keys()
      for name in a:
        # Accuracy is the sign of margins that are still rounding.
        clock = "second" in name or "wait" in name
        if name in ("split", "log_ratio/largest") or clock:
          continue
        if "accuracy" in name:
          continue
        np.testing.assert_allclose(
          a[name], b[name], rtol=1e-5, atol=1e-5, err_msg=name
        )


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
  """The same run by one process and by two."""
  folder = tmp_path_factory.mktemp("hosts")
  for num_processes in (1, 2):
    run(folder, folder / f"by_{num_processes}", num_processes)
  return folder


@pytest.mark.slow
def test_two_processes_do_what_one_does(runs):
  assert_same_curves(runs / "by_1", runs / "by_2")


@pytest.mark.slow
def test_each_layout_goes_on_from_the_others_checkpoint(runs):
  for before, num_processes in ((1, 2), (2, 1)):
    workdir = runs / f"from_{before}"
    shutil.copytree(runs / f"by_{before}", workdir)
    run(runs, workdir, num_processes, "--config.total_steps=6")
  assert_same_curves(runs / "from_1", runs / "from_2", since=4)


@pytest.mark.fault(45)
@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_to_one_of_two_stops_and_saves_both(tmp_path, number):
  workdir = tmp_path / "run"
  processes = start(tmp_path, workdir, 2, "--config.total_steps=1000")
  metrics = workdir / "metrics.jsonl"
  deadline = time.monotonic() + _TIMEOUT_S
  while time.monotonic() < deadline and not (
    metrics.exists() and '"train"' in metrics.read_text()
  ):
    if any(p.poll() is not None for p in processes):
      break
    time.sleep(0.2)
  processes[1].send_signal(number)
  codes, outputs = finish(processes)
  assert codes == [EXIT_PREEMPTED] * 2, "\n".join(outputs)[-4000:]
  steps = [int(p.name) for p in (workdir / "checkpoints").glob("[0-9]*")]
  last = max(steps)
  assert (workdir / "checkpoints" / str(last) / "manifest.json").exists()
  assert f"step {last} is saved" in outputs[0]


@pytest.mark.fault(54)
@pytest.mark.slow
def test_hosts_with_another_config_or_other_data_do_not_start(tmp_path):
  codes, outputs = finish(
    start(tmp_path, tmp_path / "a", 2, own_flags={1: ["--config.seed=1"]})
  )
  assert 0 not in codes
  for output in outputs:
    assert "seed: 0 on host 0, 1 on host 1" in output, output[-3000:]
  assert not (tmp_path / "a").exists()
  cwds = []
  for index in range(2):
    cwds.append(tmp_path / f"host{index}")
    cwds[-1].mkdir()
    lines = [
      {"prompt": f"p{i}", "chosen": f"yes{index}", "rejected": "no"}
      for i in range(16)
    ]
    (cwds[-1] / "pairs.jsonl").write_text("\n".join(map(json.dumps, lines)))
  flag = "--config.data.source=jsonl:pairs.jsonl"
  codes, outputs = finish(start(tmp_path, tmp_path / "b", 2, flag, cwds=cwds))
  assert 0 not in codes
  for output in outputs:
    assert "the hosts do not have the same data" in output, output[-3000:]


@pytest.mark.slow
@pytest.mark.parametrize("parallelism", ["jit", "pmap"])
def test_all_hosts_name_the_groups_of_a_step_that_is_not_finite(
  tmp_path, parallelism
):
  flags = ["--config.numerics.max_log_ratio=1e-9"]
  if parallelism == "pmap":
    flags += ["--config.parallelism=pmap", "--config.mesh.data=4"]
    flags += ["--config.mesh.fsdp=1"]
  codes, outputs = finish(start(tmp_path, tmp_path / "run", 2, *flags))
  assert 0 not in codes
  (path,) = (tmp_path / "run" / "nonfinite").glob("*.npz")
  ids = nonfinite.read_batch(path).example_ids
  assert (ids >= 0).sum() == 8  # of both hosts
  groups = json.loads(path.with_suffix(".json").read_text())["groups"]
  assert {group["id"] for group in groups} == set(ids[ids >= 0].tolist())
  guilty = [group for group in groups if group["is_guilty"]]
  for output in outputs:
    assert f"above numerics.max_log_ratio, {len(guilty)} of 8:" in output
    assert f"{guilty[0]['id']} ({guilty[0]['address']})" in output


def test_what_differs_is_named(monkeypatch):
  rows = ['{"seed": 0, "loss.beta": 0.1}', '{"seed": 0, "loss.beta": 0.2}']
  monkeypatch.setattr(hosts, "gather_texts", lambda text: rows)
  with pytest.raises(hosts.HostsDifferError) as error:
    hosts.check_same({"seed": 0}, "config")
  assert "loss.beta: 0.1 on host 0, 0.2 on host 1" in str(error.value)
  assert "seed" not in str(error.value)


def test_what_fails_on_one_host_fails_on_all(monkeypatch):
  monkeypatch.setattr(jax, "process_count", lambda: 2)
  monkeypatch.setattr(hosts, "gather_texts", lambda text: ["", "no such file"])
  with pytest.raises(hosts.OtherHostError, match="host 1: no such"):
    hosts.together(lambda: 3)
  monkeypatch.setattr(hosts, "gather_texts", lambda text: [text, ""])
  with pytest.raises(KeyError, match="mine"):
    hosts.together(lambda: {}["mine"])


@pytest.mark.parametrize(
  ("environment", "is_pod"),
  [
    ({}, False),
    ({"TPU_WORKER_HOSTNAMES": "localhost"}, False),
    ({"TPU_WORKER_HOSTNAMES": "10.0.0.1,10.0.0.2"}, True),
    ({"MEGASCALE_COORDINATOR_ADDRESS": "10.0.0.1:1"}, True),
    (
      {"MEGASCALE_COORDINATOR_ADDRESS": "10.0.0.1:1", "JAX_PLATFORMS": "cpu"},
      False,
    ),
  ],
)
def test_a_pod_is_known_without_asking_the_network(
  monkeypatch, environment, is_pod
):
  monkeypatch.setattr(hosts.glob, "glob", lambda pattern: [])
  for name in (
    "TPU_WORKER_HOSTNAMES",
    "MEGASCALE_COORDINATOR_ADDRESS",
    "JAX_PLATFORMS",
  ):
    monkeypatch.delenv(name, raising=False)
  for name, value in environment.items():
    monkeypatch.setenv(name, value)
  assert hosts.is_tpu_pod() == is_pod


@pytest.mark.parametrize(
  ("flags", "message"),
  [
    (("localhost:1", None, None), "belong together"),
    (("localhost:1", 2, 2), "must be at least 0 and below"),
  ],
)
def test_flags_that_do_not_say_who_is_who_are_refused(flags, message):
  joined = hosts.joined(*flags, start_timeout_s=60.0, peer_timeout_s=12.0)
  with pytest.raises(ValueError, match=message), joined:
    pass
