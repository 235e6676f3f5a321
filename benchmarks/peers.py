"""Tables 1 and 2: TRL's and Tunix's DPOTrainer on the same weights, data,
batches and dtype.

  python -m benchmarks.peers --trl_python=PYTHON --reference=cached
  python -m benchmarks.peers --trl_python=PYTHON --reference=frozen
  python -m benchmarks.peers --tunix_python=PYTHON --reference=frozen
  python -m benchmarks.peers --tunix_python=PYTHON --reference=frozen \
      --tunix_widths=384,512 --table=2_tunix_frozen_widths

and the same for long sequences with --equal_lengths and --table.
PYTHON is one with torch and trl, or google-tunix, in it. No contender is timed
before all agree on the first step's loss and gradient norm to 1e-4. torch gets
the fast path of MKL on AMD where a C compiler is found.
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


def _anonymous(argument: str) -> str:
  """An option without the path of a Python of this machine."""
  name, is_set, _ = argument.partition("_python=")
  return f"{name}_python=PYTHON" if is_set else argument


def main() -> None:
  parser = argparse.ArgumentParser()
  workload.add_options(parser)
  parser.add_argument("--trl_python", default="")
  parser.add_argument("--tunix_python", default="")
  # Prompt and response, "384,512": once more, padded to these.
  parser.add_argument("--tunix_widths", default="")
  interleave.add_options(parser, num_turns=5, steps_a_turn=4)
  parser.add_argument(
    "--reference", default="cached", choices=("cached", "frozen")
  )
  parser.add_argument("--table", default="", help="name of the JSON file")
  options = parser.parse_args()
  if not (options.trl_python or options.tunix_python):
    parser.error("give --trl_python, --tunix_python, or both")
  if options.tunix_python and options.reference == "cached":
    parser.error("Tunix keeps its reference beside it: --reference=frozen")
  if options.tunix_widths and not options.tunix_python:
    parser.error("--tunix_widths are Tunix's: give --tunix_python")
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
    kind = f"{options.reference} reference"
    mine = interleave.ours(
      f"dpo_jax, {kind}", [*shared, f"--reference={options.reference}"]
    )

    def trl(head="all"):
      command = [options.trl_python, "-m", "benchmarks.trl_worker"]
      command += [f"--model={folder}", f"--reference={options.reference}"]
      patched = "" if head == "all" else ", head on responses"
      return interleave.Contender(
        f"TRL, {kind}{patched}",
        [*command, f"--head={head}"],
        env=env | {"HF_HUB_OFFLINE": "1", "TQDM_DISABLE": "1"},
      )

    def tunix(widths=""):
      command = [options.tunix_python, "-m", "benchmarks.tunix_worker"]
      padded = f", padded to {widths.replace(',', ' + ')}" if widths else ""
      return interleave.Contender(
        f"Tunix, {kind}{padded}",
        [*command, f"--model={folder}", f"--widths={widths}"],
      )

    contenders = [mine]
    if options.trl_python:
      contenders += [trl(), trl("scored")]
    if options.tunix_python:
      contenders.append(tunix())
      if options.tunix_widths:
        contenders.append(tunix(options.tunix_widths))
    rows = interleave.measure(
      contenders, options, check=interleave.check_ticket
    )
  for contender, row in zip(contenders, rows, strict=True):
    row["dpo_jax_is_faster_by"] = interleave.times_as_fast(mine, contender)
  peers = [
    name
    for name, python in (
      ("TRL", options.trl_python),
      ("Tunix", options.tunix_python),
    )
    if python
  ]
  number = 1 if options.trl_python else 2
  lengths = ""
  if options.equal_lengths:
    prompt, response = options.equal_lengths.split(",")
    lengths = f", prompts of {prompt} and responses of {response} tokens"
  if options.tunix_widths:
    lengths += f", Tunix also padded to {options.tunix_widths}"
  mkl = ["MKL's fast path on AMD for torch: " + ("forced." if env else "no.")]
  mkl = mkl if options.trl_python else []
  results.write(
    options.table or f"{number}_{'_'.join(peers).lower()}_{options.reference}",
    title=f"dpo_jax and {' and '.join(peers)}, {kind}{lengths}",
    command=" ".join(
      ["python -m benchmarks.peers", *map(_anonymous, sys.argv[1:])]
    ),
    rows=rows,
    notes=[
      f"Turns of {options.steps_a_turn} steps, {options.num_turns} each, one"
      " after the other; medians, quartiles in the JSON.",
      "Same weights, batches, float32 and AdamW: first loss and gradient norm"
      " agree to 1e-4, or nothing is timed.",
      *mkl,
      "CPU seconds are those of the process, and say what the work takes where"
      " others load the machine; its load is above.",
    ],
    extra={
      name: version
      for contender in contenders
      for name, version in contender.turns[-1].get("versions", {}).items()
    },
  )


if __name__ == "__main__":
  main()
