"""The record of a run: what its folder holds, and what is refused."""

import json
import os

import pytest

from dpo_jax.records import workdir as workdir_lib
from dpo_jax.records.workdir import Workdir
from dpo_jax.system.files import write_atomically
from dpo_jax.train import train
from tests import tiny


def test_an_empty_path_and_a_file_are_no_workdir(tmp_path):
  (tmp_path / "file").write_text("")
  with pytest.raises(ValueError, match="workdir=''"):
    train(tiny.make_config(), "")
  with pytest.raises(ValueError, match="file' is a file: name a folder"):
    train(tiny.make_config(), tmp_path / "file")


@pytest.mark.parametrize("missing", ["config.json", "model.json"])
def test_a_folder_without_a_run_is_told(tmp_path, missing):
  for name in {"config.json", "model.json"} - {missing}:
    (tmp_path / name).write_text("{}")
  with pytest.raises(FileNotFoundError, match=f"{missing} does not exist"):
    Workdir.of_run(tmp_path)


def test_a_newer_format_is_refused_with_both_numbers(tmp_path):
  workdir = Workdir.at(tmp_path)
  workdir.write_config({})
  workdir.model.write_text("{}")
  Workdir.of_run(tmp_path)
  newer = workdir_lib.FORMAT + 1
  (tmp_path / "workdir.json").write_text(json.dumps({"format": newer}))
  for use in (Workdir.of_run, lambda w: train(tiny.make_config(), w)):
    with pytest.raises(ValueError, match=rf"format {newer}.*0 to {newer - 1}"):
      use(tmp_path)


def test_a_workdir_from_before_formats_is_read(tmp_path):
  for name in ("config.json", "model.json"):
    (tmp_path / name).write_text("{}")
  assert Workdir.of_run(tmp_path).read_config() == {}


def test_checkpoints_without_their_config_are_refused(tmp_path):
  workdir = Workdir.at(tmp_path)
  workdir.checkpoints.mkdir()
  workdir.check_format()  # a start that died before its config was written
  (workdir.checkpoints / "3").mkdir()
  with pytest.raises(ValueError, match=r"config\.json does not exist, and"):
    train(tiny.make_config(), tmp_path)


@pytest.mark.parametrize("value", [None, "1", 1.0, [1]])
def test_a_format_that_is_not_a_number_is_named(tmp_path, value):
  workdir = Workdir.at(tmp_path)
  workdir.write_config({})
  (tmp_path / "workdir.json").write_text(json.dumps({"format": value}))
  with pytest.raises(ValueError, match=r"workdir\.json is damaged: format="):
    workdir.check_format()


def test_a_damaged_file_is_named(tmp_path):
  workdir = Workdir.at(tmp_path)
  workdir.write_config({"seed": 1})
  workdir.config.write_text('{"seed"')
  with pytest.raises(ValueError, match=r"config\.json is damaged"):
    workdir.read_config()


@pytest.mark.parametrize("content", ["text", b"bytes"])
def test_a_write_that_dies_leaves_the_file_of_before(
  tmp_path, monkeypatch, content
):
  path = tmp_path / "new" / "file"
  write_atomically(path, "before")

  def die(self, target):
    raise KeyboardInterrupt

  with monkeypatch.context() as patch:
    patch.setattr(type(workdir_lib.epath.Path(path)), "replace", die)
    with pytest.raises(KeyboardInterrupt):
      write_atomically(path, content)
  assert path.read_text() == "before"
  write_atomically(path, content)
  assert path.read_bytes() in (b"text", b"bytes")
  assert os.listdir(path.parent) == ["file"]


def test_commands_are_recorded_in_their_order_and_once_in_a_row(tmp_path):
  workdir = Workdir.at(tmp_path)
  for steps in (1, 1, 2, 1):
    workdir.record_command(["-m", "dpo_jax.train", f"--steps={steps}"])
  workdir.record_command(["-c", "first\nsecond 'line'"])
  lines = workdir.read_lines(workdir.command)
  assert [line[-1] for line in lines[:-1]] == ["1", "2", "1"]
  assert lines[0] == "python -m dpo_jax.train --steps=1"
  assert len(lines) == 4 and lines[-1].startswith("python -c 'first\\nsecond")
