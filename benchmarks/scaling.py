"""Table 5: the step on 1 to 8 simulated devices, by its compiled program.

  python -m benchmarks.scaling

Simulated devices share the same cores, so time says nothing; what the
partitioner made does: FLOPs by formula of a device's share, and how often and
how many bytes a device sends in which collective.
"""

import argparse
import collections
import os
import re
import sys

os.environ.setdefault("NPROC", "16")
os.environ.setdefault("XLA_FLAGS", "--xla_force_host_platform_device_count=8")

import jax
import numpy as np

from benchmarks import ours, results, workload
from dpo_jax import mesh

_WIDTHS = {"f32": 4, "bf16": 2, "s32": 4, "u32": 4, "pred": 1, "f16": 2}
_COLLECTIVE = re.compile(
  r"= (.*?) (all-reduce|all-gather|reduce-scatter|all-to-all|"
  r"collective-permute)(?:-start)?\("
)
_SHAPE = re.compile(r"(\w+)\[([\d,]*)\]")


def collectives(text: str) -> dict[str, tuple[int, int]]:
  """Number of collectives in a program's text, and bytes of their results."""
  found = collections.defaultdict(lambda: (0, 0))
  for line in text.splitlines():
    match = _COLLECTIVE.search(line)
    if not match:
      continue
    size = 0
    for kind, dims in _SHAPE.findall(match.group(1)):
      count = int(np.prod([int(d) for d in dims.split(",") if d], initial=1))
      size += count * _WIDTHS.get(kind, 4)
    number, total = found[match.group(2)]
    found[match.group(2)] = (number + 1, total + size)
  return dict(found)


def main() -> None:
  parser = argparse.ArgumentParser()
  parser.add_argument("--batch_size", type=int, default=32)
  options = parser.parse_args()
  rows = []
  for count in (1, 2, 4, 8):
    for axis in ("data", "fsdp", "tensor"):
      if count == 1 and axis != "data":
        continue
      if axis == "tensor" and workload.MODEL["num_kv_heads"] % count:
        continue  # heads do not divide
      sizes = dict.fromkeys(mesh.AXES, 1) | {axis: count}
      trainer = ours.Trainer(
        ours.parse([f"--batch_size={options.batch_size}", "--num_groups=64"]),
        mesh.make_mesh(sizes, jax.devices()[:count]),
      )
      compiled = trainer.compile()
      found = collectives(compiled.as_text())
      memory = compiled.memory_analysis()
      rows.append(
        {
          "mesh": f"{axis} {count}",
          "step_flops_a_device": trainer.mean_work().shared_flops / count,
          "temp_mb": memory.temp_size_in_bytes / 2**20,
          "arguments_mb": memory.argument_size_in_bytes / 2**20,
          **{
            f"{name} MB": found.get(name, (0, 0))[1] / 2**20
            for name in (
              "all-reduce",
              "all-gather",
              "reduce-scatter",
              "all-to-all",
              "collective-permute",
            )
          },
          "collectives": sum(number for number, _ in found.values()),
        }
      )
  results.write(
    "5_scaling",
    title="One step on simulated devices, by its compiled program",
    command=" ".join(["python -m benchmarks.scaling", *sys.argv[1:]]),
    rows=rows,
    notes=[
      f"Workload A, {options.batch_size} pairs a step over all devices. Bytes"
      " are a device's results of collectives as the program lists them: one in"
      " a loop (of layers, or blocks of the vocabulary) counts once.",
      "The CPU's partitioner writes a reduce-scatter as all-reduce and slice.",
    ],
  )


if __name__ == "__main__":
  main()
