"""A window of steps is traced, and nothing else."""

import jax
import jax.numpy as jnp
import pytest

from dpo_jax.config import parse_steps
from dpo_jax.records import profile
from dpo_jax.records.workdir import Workdir


@pytest.mark.parametrize(
  ("text", "steps"), [("", []), ("10:13", [10, 11, 12]), ("0:1", [0])]
)
def test_windows_are_half_open(text, steps):
  assert list(parse_steps(text)) == steps


@pytest.mark.parametrize("text", ["10", "3:3", "5:2", "a:b", "-1:2"])
def test_a_window_that_is_none_is_refused(text):
  with pytest.raises(ValueError, match="must be FIRST:LAST"):
    parse_steps(text)


def test_only_the_steps_of_the_window_are_traced(tmp_path, monkeypatch):
  calls, now = [], [0]
  monkeypatch.setattr(
    jax.profiler, "start_trace", lambda folder: calls.append(("on", now[0]))
  )
  monkeypatch.setattr(
    jax.profiler, "stop_trace", lambda: calls.append(("off", now[0]))
  )
  window = profile.ProfileWindow("2:4", Workdir.at(tmp_path))
  for step in range(6):
    now[0] = step
    with window.step(step):
      pass
    window.after(step, jnp.zeros(()))
  window.close()
  assert calls == [("on", 2), ("off", 3)]


def test_a_trace_is_written(tmp_path):
  window = profile.ProfileWindow("0:1", Workdir.at(tmp_path))
  with window.step(0):
    out = jnp.ones(4) + 1
  window.after(0, out)
  assert list((tmp_path / "profile").glob("plugins/profile/*/*.xplane.pb"))
