"""Table 5: the compiled step on 1 to 8 simulated devices.

  python -m benchmarks.scaling

Simulated devices share the same cores, so their time means nothing. The table
counts instead: FLOPs of a device's share, by formula, and the number of
collectives and the bytes that a device receives in each kind.
"""

import argparse
import os
import sys

os.environ.setdefault("NPROC", "16")
os.environ.setdefault("XLA_FLAGS", "--xla_force_host_platform_device_count=8")

import jax
import numpy as np

from benchmarks import ours, results, workload
from dpo_jax.parallel import mesh
from dpo_jax.planning import compilation, hlo
from dpo_jax.system import compat


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
      mean_flops = float(np.mean(trainer.data.work(range(10))["shared_flops"]))
      found = compilation.read_collectives(
        compiled.as_text(), jax.devices()[:count]
      )
      memory = compat.program_memory(compiled)
      rows.append(
        {
          "mesh": f"{axis} {count}",
          "step_flops_a_device": mean_flops / count,
          "temp_mb": memory.temporaries / 2**20,
          "arguments_mb": memory.arguments / 2**20,
          **{
            f"{kind} MB": sum(
              c.num_bytes * c.trips for c in found if c.kind == kind
            )
            / 2**20
            for kind in hlo.KINDS
          },
          "collectives": sum(c.trips for c in found),
        }
      )
  results.write(
    "5_scaling",
    title="One step on simulated devices, by its compiled program",
    command=results.command("scaling", sys.argv[1:]),
    rows=rows,
    notes=[
      f"Workload A, {options.batch_size} pairs a step over all devices. Bytes"
      " are those that a device receives in a step; a collective in a loop"
      " counts once for each iteration.",
      "The CPU's partitioner writes a reduce-scatter as all-reduce and slice.",
    ],
  )


if __name__ == "__main__":
  main()
