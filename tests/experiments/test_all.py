"""`experiments.all`: registry, estimate, failures and the page of results."""

import dataclasses
import importlib
import json
import math
import pathlib
import types

import pytest

from experiments import all as all_lib
from experiments import page, registry, sweep
from experiments.registry import EXPERIMENTS, Experiment
from experiments.sweep import Run, Settings

FOLDER = pathlib.Path(all_lib.__file__).parent


def make_experiment(name, *, folder="", fails=False, calls=None):
  """An experiment of one run that trains nothing."""

  def work(path):
    if calls is not None:
      calls.append(name)
    if fails:
      raise FloatingPointError("not a number")

  def measure(path):
    return [{"reward": 0.5}]

  def runs(settings):
    shared = Run("shared", {"method": "shared"}, measure=measure)
    own = Run(name, {"method": name}, work=work, measure=measure)
    return [shared, own]

  def plot(rows, path):
    pathlib.Path(f"{path}.png").write_bytes(b"")
    return [f"{path}.png"]

  module = types.ModuleType(f"experiments.{name}", f"Shows {name}.\n\nMore.")
  module.runs, module.plot, module.collect = runs, plot, sweep.collect
  return Experiment(module, lambda rows: rows, folder)


def test_every_experiment_is_in_the_registry():
  """A module with `runs`, `collect` and `plot` is an experiment."""
  found = set()
  for path in FOLDER.glob("*.py"):
    text = path.read_text(encoding="utf-8")
    if path.stem == "all" or "sweep.main(" not in text:
      continue
    module = importlib.import_module(f"experiments.{path.stem}")
    assert callable(module.runs), path
    assert callable(module.collect), path
    assert callable(module.plot), path
    found.add(path.stem)
  names = [experiment.name for experiment in EXPERIMENTS]
  assert sorted(names) == sorted(found)
  assert len(names) == len(set(names))
  assert all(e.sentence.endswith(".") for e in EXPERIMENTS)


def test_an_experiment_takes_judge_flags_where_its_command_does():
  for experiment in EXPERIMENTS:
    text = pathlib.Path(experiment.module.__file__).read_text()
    assert experiment.has_judge == ("has_judge=True" in text), experiment.name


def test_an_unknown_experiment_is_refused_with_a_suggestion():
  message = r"--only=label_noize: no such .* Did you mean 'label_noise'"
  with pytest.raises(ValueError, match=message):
    registry.choose(["label_noize"])
  assert [e.name for e in registry.choose(["label_noise"])] == ["label_noise"]


def test_the_estimate_counts_shared_and_finished_runs_once(tmp_path):
  chosen = [make_experiment(name, folder="both") for name in ("a", "b")]
  whole = Settings(str(tmp_path), "tiny")
  rows, _ = all_lib.estimate(chosen, whole)
  assert [(r["runs"], r["to do"]) for r in rows] == [(2, 2), (2, 1)]
  assert rows[0]["minutes"] == pytest.approx(2 * rows[1]["minutes"])
  assert all_lib.run_all(chosen[:1], whole, "0/1") == {}
  rows, _ = all_lib.estimate(chosen, whole)
  assert [r["to do"] for r in rows] == [0, 1]


def test_an_experiment_that_cannot_run_does_not_stop_the_estimate(
  tmp_path, capsys
):
  paper = Settings(str(tmp_path), "paper")
  chosen = [*registry.choose(["tldr_temperature"]), make_experiment("a")]
  [row], refusals = all_lib.estimate(chosen, paper)
  assert row["experiment"] == "a" and row["minutes"] > 0
  assert "takes --config.eval.judge" in refusals["tldr_temperature"]
  all_lib.print_estimate(chosen, paper)
  assert "tldr_temperature cannot run: --scale" in capsys.readouterr().out


def test_a_failing_experiment_is_named_and_does_not_stop_the_others(tmp_path):
  calls = []
  chosen = [
    make_experiment("a", calls=calls),
    make_experiment("b", calls=calls, fails=True),
    make_experiment("c", calls=calls),
  ]
  chosen[0].module.plot = lambda rows, path: 1 / 0
  whole = Settings(str(tmp_path), "tiny")
  failures = all_lib.run_all(chosen, whole, "0/1")
  assert calls == ["a", "b", "c"]
  assert failures == {
    "a": "ZeroDivisionError: division by zero",
    "b": "b: FloatingPointError: not a number",
  }
  text = pathlib.Path(page.write_page(chosen, whole, failures)).read_text()
  assert "## b\n\nShows b.\n\n**Failed.** b: FloatingPointError" in text
  assert "Unfinished runs: 1." in text
  assert "## c\n\nShows c.\n\n![c](c/c.png)" in text
  assert "| shared | shared | 0.500 |" in text


def test_the_page_says_how_long_the_runs_took(tmp_path):
  """A shared run counts once, and an unfinished one not at all."""
  chosen = [make_experiment(name, folder="both") for name in ("a", "b")]
  chosen.append(make_experiment("c"))
  whole = Settings(str(tmp_path), "tiny")
  assert all_lib.run_all(chosen[:2], whole, "0/1") == {}
  for seconds, name in ((60, "shared"), (120, "a"), (30, "b")):
    result = tmp_path / "both" / name / "result.json"
    text = json.loads(result.read_text()) | {"last_seconds": seconds}
    result.write_text(json.dumps(text))
  rows = [tuple(row.values()) for row in page.durations(chosen, whole)]
  assert rows == [("a", 2, 3.0), ("b", 1, 0.5), ("c", 0, 0.0), ("all", 3, 3.5)]
  text = pathlib.Path(page.write_page(chosen, whole, {})).read_text()
  assert "| all | 3 | 3.500 |" in text
  assert "No run has begun." in text.partition("## c")[2]


def test_a_published_page_has_its_figures_beside_it(
  tmp_path, monkeypatch, capsys
):
  """It is written once nothing is missing, and not before."""
  monkeypatch.setattr(sweep, "compile_once", lambda workdir: None)
  monkeypatch.setattr(sweep, "compile_soon", lambda: None)
  a, b, bad = (make_experiment(n, fails=n == "bad") for n in ("a", "b", "bad"))
  whole = Settings(str(tmp_path / "w"), "tiny")
  out = tmp_path / "out"
  assert all_lib.run([a, bad], whole, "0/1", str(out)) == 1
  assert (
    "published: nothing, because runs are missing" in capsys.readouterr().out
  )
  assert page.publish([a, b], whole, str(out)) is None
  assert not out.exists()
  (tmp_path / "w" / "a" / "a.png").write_bytes(b"figure")
  assert page.publish([a], whole, str(out)) == str(out / "RESULTS.md")
  text = (out / "RESULTS.md").read_text()
  assert "## a\n\nShows a.\n\n![a](figures/a.png)\n\n|" in text
  assert [p.name for p in (out / "figures").iterdir()] == ["a.png"]
  assert (out / "figures" / "a.png").read_bytes() == b"figure"
  (tmp_path / "w" / "a" / "a" / "result.json").unlink()
  assert page.publish([a], whole, str(out)) is None
  assert all_lib.run([a, b], whole, "0/1", str(out)) == 0
  assert f"published: {out}/RESULTS.md" in capsys.readouterr().out


def test_a_table_of_a_page_has_no_empty_columns(tmp_path):
  """Neither NaN nor its spread is a number to show, nor is -0."""
  experiment = make_experiment("a")
  rows = [
    {"method": "x", "share": -1e-9, "+-share": 0.25, "seeds": 3},
    {"method": "y", "share": math.nan, "+-share": 0.0, "seeds": 1},
  ]
  rows = [row | {"accuracy": math.nan} for row in rows]
  experiment = dataclasses.replace(experiment, table=lambda _: rows)
  whole = Settings(str(tmp_path), "tiny")
  assert all_lib.run_all([experiment], whole, "0/1") == {}
  text = pathlib.Path(page.write_page([experiment], whole, {})).read_text()
  assert text.partition("a/a.png)\n\n")[2] == (
    "| method | share | +-share | seeds |\n|---|---|---|---|\n"
    "| x | 0.000 | 0.250 | 3 |\n| y |  |  | 1 |\n"
  )


def test_the_exit_code_says_that_an_experiment_failed(
  tmp_path, monkeypatch, capsys
):
  good, bad = make_experiment("a"), make_experiment("b", fails=True)
  monkeypatch.setattr(sweep, "compile_once", lambda workdir: None)
  monkeypatch.setattr(sweep, "compile_soon", lambda: None)
  whole = Settings(str(tmp_path), "tiny")
  assert all_lib.run([good], whole, "0/1") == 0
  assert all_lib.run([good, bad], whole, "0/1") == 1
  assert "FAILED b: b: FloatingPointError" in capsys.readouterr().out
  rows = json.loads((tmp_path / "a" / "a.runs.json").read_text())
  assert [row["name"] for row in rows] == ["shared", "a"]


def test_the_estimate_executes_nothing(tmp_path, capsys):
  calls = []
  whole = Settings(str(tmp_path / "w"), "tiny")
  all_lib.print_estimate([make_experiment("a", calls=calls)], whole)
  assert calls == [] and not (tmp_path / "w").exists()
  assert "about 0 minutes on 2 CPU cores" in capsys.readouterr().out
