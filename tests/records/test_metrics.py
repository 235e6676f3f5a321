"""metrics.jsonl is JSON line by line, and tables are readable."""

import json
import math

from etils import epath
import jax.numpy as jnp
import numpy as np
import pytest

from dpo_jax.records.lines import GrowingFile
from dpo_jax.records.metrics import MetricsWriter, format_table, read_metrics


def write(workdir, rows, is_writer=True, sinks=()):
  writer = MetricsWriter(workdir, is_writer=is_writer, sinks=sinks)
  for step, split, figures in rows:
    writer.write(step, split, figures)
  writer.close()


def strict(text):
  """Parses JSON as the standard has it: without NaN and Infinity."""

  def refuse(name):
    raise ValueError(f"{name} is not JSON")

  return [json.loads(x, parse_constant=refuse) for x in text.splitlines()]


def test_a_line_holds_step_split_and_figures(tmp_path):
  write(
    tmp_path,
    [
      (1, "train", {"loss": np.float32(0.5), "reward/margin": jnp.float32(2)}),
      (1, "eval", {"loss": 0.25, "num_groups": 8}),
    ],
  )
  assert strict((tmp_path / "metrics.jsonl").read_text()) == [
    {"step": 1, "split": "train", "loss": 0.5, "reward/margin": 2.0},
    {"step": 1, "split": "eval", "loss": 0.25, "num_groups": 8.0},
  ]


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_figure_that_is_not_finite_is_still_json(tmp_path, value):
  write(tmp_path, [(1, "train", {"loss": value, "grad_norm": 1.0})])
  (row,) = strict((tmp_path / "metrics.jsonl").read_text())
  assert row["loss"] is None and row["grad_norm"] == 1.0


def test_a_line_is_there_as_soon_as_it_is_written(tmp_path):
  writer = MetricsWriter(epath.Path(tmp_path), is_writer=True)
  writer.write(1, "train", {"loss": 1.0})
  assert len(read_metrics(tmp_path, "train")) == 1
  writer.close()


def test_later_lines_replace_earlier_ones_of_the_same_step(tmp_path):
  write(tmp_path, [(s, "train", {"loss": s}) for s in (1, 2, 3)])
  write(tmp_path, [(2, "train", {"loss": 20}), (2, "eval", {"loss": -1})])
  write(tmp_path, [(3, "train", {"loss": 30}), (4, "train", {"loss": 40})])
  rows = read_metrics(tmp_path, "train")
  assert [row["step"] for row in rows] == [1, 2, 3, 4]
  assert [row["loss"] for row in rows] == [1, 20, 30, 40]
  assert [row["loss"] for row in read_metrics(tmp_path, "eval")] == [-1]


def test_figures_survive_the_file_to_the_last_bit(tmp_path):
  figures = {"a": float(np.float32(0.1)), "b": 1e-300, "c": math.pi}
  write(tmp_path, [(1, "train", figures)])
  (row,) = read_metrics(tmp_path, "train")
  assert {k: row[k] for k in figures} == figures


def test_only_the_writer_writes(tmp_path):
  write(tmp_path / "run", [(1, "train", {"loss": 1.0})], is_writer=False)
  assert not (tmp_path / "run").exists()


def test_a_table_is_aligned():
  rows = [
    {"policy": "SFT", "reward": 0.125, "steps": 5},
    {"policy": "DPO, long", "reward": -12.5, "steps": 12345},
  ]
  assert format_table(rows).splitlines() == [
    "policy      reward  steps",
    "---------  -------  -----",
    "SFT          0.125      5",
    "DPO, long  -12.500  12345",
  ]


def test_large_numbers_get_commas_and_nan_is_shown():
  rows = [{"tokens": 1234567.0}, {"tokens": math.nan}]
  lines = format_table(rows).splitlines()
  assert [line.strip() for line in lines[2:]] == ["1,234,567", "nan"]


def test_a_table_of_nothing_is_empty():
  assert format_table([]) == ""


class Bucket:
  """An object store: a write replaces the whole, nothing is appended."""

  def __init__(self):
    self.text = None

  def __str__(self):
    return "gs://bucket/metrics.jsonl"

  def exists(self):
    return self.text is not None

  def read_bytes(self):
    return self.text.encode()

  def write_text(self, text):
    self.text = text


def test_a_file_in_a_bucket_grows_over_several_runs():
  bucket = Bucket()
  for run in range(2):
    file = GrowingFile(bucket)
    for line in range(3):
      file.append(f"{run} {line}\n")
    file.close()
  wanted = [f"{run} {line}" for run in range(2) for line in range(3)]
  assert bucket.text.splitlines() == wanted


@pytest.mark.fault(43)
def test_a_torn_last_line_is_cut_before_the_next_one(tmp_path, caplog):
  """A disk that was full, or a kill, leaves half a line."""
  writer = MetricsWriter(tmp_path, is_writer=True)
  writer.write(1, "train", {"loss": 0.5})
  writer.write(2, "train", {"loss": 0.4})
  writer.close()
  path = tmp_path / "metrics.jsonl"
  path.write_text(path.read_text()[:-7])
  assert [row["step"] for row in read_metrics(tmp_path, "train")] == [1]
  writer = MetricsWriter(tmp_path, is_writer=True)
  writer.write(2, "train", {"loss": 0.3})
  writer.close()
  rows = read_metrics(tmp_path, "train")
  assert [row["loss"] for row in rows] == [0.5, 0.3]
  assert "last line is incomplete" in caplog.text


@pytest.mark.fault(43)
@pytest.mark.parametrize(
  ("last", "kept"),
  [
    ('{"step": 2, "split": "train", "loss": 0.4}', [1, 2]),
    ('{"step": 2, "split": "tr}', [1]),
    ('{"step": 2, "split": "train", "a": {}', [1]),
    ("7", [1]),
  ],
)
def test_a_last_line_without_an_end_counts_if_it_is_whole(tmp_path, last, kept):
  first = '{"step": 1, "split": "train", "loss": 0.5}'
  (tmp_path / "metrics.jsonl").write_text(f"{first}\n{last}")
  assert [row["step"] for row in read_metrics(tmp_path, "train")] == kept
  writer = MetricsWriter(tmp_path, is_writer=True)
  writer.write(3, "train", {"loss": 0.3})
  writer.close()
  rows = read_metrics(tmp_path, "train")
  assert [row["step"] for row in rows] == [*kept, 3]


def test_lost_metrics_are_told_when_a_run_resumes(tmp_path, caplog):
  (tmp_path / "metrics.jsonl").touch()
  writer = MetricsWriter(tmp_path, is_writer=True)
  writer.write_resumed(4)
  writer.close()
  assert "the metrics up to step 4 are lost" in caplog.text


@pytest.mark.parametrize(
  "line",
  [
    *(b'{"step": 1', b"[]", b'{"step": 2}', b"null", b'["step", "split"]'),
    *(b'"step split"', b'{"step": "1", "split": "train"}', b"\xff{}"),
    *(b'{"step": 1, "split": null}', b'{"step": 1, "split": "a", "b": "c"}'),
    b'{"step": 1, "split": "a", "b": [1]}',
  ],
)
def test_a_damaged_line_is_named(tmp_path, line):
  good = b'{"step": 0, "split": "train", "loss": 1.0}'
  content = b"\n".join([good, line, good, b""])
  (tmp_path / "metrics.jsonl").write_bytes(content)
  with pytest.raises(ValueError, match=r"metrics\.jsonl:2 is damaged"):
    read_metrics(tmp_path, "train")


def test_small_numbers_in_a_table_are_not_zero():
  rows = [{"rate": 1e-6}, {"rate": 5e-7}, {"rate": 0.0}, {"rate": 0.25}]
  text = format_table(rows)
  assert [line.strip() for line in text.splitlines()[2:]] == [
    *("1e-06", "5e-07", "0.000", "0.250"),
  ]
