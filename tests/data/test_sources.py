"""Records from files and tasks: none lost, none taken for the end."""

import gzip
import io
import json
import os
import re
import shutil
import types

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from dpo_jax.data import sources, synthetic
from dpo_jax.data.messages import RecordError
from tests import bucket, faults

RECORDS = [{"prompt": f"question {i} \u00e9", "n": i} for i in range(5)]


def write_jsonl(path, records=RECORDS):
  text = "".join(json.dumps(r, ensure_ascii=False) + "\n" for r in records)
  content = text.encode()
  if path.suffix == ".gz":
    content = gzip.compress(content, mtime=0)
  elif path.suffix == ".zst":
    content = pa.Codec("zstd").compress(content, asbytes=True)
  path.write_bytes(content)
  return f"jsonl:{path}"


def read(spec):
  return [record for _, record in sources.open_source(spec)]


@pytest.mark.parametrize(
  "name", ["a.jsonl", "a.jsonl.gz", "a.jsonl.zst", "a[1].jsonl"]
)
def test_lines_of_json_are_read_in_order_with_their_addresses(tmp_path, name):
  spec = write_jsonl(tmp_path / name)
  assert list(sources.open_source(spec)) == [
    (f"{tmp_path / name}:{i + 1}", record) for i, record in enumerate(RECORDS)
  ]


def test_empty_lines_are_passed_over_and_counted(tmp_path):
  path = tmp_path / "a.jsonl"
  path.write_text('{"n": 1}\n\n  \n{"n": 2}')
  assert list(sources.open_source(f"jsonl:{path}")) == [
    (f"{path}:1", {"n": 1}),
    (f"{path}:4", {"n": 2}),
  ]


@pytest.mark.parametrize("end", ["\n", "\r\n"])
@pytest.mark.parametrize("mark", ["", "\ufeff"])
@pytest.mark.parametrize("indent", [None, 1])
def test_files_of_other_programs_are_read(tmp_path, end, mark, indent):
  """A mark of the byte order, ends of lines, an array instead of lines."""
  lines = mark + end.join(json.dumps(r) for r in RECORDS) + end
  array = mark + " " + json.dumps(RECORDS, indent=indent).replace("\n", end)
  for text in (lines, array):
    path = tmp_path / "a.json"
    path.write_bytes(text.encode())
    assert read(f"jsonl:{path}") == RECORDS


def test_elements_of_an_array_are_addressed(tmp_path):
  path = tmp_path / "a.json"
  path.write_text('[{"n": 1}, 3, {"n": 2}]')
  one, broken, two = sources.open_source(f"jsonl:{path}")
  assert (one, two) == ((f"{path}[0]", {"n": 1}), (f"{path}[2]", {"n": 2}))
  message = f"{path}[1]: a record must be an object, not int"
  assert str(broken[1]) == message


@pytest.mark.parametrize(
  ("content", "message"),
  [
    (b'[{"n": 1},', r"a.json begins with '\[', so it must be one JSON array"),
    (b'[{"n": 1}] ' + b" " * 90, r"a.json: a JSON array .* jq -c '\.\[\]'"),
    ('{"n": 1}'.encode("utf-16"), "a.json is in UTF-16: save it as UTF-8"),
    ('{"n": 1}'.encode("utf-32"), "a.json is in UTF-32: save it as UTF-8"),
  ],
)
def test_a_file_of_another_kind_is_named(
  tmp_path, monkeypatch, content, message
):
  monkeypatch.setattr(sources, "MAX_ARRAY_BYTES", 100)
  path = tmp_path / "a.json"
  path.write_bytes(content)
  with pytest.raises(ValueError, match=message):
    read(f"jsonl:{path}")


def read_in_child(spec, room):
  """Reads three records with so many bytes of memory; returns the output."""
  code = """
import itertools, resource, sys
from dpo_jax.data import sources
import gzip, pyarrow.parquet

room = int(sys.argv[2])
with open("/proc/self/statm") as file:
  used = int(file.read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + room, used + room))
for address, _ in itertools.islice(sources.open_source(sys.argv[1]), 3):
  print("read", address, flush=True)
"""
  process = faults.spawn(code, spec, str(room))
  return process.communicate(timeout=120)[0]


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz", "a.jsonl.zst"])
def test_a_line_without_an_end_is_named_before_memory_is_full(tmp_path, name):
  """600 MB of one line: a compressed file of it has a few hundred kB."""
  lines = b'{"n": 1}\n', b'{"n": "', *[b"x" * 2**20] * 600
  with open(tmp_path / name, "wb") as file:
    if name.endswith(".gz"):
      file = gzip.GzipFile(fileobj=file, mode="wb", compresslevel=1)
    elif name.endswith(".zst"):
      file = pa.CompressedOutputStream(file, "zstd")
    with file:
      for line in lines:
        file.write(line)
  ended = read_in_child(f"jsonl:{tmp_path / name}", room=2**29)
  assert f"{name}:2 is longer than 67,108,864" in ended


def test_a_small_parquet_file_of_many_long_texts_fits_into_memory(tmp_path):
  """60,000 rows of one text of 1 MB, which its file holds once."""
  text = "x" * 2**20
  column = pa.DictionaryArray.from_arrays(
    pa.array([0] * 60_000, pa.int32()), pa.array([text])
  )
  path = tmp_path / "a.parquet"
  pq.write_table(
    pa.table({"prompt": column}), path, compression="zstd", store_schema=False
  )
  assert path.stat().st_size < 2000
  ended = read_in_child(f"parquet:{path}", room=2**30)
  assert f"read {path} row 3" in ended
  # A text of the largest size of a batch is decoded alone.
  group = types.SimpleNamespace(total_byte_size=sources._BATCH_BYTES)
  assert sources._batch_rows(group) == 1


@pytest.mark.fault(18)
def test_a_damaged_parquet_file_is_named(tmp_path):
  path = tmp_path / "a.parquet"
  path.write_text("no table")
  with pytest.raises(ValueError, match=f"^{path}: no Parquet file, or damaged"):
    read(f"parquet:{path}")


def test_a_flipped_bit_of_a_parquet_page_is_found_by_its_checksum(tmp_path):
  path = tmp_path / "a.parquet"
  table = pa.Table.from_pylist([{"text": f"line {i:04}"} for i in range(300)])
  pq.write_table(
    table,
    path,
    row_group_size=100,
    compression="none",
    use_dictionary=False,
    write_page_checksum=True,
  )
  assert len(read(f"parquet:{path}")) == 300
  faults.flip_byte(path, path.read_bytes().index(b"line 0150"))
  message = f"^{path}: .* damaged after row 100, in row group 1: .*checksum"
  with pytest.raises(ValueError, match=message):
    read(f"parquet:{path}")


def test_a_broken_row_of_parquet_is_named_and_reading_continues(tmp_path):
  path = tmp_path / "a.parquet"
  raw = pa.array([b"one", b"\xff", b"three"])
  text = pa.Array.from_buffers(pa.string(), 3, raw.buffers())
  pq.write_table(pa.table({"prompt": text}), path)
  one, broken, three = sources.open_source(f"parquet:{path}")
  assert (one[1], three[1]) == ({"prompt": "one"}, {"prompt": "three"})
  assert isinstance(broken[1], RecordError)
  assert str(broken[1]).startswith(f"{path} row 2: ")


def test_a_glob_reads_its_files_in_the_order_of_their_names(tmp_path):
  for name, part in (("b", RECORDS[2:]), ("a", RECORDS[:2])):
    write_jsonl(tmp_path / f"part_{name}.jsonl", part)
  write_jsonl(tmp_path / "other.jsonl", [{"n": 9}])
  assert read(f"jsonl:{tmp_path}/part_*.jsonl") == RECORDS


def test_parquet_is_read_with_lists_and_addresses(tmp_path):
  records = [
    {"prompt": f"p{i}", "responses": ["a", "b"], "scores": [0.5, i]}
    for i in range(7)
  ]
  path = tmp_path / "a.parquet"
  pq.write_table(pa.Table.from_pylist(records), path, row_group_size=3)
  assert list(sources.open_source(f"parquet:{path}")) == [
    (f"{path} row {i + 1}", record) for i, record in enumerate(records)
  ]


def test_files_of_a_bucket_are_read_as_local_ones(tmp_path, monkeypatch):
  bucket.stand_in(tmp_path, monkeypatch)
  (tmp_path / "b").mkdir()
  for name, part in (("b", RECORDS[2:]), ("a", RECORDS[:2])):
    write_jsonl(tmp_path / "b" / f"part_{name}.jsonl.gz", part)
  table = pa.Table.from_pylist(RECORDS)
  pq.write_table(table, tmp_path / "b" / "all.parquet")
  for spec in ("jsonl:{}/b/part_*.gz", "parquet:{}/b/all.parquet"):
    remote = sources.open_source(spec.format("gs:/"))
    assert [record for _, record in remote] == RECORDS
    assert remote.digest == sources.open_source(spec.format(tmp_path)).digest
  address, _ = next(iter(remote))
  assert address == "gs://b/all.parquet row 1"


def test_a_source_may_be_read_twice(tmp_path):
  source = sources.open_source(write_jsonl(tmp_path / "a.jsonl"))
  assert list(source) == list(source)


# Damage.


@pytest.mark.fault(18)
@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz"])
@pytest.mark.parametrize(
  ("line", "message"),
  [
    (b'{"prompt": "cut', "not a line of JSON in UTF-8"),
    (b"not json", "not a line of JSON in UTF-8"),
    (b'{"prompt": "\xff\xfe"}', "not a line of JSON in UTF-8"),
    (b"{", "not a line of JSON in UTF-8: .* One object a line is wanted"),
    (b'["a", "b"]', "a record must be an object, not list"),
    (b"3", "a record must be an object, not int"),
    (b"null", "a record must be an object, not NoneType"),
    (b'{"a": ' + b"[" * 100_000, "not a line .* nested too deeply"),
    (b'{"a": ' + b"9" * 5000 + b"}", "not a line .* Exceeds the limit"),
  ],
)
def test_broken_line_is_named_and_reading_continues(
  tmp_path, name, line, message
):
  path = tmp_path / name
  content = b'{"n": 1}\n{"n": 2}\n' + line + b'\n{"n": 4}\n'
  path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)
  one, two, broken, four = sources.open_source(f"jsonl:{path}")
  assert (one[1], two[1]) == ({"n": 1}, {"n": 2})
  assert four == (f"{path}:4", {"n": 4})
  assert broken[0] == f"{path}:3"
  assert isinstance(broken[1], RecordError)
  assert re.match(re.escape(f"{path}:3: ") + message, str(broken[1]))


def large_gz(path):
  # Hard to compress, so a damaged middle is far from the header.
  records = [{"n": i, "digits": str(7 ** (500 + i))} for i in range(200)]
  return write_jsonl(path, records)


@pytest.mark.fault(18)
@pytest.mark.parametrize("name", ["a.jsonl.gz", "a.jsonl.zst"])
def test_truncated_archive_is_an_error(tmp_path, name):
  path = tmp_path / name
  spec = large_gz(path)
  faults.truncate(path)
  with pytest.raises(ValueError, match="breaks off or is damaged after line"):
    read(spec)


def test_a_gzip_with_a_wrong_byte_is_an_error_that_names_it(tmp_path):
  path = tmp_path / "a.jsonl.gz"
  spec = large_gz(path)
  # Magic number, the first block's header, its content, the checksum.
  for place in (0, 10, *range(11, path.stat().st_size, 1501), -6):
    faults.flip_byte(path, place)
    with pytest.raises(ValueError) as caught:
      read(spec)
    assert str(caught.value).startswith(str(path)), place
    faults.flip_byte(path, place)
  assert len(read(spec)) == 200


@pytest.mark.fault(57)
def test_io_error_is_not_taken_for_the_end(tmp_path, monkeypatch):
  spec = write_jsonl(tmp_path / "a.jsonl")

  class Failing(io.RawIOBase):
    """A disk that goes away after two lines."""

    def __init__(self, path, mode):
      with open(path, mode) as file:
        self.lines = file.readlines()[:2]

    def readable(self):
      return True

    def readinto(self, buffer):
      if not self.lines:
        raise OSError("Input/output error")
      line = self.lines.pop(0)
      buffer[: len(line)] = line
      return len(line)

  source = iter(sources.open_source(spec))
  monkeypatch.setattr(
    sources, "open", lambda *a: io.BufferedReader(Failing(*a)), raising=False
  )
  assert [next(source)[1] for _ in range(2)] == RECORDS[:2]
  with pytest.raises(OSError, match=r"a\.jsonl after line 2: Input/output"):
    next(source)


# Specs.


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
@pytest.mark.parametrize(
  ("name", "there"),
  [
    ("parts_0.jsonl", "the folder '.*' holds pairs_0.jsonl$"),
    ("part_*.jsonl", "the folder '.*' holds pairs_0.jsonl$"),
    ("gone/a.jsonl", "the folder '.*/gone' does not exist"),
    ("", "is a folder, and a file is wanted; it holds other, pairs_0.jsonl$"),
  ],
)
def test_error_for_a_missing_file_lists_the_files(tmp_path, kind, name, there):
  for near in ("pairs_0.jsonl", "other"):
    (tmp_path / near).touch()
  with pytest.raises(FileNotFoundError, match=there) as caught:
    sources.open_source(f"{kind}:{tmp_path / name}")
  assert str(tmp_path / name) in str(caught.value)


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_pipes_devices_and_broken_links_are_refused(tmp_path, kind):
  """Reading them would not end, and they cannot be read twice."""
  os.mkfifo(tmp_path / "pipe.jsonl")
  for path in (tmp_path / "pipe.jsonl", tmp_path / "*.jsonl", "/dev/zero"):
    with pytest.raises(OSError, match="' is a pipe or a device, and a file is"):
      sources.open_source(f"{kind}:{path}")
  for target in ("loop", "gone"):
    (tmp_path / "loop").unlink(missing_ok=True)
    (tmp_path / "loop").symlink_to(target)
    for name in ("loop", "l*"):
      with pytest.raises(FileNotFoundError, match=f"is a link to '{target}'"):
        sources.open_source(f"{kind}:{tmp_path / name}")


def test_two_columns_of_one_name_are_refused(tmp_path):
  path = tmp_path / "a.parquet"
  table = pa.table([["a"], ["b"], ["c"]], ["prompt", "chosen", "chosen"])
  pq.write_table(table, path)
  with pytest.raises(ValueError, match=rf"^{path} has two columns 'chosen'"):
    read(f"parquet:{path}")


@pytest.mark.parametrize(
  "spec", ["csv:a.csv", "jsonl:", "jsonl", "", "data/train.jsonl"]
)
def test_error_for_an_unknown_kind_lists_the_kinds(spec):
  with pytest.raises(ValueError) as caught:
    sources.open_source(spec)
  message = str(caught.value)
  assert repr(spec) in message
  assert all(f"{kind}:" in message for kind in sources.KINDS)


@pytest.mark.parametrize(
  "what",
  [
    "review_pear",
    "review_pairs:ten",
    "review_pairs:-3",
    "review_pairs:",
    "review_pairs:10:0:1",
    "review_pairs:1.5",
  ],
)
def test_error_for_an_unknown_task_shows_the_spelling(what):
  with pytest.raises(ValueError) as caught:
    sources.open_source(f"synthetic:{what}")
  message = str(caught.value)
  assert message.startswith(f"synthetic:{what} is not TASK[:NUM[:SEED]]")
  assert all(task in message for task in synthetic.TASKS)


@pytest.mark.parametrize(
  ("what", "num", "seed"),
  [
    ("review_pairs:7:3", 7, 3),
    ("review_pairs:7", 7, 0),
    ("review_pairs", 10_000, 0),
  ],
)
def test_a_synthetic_task_takes_a_number_and_a_seed(what, num, seed):
  expected = list(synthetic.review_pairs(num, seed))
  assert read(f"synthetic:{what}") == expected


# Digests.


def test_the_digest_is_of_the_content_and_not_of_the_path(tmp_path):
  specs = [write_jsonl(tmp_path / name) for name in ("a.jsonl", "b.jsonl")]
  shutil.copytree(tmp_path, tmp_path / "copy")
  specs.append(f"jsonl:{tmp_path}/copy/a.jsonl")
  digests = {sources.open_source(spec).digest for spec in specs}
  assert len(digests) == 1


def test_the_digest_changes_with_the_content(tmp_path):
  path = tmp_path / "a.jsonl"
  spec = write_jsonl(path)
  before = sources.open_source(spec).digest
  write_jsonl(path, [*RECORDS[:-1], RECORDS[-1] | {"n": 99}])
  assert sources.open_source(spec).digest != before


def test_the_digest_changes_with_the_order_of_files(tmp_path):
  parts = RECORDS[:2], RECORDS[2:]
  digests = set()
  for folder, order in (("x", parts), ("y", parts[::-1])):
    (tmp_path / folder).mkdir()
    for name, part in zip("ab", order, strict=True):
      write_jsonl(tmp_path / folder / f"{name}.jsonl", part)
    digests.add(sources.open_source(f"jsonl:{tmp_path}/{folder}/*").digest)
  assert len(digests) == 2


def test_digests_of_synthetic_tasks_differ():
  specs = ["review_pairs", "review_pairs:9", "review_pairs:9:1"]
  specs.append("review_demonstrations:9")
  digests = {sources.open_source(f"synthetic:{s}").digest for s in specs}
  assert len(digests) == len(specs)
