"""TFDS: our builders, prepared and read without TensorFlow."""

from collections import Counter
import gzip
import json

import pytest

from dpo_jax.data import sources, tfds_builders
from dpo_jax.data.store import Limits, build_store
from dpo_jax.data.tokenizers import ByteTokenizer
from tests import bucket, faults


def transcripts(num):
  """Odd ones among them: text beyond ASCII, an empty answer, other prompts."""
  for i in range(num):
    prompt = f"\n\nHuman: question {i} \u00e9\u65e5\n\nAssistant:"
    other = prompt if i % 5 else prompt.replace("question", "demand")
    yield {
      "chosen": f"{prompt} yes {i}",
      "rejected": f"{other} no" if i % 7 else other,
    }


@pytest.fixture
def data_dir(tmp_path, monkeypatch):
  folder = tmp_path / "tfds"
  monkeypatch.setenv("TFDS_DATA_DIR", str(folder))
  return folder


def write_release(data_dir, **splits):
  folder = data_dir / "downloads" / "manual" / "hh_rlhf" / "harmless_base"
  folder.mkdir(parents=True, exist_ok=True)
  for split, records in splits.items():
    lines = "".join(json.dumps(record) + "\n" for record in records)
    path = folder / f"{split}.jsonl.gz"
    path.write_bytes(gzip.compress(lines.encode(), mtime=0))
  return folder


def as_json(record):
  return json.dumps(record, sort_keys=True)


def records_of(spec):
  """Records of a source, sorted."""
  found = [record for _, record in sources.open_source(spec)]
  return sorted(found, key=as_json)


def examples_of(spec, cache):
  """Groups of a source as a multiset of texts and scores."""
  opened = build_store(
    sources.open_source(spec), ByteTokenizer(), Limits(400, 200), str(cache)
  )
  return opened.report["dropped"], Counter(
    (
      *(part.tobytes() for part in opened.group(i)),
      *opened.score[i].tolist(),
    )
    for i in range(len(opened))
  )


def test_the_data_set_is_prepared_where_the_variable_points(data_dir):
  write_release(data_dir, train=transcripts(3))
  sources.open_source("tfds:hh_rlhf/harmless_base")
  assert (data_dir / "hh_rlhf" / "harmless_base" / "1.0.0").is_dir()


def test_a_data_set_of_a_bucket_is_read(data_dir, tmp_path, monkeypatch):
  write_release(data_dir, train=transcripts(3))
  spec = "tfds:hh_rlhf/harmless_base"
  local = sources.open_source(spec)
  records = list(local)
  bucket.stand_in(tmp_path, monkeypatch)
  monkeypatch.setenv("TFDS_DATA_DIR", f"gs://{data_dir.name}")
  remote = sources.open_source(spec)
  assert list(remote) == records and remote.digest == local.digest


def test_a_release_gives_the_records_of_its_files(data_dir):
  train, test = list(transcripts(20)), list(transcripts(25))[20:]
  write_release(data_dir, train=train, test=test)
  name = "tfds:hh_rlhf/harmless_base"
  assert records_of(name) == sorted(train, key=as_json)
  assert records_of(f"{name}:train") == sorted(train, key=as_json)
  assert records_of(f"{name}:test") == sorted(test, key=as_json)
  addresses = [where for where, _ in sources.open_source(f"{name}:test")]
  assert addresses == [
    f"tfds:hh_rlhf/harmless_base:test[{i}]" for i in range(5)
  ]


def test_tfds_and_jsonl_of_the_same_records_are_the_same_examples(
  data_dir, tmp_path
):
  folder = write_release(data_dir, train=transcripts(40))
  dropped, examples = examples_of("tfds:hh_rlhf/harmless_base", tmp_path)
  # Of 0..39: 8 multiples of 5; 6 of 7, two of which are of 5 too.
  assert dropped == {"empty_response": 4, "prompts_differ": 8}
  assert examples.total() == 40 - 4 - 8
  jsonl = examples_of(f"jsonl:{folder}/train.jsonl.gz", tmp_path)
  assert (dropped, examples) == jsonl


def test_review_pairs_are_the_synthetic_task_with_its_scores(
  data_dir, tmp_path, monkeypatch
):
  num = {"train": 60, "test": 30}
  monkeypatch.setattr(tfds_builders.ReviewPairs, "NUM", num)
  for seed, split in enumerate(num):
    tfds = examples_of(f"tfds:review_pairs:{split}", tmp_path)
    own = examples_of(f"synthetic:review_pairs:{num[split]}:{seed}", tmp_path)
    assert tfds == own
    assert tfds[1].total() > 20


def test_an_unknown_split_is_told_the_known_ones(data_dir):
  write_release(data_dir, train=transcripts(3), test=transcripts(3))
  with pytest.raises(ValueError, match="no split 'dev'; it has test, train"):
    sources.open_source("tfds:hh_rlhf/harmless_base:dev")


def test_a_data_set_that_tfds_does_not_have_is_told_the_nearest(data_dir):
  with pytest.raises(ValueError, match="Did you mean 'hh_rlhf'") as caught:
    sources.open_source("tfds:hh_rlfh/harmless_base")
  assert len(str(caught.value)) < 100


def test_a_release_without_its_folder_is_told_where_it_goes(data_dir):
  with pytest.raises(FileNotFoundError, match="MANUAL_DIR/hh_rlhf") as caught:
    sources.open_source("tfds:hh_rlhf/harmless_base")
  assert "tfds:hh_rlhf/harmless_base: Manual directory" in str(caught.value)


def test_a_release_that_is_not_there_is_told_where_it_goes(data_dir):
  write_release(data_dir, other=transcripts(1))
  with pytest.raises(FileNotFoundError, match="harmless_base") as caught:
    sources.open_source("tfds:hh_rlhf/harmless_base")
  assert "MANUAL_DIR/hh_rlhf/harmless_base/" in str(caught.value)


@pytest.mark.parametrize(
  "line", [b'{"chosen": "cut', b'{"chosen": "\xff"}', b'{"chosen": "a"}', b"[]"]
)
def test_a_broken_line_of_a_release_is_named_and_nothing_is_left(
  data_dir, line
):
  folder = write_release(data_dir, train=transcripts(5))
  path = folder / "train.jsonl.gz"
  content = gzip.decompress(path.read_bytes()) + line
  path.write_bytes(gzip.compress(content))
  with pytest.raises(ValueError, match=f"{path}:6: not a record"):
    sources.open_source("tfds:hh_rlhf/harmless_base")
  write_release(data_dir, train=transcripts(5))
  assert len(records_of("tfds:hh_rlhf/harmless_base")) == 5


def test_the_digest_follows_the_files_a_data_set_was_prepared_from(
  tmp_path, monkeypatch
):
  digests = []
  for name, num in (("a", 6), ("b", 6), ("c", 7)):
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path / name))
    write_release(tmp_path / name, train=transcripts(num))
    source = sources.open_source("tfds:hh_rlhf/harmless_base")
    digests.append(source.digest)
  assert digests[0] == digests[1]
  assert digests[0] != digests[2]


def test_tensorflow_is_not_imported(data_dir, tmp_path):
  """Even where it is installed: a stand-in says when it is asked for."""
  write_release(data_dir, train=transcripts(3))
  package = tmp_path / "path" / "tensorflow"
  package.mkdir(parents=True)
  asked = tmp_path / "asked"
  (package / "__init__.py").write_text(
    f"open({str(asked)!r}, 'w').close()\nraise ImportError('a stand-in')\n"
  )
  code = (
    "import sys; sys.path.insert(0, sys.argv[1])\n"
    "from dpo_jax.data import sources\n"
    "print(len(list(sources.open_source('tfds:hh_rlhf/harmless_base'))))\n"
  )
  process = faults.spawn(code, str(package.parent))
  output, _ = process.communicate(timeout=120)
  assert process.returncode == 0, output
  assert output.split()[-1] == "3"
  assert not asked.exists()
  # The stand-in does stand in.
  process = faults.spawn(
    "import sys; sys.path.insert(0, sys.argv[1]); import tensorflow",
    str(package.parent),
  )
  assert "a stand-in" in process.communicate(timeout=120)[0]
  assert asked.exists()
