"""Records from files and tasks: none lost, none taken for the end."""

import gzip
import json
import shutil

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from dpo_jax.data import sources, synthetic
from tests import faults

RECORDS = [{"prompt": f"question {i} \u00e9", "n": i} for i in range(5)]


def write_jsonl(path, records=RECORDS):
  text = "".join(json.dumps(r, ensure_ascii=False) + "\n" for r in records)
  content = text.encode()
  path.write_bytes(
    gzip.compress(content, mtime=0) if path.suffix == ".gz" else content
  )
  return f"jsonl:{path}"


def read(spec):
  return [record for _, record in sources.open_source(spec)]


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz", "a[1].jsonl"])
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


def test_a_source_may_be_read_twice(tmp_path):
  source = sources.open_source(write_jsonl(tmp_path / "a.jsonl"))
  assert list(source) == list(source)


# Damage.


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz"])
@pytest.mark.parametrize(
  ("line", "message"),
  [
    (b'{"prompt": "cut', "not a line of JSON in UTF-8"),
    (b"not json", "not a line of JSON in UTF-8"),
    (b'{"prompt": "\xff\xfe"}', "not a line of JSON in UTF-8"),
    (b'["a", "b"]', "a record must be an object, not list"),
    (b"3", "a record must be an object, not int"),
    (b"null", "a record must be an object, not NoneType"),
  ],
)
def test_a_broken_line_is_named(tmp_path, name, line, message):
  path = tmp_path / name
  content = b'{"n": 1}\n{"n": 2}\n' + line + b'\n{"n": 4}\n'
  path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)
  source = iter(sources.open_source(f"jsonl:{path}"))
  assert [next(source)[1] for _ in range(2)] == [{"n": 1}, {"n": 2}]
  with pytest.raises(ValueError) as caught:
    next(source)
  assert str(caught.value).startswith(f"{path}:3: {message}")


def large_gz(path):
  # Hard to compress, so that a damaged middle lies far from the header.
  records = [{"n": i, "digits": str(7 ** (500 + i))} for i in range(200)]
  return write_jsonl(path, records)


def test_a_cut_gzip_is_an_error_and_not_the_end(tmp_path):
  path = tmp_path / "a.jsonl.gz"
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


def test_an_io_error_in_the_middle_is_not_the_end(tmp_path, monkeypatch):
  spec = write_jsonl(tmp_path / "a.jsonl")

  class Failing:
    """A disk that goes away after two lines."""

    def __init__(self, path, mode):
      with open(path, mode) as file:
        self.lines = file.readlines()[:2]

    def __enter__(self):
      return self

    def __exit__(self, *unused):
      pass

    def __iter__(self):
      yield from self.lines
      raise OSError("Input/output error")

  source = iter(sources.open_source(spec))
  monkeypatch.setattr(sources, "open", Failing, raising=False)
  assert [next(source)[1] for _ in range(2)] == RECORDS[:2]
  with pytest.raises(OSError, match="Input/output error"):
    next(source)


# Specs.


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
@pytest.mark.parametrize("name", ["gone.jsonl", "gone_*.jsonl"])
def test_a_file_that_is_not_there_is_named(tmp_path, kind, name):
  with pytest.raises(FileNotFoundError, match="gone"):
    sources.open_source(f"{kind}:{tmp_path}/{name}")


@pytest.mark.parametrize(
  "spec", ["csv:a.csv", "jsonl:", "jsonl", "", "data/train.jsonl"]
)
def test_unknown_kinds_are_told_the_known_ones(spec):
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
def test_a_synthetic_task_that_is_none_is_told_how_to_spell_one(what):
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
