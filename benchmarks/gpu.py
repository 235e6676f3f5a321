"""Table 6: model FLOPs utilization (MFU) in bfloat16 on one accelerator.

  python -m benchmarks.gpu [--shapes=0.5b,1b,3b,8b]

MFU is useful FLOPs a second, divided by the measured rate of a bfloat16 matmul
of size 8192 on the same device. Useful FLOPs follow `workload.count_work`: each
real token once for each of its sequences, causal attention, head on responses,
no recomputation. Refuses to run without an accelerator.
"""

import argparse
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import interleave, results


def measured_peak(size: int = 8192, repeats: int = 20) -> float:
  """Measures FLOPs a second of a bfloat16 matmul, the median of `repeats`."""
  x = jax.random.normal(jax.random.key(0), (size, size), jnp.bfloat16)
  multiply = jax.jit(jnp.dot)
  multiply(x, x).block_until_ready()
  seconds = []
  for _ in range(repeats):
    began = time.monotonic()
    multiply(x, x).block_until_ready()
    seconds.append(time.monotonic() - began)
  return 2 * size**3 / float(np.median(seconds))


def main() -> None:
  parser = argparse.ArgumentParser()
  parser.add_argument("--shapes", default="0.5b,1b,3b,8b")
  interleave.add_options(parser, num_turns=5, steps_a_turn=5)
  options = parser.parse_args()
  if jax.default_backend() == "cpu":
    raise SystemExit("benchmarks.gpu needs a GPU or a TPU: JAX sees a CPU only")
  peak = measured_peak()
  rows = []
  for shape in options.shapes.split(","):
    # Long rows and large batches fill the device. Adam's moments of an 8B
    # model do not fit on one device, and Adafactor's do.
    arguments = [f"--shape={shape}", "--batch_size=16", "--num_groups=64"]
    arguments += ["--equal_lengths=512,768", "--max_tokens=2048"]
    arguments += ["--remat=full", "--optimizer=adafactor"]
    contender = interleave.ours(
      shape, arguments, {"XLA_PYTHON_CLIENT_MEM_FRACTION": "0.95"}
    )
    [row] = interleave.measure([contender], options)
    rows.append(row | {"mfu": row["useful_gflops_per_second"] * 1e9 / peak})
  results.write(
    "6_gpu",
    title=f"MFU on {jax.devices()[0].device_kind}",
    command=results.command("gpu", sys.argv[1:]),
    rows=rows,
    notes=[f"Measured matmul rate: {peak / 1e12:.0f} TFLOP/s in bfloat16."],
  )


if __name__ == "__main__":
  main()
