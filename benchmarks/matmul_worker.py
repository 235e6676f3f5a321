"""Measures the bfloat16 matmul of one library, the limit of a training step.

  python -m benchmarks.matmul_worker --library=torch

Calls are queued, so that the time to dispatch one is hidden. The numbers are
random: a device may multiply zeros faster.
"""

import argparse
from collections.abc import Callable
import json
import time
from typing import Any

from benchmarks.interleave import MARK


def seconds_a_call(
  call: Callable[[], Any],
  wait: Callable[[Any], Any],
  *,
  num_calls: int,
  num_rounds: int = 3,
) -> float:
  """Measures queued calls, and returns the time of one in the fastest round.

  Args:
    call: starts work on the device, and returns its result.
    wait: waits for a result.
    num_calls: calls of a round.
    num_rounds: rounds, after one call that compiles and one that warms up.
  """
  for _ in range(2):
    wait(call())
  rounds = []
  for _ in range(num_rounds):
    began = time.perf_counter()
    for _ in range(num_calls):
      result = call()
    wait(result)
    rounds.append((time.perf_counter() - began) / num_calls)
  return min(rounds)


def jax_rate(size: int, num_calls: int) -> tuple[float, str, str]:
  """Returns FLOPs a second of JAX's matmul, the device, and JAX's version."""
  import jax
  import jax.numpy as jnp

  x = jax.random.normal(jax.random.key(0), (size, size), jnp.bfloat16)
  multiply = jax.jit(jnp.dot)
  seconds = seconds_a_call(
    lambda: multiply(x, x), jax.block_until_ready, num_calls=num_calls
  )
  return 2 * size**3 / seconds, jax.devices()[0].device_kind, jax.__version__


def torch_rate(size: int, num_calls: int) -> tuple[float, str, str]:
  """Returns FLOPs a second of torch's matmul, the device, and its version."""
  import torch

  x = torch.randn(size, size, device="cuda", dtype=torch.bfloat16)
  seconds = seconds_a_call(
    lambda: x @ x, lambda _: torch.cuda.synchronize(), num_calls=num_calls
  )
  device = torch.cuda.get_device_name()
  return 2 * size**3 / seconds, device, torch.__version__


def main() -> None:
  parser = argparse.ArgumentParser()
  parser.add_argument("--library", choices=("jax", "torch"), required=True)
  parser.add_argument("--size", type=int, default=8192)
  parser.add_argument("--num_calls", type=int, default=20)
  options = parser.parse_args()
  measure = jax_rate if options.library == "jax" else torch_rate
  rate, device, version = measure(options.size, options.num_calls)
  answer = {"matmul_tflops": rate / 1e12, "device": device}
  answer["version"] = f"{options.library} {version}"
  print(MARK + json.dumps(answer), flush=True)


if __name__ == "__main__":
  main()
