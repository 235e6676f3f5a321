"""Tables 1 and 2: comparison with the DPOTrainers of TRL and Tunix.

All contenders have the same weights, data, batches and dtype.

  python -m benchmarks.peers --trl_python=PYTHON --reference=cached
  python -m benchmarks.peers --trl_python=PYTHON --reference=frozen
  python -m benchmarks.peers --tunix_python=PYTHON --reference=frozen
  python -m benchmarks.peers --tunix_python=PYTHON --reference=frozen \
      --tunix_widths=384,512 --table=2_tunix_frozen_widths

The same commands with --equal_lengths and --table measure long sequences.
PYTHON is the interpreter of an environment with torch and trl, or with
google-tunix. No contender is timed before all agree on the first step's loss
and gradient norm to 1e-4. On AMD, torch gets the fast path of MKL if there is a
C compiler.
"""

import argparse
from collections.abc import Sequence
import json
import pathlib
import shutil
import subprocess
import sys
import tempfile
from typing import Any

import jax
import numpy as np

from benchmarks import interleave, llama, ours, results, workload

# MKL takes its fast path only if this function says that the CPU is Intel's.
_INTEL = "int mkl_serv_intel_cpu_true(void) { return 1; }\n"


def export(trainer: ours.Trainer, folder: str, num_steps: int) -> None:
  """Writes weights, tokens and the order of batches for another library.

  The files are model.safetensors and those of `export_data`.

  Args:
    trainer: trainer whose weights and data are written.
    folder: existing folder.
    num_steps: steps whose batches are written.
  """
  params = jax.device_get(trainer.params)
  llama.write_weights(folder, trainer.data.config, params)
  export_data(trainer.data, folder, num_steps)


def export_data(data: ours.Data, folder: str, num_steps: int) -> None:
  """Writes config.json, work.json and tokens.npy: the data without weights.

  `interleave.read_work` reads the last two.

  Args:
    data: data of a contender.
    folder: existing folder.
    num_steps: steps whose batches are written.
  """
  llama.write_config(folder, data.config)
  steps = range(num_steps)
  work = data.work(steps) | {
    "lengths": data.lengths.tolist(),
    "order": [data.loader.order(step).tolist() for step in steps],
    "num_steps": num_steps,
    "beta": workload.BETA,
    "learning_rate": workload.LEARNING_RATE,
  }
  path = pathlib.Path(folder)
  (path / "work.json").write_text(json.dumps(work))
  np.save(path / "tokens.npy", data.store.tokens)


def mkl_override(folder: str) -> dict[str, str]:
  """Builds a library that makes MKL treat AMD as Intel.

  Returns:
    Environment variables that load it; {} without a C compiler.
  """
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
  """Replaces the path of a Python in an option."""
  name, is_set, _ = argument.partition("_python=")
  return f"{name}_python=PYTHON" if is_set else argument


def parse() -> argparse.Namespace:
  """Parses the command line.

  Raises:
    SystemExit: there is no peer, or an option that the peers cannot take.
  """
  parser = argparse.ArgumentParser()
  workload.add_options(parser)
  parser.add_argument("--trl_python", default="")
  parser.add_argument("--tunix_python", default="")
  parser.add_argument(
    "--tunix_widths",
    default="",
    help="prompt and response, as in 384,512: adds Tunix padded to these",
  )
  interleave.add_options(parser, num_turns=5, steps_a_turn=4)
  parser.add_argument(
    "--reference", default="cached", choices=("cached", "frozen")
  )
  parser.add_argument("--table", default="", help="name of the JSON file")
  options = parser.parse_args()
  if not (options.trl_python or options.tunix_python):
    parser.error("give --trl_python, --tunix_python, or both")
  if options.tunix_python and options.reference == "cached":
    parser.error(
      "Tunix has no cached reference: --tunix_python requires"
      " --reference=frozen"
    )
  if options.tunix_widths and not options.tunix_python:
    parser.error("--tunix_widths requires --tunix_python")
  return options


def _shared_options(options: argparse.Namespace) -> list[str]:
  """Returns the options of the workload, as `benchmarks.ours` takes them."""
  names = ("seed", "batch_size", "num_groups", "max_tokens", "vocab_size")
  names += ("lengths", "equal_lengths")
  return [f"--{name}={getattr(options, name)}" for name in names]


def _trl(
  options: argparse.Namespace, folder: str, env: dict[str, str], head: str
) -> interleave.Contender:
  """Starts TRL, with its head on "all" positions or on "scored" ones."""
  patched = "" if head == "all" else ", head on responses"
  return interleave.Contender(
    f"TRL, {options.reference} reference{patched}",
    [
      *(options.trl_python, "-m", "benchmarks.trl_worker"),
      *(f"--model={folder}", f"--reference={options.reference}"),
      f"--head={head}",
    ],
    env=env | {"HF_HUB_OFFLINE": "1", "TQDM_DISABLE": "1"},
  )


def _tunix(
  options: argparse.Namespace, folder: str, widths: str
) -> interleave.Contender:
  """Starts Tunix, padded to `widths`, or to the longest of the data if ""."""
  padded = f", padded to {widths.replace(',', ' + ')}" if widths else ""
  return interleave.Contender(
    f"Tunix, {options.reference} reference{padded}",
    [
      *(options.tunix_python, "-m", "benchmarks.tunix_worker"),
      *(f"--model={folder}", f"--widths={widths}"),
    ],
  )


def _start_contenders(
  options: argparse.Namespace, folder: str, env: dict[str, str]
) -> list[interleave.Contender]:
  """Starts our contender, then those that the options ask for."""
  contenders = [
    interleave.ours(
      f"dpo_jax, {options.reference} reference",
      [*_shared_options(options), f"--reference={options.reference}"],
    )
  ]
  if options.trl_python:
    contenders += [_trl(options, folder, env, h) for h in ("all", "scored")]
  if options.tunix_python:
    contenders.append(_tunix(options, folder, ""))
    if options.tunix_widths:
      contenders.append(_tunix(options, folder, options.tunix_widths))
  return contenders


def main() -> None:
  options = parse()
  num_steps = 1 + options.steps_a_turn * (1 + options.num_turns)
  with tempfile.TemporaryDirectory() as folder:
    trainer = ours.Trainer(ours.parse(_shared_options(options)))
    export(trainer, folder, num_steps)
    env = mkl_override(folder)
    contenders = _start_contenders(options, folder, env)
    rows = interleave.measure(
      contenders, options, check=interleave.check_same_work
    )
  for contender, row in zip(contenders, rows, strict=True):
    row["dpo_jax_is_faster_by"] = interleave.times_as_fast(
      contenders[0], contender
    )
  _write_results(options, contenders, rows, is_mkl_forced=bool(env))


def _write_results(
  options: argparse.Namespace,
  contenders: Sequence[interleave.Contender],
  rows: Sequence[dict[str, Any]],
  *,
  is_mkl_forced: bool,
) -> None:
  pythons = {"TRL": options.trl_python, "Tunix": options.tunix_python}
  peers = [name for name, python in pythons.items() if python]
  number = 1 if options.trl_python else 2
  lengths = ""
  if options.equal_lengths:
    prompt, response = options.equal_lengths.split(",")
    lengths = f", prompts of {prompt} and responses of {response} tokens"
  if options.tunix_widths:
    lengths += f", Tunix also padded to {options.tunix_widths}"
  forced = "forced." if is_mkl_forced else "no."
  mkl = [f"MKL's fast path on AMD for torch: {forced}"]
  results.write(
    options.table or f"{number}_{'_'.join(peers).lower()}_{options.reference}",
    title=f"dpo_jax and {' and '.join(peers)}, {options.reference} reference"
    f"{lengths}",
    command=results.command("peers", map(_anonymous, sys.argv[1:])),
    rows=rows,
    notes=[
      f"Turns of {options.steps_a_turn} steps, {options.num_turns} each, one"
      " after the other; medians, quartiles in the JSON.",
      "Same weights, batches, float32 and AdamW: first loss and gradient norm"
      " agree to 1e-4, or nothing is timed.",
      *(mkl if options.trl_python else []),
      "CPU seconds are those of the process. They measure the work even where"
      " other processes load the machine, whose load is above.",
    ],
    extra={
      name: version
      for contender in contenders
      for name, version in contender.turns[-1].get("versions", {}).items()
    },
  )


if __name__ == "__main__":
  main()
