"""Cached log-probs survive a kill, and are those that a run began with."""

import dataclasses
import json
import logging
import pathlib
import shutil
import signal
from unittest import mock

import numpy as np
import pytest

from dpo_jax import model_sources
from dpo_jax.records.workdir import Workdir
from dpo_jax.training import cached_reference, logps_cache, logps_parts
from dpo_jax.training.setup import build_run
from tests import bucket, faults, tiny

NUM_BATCHES = 5  # of 40 groups


class StopError(Exception):
  """Stands for a signal that arrives between two batches."""


def make_run(workdir):
  """Returns a run, and its first state."""
  config = tiny.make_config(
    data__eval_fraction=0.0, reference__kind="cached", eval__batch_size=8
  )
  run = build_run(config, Workdir.at(workdir))
  params = model_sources.parse("random").load(
    run.program.policy, run.program.placement.mesh, seed=run.config.seed
  )
  return run, run.program.make_state(params, None)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
  """A run, its first state, and its log-probs computed in one go."""
  run, state = make_run(tmp_path_factory.mktemp("whole"))
  return run, state, attach(run, state)


@pytest.fixture
def fresh(made, tmp_path):
  """The same run in a workdir of its own."""
  run, state, _ = made
  return dataclasses.replace(run, workdir=Workdir.at(tmp_path / "run")), state


@pytest.fixture
def every_batch(monkeypatch):
  """Writes a part for each batch, and not for each minute."""
  monkeypatch.setattr(logps_parts, "_EVERY_S", 0.0)


def attach(run, state, *, check=lambda: None):
  """Returns the log-probs; `check` is called after each scored batch."""
  add = logps_parts.Parts.add

  def add_and_check(*args):
    add(*args)
    check()

  with mock.patch.object(logps_parts.Parts, "add", add_and_check):
    [loader] = cached_reference.attach(run, state, [run.data.train])
  return loader.ref_logps


def stop_after(count):
  """Returns a check that stops the scoring after so many batches."""
  calls = []

  def check():
    calls.append(1)
    if len(calls) == count:
      raise StopError

  return check


def count_batches(run, state):
  """Attaches; returns the log-probs and how many batches were scored."""
  calls = []
  return attach(run, state, check=lambda: calls.append(1)), len(calls)


def parts_of(run):
  return sorted(run.workdir.reference_cache.glob("*.part-*.npz"))


def resumed(state):
  return state.replace(step=state.step + 1)


def test_a_stopped_scoring_is_continued_with_the_same_bits(made, fresh):
  """It loses nothing, though no minute has passed."""
  with pytest.raises(StopError):
    attach(*fresh, check=stop_after(2))
  assert len(parts_of(fresh[0])) == 1
  logps, count = count_batches(*fresh)
  assert count == NUM_BATCHES - 2
  assert logps.tobytes() == made[2].tobytes()
  assert not parts_of(fresh[0])  # the cache is whole
  assert count_batches(*fresh)[1] == 0


def test_stops_at_every_batch_still_reach_the_end(made, fresh):
  for _ in range(NUM_BATCHES):
    with pytest.raises(StopError):
      attach(*fresh, check=stop_after(1))
  logps, count = count_batches(*fresh)
  assert count == 0
  assert logps.tobytes() == made[2].tobytes()


@pytest.mark.fault(39)
@pytest.mark.slow
def test_a_killed_scoring_is_continued_with_the_same_bits(made, fresh):
  run, _ = fresh
  code = """
import sys, time
from dpo_jax.training import logps_parts
from tests.training.test_cached_reference import attach, make_run
logps_parts._EVERY_S = 0.0
attach(*make_run(sys.argv[1]), check=lambda: time.sleep(0.2))
"""
  child = faults.spawn(code, str(run.workdir), num_devices=8)
  killed = faults.kill_when(
    child, lambda: len(parts_of(run)) == 2, signal.SIGKILL
  )
  assert killed == -signal.SIGKILL
  logps, count = count_batches(*fresh)
  assert 0 < count <= NUM_BATCHES - 2
  assert logps.tobytes() == made[2].tobytes()


@pytest.mark.usefixtures("every_batch")
@pytest.mark.parametrize("damage", [faults.flip_byte, faults.truncate])
def test_a_damaged_part_is_named_and_computed_again(
  made, fresh, damage, caplog
):
  with pytest.raises(StopError):
    attach(*fresh, check=stop_after(4))
  damaged = parts_of(fresh[0])[1]
  damage(pathlib.Path(damaged))
  with caplog.at_level(logging.WARNING):
    logps, count = count_batches(*fresh)
  assert count == NUM_BATCHES - 4 + 1
  assert f"{damaged} is not used: its sha256" in caplog.text
  assert damaged.with_name(f"{damaged.name}.damaged").exists()
  assert logps.tobytes() == made[2].tobytes()


@pytest.mark.usefixtures("every_batch")
def test_a_part_of_another_cache_is_not_used(made, fresh, caplog):
  run, _ = fresh
  with pytest.raises(StopError):
    attach(*fresh, check=stop_after(1))
  [part] = parts_of(run)
  key = part.name.partition(".")[0]
  other = logps_parts.Parts(part.parent, key[::-1], {}, (40, 2))
  other._prefix = part.name[: -len("-.npz") - 31]
  other.add(np.arange(8), np.zeros((8, 2), np.float32))
  assert len(parts_of(run)) == 2
  logps, count = count_batches(*fresh)
  assert count == NUM_BATCHES - 1
  assert "is not used: it is a part of another cache" in caplog.text
  assert logps.tobytes() == made[2].tobytes()


def test_parts_of_another_layout_are_not_used(fresh, monkeypatch):
  """They round differently, and would make a cache of two kinds of bits."""
  with pytest.raises(StopError):
    attach(*fresh, check=stop_after(2))
  original = logps_cache.scoring_layout
  monkeypatch.setattr(
    logps_cache, "scoring_layout", lambda *x: original(*x) | {"jax": "other"}
  )
  assert count_batches(*fresh)[1] == NUM_BATCHES
  assert not parts_of(fresh[0])
  assert not list(fresh[0].workdir.reference_cache.glob("*.damaged"))


def test_parts_of_another_process_are_used_on_a_gpu(tmp_path):
  """The cache then has the layout of that process, and is checked as such."""
  layouts = [{"backend": "gpu", "process": name} for name in "ab"]
  first, second = (
    logps_parts.Parts(tmp_path, "key", layout, (4, 1)) for layout in layouts
  )
  first.add(np.array([2, 1]), np.array([[-2.0], [-1.0]], np.float32))
  first.write()
  second.read()
  assert second.has(np.array([1, 2])) and not second.has(np.array([0, 1]))
  np.testing.assert_array_equal(second.logps[1:3, 0], [-1.0, -2.0])
  assert second.layout == layouts[0]


def test_parts_may_be_in_a_bucket(made, tmp_path, monkeypatch):
  bucket.stand_in(tmp_path, monkeypatch)
  run, state, whole = made
  run = dataclasses.replace(run, workdir=Workdir.at("gs://bucket/run"))
  with pytest.raises(StopError):
    attach(run, state, check=stop_after(3))
  faults.flip_byte(next(tmp_path.rglob("*.part-*.npz")))
  logps, count = count_batches(run, state)
  assert count == NUM_BATCHES
  assert logps.tobytes() == whole.tobytes()
  assert not parts_of(run)


def test_a_cache_that_others_wrote_meanwhile_stays(made, fresh):
  """They may have begun with its bits."""
  run, state = fresh

  def overtake():
    shutil.copytree(
      made[0].workdir.reference_cache,
      run.workdir.reference_cache,
      dirs_exist_ok=True,
    )
    [path] = run.workdir.reference_cache.glob("*.npy")
    path.touch()
    times.append(path.stat().mtime)

  times = []
  attach(run, state, check=overtake)
  [path] = run.workdir.reference_cache.glob("*.npy")
  assert path.stat().mtime == times[-1]


def swap_columns(run):
  """Writes a cache whose manifest agrees with its swapped columns."""
  [path] = run.workdir.reference_cache.glob("*.npy")
  cache = logps_cache.load_cache(path.parent, path.stem, np.load(path).shape)
  logps_cache.write_cache(
    path.parent, path.stem, cache.logps[:, ::-1], cache.layout
  )
  return path


@pytest.mark.fault(36)
def test_other_log_probs_are_refused_on_resume(fresh):
  run, state = fresh
  before = attach(run, state)
  assert attach(run, resumed(state)).tobytes() == before.tobytes()
  path = swap_columns(run)
  with pytest.raises(
    ValueError, match="other log-probs than this run began"
  ) as e:
    attach(run, resumed(state))
  assert f"{path} holds" in str(e.value)
  # As the message says.
  path.unlink()
  path.with_suffix(".json").unlink()
  assert attach(run, resumed(state)).tobytes() == before.tobytes()


def test_log_probs_of_other_groups_are_refused_on_resume(fresh):
  run, state = fresh
  logps = attach(run, state)
  [path] = run.workdir.reference_cache.glob("*.npy")
  logps_cache.write_cache(path.parent, path.stem, logps[:5], {})
  with pytest.raises(ValueError, match=r"\[5, 2\].*float32 \[40, 2\].*Delete"):
    attach(run, resumed(state))


@pytest.mark.fault(36)
def test_log_probs_that_are_not_finite_are_refused(fresh):
  """In a batch that the check of the start does not score again too."""
  run, state = fresh
  logps = attach(run, state).copy()
  [path] = run.workdir.reference_cache.glob("*.npy")
  logps[20, 1] = np.nan
  logps_cache.write_cache(path.parent, path.stem, logps, {})
  with pytest.raises(ValueError, match=f"{path} holds log-probs that are not"):
    attach(run, state)


def test_log_probs_that_round_differently_on_resume_are_told(fresh, caplog):
  run, state = fresh
  attach(run, state)
  record = json.loads(run.workdir.reference_digests.read_text())
  record["logps"] = dict.fromkeys(record["logps"], "0" * 64)
  run.workdir.reference_digests.write_text(json.dumps(record))
  run.workdir.reference_cache.rmtree()
  attach(run, resumed(state))
  assert "was computed again, and rounds differently" in caplog.text
  caplog.clear()
  attach(run, resumed(state))  # what is recorded is what is there
  assert not caplog.text


@pytest.mark.fault(34)
def test_a_resumed_run_without_a_record_of_its_reference_is_refused(fresh):
  run, state = fresh
  attach(run, state)
  path = run.workdir.reference_digests
  path.unlink()
  with pytest.raises(ValueError, match=r"reference\.json is missing") as error:
    attach(run, resumed(state))
  # The message has what to write where the reference is known to be the same.
  path.write_text(str(error.value).partition("write ")[2].partition(" into")[0])
  attach(run, resumed(state))


def test_the_record_of_an_older_run_is_read(fresh):
  run, state = fresh
  attach(run, state)
  path = run.workdir.reference_digests
  digest = json.loads(path.read_text())["weights"]
  path.unlink()
  run.workdir.old_reference_digest.write_text(digest + "\n")
  attach(run, resumed(state))
  run.workdir.old_reference_digest.write_text("0" * 64 + "\n")
  path.unlink()
  with pytest.raises(ValueError, match="other weights than when this run"):
    attach(run, resumed(state))
