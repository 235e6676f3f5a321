"""Steps are adopted, moved aside, gone back to, and never lost in silence."""

import json
import logging
import shutil

import pytest

from dpo_jax.records import manifest, recovery
from dpo_jax.records.lines import GrowingFile
from dpo_jax.records.metrics import read_metrics
from dpo_jax.records.workdir import Workdir
from tests import faults


def make_step(workdir, step, run_id="", *, is_whole=True):
  """A step of two files, as Orbax leaves it."""
  folder = Workdir.at(workdir).checkpoints / str(step)
  for part in ("params", "rest"):
    (folder / part).mkdir(parents=True)
    (folder / part / "array").write_text(f"{part} of step {step}")
  if is_whole:
    manifest.write(folder, run_id)
  return folder


def steps_of(workdir):
  return sorted(int(f.name) for f in Workdir.at(workdir).checkpoints.iterdir())


def moved(workdir):
  return sorted(f.name for f in Workdir.at(workdir).quarantine.iterdir())


def name_run(workdir, name):
  (workdir / "workdir.json").write_text(json.dumps({"format": 1, "run": name}))


@pytest.mark.fault(39)
def test_a_committed_step_without_a_manifest_is_adopted(tmp_path):
  """A kill between the two costs nothing."""
  workdir = Workdir.at(tmp_path)
  make_step(tmp_path, 2)
  recovery.mark_saved(workdir, 2)
  folder = make_step(tmp_path, 4, is_whole=False)
  recovery.mark_begun(workdir, 4)
  recovery.recover(workdir)
  assert steps_of(tmp_path) == [2, 4]
  assert not manifest.verify(folder)


@pytest.mark.fault(43)
def test_a_committed_step_without_a_part_is_not_adopted(tmp_path):
  """A save that found it so has written no manifest."""
  workdir = Workdir.at(tmp_path)
  make_step(tmp_path, 2)
  recovery.mark_saved(workdir, 2)
  shutil.rmtree(make_step(tmp_path, 4, is_whole=False) / "params")
  recovery.mark_begun(workdir, 4)
  recovery.recover(workdir)
  assert (steps_of(tmp_path), moved(tmp_path)) == ([2], ["4-0"])


def test_a_saved_step_that_lost_its_manifest_is_not_adopted(tmp_path):
  workdir = Workdir.at(tmp_path)
  make_step(tmp_path, 2)
  make_step(tmp_path, 4, is_whole=False)
  recovery.mark_saved(workdir, 4)
  recovery.recover(workdir)
  assert steps_of(tmp_path) == [2]
  assert moved(tmp_path) == ["4-0"]


@pytest.mark.fault(42)
def test_step_of_another_run_is_moved_aside(tmp_path, caplog):
  name_run(tmp_path, "ours")
  make_step(tmp_path, 2, "ours")
  make_step(tmp_path, 4, "theirs")
  make_step(tmp_path, 1)  # from before steps had the name of their run
  with caplog.at_level(logging.WARNING, "dpo_jax"):
    recovery.recover(Workdir.at(tmp_path))
  assert steps_of(tmp_path) == [1, 2]
  assert "it is a step of another run, theirs" in caplog.text


@pytest.mark.fault(42)
def test_a_renamed_step_is_moved_aside(tmp_path, caplog):
  """Otherwise it is resumed with the wrong data, or taken for the last."""
  name_run(tmp_path, "ours")
  make_step(tmp_path, 2, "ours")
  make_step(tmp_path, 4, "ours").rename(tmp_path / "checkpoints" / "12")
  with caplog.at_level(logging.WARNING, "dpo_jax"):
    recovery.recover(Workdir.at(tmp_path))
  assert steps_of(tmp_path) == [2]
  assert "it is a copy of step 4" in caplog.text


def test_the_name_of_a_run_is_part_of_the_manifest(tmp_path):
  folder = make_step(tmp_path, 2, "ours")
  (folder / "run.txt").write_text("theirs\n")
  assert manifest.verify(folder, run_id="theirs") == "run.txt is damaged"
  (folder / "run.txt").unlink()
  assert manifest.verify(folder) == "run.txt is missing"


@pytest.mark.fault(41)
def test_a_run_that_lost_all_steps_does_not_start_again(tmp_path, caplog):
  workdir = Workdir.at(tmp_path)
  for step in (2, 4):
    faults.flip_byte(make_step(tmp_path, step) / "params" / "array")
  recovery.mark_saved(workdir, 4)
  for _ in range(2):  # the mark outlives the damaged steps
    with pytest.raises(ValueError, match="has saved step 4, and no step is"):
      recovery.recover(workdir)
  assert str(tmp_path / "quarantine" / "4-1") in caplog.text
  recovery.recover(workdir, may_restart=True)
  [entry] = json.loads(workdir.data.read_text())["history"]
  assert entry["accepted"] == {"restart": ["step 4 was saved"]}


def test_a_lost_latest_step_is_told(tmp_path, caplog):
  workdir = Workdir.at(tmp_path)
  make_step(tmp_path, 2)
  recovery.mark_saved(workdir, 4)
  recovery.recover(workdir)
  assert "step 4 was saved and cannot be used" in caplog.text


def test_two_steps_stay_in_quarantine(tmp_path):
  make_step(tmp_path, 1)
  for step in (2, 4, 6, 8):
    faults.flip_byte(make_step(tmp_path, step) / "rest" / "array")
    recovery.recover(Workdir.at(tmp_path))
  assert moved(tmp_path) == ["6-2", "8-3"]


def test_what_a_user_puts_into_quarantine_stays(tmp_path):
  folder = Workdir.at(tmp_path).quarantine
  folder.mkdir()
  (folder / "notes.txt").touch()
  (folder / "good-1").mkdir()
  make_step(tmp_path, 1)
  for step in (2, 4, 6):
    faults.flip_byte(make_step(tmp_path, step) / "rest" / "array")
    recovery.recover(Workdir.at(tmp_path))
  assert moved(tmp_path) == ["4-1", "6-2", "good-1", "notes.txt"]


def test_going_back_forgets_what_came_after(tmp_path):
  workdir = Workdir.at(tmp_path)
  for step in (2, 4, 6):
    make_step(tmp_path, step)
  recovery.mark_saved(workdir, 6)
  text = {"prompt": "a", "response": "b"}
  for path, rest in ((workdir.metrics, {}), (workdir.samples, text)):
    file = GrowingFile(path)
    for step in (0, 2, 4, 6):
      row = {"step": step, "split": "train", **rest}
      file.append(json.dumps(row) + "\n")
    file.close()
  (tmp_path / "eval_logps" / "other").mkdir(parents=True)
  for step in (2, 4, 6):
    (tmp_path / "eval_logps" / "other" / f"{step}.npz").touch()
  recovery.recover(workdir, step=2)
  assert steps_of(tmp_path) == [2]
  assert moved(tmp_path) == ["4-0", "6-1"]
  assert [row["step"] for row in read_metrics(tmp_path, "train")] == [0, 2]
  assert len(workdir.samples.read_text().splitlines()) == 2
  assert [p.name for p in workdir.eval_logps.glob("*/*")] == ["2.npz"]
  recovery.recover(workdir)  # the steps that were left are not missed


def test_going_back_to_a_step_that_is_not_there_lists_the_steps(tmp_path):
  make_step(tmp_path, 2)
  make_step(tmp_path, 4)
  with pytest.raises(ValueError, match=r"resume\.step=3: .* the steps 2, 4"):
    recovery.recover(Workdir.at(tmp_path), step=3)
  assert steps_of(tmp_path) == [2, 4]


def test_a_folder_that_lost_its_name_has_that_of_its_steps(tmp_path):
  """Otherwise all its steps would be those of another run."""
  make_step(tmp_path, 2, "ours")
  make_step(tmp_path, 4, "ours")
  recovery.recover(Workdir.at(tmp_path))
  assert Workdir.at(tmp_path).run_id == "ours"
  assert steps_of(tmp_path) == [2, 4]


def test_the_name_of_another_run_moves_nothing(tmp_path):
  name_run(tmp_path, "theirs")
  make_step(tmp_path, 2, "ours")
  make_step(tmp_path, 4, "ours")
  with pytest.raises(ValueError, match=r"are of ours: restore its work"):
    recovery.recover(Workdir.at(tmp_path))
  assert steps_of(tmp_path) == [2, 4]


@pytest.mark.fault(41)
@pytest.mark.parametrize("trace", ["finished.json", "quarantine/4-0"])
def test_steps_that_nothing_but_a_trace_tells_of_were_saved(tmp_path, trace):
  workdir = Workdir.at(tmp_path)
  (tmp_path / trace).parent.mkdir(exist_ok=True)
  (tmp_path / trace).touch()
  with pytest.raises(ValueError, match="has saved steps, and no step is left"):
    recovery.recover(workdir)
  # A kill in the first save leaves a trace too, and nothing was saved.
  recovery.mark_begun(workdir, 4)
  recovery.recover(workdir)


@pytest.mark.parametrize("text", ['{"saved": "6"}', '{"saved": null}'])
def test_damaged_marks_of_saves_are_named(tmp_path, text):
  workdir = Workdir.at(tmp_path)
  make_step(tmp_path, 2)
  workdir.saves.write_text(text)
  with pytest.raises(ValueError, match=r"saves\.json is damaged"):
    recovery.recover(workdir)


@pytest.mark.parametrize("fault", ["line", "step", "arrays"])
def test_a_refusal_to_go_back_leaves_all_as_it_was(tmp_path, fault):
  workdir = Workdir.at(tmp_path)
  for step in (2, 4, 6):
    make_step(tmp_path, step)
  recovery.mark_saved(workdir, 6)
  rows = [json.dumps({"step": n, "split": "train"}) for n in (2, 4, 6)]
  workdir.metrics.write_text("\n".join(rows) + "\n")
  workdir.samples.write_text("garbage\n" if fault == "line" else "")
  before = workdir.metrics.read_text(), workdir.saves.read_text()

  def check(folder):
    if fault == "arrays":
      assert folder.name == "4"
      raise ValueError("another model")

  with pytest.raises(ValueError, match=r"samples|resume|another model"):
    recovery.recover(workdir, step=5 if fault == "step" else 4, check=check)
  assert steps_of(tmp_path) == [2, 4, 6]
  assert (workdir.metrics.read_text(), workdir.saves.read_text()) == before
