"""Steps that are not finite: found, blamed on groups, and written to a file.

  WORKDIR/nonfinite/STEP.npz   batch/FIELD of `Batch`, sequences/FIELD of
                               `Sequences`, loss_state/NAME, and of each group
                               loss and gradient_weight
  WORKDIR/nonfinite/STEP.json  the same for people: what is not finite, and each
                               group with its file and line

Groups are in the order of the batch, flattened: B = R * G.
"""

from collections.abc import Callable, Mapping, Sequence
import dataclasses
import logging
import math
from typing import Any, Protocol

from etils import epath
import jax
import jax.numpy as jnp
import numpy as np

from dpo_jax.losses import Objective, WeightedSum
from dpo_jax.system.files import read_arrays, write_arrays, write_json
from dpo_jax.training.setup import Run
from dpo_jax.training.step import LARGEST_LOG_RATIO, LossInputs
from dpo_jax.training.stops import NonFiniteError
from dpo_jax.trees import path_name
from dpo_jax.types import Batch, Sequences

_LOG = logging.getLogger(__name__)
_NUM_NAMED = 8  # groups in a message
# Fields of Sequences through which a loss reaches the parameters.
_TRAINED = (
  *("logps", "head_logps", "sampled_logps", "complement_logps", "kl"),
  *("values", "token_logps", "token_values"),
)


class Addresses(Protocol):
  """A loader that knows where its groups come from."""

  def addresses(self, example_ids: Any) -> list[str]: ...


@dataclasses.dataclass(frozen=True)
class Step:
  """A step that was taken, on the devices.

  Attributes:
    number: steps taken, this one included.
    batch: its batch.
    metrics: its metrics.
    inputs: sequences and state that its loss was computed from.
  """

  number: int
  batch: Batch
  metrics: Mapping[str, jax.Array]
  inputs: LossInputs


def check(
  run: Run, loader: Addresses, step: Step, advice: Callable[[int], str]
) -> dict[str, np.ndarray]:
  """Fetches the metrics of a step, and checks that they are finite.

  A step that is not finite is written to the workdir, see `explain`. A step
  that was skipped is logged.

  Args:
    run: run.
    loader: made the batch.
    step: step that was taken.
    advice: gives the end of an error's message, from the number of steps whose
      parameters are at fault.

  Returns:
    The metrics by name, numpy.

  Raises:
    NonFiniteError: they are not finite, or a log-ratio is above its limit.
  """
  metrics = run.program.placement.fetch(step.metrics)
  if fault := find_fault(metrics, run.config.numerics.max_log_ratio):
    found = explain(run, loader, step, fault)
    # The loss of a step is that of the parameters before it.
    raise NonFiniteError(
      f"step {step.number}: {found} {advice(step.number - 1)}"
    )
  _warn_of_spike(step.number, metrics)
  return metrics


def find_fault(metrics: Mapping[str, Any], max_log_ratio: float) -> str:
  """Says which metric of a step is not finite, or too large; "" if none is."""
  for name in ("loss", "grad_norm"):
    if not math.isfinite(metrics[name]):
      return f"{name} is {metrics[name]}"
  largest = float(metrics.get(LARGEST_LOG_RATIO, 0.0))
  if not largest <= max_log_ratio:  # NaN included
    return (
      f"a response's log-ratio of policy to reference is {largest:,.6g} nats,"
      f" and numerics.max_log_ratio={max_log_ratio:,g}"
    )
  return ""


def _warn_of_spike(step: int, metrics: Mapping[str, Any]) -> None:
  """Logs that a step was skipped, see `spikes`."""
  if metrics["grad_norm"] > metrics.get("spike_limit", math.inf):
    _LOG.warning(
      "step %d is skipped: its grad_norm is %.4g, above %.4g; skipped so far:"
      " %d",
      step,
      metrics["grad_norm"],
      metrics["spike_limit"],
      metrics["skipped_steps"],
    )


def explain(run: Run, loader: Addresses, step: Step, fault: str) -> str:
  """Writes a step to the workdir, and names the groups that are guilty.

  All hosts call it, and process 0 writes.

  Args:
    run: run.
    loader: made the batch.
    step: step that is not finite.
    fault: from `find_fault`.

  Returns:
    The fault, the guilty groups with file and line, and the file's path.
  """
  program = run.program
  placement, objective = program.placement, program.training_objective
  batch = placement.gather_rows(step.batch)
  sequences = placement.gather_rows(step.inputs[0])
  loss_state = placement.fetch(step.inputs[1])
  loss, weight = measure_groups(objective, sequences, loss_state)
  why, is_guilty = find_guilty(
    sequences, loss, weight, run.config.numerics.max_log_ratio
  )
  ids = batch.example_ids.reshape(-1)
  present = np.flatnonzero(objective.valid_groups(sequences.valid))
  columns = {"loss": loss, "gradient_weight": weight, "logps": sequences.logps}
  if sequences.ref_logps is not None:
    columns["ref_logps"] = sequences.ref_logps
  groups = [
    {"id": int(ids[i]), "address": address, "is_guilty": bool(is_guilty[i])}
    | {name: _plain(column[i]) for name, column in columns.items()}
    for i, address in zip(present, loader.addresses(ids[present]), strict=True)
  ]
  path = run.workdir.nonfinite / f"{step.number}.npz"
  if run.is_writer:
    write_arrays(
      path,
      {"loss": loss, "gradient_weight": weight}
      | _named(batch, "batch")
      | _named(sequences, "sequences")
      | _named(loss_state, "loss_state"),
    )
    metrics = placement.fetch(step.metrics)
    report = {
      "step": step.number,
      "fault": fault,
      "guilty": why,
      "metrics": {name: _plain(value) for name, value in metrics.items()},
      "groups": groups,
    }
    write_json(path.with_suffix(".json"), report)
  return f"{fault}. {_name_guilty(groups, why)}. The batch is in {path}."


def _name_guilty(groups: Sequence[Mapping[str, Any]], why: str) -> str:
  guilty = [group for group in groups if group["is_guilty"]]
  named = [
    f"{group['id']} ({group['address'] or 'file and line unknown'})"
    for group in guilty[:_NUM_NAMED]
  ]
  more = f" and {len(guilty) - _NUM_NAMED} more" * (len(guilty) > _NUM_NAMED)
  return (
    f"Groups with {why}, {len(guilty)} of {len(groups)}:"
    f" {', '.join(named)}{more}"
  )


def measure_groups(
  objective: Objective | WeightedSum, sequences: Sequences, loss_state: Any
) -> tuple[np.ndarray, np.ndarray]:
  """Computes the loss and the gradient weight of each group of a batch.

  Args:
    objective: loss that is trained.
    sequences: sequences of the whole batch.
    loss_state: state of the objective before the step.

  Returns:
    f32 [B] each. The weight is the largest derivative, by absolute value, of
    the sum of the losses by a log-prob or value of the group.
  """

  sequences = jax.tree.map(jnp.asarray, sequences)

  def total(fields):
    per_group, _, _ = objective.apply(sequences.replace(**fields), loss_state)
    return per_group.sum(), per_group

  fields = {
    name: getattr(sequences, name)
    for name in _TRAINED
    if getattr(sequences, name) is not None
  }
  gradients, loss = jax.grad(total, has_aux=True)(fields)
  sizes = [
    np.abs(np.asarray(g)).reshape(len(loss), -1).max(1)
    for g in gradients.values()
  ]
  return np.asarray(loss), np.max(sizes, axis=0)


def find_guilty(
  sequences: Sequences,
  loss: np.ndarray,
  weight: np.ndarray,
  max_log_ratio: float,
) -> tuple[str, np.ndarray]:
  """Returns what is wrong with the guilty groups, and which they are: bool [B].

  A sequence is blamed before a loss: where the loss couples the batch, one
  sequence makes the losses of all groups not finite.
  """
  valid = sequences.valid
  is_sick = np.zeros(len(valid), bool)
  for field in dataclasses.fields(sequences):
    x = getattr(sequences, field.name)
    if x is not None and np.ndim(x):
      mask = {1: valid[:, 0], 2: valid, 3: valid[..., None]}[x.ndim]
      is_bad = mask & ~np.isfinite(x)
      is_sick |= is_bad.reshape(len(valid), -1).any(1)
  is_far = np.zeros(len(valid), bool)
  if sequences.ref_logps is not None:
    log_ratios = np.where(valid, sequences.logps - sequences.ref_logps, 0.0)
    is_far = (np.abs(log_ratios) > max_log_ratio).any(1)
  for why, mask in (
    ("a log-prob that is not finite", is_sick),
    ("a log-ratio above numerics.max_log_ratio", is_far),
    ("a loss that is not finite", ~np.isfinite(loss)),
    ("a gradient weight that is not finite", ~np.isfinite(weight)),
  ):
    if mask.any():
      return why, mask
  return "the largest gradient weight", weight == weight.max()


def read_batch(path: epath.PathLike) -> Batch:
  """Reads the batch of WORKDIR/nonfinite/STEP.npz: the rows of all hosts."""
  fields: dict[str, Any] = {"token_masks": {}, "on_policy": {}}
  for name, values in read_arrays(epath.Path(path)).items():
    room, _, field = name.partition("/")
    outer, _, inner = field.partition("/")
    if room == "batch" and inner:
      fields[outer][inner] = values
    elif room == "batch":
      fields[outer] = values
  return Batch(**fields)


def _named(tree: Any, prefix: str) -> dict[str, np.ndarray]:
  return {
    f"{prefix}/{path_name(path)}": np.asarray(leaf)
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
  }


def _plain(x: np.ndarray) -> Any:
  """Converts an array to what JSON can hold: nested lists, or one number.

  Every number becomes a float. Infinities and NaN, which JSON lacks, become
  text: "inf", "-inf" and "nan".
  """
  if np.ndim(x):
    return [_plain(item) for item in x]
  return float(x) if np.isfinite(x) else str(float(x))
