"""Sources of records: `kind:what` -> records with their addresses.

jsonl:PATH                   a file or a glob, .jsonl, .jsonl.gz or .jsonl.zst;
                             also .json, an array of objects
parquet:PATH                 a file or a glob
hub:ORG/NAME[/CONFIG]@REVISION[:SPLIT]  a data set of the Hub, see hub.py
tfds:NAME[/CONFIG][:SPLIT]   a TFDS data set
synthetic:TASK[:NUM[:SEED]]  a built-in task, see synthetic.py

A path may be gs://. A split is `train` unless told.
"""

import codecs
from collections.abc import Iterator, Sequence
import dataclasses
import functools
import gzip
import hashlib
import inspect
import io
import os
from typing import Any
import zlib

from etils import epath

from dpo_jax.data import hub, synthetic
from dpo_jax.data.messages import RecordError
from dpo_jax.names import did_you_mean
from dpo_jax.system import files, inputs

_SPELLINGS = (
  "jsonl:PATH",
  "parquet:PATH",
  "hub:ORG/NAME[/CONFIG]@REVISION[:SPLIT]",
  "tfds:NAME[/CONFIG][:SPLIT]",
  "synthetic:TASK[:NUM[:SEED]]",
)
KINDS = tuple(spelling.partition(":")[0] for spelling in _SPELLINGS)
# Address and columns, or the error of a line without a record.
Record = tuple[str, dict[str, Any] | RecordError]
# Name and local path of files.
_Files = Sequence[tuple[str, str]]
# Bytes of a file that is one JSON array, which is read as a whole.
MAX_ARRAY_BYTES = 2**30
# Bytes of a line of JSON. A compressed file may hold a line of any length.
MAX_LINE_BYTES = 2**26
# Byte order marks; that of UTF-32 may begin with that of UTF-16.
_OTHER_MARKS = (
  ("UTF-32", (codecs.BOM_UTF32_LE, codecs.BOM_UTF32_BE)),
  ("UTF-16", (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)),
)
# Rows and bytes of Parquet that are decoded at once.
_BATCH_ROWS = 64
_BATCH_BYTES = 2**30


@dataclasses.dataclass(frozen=True)
class Source:
  """Records of a data set.

  Attributes:
    spec: `kind:what`; of the Hub with config, commit and split.
    digest: digest of the content, not of the path.
  """

  spec: str
  digest: str

  def __iter__(self) -> Iterator[Record]:
    """Yields (address, record) in a fixed order.

    A record that cannot be read is a RecordError, which names its address, and
    the next one follows it.

    Raises:
      ValueError: a file that breaks off or is damaged.
    """
    kind, what = self.spec.split(":", 1)
    return _READERS[kind](what)


def open_source(spec: str) -> Source:
  """Checks that a source exists, and takes its digest.

  Args:
    spec: see the module's docstring.

  Returns:
    The source; of the Hub pinned to a commit.

  Raises:
    ValueError: an unknown kind, task, TFDS data set, config or split.
    FileNotFoundError: no such file, or data set of the Hub.
    ConnectionError: the Hub does not answer.
  """
  kind, _, what = spec.partition(":")
  if kind not in KINDS or not what:
    raise ValueError(
      f"data source {spec!r} must be one of {', '.join(_SPELLINGS)}"
    )
  digest = hashlib.sha256()
  if kind == "hub":
    split = hub.open_split(what)
    return Source(f"hub:{split.spec}", split.digest)
  if kind in ("jsonl", "parquet"):
    for _, path in _local_files(what):
      with open(path, "rb") as file:
        digest.update(hashlib.file_digest(file, "sha256").digest())
  elif kind == "tfds":
    for part in _tfds_identity(what):
      digest.update(f"{part}\0".encode())
  else:
    _synthetic_task(what)
    digest.update(inspect.getsource(synthetic).encode() + what.encode())
  return Source(spec, digest.hexdigest())


def pin(spec: str) -> str:
  """Returns a source's spelling, for the Hub with commit, config and split.

  Any other kind of source is returned as it is.

  Args:
    spec: see the module's docstring.

  Raises:
    ValueError, FileNotFoundError, ConnectionError: see `hub.open_split`.
  """
  kind, _, what = spec.partition(":")
  return f"hub:{hub.open_split(what).spec}" if kind == "hub" else spec


def _local_files(pattern: str) -> _Files:
  return [(str(path), files.local(path)) for path in inputs.find(pattern)]


def _read_jsonl(paths: _Files) -> Iterator[Record]:
  for shown, path in paths:
    number = 0
    try:
      with _open_lines(path) as file:
        start = file.peek(4)
        for name, mark in _OTHER_MARKS:
          if start.startswith(mark):
            raise ValueError(f"{shown} is in {name}: save it as UTF-8")
        start = start.removeprefix(codecs.BOM_UTF8)
        if start.lstrip().startswith(b"["):
          yield from _read_array(shown, file)
          continue
        read_line = functools.partial(file.readline, MAX_LINE_BYTES + 1)
        for number, line in enumerate(iter(read_line, b""), 1):
          if number == 1:
            line = line.removeprefix(codecs.BOM_UTF8)
          if len(line) > MAX_LINE_BYTES:
            raise ValueError(
              f"{shown}:{number} is longer than {MAX_LINE_BYTES:,} bytes, and"
              " a line must hold one record: shorten the record, or write one"
              " object a line"
            )
          if line.strip():
            address = f"{shown}:{number}"
            yield address, _read_line(address, line)
    except (EOFError, gzip.BadGzipFile, zlib.error, _ZstdError) as error:
      raise ValueError(
        f"{shown}: the compressed file breaks off or is damaged after line"
        f" {number}: {error}"
      ) from error
    except OSError as error:
      raise OSError(f"{shown} after line {number}: {error}") from error


class _ZstdError(Exception):
  """Raised for a .zst file that breaks off or is damaged."""


class _ZstdReader(io.RawIOBase):
  """Bytes of a .zst file."""

  def __init__(self, path: str):
    import pyarrow as pa  # slow to import, and few runs need it

    self._stream = pa.input_stream(path, compression="zstd")

  def readable(self) -> bool:
    return True

  def readinto(self, buffer: Any) -> int:
    try:
      return self._stream.readinto(buffer)
    except OSError as error:
      raise _ZstdError(str(error)) from error


def _open_lines(path: str) -> io.BufferedReader | gzip.GzipFile:
  if path.endswith(".zst"):
    return io.BufferedReader(_ZstdReader(path))
  return gzip.open(path) if path.endswith(".gz") else open(path, "rb")


def _read_line(address: str, line: bytes) -> dict[str, Any] | RecordError:
  try:
    record = files.parse_json(line.decode("utf-8"))
  except ValueError as error:
    line = line.strip()
    is_begun = line.startswith(b"{") and not line.endswith(b"}")
    hint = (
      ". An object over several lines? One object a line is wanted:"
      " jq -c . FILE > LINES.jsonl"
    )
    return RecordError(
      f"{address}: not a line of JSON in UTF-8: {error}{hint * is_begun}"
    )
  return _check_object(address, record)


def _check_object(address: str, record: Any) -> dict[str, Any] | RecordError:
  if isinstance(record, dict):
    return record
  return RecordError(
    f"{address}: a record must be an object, not {type(record).__name__}"
  )


def _read_array(shown: str, file: Any) -> Iterator[Record]:
  content = file.read(MAX_ARRAY_BYTES + 1)
  if len(content) > MAX_ARRAY_BYTES:
    raise ValueError(
      f"{shown}: a JSON array is read as a whole, up to {MAX_ARRAY_BYTES:,}"
      f" bytes; write one object a line: jq -c '.[]' {shown} > LINES.jsonl"
    )
  try:
    records = files.parse_json(content.decode("utf-8-sig"))
  except ValueError as error:
    raise ValueError(
      f"{shown} begins with '[', so it must be one JSON array in UTF-8: {error}"
    ) from error
  for index, record in enumerate(records):
    address = f"{shown}[{index}]"
    yield address, _check_object(address, record)


def _read_parquet(paths: _Files) -> Iterator[Record]:
  import pyarrow as pa  # slow to import, and few runs need it
  import pyarrow.parquet as pq

  for shown, path in paths:
    row, group = 0, 0
    try:
      with pq.ParquetFile(path, page_checksum_verification=True) as file:
        _check_columns(shown, file.schema_arrow.names)
        for group in range(file.num_row_groups):
          for batch in file.iter_batches(
            _batch_rows(file.metadata.row_group(group)), row_groups=[group]
          ):
            for one in range(len(batch)):
              row += 1
              address = f"{shown} row {row}"
              yield address, _read_row(address, batch.slice(one, 1))
    except (pa.ArrowException, OSError) as error:
      raise ValueError(
        f"{shown}: no Parquet file, or damaged after row {row}, in row group"
        f" {group}: {error}. Restore it from a copy"
      ) from error


def _check_columns(shown: str, names: Sequence[str]) -> None:
  """Raises ValueError for two columns of one name: a record keeps the last."""
  twice = sorted({name for name in names if names.count(name) > 1})
  if twice:
    raise ValueError(
      f"{shown} has two columns {twice[0]!r}: rename one, or leave it out"
    )


def _batch_rows(group: Any) -> int:
  """Returns the rows of a row group that are decoded at once.

  A dictionary page holds a text once for all its rows, so that a small file may
  be decoded to any number of bytes. No text of a plain column is larger than
  its row group; a list may hold one text many times, which is not bounded.
  """
  rows = _BATCH_BYTES // max(group.total_byte_size, 1)
  return min(max(rows, 1), _BATCH_ROWS)


def _read_row(address: str, row: Any) -> dict[str, Any] | RecordError:
  try:
    return row.to_pylist()[0]
  except (ValueError, OverflowError) as error:  # such as text that is not UTF-8
    return RecordError(f"{address}: {error}")


def _read_hub(what: str) -> Iterator[Record]:
  for shown, path in hub.open_split(what).download():
    read = _read_parquet if path.endswith(".parquet") else _read_jsonl
    yield from read([(shown, path)])


def _tfds_builder(name: str) -> Any:
  import tensorflow_datasets as tfds

  # Importing registers our builders by their names.
  from dpo_jax.data import tfds_builders  # noqa: F401

  # TFDS reads the variable when it is imported, which may be too early.
  data_dir = os.environ.get("TFDS_DATA_DIR")
  dataset = name.partition("/")[0]
  known = tfds.list_builders(with_community_datasets=False)
  is_prepared = data_dir and (epath.Path(data_dir) / dataset).exists()
  if dataset not in known and not is_prepared:
    raise ValueError(
      f"tfds:{name}: TFDS does not have {dataset!r}."
      f"{did_you_mean(dataset, known)}"
    )
  builder = tfds.builder(name, data_dir=data_dir, file_format="array_record")
  try:
    builder.download_and_prepare(file_format="array_record")
  except AssertionError as error:  # files that a user must put there
    raise FileNotFoundError(f"tfds:{name}: {error}") from error
  if inputs.is_remote(builder.data_path):  # array_record reads local files only
    return tfds.builder_from_directory(files.local(builder.data_path))
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
  """Converts numpy values of TFDS to Python's own, and bytes to text."""
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
  "jsonl": lambda what: _read_jsonl(_local_files(what)),
  "parquet": lambda what: _read_parquet(_local_files(what)),
  "hub": _read_hub,
  "tfds": _read_tfds,
  "synthetic": _read_synthetic,
}
