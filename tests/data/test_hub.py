"""Data sets of the Hub: their files, and a stand-in for the Hub itself."""

import io

import huggingface_hub
from huggingface_hub import errors
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from dpo_jax.data import hub, sources, store, tokenizers
from tests.data import hub_server

README = """---
configs:
- config_name: first
  data_files:
  - split: train
    path: data/first-*
- config_name: second
  data_files: data/second-*
---
Text.
"""


def parquet(*numbers):
  buffer = io.BytesIO()
  pq.write_table(pa.Table.from_pylist([{"n": n} for n in numbers]), buffer)
  return buffer.getvalue()


def read(spec):
  return [record["n"] for _, record in sources.open_source(spec)]


@pytest.fixture
def repositories(tmp_path, monkeypatch):
  """Content of the Hub: ORG/NAME -> branch -> path -> content."""
  with hub_server.serve(str(tmp_path / "hub"), monkeypatch) as server:
    yield server.repositories


# Files.

ONE = {"default": {"train": ["x.jsonl"]}}


@pytest.mark.parametrize(
  ("paths", "configs"),
  [
    (["x.jsonl", "README.md", ".hidden.json", "dataset_infos.json"], ONE),
    (["x.jsonl", "x.py", "__junk__/y.jsonl"], ONE),
    # Parquet is preferred.
    (["a.parquet", "a.jsonl"], {"default": {"train": ["a.parquet"]}}),
    # Splits of any name, as `push_to_hub` writes them.
    (
      ["data/b_x-00000-of-00001.parquet", "data/a-00000-of-00001-9f.parquet"],
      {
        "data": {
          "a": ["data/a-00000-of-00001-9f.parquet"],
          "b_x": ["data/b_x-00000-of-00001.parquet"],
        }
      },
    ),
    (
      ["x/train-00000-of-00001.parquet", "y/test-00000-of-00001.parquet"],
      {
        "x": {"train": ["x/train-00000-of-00001.parquet"]},
        "y": {"test": ["y/test-00000-of-00001.parquet"]},
      },
    ),
    # The Hub's own conversion.
    (
      ["a/train/0000.parquet", "a/train/0001.parquet", "a/test/0000.parquet"],
      {
        "a": {
          "test": ["a/test/0000.parquet"],
          "train": ["a/train/0000.parquet", "a/train/0001.parquet"],
        }
      },
    ),
    # Keywords: whole words of folders, then of files.
    (
      ["x/train.jsonl.gz", "y/my_training_1.jsonl", "x/dev.json"],
      {
        "default": {
          "train": ["x/train.jsonl.gz", "y/my_training_1.jsonl"],
          "validation": ["x/dev.json"],
        }
      },
    ),
    (
      ["train/a.jsonl", "eval/train.jsonl"],
      {"default": {"train": ["train/a.jsonl"], "test": ["eval/train.jsonl"]}},
    ),
    (["trained.jsonl"], {"default": {"train": ["trained.jsonl"]}}),
    (["a.csv"], {"default": {}}),
  ],
)
def test_names_tell_configs_and_splits(paths, configs):
  assert hub.find_configs(paths, []) == configs


PATHS = ["a/x.parquet", "a/b/y.parquet", "a/z.jsonl", "c/train.jsonl"]


@pytest.mark.parametrize(
  ("declared", "splits"),
  [
    ({"data_files": "a/*.parquet"}, {"train": ["a/x.parquet"]}),
    (
      {"data_files": ["a/**", "./c/train.jsonl"]},
      {"train": ["a/b/y.parquet", "a/x.parquet", "a/z.jsonl", "c/train.jsonl"]},
    ),
    (
      {
        "data_files": [
          {"split": "s", "path": ["*/x.parquet", "a/x.parquet"]},
          {"split": "t", "path": "a/z.jsonl"},
        ]
      },
      {"s": ["a/x.parquet"], "t": ["a/z.jsonl"]},
    ),
    (
      {"data_dir": "a", "data_files": {"t": "*.jsonl"}},
      {"t": ["a/z.jsonl"]},
    ),
    ({"data_dir": "c/"}, {"train": ["c/train.jsonl"]}),
  ],
)
def test_the_header_of_the_readme_decides(declared, splits):
  declared = declared | {"config_name": "one"}
  assert hub.find_configs(PATHS, [declared]) == {"one": splits}


# The Hub.


def test_a_split_is_read_and_pinned_to_its_commit(repositories):
  files = {
    "train-00001-of-00002.parquet": parquet(2, 3),
    "train-00000-of-00002.parquet": parquet(0, 1),
    "test-00000-of-00001.parquet": parquet(9),
  }
  repositories["me/pairs"] = {"main": files}
  source = sources.open_source("hub:me/pairs@main")
  pinned = f"hub:me/pairs/default@{hub_server.commit_of(files)}:train"
  assert source.spec == pinned
  assert list(source) == [
    ("me/pairs/train-00000-of-00002.parquet row 1", {"n": 0}),
    ("me/pairs/train-00000-of-00002.parquet row 2", {"n": 1}),
    ("me/pairs/train-00001-of-00002.parquet row 1", {"n": 2}),
    ("me/pairs/train-00001-of-00002.parquet row 2", {"n": 3}),
  ]
  # The branch moves on, and the pinned spec does not.
  repositories["me/pairs"] = {"main": {"train.jsonl": b'{"n": 5}'}, "v1": files}
  assert read("hub:me/pairs@main") == [5]
  assert read(pinned) == [0, 1, 2, 3]
  assert read("hub:me/pairs@v1:test") == [9]


def test_the_digest_is_of_the_content_and_fetches_nothing(
  repositories, monkeypatch
):
  files = {"train.parquet": parquet(1), "README.md": b"one"}
  repositories["me/a"] = {"main": files}
  repositories["me/b"] = {"main": files | {"README.md": b"two"}}
  repositories["me/c"] = {"main": files | {"train.parquet": parquet(2)}}
  monkeypatch.setattr("huggingface_hub.snapshot_download", None)
  a, b, c = (sources.open_source(f"hub:me/{x}@main").digest for x in "abc")
  assert a == b != c


def test_cached_data_need_no_hub(repositories, tmp_path, monkeypatch):
  repositories["me/pairs"] = {"main": {"a.jsonl": b'{"n": 5}'}}
  source = sources.open_source("hub:me/pairs@main")
  assert [record for _, record in source] == [{"n": 5}]
  monkeypatch.setattr(
    "huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:1"
  )
  again = sources.open_source(source.spec)
  assert list(again) == list(source) and again.digest == source.digest


def test_damage_to_a_cached_file_is_named(repositories, tmp_path):
  repositories["me/pairs"] = {"main": {"a.jsonl": b'{"n": 5}'}}
  source = sources.open_source("hub:me/pairs@main")
  assert read(source.spec) == [5]
  [blob] = tmp_path.rglob("blobs/*")
  blob.write_bytes(b'{"n": 6}')
  with pytest.raises(ValueError, match=r"a\.jsonl is damaged: its digest"):
    read(source.spec)


def test_a_token_store_is_found_without_fetching_the_data(
  repositories, tmp_path, monkeypatch
):
  record = b'{"prompt": "p", "chosen": "a", "rejected": "b"}'
  repositories["me/pairs"] = {"main": {"a.jsonl": record}}
  spec = "hub:me/pairs@main"

  def build():
    return store.build_store(
      sources.open_source(spec),
      tokenizers.ByteTokenizer(),
      store.Limits(20, 10),
      str(tmp_path / "stores"),
    )

  built = build()
  assert built.report["source"] == sources.open_source(spec).spec != spec
  monkeypatch.setattr("huggingface_hub.snapshot_download", None)
  assert build().digest == built.digest


def test_a_config_is_chosen_by_name_or_is_the_default_or_a_folder(repositories):
  files = {
    "data/first-1.jsonl": b'{"n": 1}',
    "data/second-1.jsonl": b'{"n": 2}',
    "other/train.jsonl": b'{"n": 3}',
    "other/test.jsonl": b'{"n": 4}',
  }
  marked = README.replace("second\n", "second\n  default: true\n")
  repositories["me/pairs"] = {
    "main": files | {"README.md": README.encode()},
    "marked": files | {"README.md": marked.encode()},
  }
  assert read("hub:me/pairs/first@main") == [1]
  assert read("hub:me/pairs@marked") == [2]
  assert read("hub:me/pairs/other@main:test") == [4]
  for what, message in (
    ("me/pairs@main", r"must name one of its configs, .*: first, second$"),
    ("me/pairs/third@main", r"no config and no folder 'third'; .* first, sec"),
  ):
    with pytest.raises(ValueError, match=message):
      sources.open_source(f"hub:{what}")


def test_a_data_set_without_readable_files_is_read_as_the_hub_converted_it(
  repositories,
):
  converted = {
    "default/train/0000.parquet": parquet(1),
    "default/partial-test/0000.parquet": parquet(2),
  }
  repositories["me/pairs"] = {
    "main": {"pairs.csv": b"n\n1\n", "dataset_infos.json": b"{}"},
    hub.CONVERTED: converted,
  }
  source = sources.open_source("hub:me/pairs@main")
  commit = hub_server.commit_of(converted)
  assert source.spec == f"hub:me/pairs/default@{commit}:train"
  assert read(source.spec) == read(f"hub:me/pairs@{hub.CONVERTED}") == [1]
  # The conversion does not name the commit that it was made from.
  commit = hub_server.commit_of(repositories["me/pairs"]["main"])
  for what, message in (
    ("main:test", r"no split 'test'; it has partial-test, train"),
    (commit, rf"holds no .* hub:me/pairs@{hub.CONVERTED}"),
  ):
    with pytest.raises(ValueError, match=message):
      sources.open_source(f"hub:me/pairs@{what}")


def test_unreachable_hub_is_reported(monkeypatch):
  is_refused = errors.HfHubHTTPError.__mro__[1]("refused")

  def fail(*args, **kwargs):
    raise is_refused

  monkeypatch.setattr(huggingface_hub.HfApi, "dataset_info", fail)
  with pytest.raises(ConnectionError, match=r"did not answer.*o/n@main: ref"):
    sources.open_source("hub:o/n@main")


@pytest.mark.parametrize(
  ("what", "error", "message"),
  [
    ("me/pairs", ValueError, "name the commit, or a branch such as main"),
    ("pairs@main", ValueError, r"must be hub:ORG/NAME\[/CONFIG\]@REVISION"),
    ("me/pairs@v2", FileNotFoundError, "me/pairs .* has no revision 'v2'"),
    ("me/none@main", FileNotFoundError, "no data set 'me/none', or keeps it"),
    ("me/csv@main", ValueError, "holds no .parquet, .jsonl or .json files"),
    ("me/listed@main", ValueError, "a.csv is neither Parquet nor JSON"),
    ("me/listed/old@main", ValueError, "names files of the split 'train' that"),
    ("me/pairs@main:dev", ValueError, "no split 'dev'; it has train"),
  ],
)
def test_missing_data_sets_are_reported(repositories, what, error, message):
  listed = (
    b"---\nconfigs:\n- data_files: a.csv\n"
    b"- config_name: old\n  data_files: gone-*.csv\n---\n"
  )
  repositories["me/pairs"] = {"main": {"a.jsonl": b"{}"}}
  repositories["me/csv"] = {"main": {"a.csv": b""}}
  repositories["me/listed"] = {
    "main": {"a.csv": b"", "b.jsonl": b"", "README.md": listed}
  }
  with pytest.raises(error, match=message):
    sources.open_source(f"hub:{what}")
