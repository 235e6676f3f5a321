"""Table 1: TRL's DPOTrainer on the same weights, data, batches and dtype.

  python -m benchmarks.peers --trl_python=PYTHON [--num_turns=5]

PYTHON is one with torch and trl in it. No contender runs before all agree on
the first step's loss and gradient norm to 1e-4. torch gets the fast path of
MKL on AMD where a C compiler is found.
"""

import argparse
import json
import pathlib
import shutil
import subprocess
import sys
import tempfile

import jax
import numpy as np

from benchmarks import interleave, llama, ours, results, workload

# MKL asks whether the processor is Intel's before it takes its fast path.
_INTEL = "int mkl_serv_intel_cpu_true(void) { return 1; }\n"


def export(trainer: ours.Trainer, folder: str, num_steps: int) -> None:
  """Writes weights, tokens and the order of batches for another library."""
  params = jax.device_get(trainer.params)
  llama.write(folder, trainer.policy.config, params)
  loader, config = trainer.loader, trainer.policy.config
  order = [loader.order(step) for step in range(num_steps)]
  works = [workload.count_work(trainer.lengths[i], config) for i in order]
  work = {
    "lengths": trainer.lengths.tolist(),
    "order": [i.tolist() for i in order],
    "num_steps": num_steps,
    "batch_size": trainer.options.batch_size,
    "beta": workload.BETA,
    "learning_rate": workload.LEARNING_RATE,
    "tokens": [w.tokens for w in works],
    "useful_flops": [w.useful_flops for w in works],
    "shared_flops": [w.shared_flops for w in works],
  }
  path = pathlib.Path(folder)
  (path / "work.json").write_text(json.dumps(work))
  np.save(path / "tokens.npy", trainer.store.tokens)


def mkl_override(folder: str) -> dict[str, str]:
  """Environment in which MKL takes AMD for Intel; {} without a compiler."""
  compiler = shutil.which("cc")
  if compiler is None:
    return {}
  source, library = f"{folder}/intel.c", f"{folder}/intel.so"
  pathlib.Path(source).write_text(_INTEL)
  subprocess.run(
    [compiler, "-shared", "-fPIC", "-o", library, source], check=True
  )
  return {"LD_PRELOAD": library}


def main() -> None:
  parser = argparse.ArgumentParser()
  workload.add_options(parser)
  parser.add_argument("--trl_python", required=True)
  parser.add_argument("--num_turns", type=int, default=5)
  parser.add_argument("--steps_a_turn", type=int, default=4)
  parser.add_argument(
    "--frozen", action=argparse.BooleanOptionalAction, default=True
  )
  parser.add_argument("--table", default="1_peers")
  options = parser.parse_args()
  shared = [
    f"--{name}={getattr(options, name)}"
    for name in (
      "seed",
      "batch_size",
      "num_groups",
      "max_tokens",
      "vocab_size",
      "equal_lengths",
    )
  ]
  num_steps = 1 + options.steps_a_turn * (1 + options.num_turns)
  with tempfile.TemporaryDirectory() as folder:
    export(ours.Trainer(ours.parse(shared)), folder, num_steps)
    env = mkl_override(folder)
    root = str(pathlib.Path(__file__).parents[1])

    def our(reference):
      command = [sys.executable, "-m", "benchmarks.ours", *shared]
      return interleave.Contender(
        f"dpo_jax, {reference} reference",
        [*command, f"--reference={reference}"],
        cwd=root,
      )

    def trl(reference, head="all"):
      command = [options.trl_python, "-m", "benchmarks.trl_worker"]
      command += [f"--model={folder}", f"--reference={reference}"]
      patched = "" if head == "all" else ", head on responses"
      return interleave.Contender(
        f"TRL, {reference} reference{patched}",
        [*command, f"--head={head}"],
        env=env | {"HF_HUB_OFFLINE": "1", "TQDM_DISABLE": "1"},
        cwd=root,
      )

    contenders = [
      our("cached"),
      trl("cached"),
      trl("cached", head="scored"),
    ]
    if options.frozen:
      contenders += [our("frozen"), trl("frozen")]
    try:
      interleave.run(
        contenders,
        num_turns=options.num_turns,
        steps_a_turn=options.steps_a_turn,
        check=interleave.check_ticket,
      )
      rows = [interleave.summarize(c) for c in contenders]
    finally:
      for contender in contenders:
        contender.close()
  results.write(
    options.table,
    title="dpo_jax and TRL on the same pairs",
    command=" ".join(["python -m benchmarks.peers", *sys.argv[1:]]).replace(
      options.trl_python, "PYTHON"
    ),
    rows=rows,
    notes=[
      f"Turns of {options.steps_a_turn} steps, {options.num_turns} each, one"
      " after the other; medians, quartiles in the JSON.",
      "Same weights, batches, float32 and AdamW: first loss and gradient norm"
      " agree to 1e-4, or nothing is timed.",
      "MKL's fast path on AMD for torch: " + ("forced." if env else "no."),
      "CPU seconds are those of the process, and say what the work takes where"
      " others load the machine; its load is above.",
    ],
    extra=contenders[1].turns[-1]["versions"],
  )


if __name__ == "__main__":
  main()
