"""Paths that are not of this machine, on a stand-in for gs://."""

import os

from etils import epath
import pytest

from dpo_jax.records.lines import GrowingFile
from dpo_jax.system import files, inputs
from tests import bucket, faults


@pytest.fixture
def remote(tmp_path, monkeypatch):
  """Content of gs://b as a folder, and the file system of gs://."""
  folder = tmp_path / "buckets" / "b"
  folder.mkdir(parents=True)
  return folder, bucket.stand_in(tmp_path / "buckets", monkeypatch)


def read(path):
  with open(path, "rb") as file:
    return file.read()


@pytest.mark.parametrize(
  ("content", "why"),
  [
    (b'{"a": 1', "Expecting"),
    (b'{"a": "\xff"}', "can't decode byte 0xff"),
    (b"[1]", "it holds a list, not an object"),
    (b"null", "it holds a NoneType, not an object"),
    (b"[" * 100_000, "it is nested too deeply"),
    (b'{"a": ' + b"9" * 5000 + b"}", "Exceeds the limit"),
  ],
)
def test_a_damaged_json_file_is_named_with_what_to_do(tmp_path, content, why):
  path = epath.Path(tmp_path / "a.json")
  path.write_bytes(content)
  with pytest.raises(ValueError) as caught:
    files.read_json(path)
  message = str(caught.value)
  assert message.startswith(f"{path} is damaged: ")
  assert why in message
  assert message.endswith("Restore it from a copy")


def test_a_key_that_stands_twice_is_named(tmp_path):
  path = epath.Path(tmp_path / "a.json")
  path.write_text('{"a": {"b": 1, "b": 2}}')
  with pytest.raises(ValueError, match=r"a\.json has the key 'b' twice: leave"):
    files.read_json(path)


def test_local_paths_are_not_copied(tmp_path):
  assert files.local(tmp_path / "a") == str(tmp_path / "a")
  with files.writing(tmp_path / "a") as path:
    assert path == str(tmp_path / "a")


def test_folders_of_a_pattern_may_hold_wildcards_too(tmp_path):
  for name in ("a/x.jsonl", "b/x.jsonl", "b/y.jsonl"):
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).write_text("")
  found = inputs.find(f"{tmp_path}/*/x.jsonl")
  assert [str(path.relative_to(tmp_path)) for path in found] == [
    "a/x.jsonl",
    "b/x.jsonl",
  ]


def test_a_remote_file_is_copied_once_and_again_when_it_changes(remote):
  folder, buckets = remote
  (folder / "a.txt").write_bytes(b"one")
  paths = [files.local("gs://b/a.txt") for _ in range(2)]
  assert read(paths[0]) == b"one" and paths[0] == paths[1]
  assert buckets.opened == ["a.txt"]
  (folder / "a.txt").write_bytes(b"other")
  assert read(files.local("gs://b/a.txt")) == b"other"


def test_a_copy_resumes_where_it_broke_off(remote, monkeypatch):
  folder, _ = remote
  (folder / "a.txt").write_bytes(b"0123456789")
  copied = []

  def copy(source, target, size):
    copied.append(source.read(4) if not copied else source.read())
    target.write(copied[-1])
    if len(copied) == 1:
      raise OSError("connection lost")

  monkeypatch.setattr(files.shutil, "copyfileobj", copy)
  with pytest.raises(OSError, match="connection lost"):
    files.local("gs://b/a.txt")
  assert read(files.local("gs://b/a.txt")) == b"0123456789"
  assert copied == [b"0123", b"456789"]


def test_a_file_that_changes_while_it_is_copied_is_refused(remote, monkeypatch):
  folder, _ = remote
  (folder / "a.txt").write_bytes(b"0123456789")
  with monkeypatch.context() as patch:
    patch.setattr(files.shutil, "copyfileobj", lambda s, t, size: t.write(b"0"))
    with pytest.raises(OSError, match="has 10 bytes, and 1 were read"):
      files.local("gs://b/a.txt")
  assert read(files.local("gs://b/a.txt")) == b"0123456789"


def test_a_remote_folder_is_copied_with_its_subfolders(remote):
  folder, _ = remote
  (folder / "x" / "y").mkdir(parents=True)
  (folder / "x" / "a").write_bytes(b"a")
  (folder / "x" / "y" / "b").write_bytes(b"bb")
  copy = files.local("gs://b/x")
  assert read(os.path.join(copy, "a")) == b"a"
  assert read(os.path.join(copy, "y", "b")) == b"bb"
  for root in ("gs://b", str(folder)):
    sizes = [(str(path), files.size(path)) for path in files.tree(root)]
    assert sizes == [(f"{root}/x/a", 1), (f"{root}/x/y/b", 2)]


def test_patterns_find_remote_files(remote):
  folder, _ = remote
  for name in ("b_1", "a_2", "a_1"):
    (folder / name).touch()
  found = inputs.find("gs://b/a_*")
  assert found == [epath.Path("gs://b/a_1"), epath.Path("gs://b/a_2")]
  with pytest.raises(FileNotFoundError, match="'gs://b' holds a_1, a_2, b_1"):
    inputs.find("gs://b/c_*")


def test_a_library_writes_to_a_remote_path(remote):
  folder, _ = remote
  with files.writing("gs://b/a.txt") as path, open(path, "w") as file:
    file.write("one")
  assert read(folder / "a.txt") == b"one"


@pytest.mark.fault(43)
def test_a_full_disk_names_the_file_and_the_bytes(tmp_path):
  path = tmp_path / "config.json"
  files.write_atomically(path, "before")
  metrics = GrowingFile(epath.Path(tmp_path / "metrics.jsonl"))
  metrics.append("{}\n")
  with faults.limited_files(1_000):
    with pytest.raises(OSError, match=r"20,000 bytes .*config\.json"):
      files.write_atomically(path, "x" * 20_000)
    with pytest.raises(OSError, match=r"20,000 bytes .*metrics\.jsonl"):
      metrics.append("x" * 20_000)
    metrics.close()
  assert path.read_text() == "before"
  assert sorted(p.name for p in tmp_path.iterdir()) == [
    "config.json",
    "metrics.jsonl",
  ]
