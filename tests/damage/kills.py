"""Killed runs: resumed ones end with the bits of one that was not killed."""

import functools
import json
import pathlib
import signal
import tempfile
import time
from typing import Any, NamedTuple

import jax
import numpy as np
import orbax.checkpoint as ocp

from dpo_jax.judges.classifier import Classifier
from tests import faults
from tests.damage import files

_EVERY = 3  # steps from checkpoint to checkpoint
_STEPS = 15
_COMMON = {
  "total_steps": _STEPS,
  "checkpoint__every_steps": _EVERY,
  "data__eval_fraction": 0.2,
}
VARIANTS = ("cached", "frozen", "lora", "on-policy")
_SETTINGS: dict[str, dict[str, Any]] = {
  "cached": {"reference__kind": "cached"},
  "frozen": {"reference__kind": "frozen"},
  "lora": {"lora__rank": 2},
  "on-policy": {
    "online__kind": "pairs",
    "online__every_steps": 4,
    "online__max_response_tokens": 16,
    "data__eval_fraction": 0.0,
    "optimizer__learning_rate": 3e-3,
  },
}
# Moments to kill at: events of files, see `child.arm`.
_STEP = r"checkpoints/\d+"
_AIMS = {
  "any time": "",
  "in a save": rf"os.mkdir .*{_STEP}\.",
  "between commit and manifest": rf"open .*{_STEP}/manifest.json.*tmp",
  "before a manifest counts": rf"os.rename .*{_STEP}/manifest.json$",
  "first file of a save": rf"open .*{_STEP}\.",
  "metrics opened": r"open .*/metrics.jsonl",
  "token store": r"(open|os.mkdir) .*/tokens/writing_",
  "token store committed": r"os.rename .*/tokens/writing_",
  "reference cached": r"(open|os.rename) .*/reference/",
  "compiling": r"(open|os.rename) .*/compiled/jit_",
  "samples kept": r"(open|os.rename) .*/online/",
}
_VARIANTS_OF_AIM = {
  "reference cached": ("cached",),
  "samples kept": ("on-policy",),
}
# Ends of the names of metrics that the clock decides.
CLOCKS = ("per_second", "wait_fraction")
# Code of a child.
_CHILD = "import sys; from tests.damage import child; child.main(*sys.argv[1:])"
_END_S = 900  # most seconds of a child


class Ended(NamedTuple):
  """How a child ended: exit code, output and seconds."""

  code: int
  output: str
  seconds: float


def _settings(variant: str, folder: pathlib.Path, seed: int) -> dict[str, Any]:
  """Returns overrides of `tiny.make_config`; folder: of what runs share."""
  settings = {"seed": seed, "data__cache_dir": str(folder / "tokens")}
  if variant == "on-policy":
    settings["online__judge"] = write_judge(folder)
  return _COMMON | _SETTINGS[variant] | settings


def write_judge(folder: pathlib.Path) -> str:
  """Writes a judge of responses; returns its spelling in a config."""
  path = folder / "judge.npz"
  rng = np.random.default_rng(0)
  Classifier(rng.normal(0, 2, 4096).astype(np.float32), 0.0).write(path)
  return f"classifier:{path}"


def _run(
  workdir: pathlib.Path,
  settings: dict[str, Any],
  aim: dict[str, Any],
  **variables: str,
) -> Ended:
  """Starts a run or resumes it, and waits for its end."""
  begin = time.monotonic()
  process = faults.spawn(
    _CHILD,
    str(workdir),
    json.dumps(settings),
    json.dumps(aim),
    JAX_DISABLE_MOST_OPTIMIZATIONS="1",
    **variables,
  )
  try:
    output = process.communicate(timeout=_END_S)[0]
  finally:
    if process.poll() is None:
      process.kill()
      process.wait()
  return Ended(process.returncode, output, time.monotonic() - begin)


def arrays(workdir: pathlib.Path, step: int = _STEPS) -> dict[str, bytes]:
  """Returns all arrays of a checkpoint by path: dtype and bytes."""
  tree = ocp.v1.load_checkpointables(workdir / "checkpoints" / str(step))
  parts = {"params": tree["params"], "rest": tree["rest"]}
  return {
    jax.tree_util.keystr(path): f"{leaf.dtype} ".encode()
    + np.asarray(leaf).tobytes()
    for path, leaf in jax.tree_util.tree_leaves_with_path(parts)
  }


def _rows(workdir: pathlib.Path) -> list[dict[str, Any]]:
  """Reads whole lines of metrics.jsonl, without what the clock decides."""
  path = workdir / "metrics.jsonl"
  text = path.read_text() if path.exists() else ""
  rows = [json.loads(x) for x in text.splitlines(True) if x.endswith("\n")]
  return [
    {k: v for k, v in row.items() if not k.endswith(CLOCKS)} for row in rows
  ]


def metrics(workdir: pathlib.Path) -> dict[tuple[str, int], Any] | None:
  """Returns the metrics by split and step; None if a repeated step differs."""
  by_step: dict[tuple[str, int], Any] = {}
  for row in _rows(workdir):
    if row["split"] == "resumed":  # a mark of each start
      continue
    if by_step.setdefault((row["split"], row["step"]), row) != row:
      return None
  return by_step


def _lost(workdir: pathlib.Path) -> int:
  """Returns how many steps of a killed run will be taken again."""
  taken = [row["step"] for row in _rows(workdir) if row["split"] == "train"]
  names = [path.name for path in (workdir / "checkpoints").glob("*")]
  # A step that is committed counts, with its manifest or without.
  saved = [int(name) for name in names if name.isdecimal()]
  return max(taken, default=0) - max(saved, default=0)


@functools.cache
def _whole(variant: str) -> tuple[pathlib.Path, float]:
  """Trains a run that is not killed, once in a process; and its seconds."""
  folder = pathlib.Path(tempfile.mkdtemp())
  run = folder / "run"
  ended = _run(run, _settings(variant, folder, seed=0), {})
  assert ended.code == 0, ended.output
  return run, ended.seconds


def _draw_aim(
  rng: np.random.Generator, variant: str, seconds: float
) -> tuple[str, dict[str, Any]]:
  """Returns the name of a moment, and the arguments of `child.arm`."""
  names = [n for n in _AIMS if variant in _VARIANTS_OF_AIM.get(n, VARIANTS)]
  name = "any time" if rng.random() < 0.3 else files.pick(rng, names)
  count = 1 + int(rng.integers(3))
  delay_s = 0.0 if rng.random() < 0.5 else float(rng.exponential(0.05))
  if name == "any time":
    delay_s = float(rng.uniform(0.0, seconds))
  return name, {"pattern": _AIMS[name], "count": count, "delay_s": delay_s}


def _kill_and_compare(
  rng: np.random.Generator, folder: pathlib.Path, variant: str, seed: int
) -> tuple[str, dict[str, Any]]:
  """Kills a run up to three times, lets it finish, and compares the bits."""
  whole, seconds = _whole(variant)
  workdir, settings = folder / "run", _settings(variant, folder, seed)
  detail: dict[str, Any] = {"variant": variant, "kills": [], "lost": []}
  for _ in range(1 + int(rng.integers(3))):
    name, aim = _draw_aim(rng, variant, seconds)
    # Programs are compiled again where a kill is to hit that.
    own = {"JAX_COMPILATION_CACHE_DIR": str(folder / "compiled")}
    ended = _run(workdir, settings, aim, **own if name == "compiling" else {})
    if ended.code == 0:
      break
    if ended.code != -signal.SIGKILL:
      return "wrong, not resumed", detail | {"output": ended.output[-2000:]}
    detail["kills"].append(name)
    detail["lost"].append(_lost(workdir))
  ended = _run(workdir, settings, {})
  if ended.code:
    return "wrong, not resumed", detail | {"output": ended.output[-2000:]}
  if metrics(workdir) != metrics(whole):
    return "wrong, other metrics", detail
  if arrays(workdir) != arrays(whole):
    return "wrong, other bits", detail
  if max(detail["lost"], default=0) > _EVERY:
    return "same bits, more than an interval lost", detail
  return "same bits", detail


def kills(
  rng: np.random.Generator, folder: pathlib.Path, variant: str
) -> tuple[str, dict[str, Any]]:
  """Kills a run of a variant, resumes it, and compares it with a whole one."""
  return _kill_and_compare(rng, folder, variant, seed=0)


def control(
  rng: np.random.Generator, folder: pathlib.Path
) -> tuple[str, dict[str, Any]]:
  """Compares a killed run of another seed, which must not be the same."""
  outcome, detail = _kill_and_compare(rng, folder, VARIANTS[0], seed=1)
  is_caught = outcome in ("wrong, other metrics", "wrong, other bits")
  is_caught &= arrays(folder / "run") != arrays(_whole(VARIANTS[0])[0])
  return ("control, caught" if is_caught else "wrong, control missed"), detail
