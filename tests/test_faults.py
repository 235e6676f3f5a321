"""Runs that are killed without warning lose nothing that was acknowledged."""

import json
import random
import signal
import time

import numpy as np
import pytest

from dpo_jax.records.manifest import verify
from tests import faults

# Saves as fast as it can; says which steps it was promised are safe.
_SAVER = """
import sys
import jax, jax.numpy as jnp, numpy as np
from dpo_jax.records.checkpoint import Checkpoints
from dpo_jax.types import TrainState

noise = np.random.default_rng(0).normal(size=(1024, 512)).astype(np.float32)

def state(step):
  arrays = {name: jnp.asarray(noise + step) for name in "abcd"}
  return TrainState(step=jnp.int32(step), params=arrays, opt_state=())

checkpoints = Checkpoints(
  sys.argv[1], keep=2, best_metric="eval/x", best_is_lower=False
)
device = jax.devices()[0]
target = jax.tree.map(
  lambda x: jax.ShapeDtypeStruct(
    x.shape, x.dtype, sharding=jax.sharding.SingleDeviceSharding(device)
  ),
  state(0),
)
restored = checkpoints.restore(target)
start = 0
if restored is not None:
  start = int(restored.step)
  for array in restored.params.values():
    np.testing.assert_array_equal(array, noise + np.float32(start))
print("restored", start, flush=True)
for step in range(start + 1, start + 1000):
  checkpoints.save(step, state(step), {"eval/x": float(step % 7)})
  checkpoints.wait()
  print("safe", step, flush=True)
"""


def said(output, word):
  """Numbers after a word at the beginning of a line."""
  return [
    int(line.split()[1])
    for line in output.splitlines()
    if line.startswith(f"{word} ") and line.endswith(tuple("0123456789"))
  ]


@pytest.mark.fault(39)
@pytest.mark.slow
def test_a_kill_loses_no_acknowledged_checkpoint(tmp_path):
  rng = random.Random(0)
  safe, killed_in_a_save = 0, 0
  for _ in range(10):
    process = faults.spawn(_SAVER, str(tmp_path))
    first = process.stdout.readline()
    while not first.startswith("restored"):
      assert first, process.wait()
      first = process.stdout.readline()
    # Nothing that was acknowledged is lost. A step whose manifest was written
    # just before the kill may exist without an acknowledgement.
    assert int(first.split()[1]) in (safe, safe + 1), first
    # At any moment of a save, however fast this machine is just now.
    output, start = first, time.monotonic()
    num_saves = rng.randint(1, 3)
    for _ in range(num_saves):
      output += process.stdout.readline()
    a_save = (time.monotonic() - start) / num_saves
    time.sleep(rng.uniform(0.0, 1.0) * a_save)
    process.send_signal(signal.SIGKILL)
    output += process.communicate()[0]
    assert process.returncode == -signal.SIGKILL
    safe = max(said(output, "restored") + said(output, "safe"))
    names = [p.name for p in (tmp_path / "checkpoints").iterdir()]
    latest = max(int(name) for name in names if name.isdecimal())
    is_unfinished = any(not name.isdecimal() for name in names)
    killed_in_a_save += is_unfinished or bool(
      verify(tmp_path / "checkpoints" / str(latest))
    )
  assert safe >= 10
  assert killed_in_a_save >= 2  # otherwise these kills prove nothing


_TRAINER = """
import json, sys
from dpo_jax.train import train
from tests import tiny

config = tiny.make_config(**json.loads(sys.argv[2]))
print("step", int(train(config, sys.argv[1])["eval/num_groups"]), flush=True)
"""

_CONFIG = {
  "total_steps": 24,
  "checkpoint__every_steps": 1,
  "loss__name": "sft",
  "reference__kind": "none",
  "data__source": "synthetic:review_demonstrations:40",
  "data__layout": "padded",
}


def run_until(workdir, number_of_steps):
  """Starts the run; kills it after so many more lines of metrics, if told."""
  process = faults.spawn(
    _TRAINER,
    str(workdir),
    json.dumps(_CONFIG),
    JAX_DISABLE_MOST_OPTIMIZATIONS="1",
  )
  lines = workdir / "metrics.jsonl"

  def count():
    return len(lines.read_bytes().splitlines()) if lines.exists() else 0

  if number_of_steps is None:
    output = process.communicate(timeout=120)[0]
    return process.returncode, output
  before = count()
  return faults.kill_when(
    process, lambda: count() >= before + number_of_steps, signal.SIGKILL
  ), process.communicate()[0]


@pytest.mark.fault(39)
@pytest.mark.slow
def test_a_run_that_is_killed_again_and_again_ends_as_if_it_was_not(
  tmp_path,
):
  rng = random.Random(1)
  for _ in range(3):
    code, output = run_until(tmp_path / "killed", rng.randint(2, 7))
    assert code == -signal.SIGKILL, output
  for name in ("killed", "whole"):
    code, output = run_until(tmp_path / name, None)
    assert code == 0, output
  # What was restored and trained again gives the same lines again.
  records = []
  for name in ("killed", "whole"):
    text = (tmp_path / name / "metrics.jsonl").read_text()
    rows = [json.loads(line) for line in text.splitlines()]
    by_step = {}
    for row in rows:
      if row["split"] == "resumed":  # says where a start resumed
        continue
      for clock in (
        "groups_per_second",
        "tokens_per_second",
        "host_wait_fraction",
      ):
        row.pop(clock, None)
      key = (row["split"], row["step"])
      assert by_step.setdefault(key, row) == row
    records.append(by_step)
  assert records[0] == records[1]
  steps = [step for split, step in records[0] if split == "train"]
  assert sorted(steps) == list(range(1, 25))
  hashes = [
    (tmp_path / name / "checkpoints" / "24" / "manifest.json").exists()
    for name in ("killed", "whole")
  ]
  assert np.all(hashes)


@pytest.mark.fault(43)
@pytest.mark.slow
def test_a_disk_that_is_full_is_an_error_and_the_step_before_stays(tmp_path):
  code = """
import resource, signal, sys
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
import numpy as np, jax.numpy as jnp
from dpo_jax.records.checkpoint import Checkpoints
from dpo_jax.types import TrainState

def state(step):
  noise = np.random.default_rng(step).normal(size=(1024, 512))
  return TrainState(
    step=jnp.int32(step), params={"a": jnp.asarray(noise)}, opt_state=()
  )

checkpoints = Checkpoints(
  sys.argv[1], keep=2, best_metric="eval/x", best_is_lower=False
)
checkpoints.save(1, state(1), None)
checkpoints.wait()
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
checkpoints.save(2, state(2), None)
checkpoints.wait()
print("unharmed")
"""
  process = faults.spawn(code, str(tmp_path))
  output = process.communicate(timeout=120)[0]
  assert process.returncode == 1, output
  assert "unharmed" not in output
  assert "File too large" in output or "EFBIG" in output, output
  assert "the checkpoint of step 2 is not saved, and those before" in output
  assert verify(tmp_path / "checkpoints" / "1") == ""
  assert not (tmp_path / "checkpoints" / "2").exists()
