"""Log-probs of held-out groups, one file for each evaluation."""

from etils import epath
import numpy as np

from dpo_jax.records.workdir import Workdir
from dpo_jax.system.files import read_arrays, write_arrays

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
  write_arrays(workdir.eval_logps / name / f"{step}.npz", records)


def read_records(workdir: epath.PathLike, name: str = "") -> dict[int, Records]:
  """Reads what `write_records` wrote, by step.

  Args:
    workdir: run directory.
    name: name of the held-out set.

  Raises:
    FileNotFoundError: nothing there.
    ValueError: a damaged file; names it.
  """
  folder = Workdir.at(workdir).eval_logps / name
  paths = folder.glob("*.npz") if folder.exists() else ()
  paths = [path for path in paths if path.stem.isdecimal()]
  if not paths:
    raise FileNotFoundError(
      f"{folder} holds no log-probs: train with eval.save_logps=True and held-"
      "out data"
    )
  paths = sorted(paths, key=lambda path: int(path.stem))
  return {int(path.stem): read_arrays(path) for path in paths}
