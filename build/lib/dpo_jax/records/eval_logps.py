"""Log-probs of held-out groups, one file for each evaluation."""

import io

from etils import epath
import numpy as np

from dpo_jax.records.workdir import Workdir
from dpo_jax.system.files import write_atomically

# Fields of Sequences, [N, K] or [N], and the groups' ids.
Records = dict[str, np.ndarray]


def write_records(
  workdir: Workdir, step: int, records: Records, name: str = ""
) -> None:
  """Writes WORKDIR/eval_logps/[NAME/]STEP.npz, for `experiments.replay`.

  Args:
    workdir: run directory.
    step: optimizer steps taken.
    records: records that `evaluation.evaluate` returns.
    name: name of the held-out set.
  """
  buffer = io.BytesIO()
  np.savez(buffer, **records)
  path = workdir.eval_logps / name / f"{step}.npz"
  write_atomically(path, buffer.getvalue())


def read_records(workdir: epath.PathLike, name: str = "") -> dict[int, Records]:
  """Reads what `write_records` wrote, by step.

  Args:
    workdir: run directory.
    name: name of the held-out set.

  Raises:
    FileNotFoundError: nothing there.
  """
  folder = Workdir.at(workdir).eval_logps / name
  paths = sorted(folder.glob("*.npz")) if folder.exists() else []
  if not paths:
    raise FileNotFoundError(
      f"{folder} holds no log-probs: train with eval.save_logps=True and held-"
      "out data"
    )
  out = {}
  for path in sorted(paths, key=lambda path: int(path.stem)):
    with np.load(io.BytesIO(path.read_bytes())) as file:
      out[int(path.stem)] = dict(file)
  return out
