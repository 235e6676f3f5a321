"""SIGTERM and Ctrl-C end a run soon, and never lose a step."""

import os
import signal
import time

import pytest

from dpo_jax import EXIT_PREEMPTED
from dpo_jax.parallel.stop_signal import Preempted, StopSignal
from tests import faults


@pytest.mark.fault(46)
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_what_is_not_held_at_once(number):
  with StopSignal(), pytest.raises(Preempted) as stopped:
    os.kill(os.getpid(), number)
  assert stopped.value.code == EXIT_PREEMPTED


@pytest.mark.fault(46)
def test_a_signal_is_remembered_while_a_step_is_held():
  with StopSignal() as stop, stop.holding(True):
    assert not stop.reached()
    os.kill(os.getpid(), signal.SIGTERM)
    assert stop.reached()
    with pytest.raises(Preempted), stop.holding(False):
      pytest.fail("entered")
    with pytest.raises(KeyboardInterrupt):  # a second one
      os.kill(os.getpid(), signal.SIGTERM)


def test_handlers_of_before_come_back():
  before = [signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGINT)]
  with StopSignal(ends_process=True):
    assert signal.getsignal(signal.SIGTERM) != before[0]
  now = [signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGINT)]
  assert now == before
  assert signal.set_wakeup_fd(-1) == -1


# C code that releases the interpreter and runs no handler, as XLA's compiler.
_COMPILES = """
import hashlib, sys
from dpo_jax.parallel import stop_signal

stop_signal._GRACE_S = 0.3
stop = stop_signal.StopSignal(ends_process=True)
with stop:
  stop.unsaved = sys.argv[1] == "unsaved"
  with stop.holding(stop.unsaved):
    print("ready", flush=True)
    hashlib.pbkdf2_hmac("sha256", b"", b"", 10**9)
"""


@pytest.mark.fault(46)
def test_a_process_in_c_ends_unless_a_step_would_be_lost():
  idle = faults.spawn(_COMPILES, "saved")
  busy = faults.spawn(_COMPILES, "unsaved")
  try:
    for process in (idle, busy):
      while (line := process.stdout.readline()) != "ready\n":
        assert line, process.wait()
      process.send_signal(signal.SIGTERM)
    assert idle.wait(20) == EXIT_PREEMPTED
    time.sleep(0.5)
    assert busy.poll() is None
    busy.send_signal(signal.SIGTERM)  # told again, it ends
    assert busy.wait(20) == EXIT_PREEMPTED
  finally:
    for process in (idle, busy):
      process.kill()
      process.communicate()
