"""A process that is killed, frozen or never comes ends the others, named."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time

import pytest

from dpo_jax import EXIT_PREEMPTED
from dpo_jax.parallel import hosts, watcher
from tests.parallel.test_hosts import finish, free_port, start

_HOST = socket.gethostname()
# A watched process without JAX: it sends its arguments to its watcher, and ends
# when that says so.
_WATCHED = """
import json, os, subprocess, sys
watcher, settings, *messages = sys.argv[1:]
settings = [os.getpid(), *json.loads(settings)]
child = subprocess.Popen(
  [sys.executable, "-I", watcher, json.dumps(settings)],
  stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
  start_new_session=True,
)
for line in child.stdout:
  print(line, end="", flush=True)
  for message in messages:
    print(message, file=child.stdin, flush=True)
  messages = []
  if "loss" in line:
    sys.exit(75)
"""


def watch(index, count, port, *messages, start_s=20.0, peer_s=10.0):
  settings = index, count, f"127.0.0.1:{port}", start_s, peer_s
  arguments = [watcher.__file__, *map(json.dumps, (settings, *messages))]
  return subprocess.Popen(
    [sys.executable, "-I", "-c", _WATCHED, *arguments],
    stdout=subprocess.PIPE,
    stderr=subprocess.STDOUT,
    text=True,
  )


def watch_all(count, *messages, **settings):
  """Starts processes with a message each, and waits until they have met."""
  port = free_port()
  processes = [
    watch(i, count, port, *messages[i : i + 1], **settings)
    for i in range(count)
  ]
  for process in processes:
    assert json.loads(process.stdout.readline()) == {"hosts": [_HOST] * count}
  return processes


@pytest.mark.parametrize("victim", [0, 1, 2])
@pytest.mark.fault(53)
def test_a_killed_process_ends_the_others_which_name_it(victim):
  processes = watch_all(3, {"saved": 40})
  time.sleep(0.1)  # for the message to arrive
  processes[victim].kill()
  codes, outputs = finish(processes)
  assert codes.count(75) == 2 and codes[victim] == -signal.SIGKILL
  for output in outputs:  # the watcher of the victim speaks too
    assert (
      f"error: host {victim} ({_HOST}) ended without a message: killed, or out"
      " of memory. Start again: the last checkpoint is step 40"
    ) in output


@pytest.mark.fault(53)
@pytest.mark.parametrize("victim", [0, 1])
def test_a_stopped_process_is_killed_and_ends_the_others(victim):
  processes = watch_all(2, peer_s=2.0)
  processes[victim].send_signal(signal.SIGSTOP)
  codes, outputs = finish(processes)
  assert codes[victim] == -signal.SIGKILL and codes[1 - victim] == 75
  for output in outputs:
    assert f"host {victim} ({_HOST}) has been stopped for 2 s" in output


@pytest.mark.parametrize("victim", [0, 1])
def test_a_silent_watcher_is_a_lost_host(victim):
  processes = watch_all(2, peer_s=2.0)
  pid = processes[victim].pid
  with open(f"/proc/{pid}/task/{pid}/children") as file:
    child = int(file.read())
  os.kill(child, signal.SIGSTOP)
  try:
    output = processes[1 - victim].communicate()[0]
    assert f"host {victim} ({_HOST}) has not answered for 2 s" in output
  finally:
    os.kill(child, signal.SIGKILL)
    processes[victim].kill()
    processes[victim].communicate()


def test_an_error_of_all_is_that_of_the_first_and_a_loss_comes_before_it():
  errors = [{"loss": watcher.Loss(i, "failed: no", True)} for i in range(2)]
  # Each prints its own error, so its watcher is silent.
  codes, outputs = finish(watch_all(2, *errors))
  assert codes == [75] * 2
  assert not any("error:" in output for output in outputs)
  processes = watch_all(2, errors[0])
  time.sleep(0.1)
  processes[1].kill()
  for output in finish(processes)[1]:
    assert f"error: host 1 ({_HOST}) ended without" in output


def test_an_error_of_one_ends_the_others_after_a_while():
  error = {"loss": watcher.Loss(0, "failed: disk full", True)}
  began = time.monotonic()
  processes = watch_all(2, error, peer_s=2.0)
  codes, outputs = finish(processes)
  assert codes == [75] * 2 and time.monotonic() - began > 2
  assert f"host 0 ({_HOST}) failed: disk full. See its log." in outputs[1]
  assert "error:" not in outputs[0]


def test_a_run_that_is_done_ends_all_watchers_silently():
  codes, outputs = finish(watch_all(3, {}, {"done": True}))
  assert codes == [0] * 3 and outputs == [""] * 3


@pytest.mark.fault(53)
def test_processes_that_never_come_are_named_by_those_that_wait():
  port = free_port()
  processes = [watch(i, 3, port, start_s=0.8) for i in (0, 1)]
  for output in finish(processes)[1]:
    error = json.loads(output)["error"]
    assert "host 2 (of 3) did not come within 0.8 s" in error
  [output] = finish([watch(1, 2, port, start_s=0.2)])[1]
  assert f"host 0 at 127.0.0.1:{port} (of 2) did not come" in output


def test_what_is_no_watcher_is_not_taken_for_one():
  port = free_port()
  first = watch(0, 2, port)
  while True:
    try:
      stranger = socket.create_connection(("127.0.0.1", port))
      break
    except OSError:
      time.sleep(0.02)
  stranger.sendall(b"PRI * HTTP/2.0\r\n\r\n")
  assert stranger.recv(1) == b""
  for process in (first, second := watch(1, 2, port)):
    assert "hosts" in process.stdout.readline()
  second.kill()
  finish([first, second])
  stranger.close()


def test_a_taken_port_is_an_error():
  with socket.create_server(("", 0)) as server:
    [output] = finish([watch(0, 2, server.getsockname()[1])])[1]
  assert "already in use" in json.loads(output)["error"]


def test_many_missing_processes_are_counted():
  settings = watcher.Settings(7, 1, 20, "pod:1", 60.0, 12.0)
  named = watcher.name_missing(range(12), settings)
  assert named.startswith("host 0, host 1") and "host 8" not in named
  assert named.endswith("and 4 others at pod:1 (of 20)")


@pytest.mark.parametrize(
  ("saved", "end"),
  [
    (None, "Start again"),
    (0, "Start again: the last checkpoint is none"),
    (7, "Start again: the last checkpoint is step 7"),
  ],
)
def test_the_message_names_the_last_checkpoint_that_is_known(saved, end):
  loss = watcher.Loss(1, "has not answered for 12 s")
  text = watcher.describe(loss, {0: "a", 1: "b"}, saved)
  assert text == f"host 1 (b) has not answered for 12 s. {end}"


def test_timeouts_out_of_range_are_refused_before_the_processes_meet():
  timeouts = {"start_timeout_s": 60.0, "peer_timeout_s": 0.5}
  joined = hosts.joined("localhost:1", 2, 0, **timeouts)
  with pytest.raises(ValueError, match=r"hosts\.peer_timeout_s=0\.5"), joined:
    pass


def run_until_step(folder, step, *flags):
  """Starts two processes of a run, and waits until a step was saved."""
  workdir = folder / "run"
  processes = start(folder, workdir, 2, "--config.total_steps=1000", *flags)
  manifest = workdir / "checkpoints" / str(step) / "manifest.json"
  deadline = time.monotonic() + 400
  while not manifest.exists():
    are_running = all(process.poll() is None for process in processes)
    if not are_running or time.monotonic() > deadline:
      for process in processes:
        process.kill()
      pytest.fail("\n".join(finish(processes)[1])[-4000:])
    time.sleep(0.1)
  return processes


@pytest.mark.slow
@pytest.mark.parametrize(
  ("victim", "number"),
  [(1, signal.SIGKILL), (0, signal.SIGKILL), (1, signal.SIGSTOP)],
)
@pytest.mark.fault(53)
def test_a_lost_process_of_a_run_ends_the_other(tmp_path, victim, number):
  processes = run_until_step(tmp_path, 2)
  began = time.monotonic()
  processes[victim].send_signal(number)
  codes, outputs = finish(processes)
  assert time.monotonic() - began < 30
  assert codes[victim] == -signal.SIGKILL
  # JAX may abort first when its coordinator, process 0, is lost.
  allowed = [EXIT_PREEMPTED] + [-signal.SIGABRT] * (victim == 0)
  assert codes[1 - victim] in allowed, outputs[1 - victim][-3000:]
  last = outputs[1 - victim].strip().splitlines()[-1]
  assert re.fullmatch(
    rf"error: host {victim} \({_HOST}\) .*\. Start again: the last checkpoint"
    r" is step \d+",
    last,
  ), outputs[1 - victim][-3000:]


@pytest.mark.slow
@pytest.mark.parametrize("missing", [0, 1])
def test_a_run_names_the_process_that_never_comes(tmp_path, missing):
  processes = start(
    tmp_path, tmp_path / "run", 2, "--config.hosts.start_timeout_s=5.0"
  )
  processes[missing].kill()
  codes, outputs = finish(processes)
  assert codes[1 - missing] == 1
  assert f"error: host {missing} " in outputs[1 - missing]
  assert "did not come within 5 s" in outputs[1 - missing]
  assert "Traceback" not in outputs[1 - missing]


def test_the_last_message_of_a_watcher_arrives():
  """A connection that is closed with unread data is reset."""
  with socket.create_server(("127.0.0.1", 0)) as listener:
    one = socket.create_connection(listener.getsockname())
    two = listener.accept()[0]
  settings = watcher.Settings(os.getpid(), 0, 2, "", 1.0, 1.0)
  leaving = watcher.Watcher(settings, watcher.Channel(-1, -1))
  channel = watcher.Channel(one.fileno(), one.detach())
  leaving._peers[1] = channel
  for _ in range(20):  # after that the system acknowledges late
    channel.send(saved=1)
    two.recv(99)
    two.sendall(b'{"saved": 1}\n')
    channel.receive()
  two.sendall(b'{"saved": 1}\n')  # never read
  channel.send(saved=2)
  channel.send(loss=1)  # waits in the system until the other is acknowledged
  thread = threading.Thread(target=lambda: (leaving.leave(), channel.close()))
  thread.start()
  received = b""
  while data := two.recv(99):
    received += data
  two.close()
  thread.join()
  assert b'"loss": 1' in received
