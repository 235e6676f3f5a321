"""Runs the three GPU benchmarks within a quarter of an hour on one GPU.

  python -m benchmarks.gpu [--parts=kernel,1b,shapes] [--out=FOLDER]

`kernel` checks and times the attention kernels (2 minutes), `1b` is table 6 (5)
and `shapes` table 7 (3). A part that takes half a minute more than its budget
is ended, so they take 12 minutes of the 15 at most; the others are for starting
the machine and repeating one part. If the kernels disagree, the tables run with
attention=xla, and say so. A repeat compiles nothing again with
JAX_COMPILATION_CACHE_DIR=FOLDER.

A machine with Python 3.12, jax 0.11 for CUDA 13, flax, optax, chex, orbax,
torch 2.11, transformers 5 and accelerate also needs these wheels, 3 MiB
together: ml_collections 1.1.0 for dpo_jax, and for TRL trl 1.16.0,
liger_kernel 0.8.5, datasets 5.2.0, dill 0.4.1 and multiprocess 0.70.19
(`pip download --no-deps NAME==VERSION`). Without TRL its rows say so.
"""

import argparse
from collections.abc import Sequence
import json
import pathlib
import subprocess
import sys

from benchmarks.cells import DISAGREES, module

_BUDGETS_S = {"kernel": 120.0, "1b": 300.0, "shapes": 180.0}
# That a part may take beyond its budget, to start and to end.
_GRACE_S = 30.0
# Exit code of a part that took longer.
_TIMED_OUT = 124


def run_parts(
  parts: Sequence[str],
  options: argparse.Namespace,
) -> dict[str, int]:
  """Runs parts in order, and returns the exit code of each.

  Args:
    parts: keys of _BUDGETS_S.
    options: `out`, and `scale`, a factor of the budgets.
  """
  codes: dict[str, int] = {}
  for part in parts:
    budget_s = _BUDGETS_S[part] * options.scale
    command = module(f"gpu_{part}", f"--budget_s={budget_s:.0f}")
    if part != "kernel":
      command.append(f"--out={options.out}")
      command += _measured_rates(options.out) if "1b" in codes else []
      if codes.get("kernel") == DISAGREES:
        print(f"{part} runs with attention=xla: the kernel's check failed")
        command.append("--attention=xla")
    print("$", " ".join(command[1:]), flush=True)
    try:
      limit_s = budget_s + _GRACE_S
      codes[part] = subprocess.run(command, timeout=limit_s).returncode
    except subprocess.TimeoutExpired:
      print(f"{part} was ended after {limit_s:.0f} s", flush=True)
      codes[part] = _TIMED_OUT
  return codes


def _measured_rates(out: str) -> list[str]:
  """Returns the option for the matmul rates that table 6 measured."""
  path = pathlib.Path(out or "benchmarks/results") / "gpu_1b.json"
  if not path.exists():
    return []
  rates = json.loads(path.read_text())["extra"].get("matmul_tflops")
  return [f"--matmul_tflops={rates}"] if rates else []


def main() -> None:
  parser = argparse.ArgumentParser()
  parser.add_argument("--parts", default=",".join(_BUDGETS_S))
  parser.add_argument("--out", default="", help="see benchmarks.gpu_1b")
  parser.add_argument(
    "--scale", type=float, default=1.0, help="factor of all budgets"
  )
  options = parser.parse_args()
  codes = run_parts(options.parts.split(","), options)
  if any(codes.values()):
    sys.exit(f"exit codes: {codes}")


if __name__ == "__main__":
  main()
