"""The files of a run: their names, and those that are written whole.

workdir.json     format of the other files
config.json      resolved config
model.json       shape of the model
data.json        digests of data, tokenizer and template
git.txt          commit of the code
reference.txt    digest of the reference's parameters
frozen.txt       digest of the parameters that are not trained
metrics.jsonl    a JSON object a line
samples.jsonl    prompts and responses
eval_logps/      STEP.npz, log-probs of held-out groups
checkpoints/     STEP/, see `records.checkpoint`
quarantine/      damaged checkpoints
reference/       cached log-probs
online/          STEP.npz, sampled responses that the policy trains on
profile/, tensorboard/
finished.json    written last, when the run has finished
"""

from collections.abc import Mapping
import dataclasses
import datetime
from typing import Any

from etils import epath

from dpo_jax.system.files import read_json, write_json

# Raise it when a file changes so that an older version would misread it, and
# _OLDEST when this version no longer reads what was written before.
FORMAT = 1
_OLDEST = 0  # before formats were recorded


@dataclasses.dataclass(frozen=True)
class Workdir:
  """The folder of a run, local or gs://; made by the first write."""

  path: epath.Path

  @classmethod
  def at(cls, path: "epath.PathLike | Workdir") -> "Workdir":
    """Names the folder of a run, which need not exist yet.

    Raises:
      ValueError: an empty path, or one of a file.
    """
    if isinstance(path, Workdir):
      return path
    if not str(path):
      raise ValueError("workdir='' must name the folder of a run")
    path = epath.Path(path)
    if path.exists() and not path.is_dir():
      raise ValueError(f"workdir={str(path)!r} is a file: name a folder")
    return cls(path)

  @classmethod
  def of_run(cls, path: "epath.PathLike | Workdir") -> "Workdir":
    """Opens the folder of a run that has begun.

    Raises:
      FileNotFoundError: no run there.
      ValueError: an empty path, one of a file, or a run of another format.
    """
    workdir = cls.at(path)
    for file in (workdir.config, workdir.model):
      if not file.exists():
        raise FileNotFoundError(
          f"{file} does not exist: {workdir} is not the workdir of a run"
        )
    workdir.check_format()
    return workdir

  def __str__(self) -> str:
    return str(self.path)

  @property
  def config(self) -> epath.Path:
    return self.path / "config.json"

  @property
  def model(self) -> epath.Path:
    return self.path / "model.json"

  @property
  def data(self) -> epath.Path:
    return self.path / "data.json"

  @property
  def git(self) -> epath.Path:
    return self.path / "git.txt"

  @property
  def reference_digest(self) -> epath.Path:
    return self.path / "reference.txt"

  @property
  def frozen_digest(self) -> epath.Path:
    return self.path / "frozen.txt"

  @property
  def metrics(self) -> epath.Path:
    return self.path / "metrics.jsonl"

  @property
  def samples(self) -> epath.Path:
    return self.path / "samples.jsonl"

  @property
  def eval_logps(self) -> epath.Path:
    return self.path / "eval_logps"

  @property
  def checkpoints(self) -> epath.Path:
    """An absolute path, as Orbax wants; a bucket's has no absolute form."""
    folder = self.path / "checkpoints"
    return folder if "://" in str(folder) else folder.absolute()

  @property
  def quarantine(self) -> epath.Path:
    return self.checkpoints.parent / "quarantine"

  @property
  def reference_cache(self) -> epath.Path:
    return self.path / "reference"

  @property
  def online(self) -> epath.Path:
    return self.path / "online"

  @property
  def profile(self) -> epath.Path:
    return self.path / "profile"

  @property
  def tensorboard(self) -> epath.Path:
    return self.path / "tensorboard"

  @property
  def finished(self) -> epath.Path:
    return self.path / "finished.json"

  @property
  def _format(self) -> epath.Path:
    return self.path / "workdir.json"

  def _read_format(self) -> int:
    return read_json(self._format)["format"] if self._format.exists() else 0

  def check_format(self) -> None:
    """Raises ValueError unless this version reads what the folder holds."""
    if not self.config.exists():
      return
    found = self._read_format()
    if not _OLDEST <= found <= FORMAT:
      raise ValueError(
        f"{self} has format {found}, and this version of dpo_jax reads formats"
        f" {_OLDEST} to {FORMAT}: use the version that wrote it, or choose"
        " another workdir"
      )

  def read_config(self) -> dict[str, Any]:
    """Reads the resolved config of the run."""
    return read_json(self.config)

  def write_config(self, config: Mapping[str, Any]) -> None:
    """Records the resolved config, and the format of the folder."""
    if self._read_format() != FORMAT:
      write_json(self._format, {"format": FORMAT})
    write_json(self.config, config, sort_keys=True)

  def read_digest(self, path: epath.Path) -> str:
    """Reads one of the digests; "" where none was recorded."""
    return path.read_text().strip() if path.exists() else ""

  def write_finished(self, total_steps: int) -> None:
    """Marks the run as finished; the last file to be written."""
    now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    mark = {"total_steps": total_steps, "finished_at": now}
    write_json(self.finished, mark)
