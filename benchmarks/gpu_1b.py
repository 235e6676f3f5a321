"""Table 6: a Llama of 1B parameters on one GPU, next to TRL.

  python -m benchmarks.gpu_1b [--budget_s=300] [--attention=xla]

`--attention=xla` is for a GPU on which `benchmarks.gpu_kernel` found that the
kernels disagree. `--profile=FOLDER` runs the first row alone, and writes a
trace and its table there.
"""

import argparse
import tempfile

import jax

from benchmarks import cells, gpu_cells
from benchmarks.cells import Cell

_BATCH_SIZES = {"long": 16, "real": 64, "ultrafeedback": 64}
# Pairs that TRL takes at once: 64 of 1,024 tokens are as many tokens as its
# 64 of 512, and float32 activations of 16 long pairs do not fit.
_PAIRS_AT_ONCE = {"long": 16, "real": 64, "ultrafeedback": 32}
_FLOAT32_PAIRS_AT_ONCE = 4
# The second shape of batches is compiled in the turn that warms up; the third
# would be in step 14, which is timed in four turns of four.
TURNS = {"num_turns": 3, "steps_a_turn": 3}


def make_cells(
  folder: str, attention: str, profile: str, shape: str = "1b"
) -> list[Cell]:
  """Writes TRL's work, and returns the cells in order of worth.

  Args:
    folder: existing folder for TRL's work.
    attention: backend of ours.
    profile: folder for a trace of the first cell; "" for none.
    shape: a key of `workload.SHAPES`.
  """
  made = []
  for name, batch_size in _BATCH_SIZES.items():
    work = gpu_cells.work_options(shape, name, batch_size)
    options = [f"--attention={attention}", "--remat=dots"]
    if profile and not made:
      options.append(f"--profile={profile}")
    made.append(gpu_cells.our_cell(work, name, *options))
    at_once = f"--pairs_at_once={_PAIRS_AT_ONCE[name]}"
    made.append(
      gpu_cells.trl_cell(
        work, name, "", folder, at_once, *gpu_cells.TRL_FASTEST
      )
    )
  work = gpu_cells.work_options(shape, "long", _BATCH_SIZES["long"])
  at_once = f"--pairs_at_once={_FLOAT32_PAIRS_AT_ONCE}"
  made.append(
    gpu_cells.trl_cell(
      work,
      "long",
      "float32 weights",
      folder,
      at_once,
      *gpu_cells.TRL_LIKE_OURS,
    )
  )
  return made


def main() -> None:
  parser = argparse.ArgumentParser()
  cells.add_options(parser, budget_s=300.0)
  parser.set_defaults(**TURNS)
  parser.add_argument("--attention", default="triton")
  parser.add_argument("--profile", default="")
  options = parser.parse_args()
  options.out = options.profile or options.out
  jax.config.update("jax_platforms", "cpu")  # the GPU is for contenders
  with tempfile.TemporaryDirectory() as folder:
    made = make_cells(folder, options.attention, options.profile)
    cells.run_table(
      "gpu_1b",
      made[:1] if options.profile else made,
      options,
      title="dpo_jax and TRL on one GPU, 1B parameters",
      notes=[
        f"policy.attention={options.attention}; AdamW; remat=dots. TRL has no"
        " recomputation, and bfloat16 weights and moments unless a row says"
        " float32.",
      ],
    )


if __name__ == "__main__":
  main()
