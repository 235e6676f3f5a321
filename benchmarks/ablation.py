"""Table 3: workload A with one part of the hot path off at a time.

python -m benchmarks.ablation [--num_turns=5]
"""

import argparse
import sys

from benchmarks import interleave, results, workload

# Parts, and the options of `benchmarks.ours` that turn each off.
VARIANTS = {
  "nothing": [],
  "shared prompt": ["--layout=packed"],
  "packing": ["--layout=padded"],
  "scored-only head": ["--head=all"],
  "chunks of positions": ["--logps_chunk=100000"],
  "blocked attention": ["--attention=dense"],
  "cached reference": ["--reference=frozen"],
  "recomputation": ["--remat=none"],
  "kept projections": ["--remat=attention"],
}


def main() -> None:
  parser = argparse.ArgumentParser()
  interleave.add_options(parser, num_turns=5, steps_a_turn=4)
  parser.add_argument("--num_groups", type=int, default=256)
  parser.add_argument(
    "--only", default="", help="names of parts, comma-separated"
  )
  options = parser.parse_args()
  chosen = options.only.split(",") if options.only else list(VARIANTS)
  contenders = [
    interleave.ours(
      name, [f"--num_groups={options.num_groups}", *VARIANTS[name]]
    )
    for name in chosen
  ]
  rows = interleave.measure(
    contenders, options, check=interleave.check_same_work
  )
  results.write(
    "3_ablation",
    title="What each part gives: one off in turn",
    command=results.command("ablation", sys.argv[1:]),
    rows=rows,
    notes=[
      f"Workload A, {workload.BATCH_SIZE} pairs a step, {options.num_groups}"
      f" pairs; turns of {options.steps_a_turn} steps, {options.num_turns}"
      " each, one after the other; medians, quartiles in the JSON.",
      "Padded rows are as long as their batch's longest pair, in four lengths.",
    ],
  )


if __name__ == "__main__":
  main()
