"""Orbax checkpoints, verified before they are used.

  WORKDIR/checkpoints/STEP/params         the policy
  WORKDIR/checkpoints/STEP/rest           step, optimizer, loss state, reference
  WORKDIR/checkpoints/STEP/manifest.json  see `records.manifest`

A run that opens them moves damaged steps aside first, see `records.recovery`.
"""

from collections.abc import Callable, Mapping
import concurrent.futures
import logging
import math
import shutil
from typing import Any

from etils import epath
import jax
import orbax.checkpoint as ocp

from dpo_jax.parallel import hosts, peers
from dpo_jax.records import arrays, manifest, recovery
from dpo_jax.records.workdir import Workdir
from dpo_jax.types import TrainState

_LOG = logging.getLogger(__name__)
_training = ocp.v1.training
_policies = _training.preservation_policies


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
    part: str = "params",
    go_back_to: int | None = None,
    may_restart: bool = False,
    check: Callable[[epath.Path], None] = lambda folder: None,
  ):
    """Opens the folder; see `recovery.recover` for what it does to the steps.

    Args:
      workdir: run directory.
      keep: number of latest steps to keep.
      best_metric: metric whose best step is kept too; "" for none.
      best_is_lower: whether a lower value of the metric is better.
      is_reader: whether steps are only read, of a run that another process may
        be training: damaged and unfinished steps are skipped and left in place.
        A step is verified when it is asked for.
      part: part that a reader verifies, "" for both.
      go_back_to: step that becomes the latest; None for the latest there is.
      may_restart: whether the run may start again at step 0 where no step is
        left.
      check: see `recovery.recover`.

    Raises:
      ValueError: see `recovery.recover`.
    """
    self._workdir = Workdir.at(workdir)
    self._root = self._workdir.checkpoints
    self._best_metric = best_metric
    self._best_is_lower = best_is_lower
    self._is_reader, self._part = is_reader, part
    self._faults: dict[int, str] = {}
    if not is_reader:
      options = dict(step=go_back_to, may_restart=may_restart, check=check)
      hosts.together(lambda: self._prepare(**options))
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
    self._finisher = concurrent.futures.ThreadPoolExecutor(1)
    self._saving: concurrent.futures.Future | None = None

  def _prepare(self, **options: Any) -> None:
    if jax.process_index() == 0:
      self._root.mkdir(parents=True, exist_ok=True)
      recovery.recover(self._workdir, **options)

  def _merit(self, metrics: dict[str, float]) -> float:
    value = metrics.get(self._best_metric, math.nan)
    if math.isnan(value):
      return -math.inf
    return -value if self._best_is_lower else value

  def _is_usable(self, step: int) -> bool:
    """Returns whether a step can be read; a reader verifies each step once."""
    if not self._is_reader:
      return True
    if step not in self._faults:
      folder = self._root / str(step)
      self._faults[step] = fault = manifest.verify(
        folder, part=self._part, run_id=self._workdir.run_id
      )
      if fault:
        _LOG.warning("checkpoint %s is not used: %s", folder, fault)
    return not self._faults[step]

  @property
  def steps(self) -> list[int]:
    """Committed steps, ascending; of a reader, those that are not damaged."""
    found = sorted(c.step for c in self._checkpointer.checkpoints)
    return [step for step in found if self._is_usable(step)]

  @property
  def best_step(self) -> int | None:
    """Step with the best metric, the later of two equals; None without steps.

    Steps without the metric are equals that come after the others, and steps
    that were saved without any metrics come last. If the metric is "", the
    latest step.
    """

    def rank(checkpoint: Any) -> tuple[bool, float, int]:
      is_measured = bool(checkpoint.metrics and self._best_metric)
      merit = self._merit(checkpoint.metrics) if is_measured else 0.0
      return is_measured, merit, checkpoint.step

    ranked = sorted(self._checkpointer.checkpoints, key=rank, reverse=True)
    return next((c.step for c in ranked if self._is_usable(c.step)), None)

  def save(self, step: int, state: TrainState, metrics: dict | None) -> None:
    """Starts a save; the state may be donated once this returns.

    Waits for the save before it, and raises what that has failed with.

    Args:
      step: optimizer steps taken.
      state: state on the mesh.
      metrics: metrics that hold `best_metric`, or None.

    Raises:
      OSError: not enough room on the disk.
    """
    self.wait()
    _check_room(self._root, arrays.parts(state))
    if jax.process_index() == 0:
      recovery.mark_begun(self._workdir, step)
    if metrics and self._best_metric and self._best_metric not in metrics:
      _LOG.warning(
        "checkpoint.best_metric=%r is not measured, so the latest step counts"
        " as the best. Measured: %s",
        self._best_metric,
        ", ".join(metrics),
      )
    response = self._checkpointer.save_checkpointables_async(
      step,
      arrays.parts(state),
      force=True,
      overwrite=step in self.steps,
      metrics=metrics or None,
    )
    if response is None:
      raise RuntimeError(f"the checkpoint of step {step} was not taken")
    self._saving = self._finisher.submit(self._finish, step, response)

  def _finish(self, step: int, response: Any) -> None:
    """Waits for the commit, and writes the manifest at once."""
    try:
      response.result()
    except Exception as error:  # Orbax, tensorstore and OSError alike
      raise RuntimeError(
        f"the checkpoint of step {step} is not saved, and those before it stay:"
        f" {error}"
      ) from error
    if jax.process_index() == 0:
      # Raises if a part is missing.
      arrays.read_metadata(self._root / str(step))
      manifest.write(self._root / str(step), self._workdir.run_id)
      recovery.mark_saved(self._workdir, step)
      peers.tell_saved(step)
      _LOG.info("%-11s step %d saved", "checkpoint", step)

  @property
  def is_saving(self) -> bool:
    """Whether the last save is not complete yet."""
    return self._saving is not None and not self._saving.done()

  def poll(self) -> None:
    """Raises what the last save has failed with, without waiting for it."""
    if not self.is_saving:
      self.wait()

  def wait(self) -> None:
    """Waits for the last save and its manifest; raises what it failed with."""
    if self._saving is not None:
      self._saving.result()
      self._saving = None

  def restore(
    self, abstract_state: TrainState, *, step: int | None = None
  ) -> TrainState | None:
    """Reads a step onto the shardings of `abstract_state`.

    Args:
      abstract_state: ShapeDtypeStructs with shardings.
      step: step to read; None: the latest.

    Returns:
      The state, or None if there is no checkpoint. Frozen parameters, which
      no checkpoint holds, are still those of `abstract_state`.

    Raises:
      ValueError: a checkpoint of another model or optimizer.
    """
    steps = self.steps
    if not steps:
      return None
    step = steps[-1] if step is None else step
    arrays.check_fits(self._root / str(step), abstract_state)
    loaded = self._load(step, arrays.parts(abstract_state))
    return abstract_state.replace(params=loaded["params"], **loaded["rest"])

  def restore_without_optimizer(
    self, abstract_state: TrainState, *, step: int
  ) -> TrainState:
    """Reads what an evaluation needs of a step: all but the optimizer's state.

    Args:
      abstract_state: ShapeDtypeStructs with shardings.
      step: step to read.

    Returns:
      The state; its `opt_state` and `spikes` are (), and its frozen parameters
      still those of `abstract_state`.

    Raises:
      ValueError: a checkpoint of another model.
    """
    bare = abstract_state.replace(opt_state=(), spikes=())
    wanted = arrays.parts(bare)
    found = arrays.read_metadata(self._root / str(step))
    rest = {k: found["rest"][k] for k in wanted["rest"] if k in found["rest"]}
    where = f"{self._root / str(step)}"
    arrays.check_same_tree(wanted["params"], found["params"], f"{where}/params")
    arrays.check_same_tree(wanted["rest"], rest, f"{where}/rest")
    context = ocp.v1.Context()
    context.pytree.loading.partial_load = True
    with context:
      loaded = self._load(step, wanted)
    return bare.replace(params=loaded["params"], **loaded["rest"])

  def restore_params(self, abstract_params: Any, *, step: int) -> Any:
    """Reads the trained parameters of a step alone.

    Args:
      abstract_params: their ShapeDtypeStructs, with shardings.
      step: step to read.

    Returns:
      The parameters.

    Raises:
      ValueError: a checkpoint of another model.
    """
    folder = self._root / str(step)
    found = arrays.read_metadata(folder, ("params",))["params"]
    arrays.check_same_tree(abstract_params, found, f"{folder}/params")
    return self._load(step, {"params": abstract_params})["params"]

  def _load(self, step: int, wanted: Mapping[str, Any]) -> dict[str, Any]:
    folder = self._root / str(step)
    with arrays.naming(folder, is_resuming=not self._is_reader):
      return self._checkpointer.load_checkpointables(step, wanted)

  def close(self) -> None:
    """Finishes the last save and closes the folder."""
    self.wait()
    self._finisher.shutdown()
    self._checkpointer.close()


def open_checkpoints(
  workdir: Workdir, config: Mapping[str, Any], **options: Any
) -> Checkpoints:
  """Opens the checkpoints of a run with that config.

  Args:
    workdir: run directory.
    config: resolved.
    **options: other options of `Checkpoints`.
  """
  settings = config["checkpoint"]
  return Checkpoints(
    workdir,
    keep=settings["keep"],
    best_metric=settings["best_metric"],
    best_is_lower=settings["best_is_lower"],
    **options,
  )


def _check_room(root: epath.Path, trees: Any) -> None:
  try:
    free = shutil.disk_usage(root).free
  except OSError:  # not a local path; object stores have no capacity limit
    return
  needed = sum(x.nbytes for x in jax.tree.leaves(trees))
  if needed > free:
    raise OSError(
      f"a checkpoint takes {needed:,} bytes, and {root} has {free:,} free:"
      " make room, or lower checkpoint.keep"
    )
