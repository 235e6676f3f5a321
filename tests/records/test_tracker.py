"""A run is sent to its sinks, and none of their faults reaches it."""

import functools
import json
import logging
import sqlite3
import time

from matplotlib import image
import pytest

from dpo_jax.records import tracker
from dpo_jax.records.metrics import MetricsWriter, read_metrics
from dpo_jax.records.sinks import TensorBoard
from dpo_jax.records.tracker import check_installed, open_sinks
from dpo_jax.records.workdir import Workdir
from dpo_jax.train import train
from tests import tiny

# A stand-in for W&B: notes its calls, and fails where it is told to.
_WANDB = """
import json, os, time

FOLDER = os.path.dirname(__file__)

def note(**call):
  with open(f"{FOLDER}/calls.jsonl", "a") as file:
    file.write(json.dumps(call) + "\\n")

def fail(moment):
  fault, _, when = open(f"{FOLDER}/fault").read().partition(" ")
  if when != moment:
    return
  if fault == "raise":
    raise ValueError("no network\\nhere")
  if fault == "die":
    os._exit(3)
  time.sleep(600)  # hang

class Run:
  url, dir = "https://example/run", ""

  def log(self, values, step=None):
    fail("log")
    note(log=values, step=step)

  def finish(self):
    fail("finish")
    note(finish=True)

def init(**settings):
  fail("init")
  note(init=settings)
  return Run()

def Settings(**settings):
  return settings

def Table(**table):
  return table

def Image(path):
  return path
"""


@pytest.fixture
def stand_in(tmp_path, monkeypatch):
  """Puts the stand-in where W&B is looked for; returns its folder."""
  folder = tmp_path / "packages"
  folder.mkdir()
  (folder / "wandb.py").write_text(_WANDB)
  (folder / "fault").write_text("")
  monkeypatch.syspath_prepend(folder)
  return folder


def calls(folder):
  return [
    json.loads(line)
    for line in (folder / "calls.jsonl").read_text().splitlines()
  ]


def open_writer(path, **settings):
  """Opens the writer of a run whose config has these log settings."""
  workdir = Workdir.at(path)
  config = tiny.make_config(
    **{f"log__{name}": value for name, value in settings.items()}
  )
  workdir.write_config({"loss": {"beta": 0.1}})
  return MetricsWriter(
    workdir, is_writer=True, sinks=open_sinks(config.log, workdir)
  )


open_wandb = functools.partial(open_writer, trackers="wandb")


def test_a_tracker_gets_config_metrics_samples_and_plots(
  tmp_path, stand_in, caplog
):
  workdir = tmp_path / "run"
  with caplog.at_level(logging.INFO, "dpo_jax"):
    writer = open_wandb(workdir, project="mine", wandb_mode="offline")
    writer.write(1, "train", {"loss": 0.5})
    writer.write(1, "eval/short", {"loss": 0.25})
    writer.write_samples(1, [{"prompt": "a", "response": "b"}])
    (workdir / "lengths.png").write_bytes(b"")
    writer.close()
  opened, *logged, end = calls(stand_in)
  assert opened["init"] == {
    "project": "mine",
    "name": "run",
    "config": {"loss": {"beta": 0.1}, "workdir_path": str(workdir)},
    "id": Workdir.at(workdir).run_id,
    "resume": "allow",
    "dir": str(workdir),
    "mode": "offline",
    "settings": {"silent": True},
  }
  assert logged == [
    {"log": {"train/loss": 0.5}, "step": 1},
    {"log": {"eval/short/loss": 0.25}, "step": 1},
    {
      "log": {
        "samples": {"columns": ["prompt", "response"], "data": [["a", "b"]]}
      },
      "step": 1,
    },
    {"log": {"lengths": str(workdir / "lengths.png")}, "step": None},
  ]
  assert end == {"finish": True}
  assert caplog.messages == ["wandb       https://example/run"]


def test_a_resumed_run_is_the_same_run_without_its_steps_twice(
  tmp_path, stand_in
):
  rows = [{"prompt": "a", "response": "b"}]
  for first, last in ((1, 3), (2, 4)):
    writer = open_wandb(tmp_path / "run")
    writer.write_resumed(first - 1)
    for step in range(first, last + 1):
      writer.write(step, "train", {"loss": float(step)})
    writer.write_samples(3, rows)
    writer.close()
  found = calls(stand_in)
  opened = [call["init"] for call in found if "init" in call]
  assert opened[0] == opened[1]
  logged = [(*call["log"], call["step"]) for call in found if "log" in call]
  wanted = [("train/loss", 1), ("train/loss", 2), ("train/loss", 3)]
  wanted += [("samples", 3), ("train/loss", 4)]
  assert logged == wanted
  lines = (tmp_path / "run" / "samples.jsonl").read_text().splitlines()
  assert [json.loads(line) for line in lines] == [{"step": 3, **rows[0]}]


def write_twice(workdir, **settings):
  """Writes steps 1 to 3, and resumes at step 2 to write 3 and 4."""
  for first, last in ((1, 3), (3, 4)):
    writer = open_writer(workdir, **settings)
    writer.write_resumed(first - 1)
    for step in range(first, last + 1):
      writer.write(step, "train", {"loss": step / 8})
    writer.write_samples(last, [{"prompt": "a", "response": f"said at {last}"}])
    writer.close()


@pytest.mark.slow
def test_wandb_writes_an_offline_run(tmp_path, caplog):
  pytest.importorskip("wandb")
  writer = open_wandb(tmp_path, wandb_mode="offline", project="mine")
  writer.write(1, "train", {"loss": 0.625})
  writer.write_samples(1, [{"prompt": "a", "response": "b"}])
  image.imsave(tmp_path / "lengths.png", [[0.0, 1.0], [1.0, 0.0]])
  writer.close()
  assert not caplog.messages
  run_id = Workdir.at(tmp_path).run_id
  (folder,) = tmp_path.glob(f"wandb/offline-run-*-{run_id}")
  content = (folder / f"run-{run_id}.wandb").read_bytes()
  for part in ("mine", tmp_path.name, "beta", "train/loss", "0.625"):
    assert part.encode() in content, part
  (table,) = folder.rglob("samples*.table.json")
  assert json.loads(table.read_text())["data"] == [["a", "b"]]
  assert len(list(folder.rglob("lengths*.png"))) == 1


@pytest.mark.slow
def test_trackio_writes_to_its_database(tmp_path, monkeypatch, caplog):
  pytest.importorskip("trackio")
  monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))
  write_twice(tmp_path / "run", trackers="trackio", project="mine")
  assert not caplog.messages
  with sqlite3.connect(tmp_path / "trackio" / "mine.db") as database:
    rows = database.execute(
      "select run_id, run_name, step, metrics from metrics order by id"
    ).fetchall()
  run_id = Workdir.at(tmp_path / "run").run_id
  assert {name for _, name, _, _ in rows} == {f"run-{run_id[:8]}"}
  assert len({theirs for theirs, _, _, _ in rows}) == 1
  losses = [
    (step, values["train/loss"])
    for _, _, step, text in rows
    if "train/loss" in (values := json.loads(text))
  ]
  assert losses == [(step, step / 8) for step in range(1, 5)]
  assert "said at 4" in str(rows[-1])


@pytest.mark.usefixtures("in_haste")
def test_training_is_sent_to_its_tracker(tmp_path, stand_in):
  config = tiny.make_config(total_steps=1, log__trackers="wandb")
  train(config, tmp_path / "run")
  opened, *logged, _ = calls(stand_in)
  assert opened["init"]["config"]["batch_size"] == config.batch_size
  first, last = (min(call["log"]) for call in (logged[0], logged[-1]))
  assert (first.split("/")[0], last.split("/")[0]) == ("eval", "eval")
  assert [call["step"] for call in logged] == [0, 1, 1]


@pytest.mark.parametrize("moment", ["init", "log", "finish"])
@pytest.mark.parametrize(
  ("fault", "told"),
  [
    ("raise", "wandb failed: ValueError: no network here"),
    ("die", "wandb ended with code 3"),
    ("hang", "wandb has not ended 0.5 s after the run"),
  ],
)
def test_a_broken_tracker_is_a_warning(
  tmp_path, stand_in, monkeypatch, caplog, fault, told, moment
):
  monkeypatch.setattr(tracker, "_CLOSING_S", 0.5 if fault == "hang" else 15.0)
  (stand_in / "fault").write_text(f"{fault} {moment}")
  begun = time.monotonic()
  writer = open_wandb(tmp_path / "run")
  for step in range(5):
    writer.write(step, "train", {"loss": float(step)})
  assert time.monotonic() - begun < 0.3
  writer.close()
  (message,) = caplog.messages
  assert message.startswith(told)
  assert len(read_metrics(tmp_path / "run", "train")) == 5


def test_a_full_queue_does_not_stop_a_step(
  tmp_path, stand_in, monkeypatch, caplog
):
  monkeypatch.setattr(tracker, "_QUEUED", 2)
  monkeypatch.setattr(tracker, "_CLOSING_S", 0.1)
  (stand_in / "fault").write_text("hang log")
  writer = open_wandb(tmp_path / "run")
  text = "x" * 100_000  # more than a pipe holds
  begun = time.monotonic()
  for step in range(9):
    writer.write_samples(step, [{"prompt": text, "response": text}])
  writer.close()
  assert time.monotonic() - begun < 2
  assert [m[:28] for m in caplog.messages] == ["wandb has 2 messages to send"]


def test_a_package_that_is_absent_is_refused(tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  monkeypatch.syspath_prepend("")
  monkeypatch.setattr(tracker, "parse_trackers", lambda text: [text])
  (tmp_path / "nowhere").mkdir()  # as W&B leaves one of its name
  for name in ("nowhere", "not_there"):
    with pytest.raises(ValueError, match=f"pip install {name}"):
      check_installed(name)
  check_installed("json")


def test_event_files_hold_metrics_samples_and_plots(tmp_path):
  writer = MetricsWriter(
    tmp_path, is_writer=True, sinks=[TensorBoard(tmp_path / "tensorboard")]
  )
  writer.write(1, "train", {"loss": 1.5})
  writer.write(2, "train", {"loss": float("nan")})
  writer.write_samples(2, [{"prompt": "p", "response": "a response"}])
  image.imsave(tmp_path / "lengths.png", [[0.0, 1.0], [1.0, 0.0]])
  writer.close()
  (events,) = (tmp_path / "tensorboard").iterdir()
  content = events.read_bytes()
  assert "tfevents" in events.name
  for part in (b"train/loss", b"samples/0", b"a response", b"lengths"):
    assert part in content


def test_event_files_appear_only_when_they_are_asked_for(tmp_path):
  for is_wanted in (False, True):
    writer = open_writer(tmp_path, tensorboard=is_wanted)
    writer.close()
    assert (tmp_path / "tensorboard").exists() == is_wanted
