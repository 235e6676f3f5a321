"""Orbax checkpoints, verified before they are used.

  WORKDIR/checkpoints/STEP/params      the policy
  WORKDIR/checkpoints/STEP/rest        step, optimizer, loss state, reference
  WORKDIR/checkpoints/STEP/manifest.json   sha256 of every file

Orbax commits a step atomically, but it does not notice a flipped bit in an
array file, and it takes any directory with a number for a checkpoint. So a step
counts once its manifest is written, and is restored only if every file agrees
with it. A damaged step is moved aside, and the step before it is used.
"""

from collections.abc import Mapping
import concurrent.futures
import hashlib
import itertools
import json
import logging
import math
import shutil
from typing import Any

from etils import epath
import jax
from jax.experimental import multihost_utils
import orbax.checkpoint as ocp

from dpo_jax.records.workdir import Workdir
from dpo_jax.system.files import write_json
from dpo_jax.trees import path_name
from dpo_jax.types import TrainState

_LOG = logging.getLogger(__name__)
_training = ocp.v1.training
_policies = _training.preservation_policies
_MANIFEST = "manifest.json"


class Checkpoints:
  """The checkpoints of one run."""

  def __init__(
    self,
    workdir: epath.PathLike | Workdir,
    *,
    keep: int,
    best_metric: str,
    best_is_lower: bool,
    is_reader: bool = False,
  ):
    """Opens the folder, moving aside what is damaged.

    Args:
      workdir: run directory.
      keep: number of latest steps to keep. With 1, a kill between the commit of
        a step and its manifest would leave none.
      best_metric: metric whose best step is kept too; "" for none.
      best_is_lower: whether a lower value of the metric is better.
      is_reader: whether only `params` are read, of a run that another process
        may be training: damaged and unfinished steps are skipped and left in
        place. A step is verified when it is asked for, `params` alone.
    """
    self._root = Workdir.at(workdir).checkpoints
    self._best_metric = best_metric
    self._best_is_lower = best_is_lower
    self._is_reader = is_reader
    self._faults: dict[int, str] = {}
    if not is_reader and jax.process_index() == 0:
      self._root.mkdir(parents=True, exist_ok=True)
      _quarantine_damaged(self._root)
    if jax.process_count() > 1:
      multihost_utils.sync_global_devices("checkpoints verified")
    self._checkpointer = _training.Checkpointer(
      self._root,
      preservation_policy=_policies.AnyPreservationPolicy(
        [
          _policies.LatestN(keep),
          _policies.BestN(
            get_metric_fn=self._merit,
            n=1,
            keep_checkpoints_without_metrics=False,
          ),
        ]
      ),
      cleanup_tmp_directories=not is_reader,
    )
    self._hasher = concurrent.futures.ThreadPoolExecutor(1)
    self._pending: tuple[int, Any] | None = None
    self._hashing: concurrent.futures.Future | None = None

  def _merit(self, metrics: dict[str, float]) -> float:
    value = metrics.get(self._best_metric, math.nan)
    if math.isnan(value):
      return -math.inf
    return -value if self._best_is_lower else value

  def _is_usable(self, step: int) -> bool:
    """Returns whether a reader can use a step."""
    if not self._is_reader:
      return True
    if step not in self._faults:
      folder = self._root / str(step)
      self._faults[step] = fault = verify(folder, part="params")
      if fault:
        _LOG.warning("checkpoint %s is not used: %s", folder, fault)
    return not self._faults[step]

  @property
  def steps(self) -> list[int]:
    """Committed steps, ascending."""
    found = sorted(c.step for c in self._checkpointer.checkpoints)
    return [step for step in found if self._is_usable(step)]

  @property
  def best_step(self) -> int | None:
    """Step with the best metric; the latest if none was measured."""

    def rank(checkpoint: Any) -> tuple[bool, float, int]:
      is_measured = bool(checkpoint.metrics)
      merit = self._merit(checkpoint.metrics) if is_measured else 0.0
      return is_measured, merit, checkpoint.step

    ranked = sorted(self._checkpointer.checkpoints, key=rank, reverse=True)
    return next((c.step for c in ranked if self._is_usable(c.step)), None)

  def save(self, step: int, state: TrainState, metrics: dict | None) -> None:
    """Starts a save; the state may be donated once this returns.

    Args:
      step: optimizer steps taken.
      state: state on the mesh.
      metrics: metrics that hold `best_metric`, or None.

    Raises:
      OSError: not enough room on the disk.
    """
    self.wait()
    _check_room(self._root, (state.params, _rest(state)))
    if metrics and self._best_metric and self._best_metric not in metrics:
      _LOG.warning(
        "checkpoint.best_metric=%r is not measured, so the latest step counts"
        " as the best. Measured: %s",
        self._best_metric,
        ", ".join(metrics),
      )
    response = self._checkpointer.save_checkpointables_async(
      step,
      {"params": state.params, "rest": _rest(state)},
      force=True,
      overwrite=step in self.steps,
      metrics=metrics or None,
    )
    if response is None:
      raise RuntimeError(f"the checkpoint of step {step} was not taken")
    self._pending = (step, response)

  def poll(self) -> None:
    """Finishes a save whose files are written, without waiting for it."""
    if self._pending and not self._checkpointer.is_saving_in_progress():
      self._finish()

  def wait(self) -> None:
    """Waits until the last save is committed and has its manifest."""
    if self._pending:
      self._finish()
    if self._hashing:
      self._hashing.result()
      self._hashing = None

  def _finish(self) -> None:
    step, response = self._pending
    self._pending = None
    response.result()
    if jax.process_index() == 0:
      self._hashing = self._hasher.submit(
        _write_manifest, self._root / str(step)
      )

  def restore(
    self, abstract_state: TrainState, *, step: int | None = None
  ) -> TrainState | None:
    """Reads a step onto the shardings of the target.

    Args:
      abstract_state: ShapeDtypeStructs with shardings.
      step: step to read; None: the latest.

    Returns:
      The state, or None if there is no checkpoint.

    Raises:
      ValueError: a checkpoint of another model or optimizer.
    """
    steps = self.steps
    if not steps:
      return None
    step = steps[-1] if step is None else step
    wanted = {"params": abstract_state.params, "rest": _rest(abstract_state)}
    found = self._checkpointer.checkpointables_metadata(step).metadata
    for part, tree in wanted.items():
      check_same_tree(tree, found[part], f"{self._root / str(step)}/{part}")
    loaded = self._checkpointer.load_checkpointables(step, wanted)
    return abstract_state.replace(params=loaded["params"], **loaded["rest"])

  def restore_params(self, abstract_params: Any, *, step: int) -> Any:
    """Reads the policy of a step alone.

    Args:
      abstract_params: ShapeDtypeStructs with shardings.
      step: step to read.

    Returns:
      The parameters.

    Raises:
      ValueError: a checkpoint of another model.
    """
    found = self._checkpointer.checkpointables_metadata(step).metadata
    where = f"{self._root / str(step)}/params"
    check_same_tree(abstract_params, found["params"], where)
    return self._checkpointer.load_checkpointables(
      step, {"params": abstract_params}
    )["params"]

  def close(self) -> None:
    """Finishes the last save and closes the folder."""
    self.wait()
    self._hasher.shutdown()
    self._checkpointer.close()


def open_checkpoints(
  workdir: Workdir, config: Mapping[str, Any], *, is_reader: bool = False
) -> Checkpoints:
  """Opens the checkpoints of a run with that config; see `Checkpoints`."""
  settings = config["checkpoint"]
  return Checkpoints(
    workdir,
    keep=settings["keep"],
    best_metric=settings["best_metric"],
    best_is_lower=settings["best_is_lower"],
    is_reader=is_reader,
  )


def _rest(state: TrainState) -> dict[str, Any]:
  parts = {
    "step": state.step,
    "opt_state": state.opt_state,
    "loss_state": state.loss_state,
    "ref_params": state.ref_params,
  }
  return {k: v for k, v in parts.items() if jax.tree.leaves(v)}


def check_same_tree(wanted: Any, found: Any, where: str) -> None:
  """Raises ValueError unless paths, shapes and dtypes agree.

  Orbax would cast a dtype silently.
  """

  def describe(tree):
    return {
      path_name(path): (tuple(leaf.shape), str(jax.numpy.dtype(leaf.dtype)))
      for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
    }

  ours, theirs = describe(wanted), describe(found)
  faults = [
    f"{name}: {theirs.get(name, 'nothing')} there, {ours.get(name, 'nothing')}"
    " wanted"
    for name in sorted(ours.keys() | theirs.keys())
    if ours.get(name) != theirs.get(name)
  ]
  if faults:
    raise ValueError(
      f"{where} holds another model or optimizer; {len(faults)} arrays differ,"
      " the first:\n  " + "\n  ".join(faults[:5])
    )


def _files(folder: epath.Path) -> dict[str, epath.Path]:
  found, folders = {}, [folder]
  while folders:
    for path in folders.pop().iterdir():
      if path.is_dir():
        folders.append(path)
      elif path.name != _MANIFEST:
        found[str(path.relative_to(folder))] = path
  return found


def _sha256(path: epath.Path) -> str:
  with path.open("rb") as file:
    return hashlib.file_digest(file, "sha256").hexdigest()


def _write_manifest(folder: epath.Path) -> None:
  hashes = {name: _sha256(path) for name, path in _files(folder).items()}
  write_json(folder / _MANIFEST, hashes, sort_keys=True)
  _LOG.info("%-11s step %s saved", "checkpoint", folder.name)


def verify(folder: epath.PathLike, part: str = "") -> str:
  """Returns what is wrong with a checkpoint's files, or "".

  Args:
    folder: folder of a step.
    part: "params" or "rest" to verify that one alone; "" for both.
  """
  others = {"params", "rest"} - {part} if part else set()
  folder = epath.Path(folder)
  if not (folder / _MANIFEST).exists():
    return "it has no manifest: its save was not finished"
  try:
    wanted = json.loads((folder / _MANIFEST).read_text())
  except ValueError:  # not JSON, or not even text
    return f"{_MANIFEST} is damaged"
  if not isinstance(wanted, dict) or not wanted:
    return f"{_MANIFEST} is damaged"
  found = _files(folder)
  for name in sorted(wanted.keys() | found.keys()):
    if name.partition("/")[0] in others:
      continue
    if name not in found:
      return f"{name} is missing"
    if name not in wanted:
      return f"{name} is not in {_MANIFEST}"
    digest = wanted[name]
    if _sha256(found[name]) != digest:
      return f"{name} is damaged"
  return ""


def _damaged(root: epath.Path) -> dict[epath.Path, str]:
  """Returns the folders of damaged steps, and what is wrong with each."""
  if not root.exists():
    return {}
  folders = sorted(f for f in root.iterdir() if f.name.isdecimal())
  faults = {folder: verify(folder) for folder in folders}
  return {folder: fault for folder, fault in faults.items() if fault}


def _quarantine_damaged(root: epath.Path) -> None:
  for folder, fault in _damaged(root).items():
    aside = root.parent / "quarantine"
    aside.mkdir(parents=True, exist_ok=True)
    taken = {path.name for path in aside.iterdir()}
    names = (f"{folder.name}-{i}" for i in itertools.count())
    target = aside / next(name for name in names if name not in taken)
    folder.rename(target)
    _LOG.warning(
      "checkpoint %s is not used: %s. Moved to %s; the step before it is"
      " used instead",
      folder,
      fault,
      target,
    )


def _check_room(root: epath.Path, arrays: Any) -> None:
  try:
    free = shutil.disk_usage(root).free
  except OSError:  # not a local path; object stores have no capacity limit
    return
  needed = sum(x.nbytes for x in jax.tree.leaves(arrays))
  if needed > free:
    raise OSError(
      f"a checkpoint takes {needed:,} bytes, and {root} has {free:,} free:"
      " make room, or lower checkpoint.keep"
    )
