"""Where records come from: `kind:what` -> records with their addresses.

jsonl:PATH                   a file or a glob, .jsonl or .jsonl.gz
parquet:PATH                 a file or a glob
tfds:NAME[/CONFIG][:SPLIT]   a TFDS data set, `train` unless told
synthetic:TASK[:NUM[:SEED]]  a built-in task, see synthetic.py
"""

from collections.abc import Iterator
import dataclasses
import glob
import gzip
import hashlib
import inspect
import json
import os
from typing import Any
import zlib

from dpo_jax.data import synthetic

KINDS = ("jsonl", "parquet", "tfds", "synthetic")
Record = tuple[str, dict[str, Any]]


@dataclasses.dataclass(frozen=True)
class Source:
  """Records of a data set.

  Attributes:
    spec: `kind:what`.
    digest: of the content, not of the path.
  """

  spec: str
  digest: str

  def __iter__(self) -> Iterator[Record]:
    """Yields (address, record) in a fixed order."""
    kind, what = self.spec.split(":", 1)
    return _READERS[kind](what)


def open_source(spec: str) -> Source:
  """Checks that a source exists, and takes its digest.

  Args:
    spec: see the module's docstring.

  Returns:
    The source.

  Raises:
    ValueError: an unknown kind or task.
    FileNotFoundError: no such file.
  """
  kind, _, what = spec.partition(":")
  if kind not in KINDS or not what:
    raise ValueError(
      f"data source {spec!r} must be one of jsonl:PATH, parquet:PATH,"
      " tfds:NAME[/CONFIG][:SPLIT], synthetic:TASK[:NUM[:SEED]]"
    )
  digest = hashlib.sha256()
  if kind in ("jsonl", "parquet"):
    for path in _paths(what):
      with open(path, "rb") as file:
        digest.update(hashlib.file_digest(file, "sha256").digest())
  elif kind == "tfds":
    for part in _tfds_identity(what):
      digest.update(f"{part}\0".encode())
  else:
    _synthetic_task(what)
    digest.update(inspect.getsource(synthetic).encode() + what.encode())
  return Source(spec, digest.hexdigest())


def _paths(pattern: str) -> list[str]:
  # A name may hold brackets without being a pattern.
  paths = [pattern] if os.path.exists(pattern) else sorted(glob.glob(pattern))
  if not paths:
    raise FileNotFoundError(f"no file matches {pattern!r}")
  return paths


def _read_jsonl(pattern: str) -> Iterator[Record]:
  for path in _paths(pattern):
    opener = gzip.open if path.endswith(".gz") else open
    number = 0
    with opener(path, "rb") as file:
      try:
        for number, line in enumerate(file, 1):
          if not line.strip():
            continue
          try:
            record = json.loads(line.decode("utf-8"))
          except (json.JSONDecodeError, UnicodeDecodeError) as error:
            raise ValueError(
              f"{path}:{number}: not a line of JSON in UTF-8: {error}"
            ) from error
          if not isinstance(record, dict):
            raise ValueError(
              f"{path}:{number}: a record must be an object, not"
              f" {type(record).__name__}"
            )
          yield f"{path}:{number}", record
      except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise ValueError(
          f"{path}: the compressed file breaks off or is damaged after line"
          f" {number}: {error}"
        ) from error


def _read_parquet(pattern: str) -> Iterator[Record]:
  import pyarrow.parquet as pq  # slow to import, and few runs need it

  for path in _paths(pattern):
    row = 0
    for batch in pq.ParquetFile(path).iter_batches():
      for record in batch.to_pylist():
        row += 1
        yield f"{path} row {row}", record


def _tfds_builder(name: str) -> Any:
  import tensorflow_datasets as tfds

  # Importing registers our builders by their names.
  from dpo_jax.data import tfds_builders  # noqa: F401

  # TFDS reads the variable when it is imported, which may be too early.
  builder = tfds.builder(
    name,
    data_dir=os.environ.get("TFDS_DATA_DIR"),
    file_format="array_record",
  )
  builder.download_and_prepare(file_format="array_record")
  return builder


def _tfds_parts(what: str) -> tuple[str, str]:
  name, _, split = what.partition(":")
  return name, split or "train"


def _tfds_identity(what: str) -> list[str]:
  name, split = _tfds_parts(what)
  info = _tfds_builder(name).info
  if split not in info.splits:
    raise ValueError(
      f"tfds:{name} has no split {split!r}; it has"
      f" {', '.join(sorted(info.splits))}"
    )
  shards = info.splits[split].filepaths
  # The files, not only the version: a builder over a user's own files may be
  # prepared again from other content.
  hashes = []
  for path in shards:
    with open(path, "rb") as file:
      hashes.append(hashlib.file_digest(file, "sha256").hexdigest())
  return [info.full_name, split, *hashes]


def _read_tfds(what: str) -> Iterator[Record]:
  name, split = _tfds_parts(what)
  source = _tfds_builder(name).as_data_source(split=split)
  for index in range(len(source)):
    record = {
      key: _plain(value)
      for key, value in source[index].items()
      if _plain(value) is not None
    }
    yield f"tfds:{name}:{split}[{index}]", record


def _plain(value: Any) -> Any:
  """TFDS's numpy values and bytes as Python's own."""
  if isinstance(value, bytes):
    return value.decode("utf-8")
  if isinstance(value, dict):
    return {k: _plain(v) for k, v in value.items()}
  if hasattr(value, "tolist"):
    value = value.tolist()
  if isinstance(value, list):
    return [_plain(v) for v in value]
  return value.decode("utf-8") if isinstance(value, bytes) else value


def _synthetic_task(what: str) -> tuple[Any, int, int]:
  task, *numbers = what.split(":")
  is_known = task in synthetic.TASKS and len(numbers) <= 2
  if not is_known or not all(number.isdecimal() for number in numbers):
    raise ValueError(
      f"synthetic:{what} is not TASK[:NUM[:SEED]] with a task of"
      f" {', '.join(synthetic.TASKS)}"
    )
  num, seed = (*map(int, numbers), *(10_000, 0)[len(numbers) :])
  return synthetic.TASKS[task], num, seed


def _read_synthetic(what: str) -> Iterator[Record]:
  task, num, seed = _synthetic_task(what)
  for index, record in enumerate(task(num, seed)):
    yield f"synthetic:{what}[{index}]", record


_READERS = {
  "jsonl": _read_jsonl,
  "parquet": _read_parquet,
  "tfds": _read_tfds,
  "synthetic": _read_synthetic,
}
