"""Puts the checkpoints of a workdir in order before a run resumes.

  adopts     a step that was committed when the run was killed, before its
             manifest was written
  moves      damaged steps to quarantine/, and those after a step to go back to
  refuses    to start again at step 0 where steps were saved and none is left

WORKDIR/saves.json says which save was begun last, and which is complete. It
outlives the checkpoints.
"""

from collections.abc import Callable, Mapping
import logging
import re

from etils import epath

from dpo_jax.records import manifest
from dpo_jax.records.history import add_to_history
from dpo_jax.records.lines import cut_lines_after
from dpo_jax.records.metrics import check_lines
from dpo_jax.records.workdir import Workdir
from dpo_jax.system.files import read_json, tree, write_json
from dpo_jax.system.inputs import is_remote

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
  workdir: Workdir,
  *,
  step: int | None = None,
  may_restart: bool = False,
  check: Callable[[epath.Path], None] = lambda folder: None,
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
    check: given the folder of the step that the run resumes from, raises
      ValueError if it may not; nothing is deleted or cut then.

  Raises:
    ValueError: no such step to go back to; a step was saved and none is left;
      the checkpoints of another run; or a damaged line of metrics or samples.
  """
  saves = _read_saves(workdir)
  check_lines(workdir)
  _check_owner(workdir)
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
  if step is not None and step not in steps:
    raise ValueError(
      f"resume.step={step}: {workdir.checkpoints} has the steps"
      f" {', '.join(map(str, steps)) or '(none)'}"
    )
  if steps:
    check(workdir.checkpoints / str(steps[-1] if step is None else step))
  if step is not None:
    _go_back(workdir, step, steps)
  else:
    _check_not_lost(workdir, saves, steps, may_restart=may_restart)
  _clear_quarantine(workdir)


def _read_saves(workdir: Workdir) -> dict[str, int]:
  found = read_json(workdir.saves) if workdir.saves.exists() else {}
  if not all(type(step) is int for step in found.values()):
    raise ValueError(
      f"{workdir.saves} is damaged: {found} must hold numbers of steps. Restore"
      " it from a copy"
    )
  return found


def _check_owner(workdir: Workdir) -> None:
  """Checks that workdir.json names the run of the checkpoints.

  If it is missing, it is written again: every step names its run.

  Raises:
    ValueError: every step is of another run.
  """
  owners = {manifest.owner(folder) for folder in _step_folders(workdir)}
  if not workdir.run_id and len(owners - {""}) == 1:
    [name] = owners - {""}
    workdir.write_name(name)
    _LOG.warning("%s has the name of its run from its checkpoints", workdir)
  elif workdir.run_id and owners and not owners & {"", workdir.run_id}:
    theirs = ", ".join(name[:12] for name in sorted(owners))
    raise ValueError(
      f"{workdir} is the folder of the run {workdir.run_id[:12]}, and all its"
      f" checkpoints are of {theirs}: restore its workdir.json, or the"
      " checkpoints, from a copy"
    )


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
  has_parts = all((folder / part).is_dir() for part in manifest.PARTS)
  if not has_parts or (folder / manifest.MANIFEST).exists():
    return
  if is_remote(folder) and not (folder / _COMMITTED).exists():
    return
  manifest.write(folder, workdir.run_id)
  _LOG.info("%-11s step %d was saved when the run ended", "checkpoint", step)


def _go_back(workdir: Workdir, step: int, steps: list[int]) -> None:
  """Makes `step` the latest, and removes what was recorded after it.

  Later checkpoints are moved aside. Later lines of metrics.jsonl and
  samples.jsonl, and later files of eval_logps/, are deleted.
  """
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
  workdir: Workdir,
  saves: Mapping[str, int],
  steps: list[int],
  *,
  may_restart: bool,
) -> None:
  """Checks that a run which has saved steps has one left.

  A run that has is told by saves.json. If that is gone, it is told by its
  finished.json, or by steps in quarantine/.

  Raises:
    ValueError: none is left, and the run may not start again.
  """
  saved, latest = saves.get("saved", 0), max(steps, default=0)
  has_saved = "saved" in saves
  if not saves:
    has_saved = workdir.finished.exists() or bool(_moved(workdir))
  if has_saved and not steps:
    what = f"step {saved}" if saved else "steps"
    if not may_restart:
      raise ValueError(
        f"{workdir} has saved {what}, and no step is left that could be used:"
        f" {workdir.checkpoints} holds none, {workdir.quarantine} what was"
        " moved there. Put a checkpoint back, choose another workdir, or start"
        " again at step 0 with --config.resume.allow=restart"
      )
    add_to_history(workdir, {"restart": [f"{what} was saved"]})
  elif latest < saved:
    _LOG.warning(
      "step %d was saved and cannot be used: the run resumes from step %d",
      saved,
      latest,
    )


def _move_aside(workdir: Workdir, folder: epath.Path) -> epath.Path:
  """Moves a step to quarantine/STEP-NUMBER; the numbers ascend."""
  workdir.quarantine.mkdir(parents=True, exist_ok=True)
  number = max(map(_number, _moved(workdir)), default=-1) + 1
  target = workdir.quarantine / f"{folder.name}-{number}"
  folder.rename(target)
  return target


def _clear_quarantine(workdir: Workdir) -> None:
  """Deletes all but the latest steps that were moved aside.

  What a user has put there under another name stays.
  """
  for folder in _moved(workdir)[:-_KEPT]:
    folder.rmtree()
    _LOG.info("deleted %s: the latest %d are kept", folder, _KEPT)


def _moved(workdir: Workdir) -> list[epath.Path]:
  """Returns the steps in quarantine/, in the order in which they came."""
  if not workdir.quarantine.exists():
    return []
  found = [path for path in workdir.quarantine.iterdir() if _number(path) >= 0]
  return sorted(found, key=_number)


def _number(path: epath.Path) -> int:
  """Returns the number of a step that was moved aside; -1 of another path."""
  found = re.fullmatch(r"\d+-(\d+)", path.name)
  return int(found[1]) if found else -1
