"""Runs side by side: what differs, metrics, samples, curves."""

import dataclasses
import io
import json
import pathlib
import shutil

import pytest
from rich.console import Console

from dpo_jax.records.metrics import read_metrics
from dpo_jax.train import train
from dpo_jax.viewing import runs as runs_lib
from tests import tiny

pytestmark = pytest.mark.usefixtures("in_haste")


@pytest.fixture(scope="module")
def workdirs(tmp_path_factory):
  """Two runs of another beta, with samples."""
  folder = tmp_path_factory.mktemp("runs")
  names = []
  for beta in (0.1, 0.5):
    config = tiny.make_config(
      loss__beta=beta,
      total_steps=2,
      eval__every_steps=1,
      eval__num_samples=2,
      eval__max_response_tokens=4,
      eval__judge="sentiment",
    )
    names.append(str(folder / f"beta_{beta}"))
    train(config, names[-1])
  return names


def test_only_what_differs_is_listed(workdirs):
  rows = runs_lib.config_differences(runs_lib.read_runs(workdirs))
  assert rows == [{"key": "loss.beta", "beta_0.1": "0.1", "beta_0.5": "0.5"}]


def test_long_values_that_differ_at_their_ends_are_told_apart(workdirs):
  runs = runs_lib.read_runs(workdirs)
  path = "jsonl:/mnt/disks/data/preferences/of/many/annotators/train_v"
  runs = [
    dataclasses.replace(run, config={**run.config, "data.source": f"{path}{i}"})
    for i, run in enumerate(runs)
  ]
  (row,) = (
    row
    for row in runs_lib.config_differences(runs)
    if row["key"] == "data.source"
  )
  assert row["beta_0.1"].endswith("_v0") and row["beta_0.5"].endswith("_v1")


def test_absolute_and_relative_paths_are_compared(workdirs, monkeypatch):
  monkeypatch.chdir(pathlib.Path(workdirs[0]).parent)
  runs = runs_lib.read_runs(["beta_0.1", workdirs[1]])
  assert [run.name for run in runs] == ["beta_0.1", "beta_0.5"]
  with pytest.raises(ValueError, match="different workdirs"):
    runs_lib.read_runs(["beta_0.1", "./beta_0.1"])


def test_samples_that_are_rarer_than_evaluations_are_shown(workdirs):
  runs = runs_lib.read_runs(workdirs)
  rows = [{"step": 1, "split": "eval", "kl": 0.5}, {"step": 2, "split": "eval"}]
  runs = [dataclasses.replace(run, splits={"eval": rows}) for run in runs]
  table = {row["metric"]: row for row in runs_lib.last_metrics(runs)}
  assert table["eval: kl"]["beta_0.1"] == "0.5"
  assert table["eval: step"]["beta_0.1"] == "2"
  (axis,) = runs_lib.plot(runs, ["kl"]).axes
  assert axis.get_lines()[0].get_xdata().tolist() == [1]


def test_the_metrics_are_those_of_the_last_evaluation(workdirs):
  runs = runs_lib.read_runs(workdirs)
  rows = {row["metric"]: row for row in runs_lib.last_metrics(runs)}
  for workdir, name in zip(workdirs, ("beta_0.1", "beta_0.5"), strict=True):
    last = read_metrics(workdir, "eval")[-1]
    assert rows["eval: loss"][name] == f"{last['loss']:.4g}"
    assert rows["eval: step"][name] == "2"


def test_everything_is_shown_and_nothing_is_changed(workdirs, tmp_path):
  before = snapshot(workdirs)
  runs = runs_lib.read_runs(workdirs)
  console = Console(record=True, width=90, file=io.StringIO())
  runs_lib.show(console, runs, num_samples=1)
  runs_lib.write_figure(runs_lib.plot(runs, []), tmp_path / "two.png")
  text = console.export_text()
  for expected in ("2 of 2", "finished", "loss.beta", "eval: loss", "(step 2"):
    assert expected in text
  assert (tmp_path / "two.png").read_bytes()[:4] == b"\x89PNG"
  assert snapshot(workdirs) == before


def snapshot(workdirs):
  paths = [p for w in workdirs for p in pathlib.Path(w).rglob("*")]
  return {p: p.read_bytes() for p in paths if p.is_file()}


def test_each_curve_has_the_points_and_the_name_of_its_run(workdirs):
  runs = runs_lib.read_runs(workdirs)
  figure = runs_lib.plot(runs, ["reward/accuracy"])
  [axis] = figure.axes
  assert axis.get_title(loc="left") == "reward/accuracy (eval)"
  for workdir, line in zip(workdirs, axis.get_lines(), strict=True):
    rows = read_metrics(workdir, "eval")
    assert line.get_xdata().tolist() == [row["step"] for row in rows]
    assert line.get_ydata().tolist() == [row["reward/accuracy"] for row in rows]
  labels = [text.get_text().strip() for text in axis.texts]
  assert labels == ["beta_0.1", "beta_0.5"]


def test_a_run_without_metrics_yet_has_no_cells(workdirs, tmp_path):
  young = tmp_path / "young"
  young.mkdir()
  for name in ("config.json", "model.json"):
    shutil.copy(f"{workdirs[0]}/{name}", young)
  runs = runs_lib.read_runs([workdirs[0], str(young)])
  rows = {row["metric"]: row for row in runs_lib.last_metrics(runs)}
  assert rows["eval: loss"][runs[1].name] == "-"
  console = Console(record=True, width=90, file=io.StringIO())
  runs_lib.show(console, runs, num_samples=1)
  assert "0 of 2" in console.export_text()
  runs_lib.plot(runs, [])
  alone = [run for run in runs if not run.splits]
  with pytest.raises(ValueError, match="no metrics yet"):
    runs_lib.plot(alone, [])


def test_mistakes_are_named(workdirs, tmp_path):
  with pytest.raises(ValueError, match="name two or more different workdirs"):
    runs_lib.read_runs([workdirs[0], f"{workdirs[0]}/"])
  with pytest.raises(ValueError, match="given: none"):
    runs_lib.read_runs([])
  with pytest.raises(FileNotFoundError, match="is not the workdir of a run"):
    runs_lib.read_runs([workdirs[0], str(tmp_path)])
  runs = runs_lib.read_runs(workdirs)
  with pytest.raises(ValueError, match="--metrics=reward/accurac: no run has"):
    runs_lib.plot(runs, ["reward/accurac"])


def test_a_damaged_line_of_metrics_is_named(workdirs, tmp_path):
  for name in ("config.json", "model.json"):
    shutil.copy(f"{workdirs[0]}/{name}", tmp_path)
  (tmp_path / "metrics.jsonl").write_text(json.dumps({"step": 1}) + "\n")
  with pytest.raises(ValueError, match=r"metrics\.jsonl:1 is damaged: split"):
    runs_lib.read_runs([workdirs[0], str(tmp_path)])


def test_a_torn_line_of_samples_is_left_out(workdirs, tmp_path):
  for name in ("config.json", "model.json"):
    shutil.copy(f"{workdirs[0]}/{name}", tmp_path)
  row = {"step": 1, "prompt": "a", "response": "b"}
  torn = json.dumps(row) + "\n" + json.dumps(row)[:20]
  (tmp_path / "samples.jsonl").write_text(torn)
  runs = runs_lib.read_runs([workdirs[0], str(tmp_path)])
  assert runs[1].samples == [row]
