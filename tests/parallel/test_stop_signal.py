"""SIGTERM, SIGHUP and Ctrl-C end a run soon, and never lose a step."""

import gc
import os
import signal
import time

import pytest

from dpo_jax import EXIT_PREEMPTED
from dpo_jax.parallel import stop_signal
from dpo_jax.parallel.stop_signal import Preempted, StopSignal
from tests import faults

_NUMBERS = [signal.SIGTERM, signal.SIGINT, signal.SIGHUP]


@pytest.mark.fault(46)
@pytest.mark.parametrize("number", _NUMBERS)
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
  before = [signal.getsignal(number) for number in _NUMBERS]
  with StopSignal():
    assert signal.getsignal(signal.SIGTERM) != before[0]
  assert [signal.getsignal(number) for number in _NUMBERS] == before


def test_a_terminal_that_closes_may_send_two():
  with StopSignal() as stop, stop.holding(True):
    for _ in range(2):
      os.kill(os.getpid(), signal.SIGHUP)
    assert stop.reached()


def test_nohup_takes_sighup_away():
  before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
  try:
    with StopSignal() as stop:
      os.kill(os.getpid(), signal.SIGHUP)
      assert not stop.reached()
  finally:
    signal.signal(signal.SIGHUP, before)


@pytest.mark.parametrize("number", _NUMBERS)
def test_a_stop_that_was_swallowed_is_noticed_later(number, recwarn):
  """As by a callback of the garbage collector: Python prints what it raises."""

  def swallow(phase, info):
    gc.callbacks.remove(swallow)
    os.kill(os.getpid(), number)

  with StopSignal() as stop:
    stop_signal.check()
    gc.callbacks.append(swallow)
    gc.collect()
    with pytest.raises(Preempted):
      stop_signal.check()
    with stop.holding(True):
      assert stop.reached()
  stop_signal.check()


# C code that releases the interpreter and runs no handler, as XLA's compiler.
_COMPILES = """
import hashlib, sys
from dpo_jax.parallel import stop_signal
from dpo_jax.system import signals

signals.begin()
signals.end_with_preempted()
stop_signal._GRACE_S = 0.3
with stop_signal.StopSignal() as stop:
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
    busy.send_signal(signal.SIGHUP)  # as a terminal that closes
    time.sleep(0.5)
    assert busy.poll() is None
    busy.send_signal(signal.SIGTERM)  # told again, it ends
    assert busy.wait(20) == EXIT_PREEMPTED
  finally:
    for process in (idle, busy):
      process.kill()
      process.communicate()
