"""The files of a run: their names, and those that are written whole.

workdir.json     format of the other files, and the name of the run
lock.json        process that trains the run, until it ends: `records.lock`
config.json      resolved config
model.json       shape of the model
data.json        digests of data, tokenizer and template
git.txt          commits of the code that trained it, the latest last
command.txt      commands that trained it, the latest last
reference.json   digests of the reference's parameters and of its log-probs
frozen.txt       digest of the parameters that are not trained
metrics.jsonl    a JSON object a line
samples.jsonl    prompts and responses
eval_logps/      STEP.npz, log-probs of held-out groups
checkpoints/     STEP/, see `records.checkpoint`
saves.json       step that was begun last, and step that was saved last
quarantine/      the latest two checkpoints that were moved aside
nonfinite/       STEP.json, STEP.npz: a step that is not finite, and its batch
reference/       cached log-probs
online/          STEP.npz, sampled responses that the policy trains on
evaluations/     NAME.jsonl, what `dpo_jax.evaluate` measured: its settings,
                 then a line for each held-out set and for each sample
profile/, tensorboard/, wandb/
finished.json    written last, when the run has finished
"""

from collections.abc import Mapping, Sequence
import dataclasses
import datetime
import logging
import shlex
from typing import Any
import uuid

from etils import epath

from dpo_jax.config.keys import default_config
from dpo_jax.system.files import (
  read_json,
  read_text,
  write_atomically,
  write_json,
)

_LOG = logging.getLogger(__name__)

# Raise it when a file changes so that an older version would misread it, and
# _OLDEST when this version no longer reads what was written before.
FORMAT = 1
_OLDEST = 0  # before formats were recorded
# Kinds of JSON: a value must be of the same as its default.
_SHAPES = (str, list | tuple, Mapping)


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
  def command(self) -> epath.Path:
    return self.path / "command.txt"

  @property
  def reference_digests(self) -> epath.Path:
    return self.path / "reference.json"

  @property
  def old_reference_digest(self) -> epath.Path:
    """Path of the digest of the parameters alone, as older runs recorded it."""
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
  def saves(self) -> epath.Path:
    return self.path / "saves.json"

  @property
  def quarantine(self) -> epath.Path:
    return self.checkpoints.parent / "quarantine"

  @property
  def nonfinite(self) -> epath.Path:
    return self.path / "nonfinite"

  @property
  def reference_cache(self) -> epath.Path:
    return self.path / "reference"

  @property
  def online(self) -> epath.Path:
    return self.path / "online"

  @property
  def evaluations(self) -> epath.Path:
    return self.path / "evaluations"

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
  def lock(self) -> epath.Path:
    return self.path / "lock.json"

  @property
  def _format(self) -> epath.Path:
    return self.path / "workdir.json"

  def _read_format(self) -> dict[str, Any]:
    """Reads workdir.json; format 0 is from before there was one."""
    if not self._format.exists():
      return {"format": 0}
    found = read_json(self._format)
    for key, kind in (("format", int), ("run", str)):
      value = found.get(key, "" if key == "run" else None)
      if type(value) is not kind:
        raise ValueError(
          f"{self._format} is damaged: {key}={value!r} must be"
          f" {'a number' if kind is int else 'a text'}. Restore it from a copy"
        )
    return found

  @property
  def run_id(self) -> str:
    """Name of the run, which its checkpoints hold; "" where it has none."""
    return self._read_format().get("run", "")

  def check_format(self) -> None:
    """Checks that this version reads what the folder holds.

    Raises:
      ValueError: another format, or a run whose config is not there.
    """
    if not self.config.exists():
      if self.checkpoints.is_dir() and any(self.checkpoints.iterdir()):
        raise ValueError(
          f"{self.config} does not exist, and {self.checkpoints} holds a run:"
          " restore the file from a copy, or choose another workdir"
        )
      return
    found = self._read_format()["format"]
    if not _OLDEST <= found <= FORMAT:
      raise ValueError(
        f"{self._format}: format {found}, and this version of dpo_jax reads"
        f" formats {_OLDEST} to {FORMAT}: use the version that wrote it, or"
        " choose another workdir"
      )

  def read_config(self) -> dict[str, Any]:
    """Reads the resolved config of the run, as nested dicts.

    One of an older version may lack keys.

    Raises:
      ValueError: it is damaged; names it and a key.
    """
    config = read_json(self.config)
    defaults = default_config().copy_and_resolve_references().to_dict()
    if key := _odd_key(config, defaults):
      raise ValueError(
        f"{self.config} is damaged: {key} must be a value of another type."
        " Restore it from a copy"
      )
    return config

  def write_config(self, config: Mapping[str, Any]) -> None:
    """Writes config.json, and workdir.json with format and name of the run."""
    known = self._read_format()
    if known["format"] != FORMAT or "run" not in known:
      self.write_name(known.get("run") or uuid.uuid4().hex)
    write_json(self.config, config, sort_keys=True)

  def write_name(self, name: str) -> None:
    """Writes workdir.json, with the format and a name of the run."""
    write_json(self._format, {"format": FORMAT, "run": name})

  def record_version(self, version: str) -> None:
    """Appends a version of the code to git.txt, unless it is the last.

    Warns if it differs from the last.
    """
    before = self.read_lines(self.git)
    if before and before[-1] != version:
      _LOG.warning(
        "the run began with the code %s, and this is %s", before[0], version
      )
    _add_line(self.git, before, version)

  def record_command(self, arguments: Sequence[str]) -> None:
    """Appends a command to command.txt, unless it is the last.

    Args:
      arguments: its words, such as `sys.orig_argv` without the interpreter.
    """
    command = shlex.join(["python", *arguments]).replace("\n", "\\n")
    _add_line(self.command, self.read_lines(self.command), command)

  def read_lines(self, path: epath.Path) -> list[str]:
    """Reads git.txt or command.txt; empty where nothing was recorded.

    They are for people, so damage to them stops no run: bytes that are not
    UTF-8 become escapes.
    """
    if not path.exists():
      return []
    return path.read_bytes().decode(errors="backslashreplace").splitlines()

  def read_digest(self, path: epath.Path) -> str:
    """Reads a file that holds a digest alone; "" where there is none.

    Raises:
      ValueError: it is damaged; names it.
    """
    return read_text(path).strip() if path.exists() else ""

  def write_finished(self, total_steps: int) -> None:
    """Writes finished.json: "total_steps", and "finished_at", a time in UTC."""
    now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    mark = {"total_steps": total_steps, "finished_at": now}
    write_json(self.finished, mark)


def _odd_key(found: Mapping[str, Any], defaults: Mapping[str, Any]) -> str:
  """Returns the first key whose value is of another kind of JSON; or "".

  Args:
    found: config, or a part of it.
    defaults: the same of the default config.
  """
  for key, default in defaults.items():
    value = found.get(key)
    # A loss may be a list of losses; a placeholder has no type here.
    if key == "loss" or value is None or default is None:
      continue
    if any(isinstance(value, k) != isinstance(default, k) for k in _SHAPES):
      return key
    if isinstance(default, Mapping) and (inner := _odd_key(value, default)):
      return f"{key}.{inner}"
  return ""


def _add_line(path: epath.Path, before: Sequence[str], line: str) -> None:
  if list(before[-1:]) != [line]:
    write_atomically(path, "".join(f"{x}\n" for x in [*before, line]))
