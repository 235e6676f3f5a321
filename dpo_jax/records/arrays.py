"""The arrays of a checkpoint, compared with a state before they are read."""

from collections.abc import Collection, Iterator
import contextlib
from typing import Any

from etils import epath
import jax
import orbax.checkpoint as ocp

from dpo_jax.records import manifest
from dpo_jax.trees import path_name
from dpo_jax.types import TrainState


def parts(state: TrainState) -> dict[str, Any]:
  """Returns the parts of a checkpoint of a state, or of an abstract one."""
  rest = {
    "step": state.step,
    "opt_state": state.opt_state,
    "loss_state": state.loss_state,
    "ref_params": state.ref_params,
    "spikes": state.spikes,
  }
  rest = {k: v for k, v in rest.items() if jax.tree.leaves(v)}
  return {"params": state.params, "rest": rest}


@contextlib.contextmanager
def naming(folder: epath.Path, *, is_resuming: bool) -> Iterator[None]:
  """Names a step in an error of Orbax.

  Args:
    folder: folder of the step.
    is_resuming: whether a run resumes from it, which is told of an earlier one.

  Raises:
    ValueError: the error of the block; one of JAX, such as that of a device
      whose memory is full, is raised as it is.
  """
  try:
    yield
  except jax.errors.JaxRuntimeError:
    raise
  except Exception as error:  # Orbax, tensorstore and KeyError alike
    numbers = [
      int(f.name) for f in folder.parent.iterdir() if f.name.isdecimal()
    ]
    earlier = [step for step in numbers if step < int(folder.name)]
    message = f"{folder} cannot be read: {error!r:.300}"
    if earlier and is_resuming:
      message += (
        f". If that stays so, --config.resume.step={max(earlier)} resumes from"
        " the checkpoint before it"
      )
    raise ValueError(message) from error


def read_metadata(
  folder: epath.Path,
  needed: Collection[str] = manifest.PARTS,
  *,
  is_resuming: bool = False,
) -> dict[str, Any]:
  """Reads paths, shapes and dtypes of a step's arrays, by part.

  Args:
    folder: folder of the step.
    needed: parts that it must have.
    is_resuming: see `naming`.

  Raises:
    ValueError: it lacks a part, or cannot be read.
  """
  with naming(folder, is_resuming=is_resuming):
    found = ocp.v1.checkpointables_metadata(folder).metadata
    return {part: found[part] for part in needed}


def check_fits(folder: epath.Path, abstract_state: TrainState) -> None:
  """Checks that a step to resume from holds the arrays of a state.

  Args:
    folder: folder of the step.
    abstract_state: ShapeDtypeStructs.

  Raises:
    ValueError: a checkpoint of another model or optimizer, or a damaged one.
  """
  found = read_metadata(folder, is_resuming=True)
  for part, tree in parts(abstract_state).items():
    check_same_tree(tree, found[part], f"{folder}/{part}")


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
