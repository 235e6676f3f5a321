"""The fault harness finds what is planted, and its table of faults is whole."""

import pathlib
import runpy

import pytest

from dpo_jax.data import checksums
from tests.damage import trials
from tests.damage.__main__ import table

ROOT = pathlib.Path(__file__).parents[1]


def script():
  """Returns the names of scripts/write_reliability.py."""
  return runpy.run_path(str(ROOT / "scripts" / "write_reliability.py"))


def test_every_fault_has_a_test():
  names = script()
  assert not names["complaints"](names["marked"]())


def test_marks_without_a_fault_and_faults_without_a_mark_are_told():
  names = script()
  tests = names["marked"]()
  del tests[39]
  tests[66] = ["test_x.py::test_x"]
  tests[30] = ["test_x.py::test_y"]
  found = names["complaints"](tests)
  assert "fault 39 has no test" in found
  assert any("there is no fault 66" in message for message in found)


def test_the_table_of_faults_is_that_of_the_marks():
  message = "run python scripts/write_reliability.py"
  text = (ROOT / "docs" / "reliability.md").read_text()
  assert text == script()["render"](), message


def outcomes(kind, count):
  return [trials.run_trial(kind, 0, index).outcome for index in range(count)]


def test_a_damaged_store_gives_the_same_batches():
  assert set(outcomes("store", 12)) <= {"same", "built again, right"}


def test_harness_finds_damage_that_checksums_do_not(monkeypatch):
  monkeypatch.setattr(checksums, "verify", lambda folder: None)
  assert "wrong, silent" in outcomes("store", 20)


def test_a_trial_depends_on_its_index_alone():
  first = trials.run_trial("store", 0, 5)
  outcomes("store", 2)
  again = trials.run_trial("store", 0, 5)
  assert (first.outcome, first.detail) == (again.outcome, again.detail)
  assert first.detail != trials.run_trial("store", 1, 5).detail


@pytest.mark.parametrize("error", [MemoryError, TimeoutError])
def test_a_trial_beyond_its_limits_is_a_failure(monkeypatch, error):
  from tests.damage import store

  def fail(rng, folder):
    raise error("no more")

  monkeypatch.setattr(store, "store", fail)
  assert trials.run_trial("store", 0, 0).outcome == f"wrong, {error.__name__}"


def test_outcomes_are_counted_and_aligned():
  results = [
    trials.Result("store", i, outcome, "", 0.1)
    for i, outcome in enumerate(["same", "same", "built again, right"])
  ]
  assert table(results).splitlines() == [
    "kind   outcome             trials",
    "store  built again, right       1",
    "store  same                     2",
  ]
