"""One run, one workdir: who trains, who is refused, and who takes over."""

import contextlib
import dataclasses
import functools
import json
import logging
import subprocess
import sys
import threading
import time
import types
from unittest import mock

import numpy as np
import pytest

from dpo_jax import train as train_lib
from dpo_jax.parallel import hosts
from dpo_jax.records import lock as lock_lib
from dpo_jax.records.lock import Holder, LockLost, RunLock, WorkdirInUse
from dpo_jax.records.metrics import MetricsWriter, read_metrics
from dpo_jax.records.workdir import Workdir
from dpo_jax.system import files
from dpo_jax.train import train
from tests import bucket, faults, tiny

_TIMEOUT_S = 0.3


@pytest.fixture(params=["local", "gs"])
def workdir(request, tmp_path, monkeypatch):
  """A workdir of this machine, and one of the stand-in for gs://."""
  if request.param == "local":
    return Workdir.at(tmp_path / "run")
  (tmp_path / "b").mkdir()
  bucket.stand_in(tmp_path, monkeypatch)
  return Workdir.at("gs://b/run")


def make_lock(workdir, timeout_s=_TIMEOUT_S):
  return RunLock(workdir, timeout_s=timeout_s)


def leave(workdir, **fields):
  """Writes the lock of a process that this one knows nothing about."""
  holder = Holder.this_process(_TIMEOUT_S)
  holder = dataclasses.replace(
    holder, **{"host": "elsewhere", "machine": "another", **fields}
  )
  files.write_atomically(workdir.lock, holder.content)
  return holder


@functools.cache
def dead_process():
  child = subprocess.Popen(["sleep", "60"])  # not over before it is looked at
  start = lock_lib._process_start(child.pid)
  assert start
  child.kill()
  child.wait()
  return {"pid": child.pid, "process_start": start}


def leave_dead(workdir):
  """Writes the lock of a process of this machine that has ended."""
  return leave(workdir, machine=lock_lib._machine(), **dead_process())


def names(workdir):
  return sorted(path.name for path in workdir.path.iterdir())


def holder_of(workdir):
  return make_lock(workdir)._chain()[-1][1]


def test_a_lock_names_its_process_and_is_gone_at_the_end(workdir):
  with make_lock(workdir) as lock:
    lock.check()
    assert names(workdir) == ["lock.json"]
    found = json.loads(workdir.lock.read_text())
    assert found["pid"] == Holder.this_process(1.0).pid and found["host"]
  assert names(workdir) == []
  with pytest.raises(KeyError), make_lock(workdir):
    raise KeyError
  assert names(workdir) == []


@pytest.mark.fault(49)
def test_a_live_process_of_this_machine_is_named_at_once(workdir):
  with make_lock(workdir, timeout_s=30.0) as lock:
    started = time.monotonic()
    with (
      pytest.raises(WorkdirInUse, match=r"by process \d+ on .*, since 20"),
      make_lock(workdir, timeout_s=30.0),
    ):
      pass
    assert time.monotonic() - started < 15.0
    lock.check()
  assert names(workdir) == []


def test_a_dead_process_of_this_machine_is_followed_at_once(workdir, caplog):
  dead = leave_dead(workdir)
  started = time.monotonic()
  with make_lock(workdir, timeout_s=30.0) as lock:
    assert time.monotonic() - started < 15.0
    assert names(workdir) == ["lock.json"]  # the old file was replaced
    lock.check()
  assert f"process {dead.pid} on elsewhere" in caplog.text
  assert "which has ended: taken over" in caplog.text
  assert names(workdir) == []


def test_a_pid_that_another_process_got_is_not_the_holder(workdir):
  leave(workdir, machine=lock_lib._machine(), process_start="1")
  with make_lock(workdir, timeout_s=30.0) as lock:
    lock.check()


def test_an_ended_process_whose_parent_sleeps_is_gone():
  child = subprocess.Popen([sys.executable, "-c", ""])
  end = time.monotonic() + 10.0
  while lock_lib._process_start(child.pid) and time.monotonic() < end:
    time.sleep(0.01)
  assert lock_lib._process_start(child.pid) == ""
  child.wait()


@pytest.mark.parametrize("fault", [{"machine": ""}, {"machine": "other boot"}])
def test_pids_of_another_boot_are_not_looked_up(tmp_path, fault, monkeypatch):
  """Without /proc no pid is; the same number means another process there."""
  if not fault["machine"]:
    monkeypatch.setattr(lock_lib, "_machine", lambda: "")
  workdir = Workdir.at(tmp_path)
  leave(workdir, process_start="1", **fault)
  started = time.monotonic()
  with make_lock(workdir):
    assert time.monotonic() - started >= _TIMEOUT_S


def test_a_silent_process_elsewhere_is_waited_for(workdir, caplog):
  caplog.set_level(logging.INFO)
  leave(workdir, since="2030-01-01")  # the clock there is fast: not compared
  started = time.monotonic()
  with make_lock(workdir) as lock:
    assert time.monotonic() - started >= _TIMEOUT_S
    lock.check()
  assert "on elsewhere, since 2030-01-01: waiting 0.3 s" in caplog.text
  assert "no sign of life for 0.3 s: taken over" in caplog.text
  assert names(workdir) == []  # the lock of the silent one too


def test_the_timeout_is_that_of_the_holder_where_it_is_longer(tmp_path):
  leave(Workdir.at(tmp_path), timeout_s=0.6)
  started = time.monotonic()
  with make_lock(Workdir.at(tmp_path)):
    assert time.monotonic() - started >= 0.6


def test_a_process_elsewhere_that_beats_is_named(workdir, monkeypatch):
  monkeypatch.setattr(lock_lib, "_machine", lambda: "another")
  with make_lock(workdir) as lock:
    monkeypatch.setattr(lock_lib, "_machine", lambda: "here")
    with pytest.raises(WorkdirInUse, match="is being trained by process"):
      make_lock(workdir).__enter__()
    lock.check()
    assert holder_of(workdir).beat > 0


def test_a_lock_that_is_released_while_others_wait_is_free(workdir, caplog):
  leave(workdir, timeout_s=30.0)
  releaser = threading.Timer(0.1, workdir.lock.unlink)
  releaser.start()
  started = time.monotonic()
  with make_lock(workdir) as lock:
    assert time.monotonic() - started < 15.0
    lock.check()
    assert names(workdir) == ["lock.json"]
  assert "taken over" not in caplog.text
  releaser.join()


@pytest.mark.parametrize(
  "content",
  [b"", b"{", b"\xff\x00", b"[]", b"7", b'{"id": "../x"}', b'{"id": 7}'],
)
def test_a_damaged_lock_is_one_of_an_unknown_process(tmp_path, content, caplog):
  workdir = Workdir.at(tmp_path)
  workdir.lock.write_bytes(content)
  started = time.monotonic()
  with make_lock(workdir) as lock:
    assert time.monotonic() - started >= _TIMEOUT_S
    lock.check()
  assert "held by an unknown process (its lock file is damaged)" in caplog.text
  assert names(workdir) == []


@pytest.mark.fault(43, 49)
def test_empty_locks_that_a_full_disk_left_are_followed(tmp_path):
  """Each start on a full disk once left one."""
  workdir = Workdir.at(tmp_path)
  for _ in range(3):
    chain = make_lock(workdir)._chain()
    path = tmp_path / "lock.json"
    if chain:
      path = make_lock(workdir)._path_after(chain[-1][1])
    path.touch()
  with make_lock(workdir) as lock:
    lock.check()
  assert not list(tmp_path.glob("lock*"))


def test_a_lock_that_cannot_be_written_is_not_left_behind(tmp_path):
  with faults.limited_files(0), pytest.raises(OSError, match=r"lock\.json"):
    make_lock(Workdir.at(tmp_path)).__enter__()
  assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("how", ["copy", "dangling link"])
def test_lock_files_that_tell_nothing_are_refused_with_a_remedy(tmp_path, how):
  workdir = Workdir.at(tmp_path)
  if how == "copy":
    holder = leave(workdir)
    name = f"lock.{holder.id}.json"
    (tmp_path / name).write_bytes(workdir.lock.read_bytes())
  else:
    (tmp_path / "lock.json").symlink_to(tmp_path / "nowhere")
  with pytest.raises(WorkdirInUse, match=r"if none does, delete its"):
    make_lock(workdir).__enter__()
  for path in tmp_path.glob("lock*"):
    path.unlink()
  with make_lock(workdir) as lock:
    lock.check()


def test_a_damaged_lock_that_changes_belongs_to_a_live_process(tmp_path):
  workdir = Workdir.at(tmp_path)
  workdir.lock.write_bytes(b"{")
  writer = threading.Timer(0.1, workdir.lock.write_bytes, [b"{}"])
  writer.start()
  with pytest.raises(WorkdirInUse, match="an unknown process"):
    make_lock(workdir).__enter__()
  writer.join()


def test_a_process_that_wakes_up_notices_and_leaves_the_lock(workdir, caplog):
  """Nothing of it disturbs the one that took over, not even its end."""
  frozen = make_lock(workdir)
  with frozen:
    frozen._is_closing.set()  # no beats any more
    frozen._thread.join()
    old = dataclasses.replace(frozen._me, machine="another")
    files.write_atomically(workdir.lock, old.content)
    with make_lock(workdir) as lock:
      with pytest.raises(LockLost, match=r"is held by process \d+ on"):
        frozen.check()
      frozen.lost = None
      frozen._is_closing.clear()
      thread = threading.Thread(target=frozen._keep_beating, daemon=True)
      thread.start()
      thread.join(10.0)
      assert not thread.is_alive()
      assert frozen.lost and "saves nothing more" in caplog.text
      # It may have been frozen between its look and its write.
      files.write_atomically(frozen._path, frozen._me.content)
      lock.check()
      frozen._is_closing.set()
      frozen.__exit__()
      lock.check()
  assert names(workdir) == []


def test_a_lock_that_was_deleted_is_lost(tmp_path):
  workdir = Workdir.at(tmp_path)
  with make_lock(workdir) as lock:
    workdir.lock.unlink()
    with pytest.raises(LockLost, match=r"lock\.json is gone"):
      lock.check()
  assert names(workdir) == []


def test_a_beat_that_cannot_be_written_is_told_and_tried_again(
  tmp_path, monkeypatch, caplog
):
  write, failures = files.write_atomically, iter([OSError("no room")])

  def fail_once(path, content):
    for error in failures:
      raise error
    write(path, content)

  monkeypatch.setattr(files, "write_atomically", fail_once)
  workdir = Workdir.at(tmp_path)
  with make_lock(workdir):
    end = time.monotonic() + 5.0
    while holder_of(workdir).beat == 0 and time.monotonic() < end:
      time.sleep(0.01)
    assert holder_of(workdir).beat > 0
  assert "lock.json was not renewed: no room" in caplog.text


def race(workdir, num=4):
  """Starts `num` takers at once; returns how many won and were refused."""
  barrier, results = threading.Barrier(num), []
  done = threading.Barrier(num)

  def take():
    lock = make_lock(workdir, timeout_s=0.2)
    barrier.wait()
    try:
      lock.__enter__()
    except WorkdirInUse:
      results.append("refused")
      done.wait()
      return
    done.wait()  # until all others were refused
    lock.check()
    lock.__exit__()
    results.append("won")

  threads = [threading.Thread(target=take) for _ in range(num)]
  for thread in threads:
    thread.start()
  for thread in threads:
    thread.join(20.0)
  return sorted(results)


@pytest.fixture
def in_small_turns():
  """Lets threads change often, so that they interleave."""
  before = sys.getswitchinterval()
  sys.setswitchinterval(1e-5)
  yield
  sys.setswitchinterval(before)


@pytest.mark.usefixtures("in_small_turns")
@pytest.mark.parametrize(
  "before, num_races",
  [(None, 20), (leave_dead, 20), (leave, 3)],
  ids=["free", "dead", "silent"],
)
def test_one_of_four_that_start_at_once_wins(workdir, before, num_races):
  for _ in range(num_races):
    if before is not None:
      before(workdir)
    assert race(workdir) == ["refused"] * 3 + ["won"]
    assert names(workdir) == []


def test_of_two_that_creep_in_after_a_take_over_one_wins(tmp_path, monkeypatch):
  """The second saw the dead process before the first replaced its file."""
  workdir = Workdir.at(tmp_path)
  leave_dead(workdir)
  late, stack = make_lock(workdir), contextlib.ExitStack()
  wait_for_end = late._wait_for_end

  def overtaken(holder):
    reason = wait_for_end(holder)
    monkeypatch.setattr(late, "_wait_for_end", wait_for_end)
    stack.enter_context(make_lock(workdir))
    return reason

  monkeypatch.setattr(late, "_wait_for_end", overtaken)
  with stack:
    with pytest.raises(WorkdirInUse):
      late.__enter__()
    assert names(workdir) == ["lock.json"]  # no file of the late one
  assert names(workdir) == []


def test_without_gcsfs_the_lock_is_weaker_and_says_so(
  tmp_path, monkeypatch, caplog
):
  (tmp_path / "b").mkdir()
  bucket.stand_in(tmp_path, monkeypatch)
  monkeypatch.setattr(files, "_object_store", lambda path: None)
  workdir = Workdir.at("gs://b/run")
  with make_lock(workdir) as lock:
    lock.check()
    with pytest.raises(WorkdirInUse):
      make_lock(workdir).__enter__()
  assert "without gcsfs two processes may both create it" in caplog.text
  assert names(workdir) == []


def test_processes_after_the_first_hold_nothing(tmp_path, monkeypatch):
  """They learn from the first what became of the lock."""
  monkeypatch.setattr(lock_lib.jax, "process_index", lambda: 1)
  calls = []
  monkeypatch.setattr(hosts, "together", lambda f: calls.append(f()))
  workdir = Workdir.at(tmp_path / "run")
  with make_lock(workdir) as lock:
    lock.check()
  assert len(calls) == 2 and not workdir.path.exists()


@pytest.mark.usefixtures("in_haste")
def test_a_run_that_lost_its_lock_saves_nothing_more(tmp_path, monkeypatch):
  record = train_lib._Loop._record

  def overtaken(self, step, split, metrics):
    record(self, step, split, metrics)
    if (step, split) == (2, "train"):
      leave(Workdir.at(tmp_path))  # another process in the place of this one

  monkeypatch.setattr(train_lib._Loop, "_record", overtaken)
  closed = mock.patch.object(MetricsWriter, "close")
  config = tiny.make_config(
    loss__name="sft",
    reference__kind="none",
    data__source="synthetic:review_demonstrations:40",
    checkpoint__every_steps=1,
  )
  message = r"held by process \d+ on elsewhere"
  with closed as close, pytest.raises(LockLost, match=message):
    train(config, tmp_path)
  assert not close.called  # in a bucket it would write metrics.jsonl again
  steps = [row["step"] for row in read_metrics(tmp_path, "train")]
  assert steps == [1, 2]
  saved = [int(p.name) for p in (tmp_path / "checkpoints").iterdir()]
  assert max(saved) == 1
  assert "lock.json" in names(Workdir.at(tmp_path))  # the other's
  assert not (tmp_path / "finished.json").exists()


def test_a_run_that_noticed_the_loss_records_nothing_more():
  lost = LockLost("held by another")
  loop = types.SimpleNamespace(_lock=types.SimpleNamespace(lost=lost))
  with pytest.raises(LockLost, match="held by another"):
    train_lib._Loop._record(loop, 3, "train", {})


_TRAINER = """
import pathlib, sys, time
from dpo_jax import command_line, train as train_lib
from tests import tiny

record = train_lib._Loop._record

def patient(self, *arguments):
  while not pathlib.Path(sys.argv[2]).exists():
    time.sleep(0.05)
  record(self, *arguments)

train_lib._Loop._record = patient
command_line.show_logs()
try:
  train_lib.train(
    tiny.make_config(
      loss__name="sft",
      reference__kind="none",
      data__source="synthetic:review_demonstrations:40",
      total_steps=12,
      checkpoint__every_steps=1,
    ),
    sys.argv[1],
  )
except ValueError as error:
  sys.exit(f"error: {error}")
"""


@pytest.mark.slow
@pytest.mark.fault(49)
def test_of_two_runs_started_together_one_trains(tmp_path):
  workdir, go = tmp_path / "run", tmp_path / "go"
  processes = [faults.spawn(_TRAINER, str(workdir), str(go)) for _ in range(2)]
  try:
    while all(process.poll() is None for process in processes):
      time.sleep(0.1)
    go.touch()
    outputs = [process.communicate(timeout=120)[0] for process in processes]
  finally:
    for process in processes:
      process.kill()
      process.wait()
  codes = [process.returncode for process in processes]
  assert sorted(codes) == [0, 1], "\n".join(outputs)
  winner, refused = np.argsort(codes)
  told = f"{workdir} is being trained by process {processes[winner].pid} on"
  assert told in outputs[refused]
  steps = [row["step"] for row in read_metrics(workdir, "train")]
  assert steps == list(range(1, 13))
  assert (workdir / "finished.json").exists()
  assert not list(workdir.glob("lock*"))
