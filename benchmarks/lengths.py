"""Table 4: memory and time against length and vocabulary.

  python -m benchmarks.lengths [--num_turns=3]

First one pair a step, whose prompt is half of each sequence; then workload A
with larger vocabularies. Memory is what XLA's compiler reports for the step,
which allocators and other processes do not affect. The table also has the peak
of the process.
"""

import argparse
import sys

from benchmarks import interleave, results

LENGTHS = (128, 512, 2048, 8192)
VOCABULARIES = (32_000, 64_000, 128_000, 256_000)


def variants() -> dict[str, list[str]]:
  """Returns options of `benchmarks.ours` by name."""
  found = {}
  for length in LENGTHS:
    half = length // 2
    found[f"T {length}"] = [
      f"--equal_lengths={half},{length - half}",
      f"--max_tokens={length}",
      "--batch_size=1",
      "--num_groups=2",
    ]
  for size in VOCABULARIES:
    found[f"V {size}"] = [f"--vocab_size={size}", "--num_groups=16"]
  return found


def main() -> None:
  parser = argparse.ArgumentParser()
  interleave.add_options(parser, num_turns=3, steps_a_turn=1)
  parser.add_argument(
    "--only", default="", help="names of rows, comma-separated"
  )
  options = parser.parse_args()
  found = variants()
  chosen = options.only.split(",") if options.only else list(found)
  rows = []
  # One process at a time: together they would not fit in memory.
  for variant in chosen:
    contender = interleave.ours(variant, ["--memory", *found[variant]])
    rows += interleave.measure([contender], options)
    for name in ("step_temp_mb", "step_arguments_mb"):
      rows[-1][name] = contender.first[name]
  results.write(
    "4_lengths",
    title="Memory and time against length and vocabulary",
    command=results.command("lengths", sys.argv[1:]),
    rows=rows,
    notes=[
      "T: one pair a step, half of each sequence its prompt. V: workload A.",
      "step temp: memory of the compiled step in addition to its arguments"
      " (weights, two moments, a batch). It holds the gradient, which grows"
      " with the embeddings.",
    ],
  )


if __name__ == "__main__":
  main()
