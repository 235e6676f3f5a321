"""The manifest of a checkpoint: a sha256 of every file of a step.

Orbax commits a step atomically, but it does not notice a flipped bit in an
array file, and it takes any directory with a number for a checkpoint. So a step
counts once its manifest is written, and only while every file agrees with it.
The manifest covers `run.txt` too: the run that the step belongs to, and its
number, which a copied or renamed folder would belie.
"""

import hashlib
import json

from etils import epath

from dpo_jax.system import files

MANIFEST = "manifest.json"
PARTS = ("params", "rest")
_RUN = "run.txt"


def write(folder: epath.Path, run_id: str = "") -> None:
  """Writes run.txt, then the manifest: a sha256 of every file of a step.

  The caller must wait until Orbax has committed the step.

  Args:
    folder: folder of the step.
    run_id: `Workdir.run_id`, for run.txt; "" writes none, for a run from before
      runs had names.
  """
  if run_id:
    files.write_atomically(folder / _RUN, f"{run_id}\n{folder.name}\n")
  digests = {name: _sha256(path) for name, path in _members(folder).items()}
  files.write_json(folder / MANIFEST, digests, sort_keys=True)


def verify(folder: epath.PathLike, part: str = "", run_id: str = "") -> str:
  """Returns what is wrong with a step, or "".

  Args:
    folder: folder of the step.
    part: "params" or "rest" to verify that one alone; "" for both.
    run_id: `Workdir.run_id`; "" takes a step of any run. A step without run.txt
      is taken in any case.
  """
  others = set(PARTS) - {part} if part else set()
  folder = epath.Path(folder)
  if not (folder / MANIFEST).exists():
    return "it has no manifest: its save was not finished"
  try:
    wanted = json.loads((folder / MANIFEST).read_text())
  except (ValueError, RecursionError):  # not JSON, or not even text
    return f"{MANIFEST} is damaged"
  if not isinstance(wanted, dict) or not wanted:
    return f"{MANIFEST} is damaged"
  found = _members(folder)
  for name in sorted(wanted.keys() | found.keys()):
    if name.partition("/")[0] in others:
      continue
    if name not in found:
      return f"{name} is missing"
    if name not in wanted:
      return f"{name} is not in {MANIFEST}"
    if _sha256(found[name]) != wanted[name]:
      return f"{name} is damaged"
  if _RUN in found:
    name, step = _read_run(folder)
    if run_id and name != run_id:
      return f"it is a step of another run, {name[:12]}"
    if step != folder.name:
      return f"it is a copy of step {step}"
  return ""


def owner(folder: epath.Path) -> str:
  """Returns the name of the run of a step, which is not verified; or ""."""
  try:
    return _read_run(folder)[0]
  except (OSError, ValueError):  # not there, or not two words
    return ""


def _read_run(folder: epath.Path) -> tuple[str, str]:
  name, step = (folder / _RUN).read_text().split()
  return name, step


def _members(folder: epath.Path) -> dict[str, epath.Path]:
  return {
    str(path.relative_to(folder)): path
    for path in files.tree(folder)
    if path.name != MANIFEST
  }


def _sha256(path: epath.Path) -> str:
  with path.open("rb") as file:
    return hashlib.file_digest(file, "sha256").hexdigest()
