"""Table 7: Llamas of 8B and 0.5B on one GPU, and the attention kernel alone.

python -m benchmarks.gpu_shapes [--budget_s=180] [--attention=xla]
"""

import argparse
import tempfile

import jax

from benchmarks import cells, gpu_cells
from benchmarks.cells import Cell, module

TURNS = {"num_turns": 3, "steps_a_turn": 2}


def _kernel_cell(kernel: str, remark: str, head_dim: int) -> Cell:
  return Cell(
    f"attention, {kernel}{remark}, d {head_dim}",
    module("attention_worker", f"--kernel={kernel}", f"--head_dim={head_dim}"),
    is_trainer=False,
  )


def make_cells(folder: str, attention: str) -> list[Cell]:
  """Returns the cells, in order of worth; see `gpu_1b.make_cells`."""
  ours = f"--attention={attention}"
  large = gpu_cells.work_options("8b", "long", 8)
  pairs = gpu_cells.work_options("8b", "ultrafeedback", 32)
  small = gpu_cells.work_options("0.5b", "long", 16)
  lean = ("--remat=full", "--optimizer=adafactor")
  # Its Adafactor would be another algorithm: with bfloat16 moments AdamW fits.
  recomputed = ("--recompute", *gpu_cells.TRL_FASTEST)
  return [
    gpu_cells.our_cell(large, "8B long", ours, *lean),
    _kernel_cell("triton", "", 128),
    _kernel_cell("flex", "", 128),
    _kernel_cell("cudnn", " causal", 128),
    gpu_cells.trl_cell(large, "8B long", "", folder, *recomputed),
    gpu_cells.our_cell(pairs, "8B ultrafeedback", ours, *lean),
    gpu_cells.our_cell(small, "0.5B long", ours, "--remat=dots"),
    gpu_cells.trl_cell(small, "0.5B long", "", folder, *gpu_cells.TRL_FASTEST),
    _kernel_cell("triton", "", 64),
    _kernel_cell("flex", "", 64),
    _kernel_cell("cudnn", " causal", 64),
  ]


def main() -> None:
  parser = argparse.ArgumentParser()
  cells.add_options(parser, budget_s=180.0)
  parser.set_defaults(**TURNS)
  parser.add_argument("--attention", default="triton")
  options = parser.parse_args()
  jax.config.update("jax_platforms", "cpu")  # the GPU is for contenders
  with tempfile.TemporaryDirectory() as folder:
    cells.run_table(
      "gpu_shapes",
      make_cells(folder, options.attention),
      options,
      title="dpo_jax and TRL on one GPU, 8B and 0.5B parameters",
      notes=[
        f"policy.attention={options.attention}. 8B: Adafactor and remat=full;"
        " TRL AdamW with bfloat16 moments, and each layer recomputed. 0.5B:"
        " AdamW, remat=dots; TRL has no recomputation.",
        "attention: one row of 16 pairs, 32 heads over 8; cuDNN on rows of one"
        " pair and without the mask.",
      ],
    )


if __name__ == "__main__":
  main()
