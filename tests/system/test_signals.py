"""A signal ends a command that still imports, or runs C++, at once."""

import os
import signal
import subprocess
import sys

import pytest

from dpo_jax import EXIT_PREEMPTED
from tests import faults

# Stands for JAX: C code that releases the interpreter and runs no handler.
_SLOW_JAX = """
import hashlib
print("ready", flush=True)
hashlib.pbkdf2_hmac("sha256", b"", b"", 10**9)
"""


@pytest.fixture
def ended(tmp_path):
  """Function: starts a module, sends a signal while it imports JAX."""
  folder = tmp_path / "jax"
  folder.mkdir()
  (folder / "__init__.py").write_text(_SLOW_JAX)

  def end(module, number, ignored=None):
    def prepare():
      # Libraries that the worker has loaded ignore SIGHUP, unseen by Python.
      for one in (signal.SIGINT, signal.SIGHUP):
        signal.signal(one, signal.SIG_DFL)
      if ignored is not None:
        signal.signal(ignored, signal.SIG_IGN)

    process = subprocess.Popen(
      [sys.executable, "-m", module],
      cwd=faults.ROOT,
      env=os.environ | {"PYTHONPATH": str(tmp_path)},
      stdout=subprocess.PIPE,
      stderr=subprocess.STDOUT,
      text=True,
      preexec_fn=prepare,
    )
    try:
      assert process.stdout.readline() == "ready\n"
      process.send_signal(number)
      return process.wait(5), process.stdout.read()
    finally:
      process.kill()
      process.communicate()

  return end


@pytest.mark.fault(46)
@pytest.mark.parametrize(
  "module",
  [
    "dpo_jax.train",
    "experiments.all",
    "experiments.beta_ablation",
    "experiments.quickstart",
    "experiments.replay",
    "experiments.sweep",
  ],
)
@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT", "SIGHUP"])
def test_a_command_that_resumes_ends_with_its_code(ended, module, name):
  assert ended(module, signal.Signals[name]) == (EXIT_PREEMPTED, "")


@pytest.mark.parametrize(
  "module",
  ["evaluate", "export", "generate", "inspect", "compare", "plan"],
)
@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT"])
def test_another_command_is_ended_by_the_signal(ended, module, name):
  number = signal.Signals[name]
  assert ended(f"dpo_jax.{module}", number) == (-number, "")


def test_what_the_shell_ignores_stays_ignored(ended):
  for module, number in (
    ("dpo_jax.train", signal.SIGHUP),  # nohup
    ("dpo_jax.evaluate", signal.SIGINT),  # in the background of a script
  ):
    with pytest.raises(subprocess.TimeoutExpired):
      ended(module, number, ignored=number)


def test_a_notebook_keeps_its_handlers():
  process = faults.spawn(
    "import signal; before = signal.getsignal(signal.SIGINT);"
    " import dpo_jax.train, experiments;"
    " assert signal.getsignal(signal.SIGINT) is before"
  )
  assert process.wait(60) == 0, process.communicate()[0]
