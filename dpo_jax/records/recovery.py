"""Puts the checkpoints of a workdir in order before a run resumes.

  adopts     a step that was committed when the run was killed, before its
             manifest was written
  moves      damaged steps to quarantine/, and those after a step to go back to
  refuses    to start again at step 0 where steps were saved and none is left

WORKDIR/saves.json says which save was begun last, and which is complete. It
outlives the checkpoints.
"""

import logging
import re

from etils import epath

from dpo_jax.records import manifest
from dpo_jax.records.metrics import cut_lines_after
from dpo_jax.records.resume import add_to_history
from dpo_jax.records.workdir import Workdir
from dpo_jax.system.files import is_remote, read_json, tree, write_json

_LOG = logging.getLogger(__name__)
_KEPT = 2  # steps in quarantine
# Orbax writes it last where a folder cannot be renamed.
_COMMITTED = "commit_success.txt"


def mark_begun(workdir: Workdir, step: int) -> None:
  """Records that the save of a step begins."""
  write_json(workdir.saves, _read_saves(workdir) | {"begun": step})


def mark_saved(workdir: Workdir, step: int) -> None:
  """Records that a step is saved and has its manifest."""
  write_json(workdir.saves, {"begun": step, "saved": step})


def recover(
  workdir: Workdir, *, step: int | None = None, may_restart: bool = False
) -> None:
  """Leaves only steps that a run may resume from, the right one as the latest.

  Damaged steps, and those after `step`, are moved to quarantine/, which keeps
  the latest two. Metrics, samples and log-probs of later steps than `step` are
  deleted.

  Args:
    workdir: run directory.
    step: step to go back to; None for the latest.
    may_restart: whether the run may start again at step 0 where no step is
      left.

  Raises:
    ValueError: no such step to go back to, or a step was saved and none is
      left.
  """
  saves = _read_saves(workdir)
  if "begun" in saves and saves["begun"] != saves.get("saved"):
    _adopt_last(workdir, saves["begun"])
  for folder in _step_folders(workdir):
    fault = manifest.verify(folder, run_id=workdir.run_id)
    if fault:
      target = _move_aside(workdir, folder)
      _LOG.warning(
        "checkpoint %s is not used: %s. Moved to %s", folder, fault, target
      )
  steps = sorted(int(folder.name) for folder in _step_folders(workdir))
  if step is not None:
    _go_back(workdir, step, steps)
  elif "saved" in saves:
    _check_not_lost(workdir, saves["saved"], steps, may_restart=may_restart)
  _clear_quarantine(workdir)


def _read_saves(workdir: Workdir) -> dict[str, int]:
  return read_json(workdir.saves) if workdir.saves.exists() else {}


def _step_folders(workdir: Workdir) -> list[epath.Path]:
  root = workdir.checkpoints
  if not root.exists():
    return []
  return sorted(f for f in root.iterdir() if f.name.isdecimal())


def _adopt_last(workdir: Workdir, step: int) -> None:
  """Writes the manifest that a kill right after the commit has prevented.

  Its digests are as good as those of a run that was not killed: both read the
  files that Orbax has committed.
  """
  folder = workdir.checkpoints / str(step)
  if not folder.exists() or (folder / manifest.MANIFEST).exists():
    return
  if is_remote(folder) and not (folder / _COMMITTED).exists():
    return
  manifest.write(folder, workdir.run_id)
  _LOG.info("%-11s step %d was saved when the run ended", "checkpoint", step)


def _go_back(workdir: Workdir, step: int, steps: list[int]) -> None:
  """Makes `step` the latest, and removes what was recorded after it.

  Later checkpoints are moved aside. Later lines of metrics.jsonl and
  samples.jsonl, and later files of eval_logps/, are deleted.

  Raises:
    ValueError: `step` is not one of `steps`.
  """
  if step not in steps:
    raise ValueError(
      f"resume.step={step}: {workdir.checkpoints} has the steps"
      f" {', '.join(map(str, steps)) or '(none)'}"
    )
  for later in steps[steps.index(step) + 1 :]:
    target = _move_aside(workdir, workdir.checkpoints / str(later))
    _LOG.warning("resume.step=%d: moved step %d to %s", step, later, target)
  cut_lines_after(workdir.metrics, step)
  cut_lines_after(workdir.samples, step)
  if workdir.eval_logps.exists():
    for path in tree(workdir.eval_logps):
      if path.stem.isdecimal() and int(path.stem) > step:
        path.unlink()
  mark_saved(workdir, step)


def _check_not_lost(
  workdir: Workdir, saved: int, steps: list[int], *, may_restart: bool
) -> None:
  latest = max(steps, default=0)
  if not steps and may_restart:
    add_to_history(workdir, {"restart": [f"step {saved} was saved"]})
  elif not steps:
    raise ValueError(
      f"{workdir} has saved step {saved}, and no step is left that could be"
      f" used: {workdir.checkpoints} holds none, {workdir.quarantine} what was"
      " moved there. Put a checkpoint back, choose another workdir, or start"
      " again at step 0 with --config.resume.allow=restart"
    )
  elif latest < saved:
    _LOG.warning(
      "step %d was saved and cannot be used: the run resumes from step %d",
      saved,
      latest,
    )


def _move_aside(workdir: Workdir, folder: epath.Path) -> epath.Path:
  """Moves a step to quarantine/STEP-NUMBER; the numbers ascend."""
  workdir.quarantine.mkdir(parents=True, exist_ok=True)
  number = max(map(_number, workdir.quarantine.iterdir()), default=-1) + 1
  target = workdir.quarantine / f"{folder.name}-{number}"
  folder.rename(target)
  return target


def _clear_quarantine(workdir: Workdir) -> None:
  """Deletes all but the latest steps that were moved aside.

  What a user has put there under another name stays.
  """
  if not workdir.quarantine.exists():
    return
  found = [path for path in workdir.quarantine.iterdir() if _number(path) >= 0]
  moved = sorted(found, key=_number)
  for folder in moved[:-_KEPT]:
    folder.rmtree()
    _LOG.info("deleted %s: the latest %d are kept", folder, _KEPT)


def _number(path: epath.Path) -> int:
  """Returns the number of a step that was moved aside; -1 of another path."""
  found = re.fullmatch(r"\d+-(\d+)", path.name)
  return int(found[1]) if found else -1
