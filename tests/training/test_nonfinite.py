"""Steps that are not finite: what is blamed, dumped and said of them."""

import json

import jax
import numpy as np
import pytest

from dpo_jax.losses import build_objective
from dpo_jax.records.checkpoint import open_checkpoints
from dpo_jax.records.metrics import read_metrics
from dpo_jax.records.workdir import Workdir
from dpo_jax.system.files import read_json
from dpo_jax.train import NonFiniteError, train
from dpo_jax.training import nonfinite
from dpo_jax.training.setup import build_run
from tests import tiny
from tests.test_train import assert_same_bits, change_batches, read_state

pytestmark = pytest.mark.usefixtures("in_haste")


@pytest.fixture(scope="module")
def source(tmp_path_factory):
  """Pairs on every second line, so that a line is not a group's index."""
  path = tmp_path_factory.mktemp("data") / "pairs.jsonl"
  rows = [
    {"prompt": f"Question {i}?", "chosen": f"a{i}", "rejected": f"other {i}"}
    for i in range(8)
  ]
  path.write_text("\n\n".join(json.dumps(row) for row in rows) + "\n")
  return path


def make_config(source, **overrides):
  return tiny.make_config(
    data__source=f"jsonl:{source}",
    data__eval_fraction=0.0,
    total_steps=5,
    checkpoint__every_steps=1,
    **overrides,
  )


def poison(monkeypatch, step, value):
  """Gives a step's first group a log-prob of the reference; notes its id."""
  poisoned = []

  def change(loader, number, batch):
    if number != step:
      return batch
    ref_logps = batch.ref_logps.copy()
    ref_logps[0, 0] = value
    poisoned.append(int(batch.example_ids[0, 0]))
    return batch.replace(ref_logps=ref_logps)

  change_batches(monkeypatch, change)
  return poisoned


def stop(config, workdir):
  with pytest.raises(NonFiniteError) as error:
    train(config, workdir)
  return str(error.value)


@pytest.mark.parametrize("parts", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_the_guilty_group_is_named_and_its_batch_reproduces_the_loss(
  source, tmp_path, monkeypatch, parts
):
  config = make_config(source, accumulation_steps=parts)
  with monkeypatch.context() as patch:
    poisoned = poison(patch, 1, np.nan)
    message = stop(config, tmp_path)
  address = f"{source}:{2 * poisoned[0] + 1}"
  path = tmp_path / "nonfinite" / "2.npz"
  assert message.startswith(
    "step 2: loss is nan. Groups with a log-prob that is not finite, 1 of 8:"
    f" {poisoned[0]} ({address}). The batch is in {path}."
  )
  assert "--config.resume.step=1 goes back to it," in message
  report = read_json(path.with_suffix(".json"))
  assert report["metrics"]["loss"] == "nan"
  (guilty,) = (group for group in report["groups"] if group["is_guilty"])
  assert (guilty["id"], guilty["address"]) == (poisoned[0], address)
  # The parameters before the step give the losses of the dump.
  run = build_run(config, Workdir.at(tmp_path))
  checkpoints = open_checkpoints(run.workdir, run.config, is_reader=True)
  state = checkpoints.restore(run.program.abstract_state()[0], step=1)
  batch = nonfinite.read_batch(path)
  sequences = run.program.eval_step(
    state.policy_params, None, run.program.placement.place_rows(batch)
  )
  loss, weight = nonfinite.measure_groups(
    run.program.objective, jax.device_get(sequences), ()
  )
  assert np.isnan(loss).sum() == 1
  with np.load(path) as dump:
    np.testing.assert_allclose(loss, dump["loss"], rtol=1e-5)
    np.testing.assert_allclose(weight, dump["gradient_weight"], rtol=1e-5)


def test_a_log_ratio_above_its_limit_stops_the_run(
  source, tmp_path, monkeypatch
):
  poisoned = poison(monkeypatch, 1, -2000.0)
  message = stop(make_config(source), tmp_path)
  assert "log-ratio of policy to reference is 1,9" in message
  assert "numerics.max_log_ratio=1,000. Groups with a log-ratio" in message
  assert f"1 of 8: {poisoned[0]} ({source}:" in message
  assert "The last good checkpoint is step 1;" in message


def test_a_spike_is_skipped_and_resume_is_exact(
  source, tmp_path, monkeypatch, caplog
):
  """Every batch has the same groups, so norms are close to each other."""
  config = make_config(
    source,
    numerics__skip_spikes=1.3,
    numerics__spike_window=2,
    checkpoint__keep=5,
  )

  def spike(loader, step, batch):
    if step == 4 and is_broken:
      raise OSError("the disk is gone")
    if step != 3:
      return batch
    lower = np.array([500.0, 0.0], np.float32)  # doubles DPO's weights
    return batch.replace(ref_logps=batch.ref_logps + lower)

  change_batches(monkeypatch, spike)
  is_broken = False
  train(config, tmp_path / "whole")
  is_broken = True
  with pytest.raises(OSError, match="the disk is gone"):
    train(config, tmp_path / "parts")
  is_broken = False
  train(config, tmp_path / "parts")
  before, after, last, other = (
    read_state(tmp_path / name, step)
    for name, step in (("whole", 3), ("whole", 4), ("whole", 5), ("parts", 5))
  )
  changed = {k for k in after if (after[k] != before[k]).any()}
  assert changed == {
    "['rest']['step']",
    "['rest']['spikes']['norms']",
    "['rest']['spikes']['skipped_steps']",
  }
  assert_same_bits(last, other)
  rows = read_metrics(tmp_path / "parts", "train")
  assert [row["skipped_steps"] for row in rows] == [0, 0, 0, 1, 1]
  assert "step 4 is skipped: its grad_norm is" in caplog.text


@pytest.mark.parametrize("name", ["kto", "ppo"])
def test_a_sequence_is_blamed_before_the_losses_that_it_spoils(name):
  objective = build_objective({"name": name})
  sequences = tiny.make_sequences({"kto": 1}.get(name, 2))
  field = "token_logps" if name == "ppo" else "logps"
  values = np.array(getattr(sequences, field))
  values[2, 0] = np.nan
  sequences = jax.device_get(sequences.replace(**{field: values}))
  loss, weight = nonfinite.measure_groups(
    objective, sequences, objective.init()
  )
  why, is_guilty = nonfinite.find_guilty(sequences, loss, weight, np.inf)
  assert why == "a log-prob that is not finite"
  assert np.flatnonzero(is_guilty).tolist() == [2]


def test_the_largest_weight_is_blamed_where_no_group_is_not_finite():
  """The gradient may overflow on its way through the layers."""
  sequences = tiny.make_sequences(2)
  objective = build_objective({"name": "dpo"})
  found = nonfinite.measure_groups(objective, sequences, ())
  why, is_guilty = nonfinite.find_guilty(sequences, *found, np.inf)
  assert why == "the largest gradient weight"
  assert np.flatnonzero(is_guilty).tolist() == [int(found[1].argmax())]


def test_a_limit_is_not_applied_without_a_reference():
  finite = {"loss": 1.0, "grad_norm": 2.0}
  assert not nonfinite.find_fault(finite, 0.1)
  for value in (0.2, np.nan):
    fault = nonfinite.find_fault({**finite, "log_ratio/largest": value}, 0.1)
    assert fault.endswith("nats, and numerics.max_log_ratio=0.1")
  assert not nonfinite.find_fault({**finite, "log_ratio/largest": 0.1}, 0.1)
  infinite = {"loss": 1.0, "grad_norm": np.inf}
  assert nonfinite.find_fault(infinite, 0.1) == "grad_norm is inf"
