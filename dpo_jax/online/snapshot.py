"""Responses sampled at a step: all that the next batches are made from."""

import dataclasses
from typing import Any

from etils import epath
import numpy as np

from dpo_jax.system.files import read_arrays, write_arrays
from dpo_jax.types import fields_of


@dataclasses.dataclass(frozen=True)
class Snapshot:
  """Samples of a step, from which the next batches are made.

  Attributes:
    step: step of the sampling.
    prompts: i64 [n], indices of the prompts' groups.
    responses: i32 [n, K, M], -1 after the end; a group of nothing but -1 is
      left out of the loss.
    score: f32 [n, K].
    ref_logps: f32 [n, K].
    kl_weight: f64 [], KL weight of the next sampling.
    fields: on-policy fields of Batch, f32 [n, K] or [n, K, M] each.
  """

  step: int
  prompts: np.ndarray
  responses: np.ndarray
  score: np.ndarray
  ref_logps: np.ndarray
  kl_weight: float
  fields: dict[str, np.ndarray]

  def after(self, earlier: "Snapshot") -> "Snapshot":
    """Returns this snapshot with an earlier one's groups before its own."""

    def join(name: str) -> np.ndarray:
      return np.concatenate([getattr(earlier, name), getattr(self, name)])

    arrays = ("prompts", "responses", "score", "ref_logps")
    return dataclasses.replace(
      self,
      **{name: join(name) for name in arrays},
      fields={
        name: np.concatenate([earlier.fields[name], values])
        for name, values in self.fields.items()
      },
    )

  def write(self, path: epath.Path) -> None:
    fields = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
    fields |= fields.pop("fields")
    write_arrays(path, fields)

  @classmethod
  def read(cls, path: epath.Path) -> "Snapshot":
    """Reads a snapshot.

    Raises:
      ValueError: the file is missing or damaged.
    """
    try:
      fields: dict[str, Any] = read_arrays(path)
    except (OSError, ValueError) as error:
      raise ValueError(
        f"{path} is missing or damaged, and holds the responses that the run's"
        f" next steps learn from: {error}. Or go back to a checkpoint of step"
        f" {path.stem}, or of one before it: --config.resume.step=N"
      ) from error
    if f"{fields.get('step')}" != path.stem:
      raise ValueError(
        f"{path} holds the samples of step {fields.get('step')}: it was copied"
        " or renamed. Put the right file back, or go back to a checkpoint of"
        f" step {path.stem}, or of one before it: --config.resume.step=N"
      )
    names = fields_of("on_policy") & fields.keys()
    on_policy = {name: fields.pop(name) for name in names}
    return cls(
      step=int(fields.pop("step")),
      kl_weight=float(fields.pop("kl_weight")),
      fields=on_policy,
      **fields,
    )
