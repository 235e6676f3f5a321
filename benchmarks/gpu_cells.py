"""Cells of dpo_jax and TRL on one GPU: the same pairs, reference given.

Ours has float32 weights and moments, bfloat16 compute, and each prompt once in
its rows. TRL is at its fastest: weights, gradients and moments in bfloat16,
Liger's kernels, SDPA, and its own head on responses alone. SDPA takes its flash
kernel where a batch has no padding, which is on long rows only: with padding
transformers gives it a mask, which that kernel does not take.
The reference's log-probs are given to both, as zeros.
"""

from collections.abc import Sequence
import pathlib

from benchmarks import ours, peers
from benchmarks.cells import Cell, module

# Options of the work, by name.
WORKLOADS = {
  "long": ["--equal_lengths=512,768", "--max_tokens=2048", "--num_groups=64"],
  "real": ["--lengths=a", "--max_tokens=512", "--num_groups=256"],
  "ultrafeedback": [
    *("--lengths=ultrafeedback", "--max_tokens=1024"),
    "--num_groups=256",
  ],
}
_NUM_STEPS = 64  # that TRL reads, more than all turns take
_OURS_ENV = {"XLA_PYTHON_CLIENT_MEM_FRACTION": "0.95"}
_TRL_ENV = {
  "HF_HUB_OFFLINE": "1",
  "TQDM_DISABLE": "1",
  "PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True",
}
TRL_FASTEST = ("--weights_dtype=bfloat16", "--liger")
# As ours: float32 weights and moments, bfloat16 compute.
TRL_LIKE_OURS = ("--weights_dtype=float32", "--autocast", "--liger")


def work_options(shape: str, workload: str, batch_size: int) -> list[str]:
  """Returns options of `benchmarks.ours` that describe the work.

  Args:
    shape: key of `workload.SHAPES`.
    workload: key of WORKLOADS.
    batch_size: pairs a step.
  """
  sizes = [f"--shape={shape}", f"--batch_size={batch_size}"]
  return [*sizes, *WORKLOADS[workload]]


def our_cell(work: Sequence[str], key: str, *options: str) -> Cell:
  """Returns the cell of dpo_jax.

  Args:
    work: from `work_options`.
    key: names the work in the table.
    *options: further options of `benchmarks.ours`.
  """
  command = module("ours", *work, "--reference=given", *options)
  return Cell(
    f"dpo_jax, {key}",
    command,
    env=_OURS_ENV,
    workload=key,
    executed="shared_flops",
  )


def trl_cell(
  work: Sequence[str], key: str, remark: str, folder: str, *options: str
) -> Cell:
  """Writes the work for TRL, and returns its cell.

  Args:
    work: from `work_options`.
    key: names the work in the table.
    remark: further words of the row's name; "" for none.
    folder: existing folder for the work.
    *options: further options of `benchmarks.trl_worker`.
  """
  target = pathlib.Path(folder) / key.replace(" ", "_")
  if not target.exists():
    target.mkdir()
    data = ours.make_data(ours.parse(list(work)))
    peers.export_data(data, str(target), _NUM_STEPS)
  command = module(
    "trl_worker",
    f"--model={target}",
    "--reference=given",
    "--device=cuda",
    "--random_weights",
    *options,
  )
  name = f"TRL, {key}" + (f", {remark}" if remark else "")
  return Cell(name, command, env=_TRL_ENV, workload=key)
