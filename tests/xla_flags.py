"""Flags of XLA, tried before the tests rely on them."""

import os
import subprocess
import sys
import warnings

# What JAX does first with a CPU, without the second that importing JAX takes.
_START = "from jaxlib import xla_client; xla_client.make_cpu_client()"


def known(flags: str) -> str:
  """Tries flags in a child: XLA ends a process that has an unknown one.

  XLA ignores unknown keys within xla_backend_extra_options.

  Args:
    flags: as XLA_FLAGS has them.

  Returns:
    The flags; "", with a warning, if the child fails.
  """
  child = subprocess.run(
    [sys.executable, "-c", _START],
    env=os.environ | {"XLA_FLAGS": flags},
    capture_output=True,
    text=True,
    check=False,
  )
  if child.returncode == 0:
    return flags
  reason = child.stderr.strip().rpartition("\n")[2]
  warnings.warn(f"tests run without {flags}: {reason}", stacklevel=2)
  return ""
