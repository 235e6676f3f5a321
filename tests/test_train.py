"""Whole runs: resumed ones, interrupted ones, and ones that must not start."""

import itertools
import json
import logging
import math
import os
import pathlib
import re
import signal

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest

from dpo_jax import command_line, model_sources
from dpo_jax import config as config_lib
from dpo_jax.data import store
from dpo_jax.data.loader import Loader
from dpo_jax.losses import CATALOGUE, KNOBS, build_objective
from dpo_jax.model_sources import ModelSource
from dpo_jax.models import huggingface
from dpo_jax.records import resume
from dpo_jax.records.metrics import read_metrics
from dpo_jax.records.workdir import Workdir
from dpo_jax.system.cache import use_compilation_cache
from dpo_jax.train import NonFiniteError, Preempted, train
from dpo_jax.training import (
  cached_reference,
  evaluation,
  initial_state,
  logps_cache,
  measure,
  samples,
  start,
)
from dpo_jax.training.setup import build_run
from dpo_jax.types import FIELDS
from tests import faults, tiny
from tests.data.folders import write_folder

pytestmark = pytest.mark.usefixtures("in_haste")

# Depend on the machine, not on the run.
_RATES = ("groups_per_second", "tokens_per_second", "host_wait_fraction")


# Few groups, as their reference log-probs are computed in every run.
_SMALL = {
  "data__source": "synthetic:review_pairs:40",
  "data__eval_fraction": 0.1,
}


def make_config(**overrides):
  return tiny.make_config(**_SMALL | overrides)


def read_state(workdir, step):
  """All arrays of a checkpoint on the disk, by their paths."""
  folder = pathlib.Path(workdir) / "checkpoints" / str(step)
  tree = ocp.v1.load_checkpointables(folder)
  return {
    jax.tree_util.keystr(path): np.asarray(leaf)
    for path, leaf in jax.tree_util.tree_leaves_with_path(
      {"params": tree["params"], "rest": tree["rest"]}
    )
  }


def assert_same_bits(one, other):
  assert one.keys() == other.keys()
  assert any("opt_state" in name for name in one)
  for name, array in one.items():
    assert array.dtype == other[name].dtype, name
    assert array.tobytes() == other[name].tobytes(), name


def assert_close(one, other, tolerance=1e-5):
  assert one.keys() == other.keys()
  for name in one:
    np.testing.assert_allclose(
      one[name], other[name], rtol=tolerance, atol=tolerance, err_msg=name
    )


def params_of(state):
  return {k: v for k, v in state.items() if k.startswith("['params']")}


def curve(workdir, split="train"):
  """Lines of metrics.jsonl, without what only the clock decides."""
  rows = read_metrics(workdir, split)
  return [{k: v for k, v in row.items() if k not in _RATES} for row in rows]


# Adam divides by the root of the second moment: where a gradient is next to
# zero it turns rounding into a step. A larger epsilon leaves rounding small.
_SMOOTH = {"total_steps": 4, "optimizer__epsilon": 1e-3}


def assert_same_training(one, other):
  """Two runs that differ by rounding; both have gone somewhere."""
  before, after, others = (
    params_of(read_state(workdir, step))
    for workdir, step in ((one, 1), (one, 4), (other, 4))
  )
  assert max(np.abs(after[k] - before[k]).max() for k in after) > 1e-4
  assert_close(after, others)
  for split in ("train", "eval"):
    for a, b in zip(curve(one, split), curve(other, split), strict=True):
      # At the start margins are rounding, and accuracy its sign. The largest
      # log-ratio, in nats, is a difference of sums some hundreds large.
      left_out = ["split", "padding_fraction", "log_ratio/largest"]
      left_out += [name for name in a if "accuracy" in name]
      assert_close(
        {k: v for k, v in a.items() if k not in left_out},
        {k: v for k, v in b.items() if k not in left_out},
        tolerance=5e-5,
      )


def change_batches(monkeypatch, change):
  """Every training batch goes through change(loader, step, batch)."""
  original = Loader.batch
  monkeypatch.setattr(
    Loader,
    "batch",
    lambda self, step: change(self, step, original(self, step)),
  )


def note_order(monkeypatch):
  """Step -> ids of the groups that it was given."""
  order = {}

  def note(loader, step, batch):
    order[step] = np.sort(batch.example_ids.ravel()).tolist()
    return batch

  change_batches(monkeypatch, note)
  return order


def check_resume(monkeypatch, workdir, config, stop):
  """A run that is stopped and resumed equals one that was not stopped."""
  whole, parts = workdir / "whole", workdir / "parts"
  order = note_order(monkeypatch)
  figures = train(config, whole)
  whole_order = dict(order)
  order.clear()
  with monkeypatch.context() as patch:
    faults.stop_at(patch, stop)
    with pytest.raises(Preempted) as stopped:
      train(config, parts)
  assert stopped.value.code == 75 and stopped.value.step == stop
  steps = [row["step"] for row in curve(parts)]
  assert steps == list(range(1, stop + 1))
  first_order = dict(order)
  order.clear()
  assert train(config, parts) == figures
  assert min(order) == stop  # it has not started again
  order |= first_order
  assert curve(parts) == curve(whole)
  assert curve(parts, "eval") == curve(whole, "eval")
  assert_same_bits(
    read_state(parts, config.total_steps), read_state(whole, config.total_steps)
  )
  assert order == whole_order
  assert len({str(ids) for ids in order.values()}) == config.total_steps
  # Training, not standing still.
  before, after = (
    params_of(read_state(parts, step)) for step in (stop, config.total_steps)
  )
  assert all(np.abs(after[k] - before[k]).max() > 1e-6 for k in after)


@pytest.mark.fault(38)
@pytest.mark.slow
def test_three_steps_and_three_more_are_six(
  on_all_devices, tmp_path, monkeypatch
):
  """An epoch has four."""
  check_resume(monkeypatch, tmp_path, make_config(total_steps=6), 3)


@pytest.mark.slow
def test_a_run_with_a_frozen_reference_resumes(tmp_path, monkeypatch):
  config = make_config(total_steps=4, reference__kind="frozen")
  check_resume(monkeypatch, tmp_path, config, 2)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["rmsprop", "adafactor", "lion", "muon"])
def test_other_optimizers_and_a_schedule_resume(tmp_path, monkeypatch, name):
  config = make_config(
    total_steps=4,
    optimizer__name=name,
    optimizer__schedule="cosine",
    optimizer__warmup_steps=2,
    reference__kind="frozen",
    data__layout="padded",
  )
  check_resume(monkeypatch, tmp_path, config, 2)


@pytest.mark.slow
def test_pmap_resumes(on_all_devices, tmp_path, monkeypatch):
  config = make_config(total_steps=4, parallelism="pmap")
  check_resume(monkeypatch, tmp_path, config, 2)


@pytest.mark.slow
def test_a_longer_run_goes_on_from_a_shorter_one(tmp_path, monkeypatch, caplog):
  train(make_config(total_steps=6), tmp_path / "whole")
  train(make_config(total_steps=3), tmp_path / "parts")
  order = note_order(monkeypatch)
  with caplog.at_level(logging.INFO, "dpo_jax"):
    train(make_config(total_steps=6), tmp_path / "parts")
  told = next(m for m in caplog.messages if m.startswith("resumed"))
  assert told.endswith("from step 3: 3 of 6 steps to train")
  assert sorted(order) == [3, 4, 5]
  assert_same_bits(
    read_state(tmp_path / "parts", 6), read_state(tmp_path / "whole", 6)
  )


_SLOW_RUN = """
import json, sys, time
from dpo_jax.data.loader import Loader
from dpo_jax.train import train
from tests import tiny

original = Loader.batch

def slow(self, step):
  time.sleep(0.1)
  return original(self, step)

Loader.batch = slow
train(
  tiny.make_config(total_steps=1_000, **json.loads(sys.argv[2])), sys.argv[1]
)
"""


@pytest.mark.slow
def test_sigterm_saves_and_the_run_goes_on_as_if_nothing_was(
  on_all_devices,
  tmp_path,
):
  workdir = tmp_path / "parts"
  process = faults.spawn(
    _SLOW_RUN,
    str(workdir),
    json.dumps(_SMALL),
    num_devices=8,
    JAX_DISABLE_MOST_OPTIMIZATIONS="1",  # as here: for the same bits
  )
  lines = workdir / "metrics.jsonl"

  def has_trained():
    return lines.exists() and lines.read_text().count('"train"') >= 4

  code = faults.kill_when(process, has_trained, signal.SIGTERM)
  assert code == 75, process.communicate()[0]
  (step,) = (int(p.name) for p in (workdir / "checkpoints").iterdir())
  assert step >= 4
  assert (workdir / "checkpoints" / str(step) / "manifest.json").exists()
  total = step + 3
  figures = train(make_config(total_steps=total), workdir)
  whole = train(make_config(total_steps=total), tmp_path / "whole")
  assert figures == whole
  assert curve(workdir) == curve(tmp_path / "whole")
  assert_same_bits(
    read_state(workdir, total), read_state(tmp_path / "whole", total)
  )


@pytest.mark.slow
def test_the_evaluation_after_a_signal_in_the_last_step_is_made_up_for(
  tmp_path, monkeypatch
):
  faults.stop_at(monkeypatch, 2)
  config = make_config(total_steps=2)
  with pytest.raises(Preempted):
    train(config, tmp_path)
  figures = train(config, tmp_path)
  assert figures["eval/num_groups"] > 0
  assert [row["step"] for row in curve(tmp_path, "eval")] == [0, 2]


def test_the_signal_handler_of_before_comes_back(tmp_path):
  before = signal.getsignal(signal.SIGTERM)
  train(make_config(total_steps=1), tmp_path)
  assert signal.getsignal(signal.SIGTERM) is before


@pytest.mark.fault(40)
@pytest.mark.slow
def test_a_damaged_checkpoint_costs_its_steps_and_nothing_else(
  tmp_path, caplog
):
  config = make_config(total_steps=6, checkpoint__every_steps=2)
  figures = train(config, tmp_path)
  state = read_state(tmp_path, 6)
  faults.flip_byte(faults.largest_file(tmp_path / "checkpoints" / "6"))
  with caplog.at_level(logging.WARNING, "dpo_jax"):
    assert train(config, tmp_path) == figures
  assert "is damaged" in caplog.text
  assert_same_bits(read_state(tmp_path, 6), state)


@pytest.mark.fault(29)
@pytest.mark.slow
def test_a_loss_that_is_no_number_stops_the_run(tmp_path, monkeypatch):
  config = make_config(total_steps=8, checkpoint__every_steps=2)
  with monkeypatch.context() as patch:

    def poison(loader, step, batch):
      if step != 4:
        return batch
      return batch.replace(ref_logps=np.full_like(batch.ref_logps, np.nan))

    change_batches(patch, poison)
    with pytest.raises(NonFiniteError) as error:
      train(config, tmp_path / "parts")
  message = str(error.value)
  assert "step 5: loss is nan" in message
  assert "last good checkpoint is step 4;" in message
  assert "Groups with a log-prob that is not finite, 8 of 8: " in message
  # The bad step is not recorded, and the run resumes without the fault.
  assert [row["step"] for row in curve(tmp_path / "parts")] == [1, 2, 3, 4]
  train(config, tmp_path / "parts")
  train(config, tmp_path / "whole")
  assert_same_bits(
    read_state(tmp_path / "parts", 8), read_state(tmp_path / "whole", 8)
  )


def test_a_learning_rate_that_blows_up_is_noticed(tmp_path):
  config = make_config(
    total_steps=20, optimizer__learning_rate=1e30, data__eval_fraction=0.0
  )
  with pytest.raises(NonFiniteError, match="No checkpoint was saved; a lower"):
    train(config, tmp_path)
  assert not list((tmp_path / "checkpoints").iterdir())


@pytest.mark.fault(29)
def test_a_state_that_is_not_finite_is_not_saved(tmp_path):
  """The loss is measured before the update, so it does not show this one."""
  config = make_config(
    total_steps=4, checkpoint__every_steps=1, optimizer__weight_decay=1e38
  )
  config.optimizer.learning_rate = 1e3
  with pytest.raises(NonFiniteError, match="after step 1 a parameter is not"):
    train(config, tmp_path)
  assert not list((tmp_path / "checkpoints").iterdir())


@pytest.mark.fault(57)
def test_a_data_error_is_not_the_end_of_the_data(tmp_path, monkeypatch):
  def fail(loader, step, batch):
    if step == 3:
      raise OSError("the disk is gone")
    return batch

  change_batches(monkeypatch, fail)
  config = make_config(total_steps=6, checkpoint__every_steps=2)
  with pytest.raises(OSError, match="the disk is gone"):
    train(config, tmp_path)
  assert (tmp_path / "checkpoints" / "2" / "manifest.json").exists()


def load_other_reference(monkeypatch, change):
  """The policy loads first; what loads after it is changed."""
  original, calls = ModelSource.load, itertools.count()

  def load(self, policy, mesh, *, seed):
    params = original(self, policy, mesh, seed=seed)
    return change(params) if next(calls) else params

  monkeypatch.setattr(ModelSource, "load", load)


@pytest.mark.fault(37)
@pytest.mark.parametrize("kind", ["cached", "frozen"])
def test_a_policy_that_does_not_start_as_its_reference_is_stopped(
  tmp_path, monkeypatch, kind
):
  load_other_reference(
    monkeypatch, lambda params: jax.tree.map(lambda x: 1.001 * x, params)
  )
  with pytest.raises(ValueError) as error:
    train(make_config(reference__kind=kind), tmp_path)
  message = str(error.value)
  assert "does not start as its reference" in message
  if kind == "cached":
    assert "scored as the cached log-probs were differ by up to" in message
  else:
    assert "step 0: loss 0.6" in message
    assert "log 2 is 0.693147; largest |log-ratio|" in message
  assert not curve(tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize(("seed", "batch_size"), [(0, 4), (1, 8)])
def test_bfloat16_starts_with_cached_log_probs_and_tells_their_rounding(
  tmp_path, caplog, seed, batch_size
):
  """Scoring and training round differently, which does not stop a run."""
  config = make_config(
    seed=seed,
    batch_size=batch_size,
    policy__compute_dtype="bfloat16",
    total_steps=1,
  )
  with caplog.at_level(logging.INFO):
    train(config, tmp_path)
  told = re.search(
    r"bfloat16 rounding between layouts up to (\S+)", caplog.text
  )
  assert 0 < float(told[1]) < 8


def change_cache(folder, change):
  """Writes changed values to a cache, with a manifest that agrees."""
  [path] = folder.glob("*.npy")
  shape = np.load(path).shape
  logps, _, layout = logps_cache.load_cache(folder, path.stem, shape)
  change(logps)
  logps_cache.write_cache(folder, path.stem, logps, layout)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(
  ("size", "message"),
  [
    (1e-2, " the log-probs of PATH belong to policy.init?"),
    (math.nan, "PATH holds log-probs that are not finite"),
  ],
)
def test_a_cache_that_is_not_what_its_layout_gives_is_refused(
  tmp_path, dtype, size, message
):
  cache = tmp_path / "cache"
  config = make_config(
    total_steps=1,
    reference__cache_dir=str(cache),
    policy__compute_dtype=dtype,
    data__eval_fraction=0.0,
  )
  train(config, tmp_path / "one")

  def shift(logps):
    logps += size

  change_cache(cache, shift)
  with pytest.raises(ValueError) as error:
    train(config, tmp_path / "two")
  [path] = cache.glob("*.npy")
  assert message.replace("PATH", str(path)) in str(error.value)
  assert not curve(tmp_path / "two")


@pytest.mark.slow
def test_log_probs_of_another_layout_are_compared_in_float32(
  tmp_path, monkeypatch, caplog
):
  """They differ by rounding, and start a run; other weights do not."""
  knobs = dict(
    total_steps=1,
    reference__cache_dir=str(tmp_path / "cache"),
    policy__compute_dtype="bfloat16",
  )
  train(make_config(**knobs), tmp_path / "one")
  other = make_config(**knobs, eval__batch_size=16)
  calls = []
  check = start.check_in_float32
  monkeypatch.setattr(
    start, "check_in_float32", lambda *x: calls.append(1) or check(*x)
  )
  train(other, tmp_path / "two")
  assert calls
  # The cache is that of the weights, and the policy has others.
  original, count = ModelSource.load, itertools.count()

  def load(self, policy, mesh, *, seed):
    params = original(self, policy, mesh, seed=seed)
    is_policy = next(count) == 0
    return jax.tree.map(lambda x: 1.001 * x, params) if is_policy else params

  monkeypatch.setattr(ModelSource, "load", load)
  with pytest.raises(ValueError, match="scored by both in float32 differ"):
    train(other, tmp_path / "three")


def test_adapters_that_do_something_are_no_start(tmp_path, monkeypatch):
  original = ModelSource.load

  def load(*args, **kwargs):
    params = original(*args, **kwargs)
    return jax.tree_util.tree_map_with_path(
      lambda path, x: x + 1e-3 if "lora_b" in str(path) else x, params
    )

  monkeypatch.setattr(ModelSource, "load", load)
  with pytest.raises(ValueError, match="its adapters are not zero"):
    train(make_config(lora__rank=2, reference__kind="cached"), tmp_path)


@pytest.mark.slow
def test_a_reference_of_its_own_may_differ(tmp_path):
  train(make_sft_config(total_steps=1), tmp_path / "sft")
  config = make_config(total_steps=1, reference__init=f"run:{tmp_path}/sft")
  train(config, tmp_path / "dpo")
  assert abs(curve(tmp_path / "dpo")[0]["loss"] - math.log(2)) > 1e-4


def test_a_reference_that_is_no_number_is_stopped(tmp_path, monkeypatch):
  load_other_reference(
    monkeypatch, lambda params: jax.tree.map(lambda x: math.nan * x, params)
  )
  with pytest.raises(NonFiniteError, match="log-prob that is not finite"):
    train(make_config(), tmp_path / "cached")
  with pytest.raises(ValueError, match="does not start as its reference"):
    train(make_config(reference__kind="frozen"), tmp_path / "frozen")


def test_the_first_loss_is_log_two(tmp_path):
  train(make_config(total_steps=2), tmp_path)
  for row in (curve(tmp_path)[0], curve(tmp_path, "eval")[0]):
    assert row["loss"] == pytest.approx(math.log(2), abs=1e-5)
    for name in ("reward/chosen", "reward/rejected", "reward/margin"):
      assert row[name] == pytest.approx(0.0, abs=1e-5)
  second = curve(tmp_path)[1]
  assert abs(second["loss"] - math.log(2)) > 1e-4


@pytest.mark.fault(32, 33)
@pytest.mark.slow
def test_a_frozen_reference_stays_what_it_was(tmp_path):
  config = make_config(
    total_steps=4, checkpoint__every_steps=1, reference__kind="frozen"
  )
  train(config, tmp_path)
  before, after = (read_state(tmp_path, step) for step in (3, 4))
  changed = {k for k in after if before[k].tobytes() != after[k].tobytes()}
  assert any("params" in name and "ref_params" not in name for name in changed)
  assert not any("ref_params" in name for name in changed)
  run = build_run(config, Workdir.at(tmp_path))
  start = model_sources.parse("random").load(
    run.program.policy, run.program.placement.mesh, seed=config.seed
  )
  for path, leaf in jax.tree_util.tree_leaves_with_path(start):
    name = f"['rest']['ref_params']{jax.tree_util.keystr(path)}"
    assert after[name].tobytes() == np.asarray(leaf).tobytes(), name


@pytest.mark.slow
def test_the_cache_is_computed_once(tmp_path, monkeypatch):
  config = make_config(
    total_steps=1, reference__cache_dir=str(tmp_path / "cache")
  )
  train(config, tmp_path / "one")

  def refuse(*args):
    raise AssertionError("computed again")

  monkeypatch.setattr(cached_reference, "Parts", refuse)
  train(config, tmp_path / "two")
  assert curve(tmp_path / "one") == curve(tmp_path / "two")
  config.seed = 1
  with pytest.raises(AssertionError, match="computed again"):
    train(config, tmp_path / "three")


@pytest.mark.fault(34)
@pytest.mark.slow
def test_a_reference_that_changed_under_a_run_is_refused(tmp_path, monkeypatch):
  config = make_config(total_steps=4)
  with monkeypatch.context() as patch:
    faults.stop_at(patch, 2)
    with pytest.raises(Preempted):
      train(config, tmp_path)
  with monkeypatch.context() as patch:
    original = ModelSource.load
    patch.setattr(
      ModelSource,
      "load",
      lambda *args, seed: original(*args, seed=seed + 1),
    )
    with pytest.raises(ValueError, match="other weights than when this run"):
      train(config, tmp_path)
  assert "eval/loss" in train(config, tmp_path)


def make_sft_config(**overrides):
  return make_config(
    loss__name="sft",
    reference__kind="none",
    data__source="synthetic:review_demonstrations:80",
    checkpoint__best_metric="eval/loss",
    checkpoint__best_is_lower=True,
    **overrides,
  )


def test_sft_needs_no_reference(tmp_path):
  figures = train(make_sft_config(total_steps=8), tmp_path)
  assert not (tmp_path / "reference").exists()
  rows = curve(tmp_path)
  # 384 ids, and the start is next to uniform.
  assert rows[0]["loss"] == pytest.approx(math.log(384), abs=0.1)
  assert rows[-1]["loss"] < rows[0]["loss"] - 0.3
  assert figures["eval/loss"] < curve(tmp_path, "eval")[0]["loss"] - 0.3


@pytest.fixture(scope="module")
def sft_run(tmp_path_factory):
  """A run whose best checkpoint, by a twisted metric, is not its latest."""
  workdir = tmp_path_factory.mktemp("sft")
  config = make_sft_config(
    total_steps=3,
    eval__every_steps=1,
    checkpoint__every_steps=1,
    data__cache_dir=str(tmp_path_factory.mktemp("stores")),
  )
  config.checkpoint.best_is_lower = False
  train(config, workdir)
  losses = [row["loss"] for row in read_metrics(workdir, "eval")]
  assert losses[1] == max(losses[1:])
  return workdir


def loaded_params(init):
  run = build_run(make_config(policy__init=init), Workdir.at(init))
  source = model_sources.parse(init)
  params = source.load(run.program.policy, run.program.placement.mesh, seed=0)
  return {
    f"['params']{jax.tree_util.keystr(path)}": np.asarray(leaf)
    for path, leaf in jax.tree_util.tree_leaves_with_path(params)
  }


def test_a_run_starts_from_the_best_checkpoint_of_another(sft_run):
  names = sorted(p.name for p in (sft_run / "checkpoints").iterdir())
  assert names == ["1", "2", "3"]
  params = loaded_params(f"run:{sft_run}")
  best, latest = (params_of(read_state(sft_run, step)) for step in (1, 3))
  assert params.keys() == best.keys()
  for name, array in params.items():
    assert array.tobytes() == best[name].tobytes(), name
  assert any(
    array.tobytes() != latest[name].tobytes() for name, array in params.items()
  )


@pytest.mark.slow
def test_dpo_starts_from_an_sft_run(tmp_path, sft_run):
  config = make_config(total_steps=2, policy__init=f"run:{sft_run}")
  train(config, tmp_path)
  assert curve(tmp_path)[0]["loss"] == pytest.approx(math.log(2), abs=1e-5)
  before, after = read_state(sft_run, 1), read_state(tmp_path, 2)
  # Adam's first two steps move a weight by at most the learning rate each.
  moved = max(
    float(np.abs(after[name] - array).max())
    for name, array in params_of(before).items()
  )
  assert 1e-4 < moved < 2.5e-3


@pytest.mark.parametrize(
  ("init", "error", "message"),
  [
    ("run:{}/nowhere", FileNotFoundError, "is not the workdir"),
    ("hf:{}/nowhere", FileNotFoundError, "nowhere"),
    ("random:{}", ValueError, "must be one of random, hf:FOLDER, hub:"),
    ("magic", ValueError, "must be one of random, hf:FOLDER, hub:"),
  ],
)
def test_a_start_that_is_not_there_is_refused(tmp_path, init, error, message):
  config = make_config(policy__init=init.format(tmp_path))
  with pytest.raises(error, match=message):
    build_run(config, Workdir.at(tmp_path))


def test_a_run_without_a_checkpoint_is_no_start(tmp_path, monkeypatch):
  faults.stop_at(monkeypatch)
  change_batches(monkeypatch, lambda *args: 1 / 0)
  with pytest.raises(ZeroDivisionError):
    train(make_sft_config(), tmp_path / "sft")
  config = make_config(policy__init=f"run:{tmp_path}/sft")
  with pytest.raises(FileNotFoundError, match="no finished checkpoint"):
    train(config, tmp_path / "dpo")


def snapshot(folder):
  return {
    path: (path.stat().st_mtime_ns, path.read_bytes())
    for path in sorted(folder.rglob("*"))
    if path.is_file()
    and path.name not in ("config.json", "git.txt", "finished.json")
  }


@pytest.mark.slow
@pytest.mark.parametrize(
  ("moment", "saved"),
  [
    ((cached_reference._Scorer, "_compute", 1), None),
    ((evaluation, "evaluate", 1), None),  # at the start
    ((evaluation, "evaluate", 2), 2),
    ((samples, "draw_samples", 3), 2),  # of the policy, after the reference
    ((samples, "draw_samples", 4), 4),
  ],
  ids=["caching", "first evaluation", "evaluation", "samples", "last samples"],
)
@pytest.mark.fault(46)
def test_sigterm_outside_of_a_step_saves_what_there_is(
  tmp_path, monkeypatch, moment, saved
):
  config = make_config(
    total_steps=4,
    eval__every_steps=2,
    eval__num_samples=2,
    eval__samples_every_steps=2,
    eval__max_response_tokens=8,
    checkpoint__every_steps=100,
    data__cache_dir=str(tmp_path / "stores"),
  )
  whole, parts = tmp_path / "whole", tmp_path / "parts"
  train(config, whole)
  module, name, number = moment
  original, calls = getattr(module, name), itertools.count(1)

  def interrupted(*args, **kwargs):
    if next(calls) == number:
      os.kill(os.getpid(), signal.SIGTERM)
    return original(*args, **kwargs)

  with monkeypatch.context() as patch:
    patch.setattr(module, name, interrupted)
    with pytest.raises(Preempted) as stopped:
      train(config, parts)
  assert stopped.value.code == 75 and stopped.value.step == saved
  assert not (parts / "finished.json").exists()
  train(config, parts)
  assert (parts / "finished.json").exists()
  for split in ("train", "eval"):
    assert curve(parts, split) == curve(whole, split)
  assert_same_bits(read_state(parts, 4), read_state(whole, 4))
  lines = [(w / "samples.jsonl").read_text() for w in (parts, whole)]
  assert lines[0] == lines[1]
  steps = [json.loads(line)["step"] for line in lines[0].splitlines()]
  assert steps == [0, 0, 2, 2, 4, 4]


@pytest.mark.slow
def test_the_mark_of_a_finished_run_comes_last(tmp_path, monkeypatch):
  """After manifest, evaluation and samples; a stopped run has none."""
  config = make_config(total_steps=4, eval__num_samples=2)
  path = tmp_path / "finished.json"
  with monkeypatch.context() as patch:
    faults.stop_at(patch, 2)
    with pytest.raises(Preempted):
      train(config, tmp_path)
  assert not path.exists()
  seen = {}
  original = Workdir.write_finished

  def write(workdir, total_steps):
    manifest = tmp_path / "checkpoints" / "4" / "manifest.json"
    seen["manifest"] = manifest.exists()
    seen["eval"] = [row["step"] for row in read_metrics(tmp_path, "eval")]
    lines = (tmp_path / "samples.jsonl").read_text().splitlines()
    seen["samples"] = {json.loads(line)["step"] for line in lines}
    original(workdir, total_steps)

  monkeypatch.setattr(Workdir, "write_finished", write)
  train(config, tmp_path)
  assert seen == {"manifest": True, "eval": [0, 4], "samples": {0, 4}}
  mark = json.loads(path.read_text())
  assert mark["total_steps"] == 4 and mark["finished_at"].endswith("+00:00")
  # A resumed run is not finished until its last step.
  with monkeypatch.context() as patch:
    change_batches(patch, lambda *args: 1 / 0)
    with pytest.raises(ZeroDivisionError):
      train(make_config(total_steps=6, eval__num_samples=2), tmp_path)
  assert not path.exists()
  train(config, tmp_path)
  assert path.exists()


def test_a_finished_run_says_so_does_nothing_and_gives_its_figures(
  tmp_path, monkeypatch, caplog
):
  config = make_config(total_steps=2)
  figures = train(config, tmp_path)
  before = snapshot(tmp_path)

  def refuse(*args, **kwargs):
    raise AssertionError("it evaluates again")

  monkeypatch.setattr(evaluation, "evaluate", refuse)
  with caplog.at_level(logging.INFO, "dpo_jax"):
    assert train(config, tmp_path) == figures
  told = [m for m in caplog.messages if m.startswith("finished")]
  assert "the workdir holds all 2 steps" in told[0]
  shown = f"{figures['eval/reward/accuracy']:.3f}"
  assert any(shown in message for message in caplog.messages)
  assert snapshot(tmp_path) == before
  caplog.clear()
  with caplog.at_level(logging.INFO, "dpo_jax"):
    train(make_config(total_steps=1), tmp_path)
  assert snapshot(tmp_path) == before
  told = [m for m in caplog.messages if m.startswith("finished")]
  assert "step 2, beyond total_steps=1, so nothing" in told[0]
  assert all(name.startswith("eval/") for name in figures)


def test_an_ended_run_keeps_the_record_of_what_was_trained(tmp_path, caplog):
  train(make_config(total_steps=2), tmp_path)
  before = snapshot(tmp_path)
  config = make_config(total_steps=2, loss__beta=0.9, resume__allow="config")
  with caplog.at_level(logging.WARNING, "dpo_jax"):
    train(config, tmp_path)
  assert snapshot(tmp_path) == before
  assert "resume.allow changes nothing" in caplog.text


@pytest.mark.fault(44)
@pytest.mark.parametrize(
  "other",
  [{"lora__rank": 2}, {"optimizer__name": "lion"}, {"resume__step": 2}],
  ids=lambda other: next(iter(other)),
)
def test_a_start_that_cannot_resume_leaves_the_record_as_it_was(
  tmp_path, other
):
  config = make_config(total_steps=4, checkpoint__every_steps=2)
  train(config, tmp_path)
  before = snapshot(tmp_path)
  more = dict(total_steps=6, resume__allow="config", optimizer__name="lion")
  with pytest.raises(ValueError, match="holds another model or optimizer"):
    train(make_config(**more | other), tmp_path)
  assert snapshot(tmp_path) == before


@pytest.mark.fault(43)
def test_an_evaluation_that_fails_loses_no_step(tmp_path, monkeypatch):
  config = make_config(total_steps=3)
  evaluate = evaluation.evaluate

  def fail(*args, **kwargs):
    if monkeypatched.pop():
      raise OSError(28, "No space left on device", "samples.jsonl")
    return evaluate(*args, **kwargs)

  monkeypatched = [True, False]  # at the start, and at the end
  monkeypatch.setattr(evaluation, "evaluate", fail)
  with pytest.raises(OSError, match="No space left"):
    train(config, tmp_path / "run")
  monkeypatch.undo()
  assert (tmp_path / "run" / "checkpoints" / "3" / "manifest.json").exists()
  figures = train(config, tmp_path / "run")
  assert figures == train(config, tmp_path / "whole")


@pytest.mark.fault(29)
def test_a_step_whose_evaluation_is_not_finite_is_not_saved(
  tmp_path, monkeypatch
):
  evaluate = evaluation.evaluate

  def poison(*args, **kwargs):
    metrics, records = evaluate(*args, **kwargs)
    return metrics | {"loss": losses.pop()}, records

  losses = [math.nan, 0.7]
  monkeypatch.setattr(evaluation, "evaluate", poison)
  with pytest.raises(NonFiniteError, match="after step 3 eval/loss is nan"):
    train(make_config(total_steps=3), tmp_path)
  assert not list((tmp_path / "checkpoints").iterdir())


def test_an_evaluation_that_is_made_up_for_must_be_finite_too(
  tmp_path, monkeypatch
):
  config = make_config(total_steps=3)
  evaluate = evaluation.evaluate

  def fail_then_poison(*args, **kwargs):
    if (what := faulty.pop()) == "full":
      raise OSError(28, "No space left on device")
    metrics, records = evaluate(*args, **kwargs)
    return metrics | ({"loss": math.nan} if what == "nan" else {}), records

  faulty = ["nan", "full", ""]
  monkeypatch.setattr(evaluation, "evaluate", fail_then_poison)
  with pytest.raises(OSError, match="No space left"):
    train(config, tmp_path)
  with pytest.raises(NonFiniteError, match="after step 3 eval/loss is nan"):
    train(config, tmp_path)
  assert not (tmp_path / "finished.json").exists()


@pytest.mark.fault(65)
def test_a_workdir_and_a_pipe_tell_what_was_run_and_no_secret(
  tmp_path, logs, capsys, monkeypatch
):
  for name in ("HF_TOKEN", "WANDB_API_KEY", "AWS_SECRET_ACCESS_KEY"):
    monkeypatch.setenv(name, "a secret")
  command_line.show_logs()
  config = make_config(total_steps=1, log__progress=True)
  # No other test has compiled these.
  config.optimizer.learning_rate = 1.1e-3
  config.logps_chunk = 24
  train(config, tmp_path)
  shown = capsys.readouterr().err
  files = [path for path in tmp_path.rglob("*") if path.is_file()]
  assert not any(b"a secret" in path.read_bytes() for path in files)
  assert len(files) > 10 and "a secret" not in shown
  for name in ("scoring", "evaluation", "training"):
    assert f"compiled    the {name} step in " in shown
  labels = ["model", "loss", "held out", "checkpoint", "best", "export"]
  found = [shown.index(f" {label} ") for label in labels]
  assert found == sorted(found)
  assert "110,912 parameters, all trained" in shown and "\r" not in shown
  for line in shown.splitlines():  # warnings and paths are not broken
    assert len(line) <= 120 or "warning:" in line or str(tmp_path) in line
  resolved = json.loads((tmp_path / "config.json").read_text())
  assert resolved["loss"]["beta"] == 0.1  # the loss's own default
  model = json.loads((tmp_path / "model.json").read_text())
  assert (model["vocab_size"], model["d_model"]) == (384, 64)
  assert (tmp_path / "git.txt").read_text().strip()


@pytest.mark.slow
def test_samples_are_written_and_judged(tmp_path):
  config = make_config(
    total_steps=1,
    eval__num_samples=4,
    eval__max_response_tokens=8,
    eval__judge="sentiment",
  )
  train(config, tmp_path)
  lines = (tmp_path / "samples.jsonl").read_text().splitlines()
  rows = [json.loads(line) for line in lines]
  assert [row["step"] for row in rows] == [0] * 4 + [1] * 4
  assert {tuple(row) for row in rows} == {
    ("step", "prompt", "response", "reward")
  }
  prompts = [row["prompt"] for row in rows]
  assert prompts[:4] == prompts[4:]
  assert all(prompt.startswith("We saw ") for prompt in prompts)
  start, end = curve(tmp_path, "eval")
  # The policy is its own reference yet, and draws the same samples.
  assert start["sample/win_rate"] == 0.5
  assert start["kl"] == pytest.approx(0.0, abs=1e-4)
  assert end["kl"] != start["kl"]
  assert 0 < end["sample/tokens"] <= 8


@pytest.fixture(scope="module")
def plain_run(tmp_path_factory):
  """Four steps in the plainest way, each with its checkpoint."""
  workdir = tmp_path_factory.mktemp("plain")
  stores = str(tmp_path_factory.mktemp("stores"))
  train(
    make_config(
      checkpoint__every_steps=1,
      checkpoint__keep=4,
      data__cache_dir=stores,
      **_SMOOTH,
    ),
    workdir,
  )
  return workdir


@pytest.mark.slow
@pytest.mark.parametrize(
  "overrides",
  [
    {"reference__kind": "frozen"},
    {"accumulation_steps": 4},
    {"parallelism": "pmap"},
    {"data__layout": "padded"},
    {"mesh": {"data": 2, "fsdp": 2, "tensor": 2}},
  ],
  ids=lambda x: next(iter(x)),
)
def test_the_same_run_in_another_way(
  on_all_devices, tmp_path, plain_run, overrides
):
  train(make_config(**_SMOOTH | overrides), tmp_path)
  assert_same_training(plain_run, tmp_path)


@pytest.mark.fault(51)
@pytest.mark.slow
def test_a_run_goes_on_in_another_way(
  on_all_devices, tmp_path, monkeypatch, plain_run
):
  faults.stop_at(monkeypatch, 2)
  mesh = {"data": 2, "fsdp": 2, "tensor": 2}
  with pytest.raises(Preempted):
    train(make_config(mesh=mesh, **_SMOOTH), tmp_path)
  train(make_config(parallelism="pmap", **_SMOOTH), tmp_path)
  assert_same_training(plain_run, tmp_path)


def test_a_shape_that_was_not_planned_is_noticed(tmp_path, monkeypatch):
  def widen(loader, step, batch):
    if step != 2:
      return batch
    # The same groups in twice the rows.
    return jax.tree.map(lambda x: np.concatenate([x, 0 * x]), batch)

  change_batches(monkeypatch, widen)
  # No other test has this rate, and with it the program.
  config = make_config(
    data__eval_fraction=0.0, data__max_shapes=1, optimizer__b1=0.87
  )
  with pytest.raises(AssertionError, match="traced"):
    train(config, tmp_path)


def refuse(config, message, error=ValueError):
  with pytest.raises(error) as raised:
    build_run(config, Workdir.at("/nowhere"))
  assert message in str(raised.value), raised.value


@pytest.mark.fault(55)
@pytest.mark.parametrize(
  ("overrides", "message"),
  [
    (
      {"batch_size": 12},
      "batch_size=12 must be a multiple of the 8 devices on the mesh axes"
      " ('data', 'fsdp'): nearest are 8 and 16",
    ),
    ({"batch_size": 5}, "nearest is 8"),
    ({"eval__batch_size": 20}, "eval.batch_size=20 must be a multiple"),
    (
      {"data__row_tokens": 16},
      "data.row_tokens=16 is shorter than the longest",
    ),
    (
      {"data__max_tokens": 600},
      "data.max_tokens=600 exceeds the model's max_positions=512",
    ),
    ({"data__max_prompt_tokens": 160}, "must be below data.max_tokens=160"),
    ({"data__layout": "ragged"}, "must be one of shared, packed, padded"),
    ({"data__eval_fraction": 1.5}, "data.eval_fraction=1.5 is outside [0, 1)"),
    ({"data__source": "synthetic:reviews"}, "review_pairs"),
    ({"reference__kind": "none"}, "loss 'dpo' compares with a reference"),
    ({"reference__kind": "frosen"}, "reference.kind='frosen' must be one of"),
    ({"policy__preset": "2m"}, "policy.preset='2m' must be one of"),
    ({"policy__remat": "some"}, "policy.remat='some' must be one of none"),
    ({"eval__judge": "me"}, "eval.judge='me' must be '' or one of sentiment"),
    ({"parallelism": "gspmd"}, "parallelism='gspmd' must be one of jit, pmap"),
    ({"mesh__tensor": 8}, "layers/query/kernel has a dimension of 4"),
    ({"mesh__data": 4}, "takes 4 devices, and there are 8"),
    ({"loss__name": "dpoo"}, "Did you mean 'dpo'?"),
    ({"optimizer__name": "adam"}, "optimizer.name='adam' must be one of"),
    ({"total_steps": 0}, "total_steps=0 is outside [1, inf)"),
  ],
  ids=lambda x: "-".join(x) if isinstance(x, dict) else "",
)
def test_what_cannot_be_trained_is_refused_before_it_starts(
  on_all_devices, overrides, message
):
  refuse(make_config(**overrides), message)


@pytest.mark.fault(15)
def test_a_token_beyond_the_vocabulary_is_refused(monkeypatch):
  monkeypatch.setattr(
    ModelSource, "policy", lambda *args, **kwargs: tiny.make_policy(96)
  )
  refuse(make_config(), "and the model's vocabulary has 96")


def swap_labels(records):
  return [
    r | {"chosen": r["rejected"], "rejected": r["chosen"]} for r in records
  ]


@pytest.mark.fault(48)
@pytest.mark.slow
@pytest.mark.parametrize("kind", ["cached", "frozen"])
def test_a_run_does_not_go_on_with_other_data(tmp_path, kind):
  records = [
    {"prompt": f"{i} a", "chosen": f" good {i}", "rejected": " bad"}
    for i in range(16)
  ]
  source = write_lines(tmp_path / "pairs.jsonl", records)
  knobs = dict(data__source=source, reference__kind=kind)
  train(make_config(total_steps=1, **knobs), tmp_path / "run")
  before = snapshot(tmp_path / "run")
  for changed in (swap_labels(records), records[::-1], records[2:]):
    write_lines(tmp_path / "pairs.jsonl", changed)
    with pytest.raises(
      ValueError, match=r"train\.content: '.*' there, '.*' now"
    ):
      train(make_config(total_steps=2, **knobs), tmp_path / "run")
    assert snapshot(tmp_path / "run") == before
  # The same content at another place is the same data.
  write_lines(tmp_path / "pairs.jsonl", records)
  train(make_config(total_steps=2, **knobs), tmp_path / "run")


@pytest.mark.fault(48)
@pytest.mark.slow
def test_a_run_does_not_go_on_with_another_tokenizer_or_template(tmp_path):
  folder = tmp_path / "tokenizer"
  write_folder(folder)
  records = [
    {"prompt": f"the cat {i}", "chosen": " sat", "rejected": " ran"}
    for i in range(16)
  ]
  source = write_lines(tmp_path / "pairs.jsonl", records)
  policy = tiny.make_policy(vocab_size=384)
  params = policy.init(jax.random.key(0))
  huggingface.save_params(tmp_path / "model", policy, params, dtype="float32")
  knobs = dict(
    data__source=source,
    data__tokenizer=str(folder),
    policy__init=f"hf:{tmp_path / 'model'}",
  )
  train(make_config(total_steps=1, **knobs), tmp_path / "run")
  for changed, named in (
    ({"chat_template": "{{ messages[0].content }}"}, "tokenizer.chat_template"),
    ({"eos_token": "<|user|>"}, "tokenizer.vocabulary"),
  ):
    write_folder(folder, **changed)
    with pytest.raises(ValueError, match=named):
      train(make_config(total_steps=2, **knobs), tmp_path / "run")
  write_folder(folder)
  train(make_config(total_steps=2, **knobs), tmp_path / "run")


@pytest.mark.slow
def test_an_older_record_of_the_data_is_compared_too(tmp_path):
  config = make_config(total_steps=1)
  train(config, tmp_path)
  path = tmp_path / "data.json"
  splits = json.loads(path.read_text())
  old = {
    name: f"{splits[name]['store']}, {splits[name]['groups']} groups"
    for name in ("train", "eval")
  }
  path.write_text(json.dumps(old))
  train(make_config(total_steps=2), tmp_path)
  path.write_text(json.dumps(old | {"train": "0123, 9 groups"}))
  with pytest.raises(ValueError, match="train: '0123, 9 groups' there"):
    train(make_config(total_steps=3), tmp_path)


def write_lines(path, records):
  path.write_text("\n".join(json.dumps(record) for record in records))
  return f"jsonl:{path}"


def test_groups_that_teach_the_loss_nothing_are_dropped_and_counted(
  tmp_path, caplog
):
  """Eight pairs among demonstrations and ties; only they are trained on."""
  pairs = [
    {"prompt": f"{i} a", "chosen": " good", "rejected": " bad"}
    for i in range(8)
  ]
  others = [{"prompt": f"{i} b", "completion": " fine"} for i in range(30)] + [
    pair | {"score_chosen": 1, "score_rejected": 1} for pair in pairs[:2]
  ]
  source = write_lines(tmp_path / "mixed.jsonl", others + pairs)
  config = make_config(
    data__source=source, data__eval_source=source, eval__max_groups=0
  )
  with caplog.at_level(logging.WARNING):
    run = build_run(config, Workdir.at(tmp_path))
  for loader in (run.data.train, run.data.first_eval):
    assert loader.indices.tolist() == list(range(32, 40))
  assert "32 of 40 groups, which are dropped" in caplog.text
  assert "30 too_few_responses, 2 tied_scores" in caplog.text
  figures = train(config, tmp_path / "run")
  assert figures["eval/num_groups"] == 8
  rows = read_metrics(tmp_path / "run", "train")
  assert all(row["grad_norm"] > 0 for row in rows)
  # The loss of unpaired responses takes the demonstrations, not the ties.
  config = make_config(data__source=source, loss__name="kto")
  assert len(build_run(config, Workdir.at(tmp_path)).data.train.indices) > 30


def write_pairs(path, num, tag):
  records = [
    {"prompt": f"{tag} {i}", "chosen": f" good {i}", "rejected": " bad"}
    for i in range(num)
  ]
  return write_lines(path, records)


def test_a_mixture_with_two_held_out_sets_resumes_exactly(
  tmp_path, monkeypatch
):
  one, two = (
    write_pairs(tmp_path / f"{tag}.jsonl", num, tag)
    for tag, num in (("one", 6), ("two", 30))
  )
  config = make_config(
    data__source="",
    data__sources=(
      {"source": one, "weight": 1.0},
      {"source": two, "weight": 3.0},
    ),
    data__eval_sources=f"small={one},large={two}",
    checkpoint__best_metric="large:loss",
    total_steps=4,
    eval__every_steps=2,
  )
  # Where an evaluation is due, which SIGTERM leaves no time for.
  check_resume(monkeypatch, tmp_path, config, 2)
  whole = tmp_path / "whole"
  assert curve(tmp_path / "parts", "eval/large") == curve(whole, "eval/large")
  assert [row["num_groups"] for row in curve(whole, "eval/small")] == [6] * 3
  figures = train(config, whole)  # finished: what the last evaluation gave
  last = curve(whole, "eval/large")[-1]
  assert figures["large:loss"] == last["loss"] != figures["small:loss"]
  assert (whole / "eval_logps" / "large" / "4.npz").exists()


@pytest.mark.parametrize(
  ("overrides", "message"),
  [
    ({"data__source": "jsonl:x"}, "exclude each other"),
    ({"weight": 0.0}, "is outside (0, inf)"),
    ({"weight": "1"}, "must be a number"),
    (
      {"data__eval_source": "jsonl:x", "data__eval_sources": "a=jsonl:x"},
      "excl",
    ),
    ({"data__eval_sources": "a=jsonl:x,a=jsonl:y"}, "each name once"),
    ({"data__eval_sources": "jsonl:x"}, "must be NAME=VALUE"),
    ({"data__eval_sources": "a="}, "'a' has no source"),
    ({"checkpoint__best_metric": "a:loss"}, "is not measured"),
    ({"total_steps": 5, "epochs": 1.0}, "both say how long"),
    ({"kinds": True}, "reads groups of 2 responses"),
  ],
)
def test_mixtures_that_cannot_be_are_refused(tmp_path, overrides, message):
  given = dict(overrides)
  other = write_pairs(tmp_path / "two.jsonl", 4, "two")
  if given.pop("kinds", False):
    records = [
      {"prompt": "a", "responses": ["x", "y", "z"], "scores": [3, 2, 1]}
    ]
    other = write_lines(tmp_path / "two.jsonl", records)
  source = write_pairs(tmp_path / "one.jsonl", 4, "one")
  entries = (
    {"source": source, "weight": given.pop("weight", 1.0)},
    {"source": other, "weight": 1.0},
  )
  given = {"data__source": "", "data__sources": entries} | given
  refuse(make_config(**given), message)


def test_a_changed_config_is_told_before_the_data_are_read(
  tmp_path, monkeypatch
):
  config = make_config(total_steps=1)
  train(config, tmp_path)
  config.data.max_tokens = 150

  def refuse(*args):
    raise AssertionError("it reads the data")

  monkeypatch.setattr(store, "build_store", refuse)
  with pytest.raises(ValueError, match=r"data.max_tokens: 160 there, 150 now"):
    train(config, tmp_path)


def test_epochs_count_the_groups_of_all_sources(tmp_path):
  one, two = (
    write_pairs(tmp_path / f"{tag}.jsonl", num, tag)
    for tag, num in (("one", 6), ("two", 30))
  )
  config = make_config(
    data__source="",
    data__sources=(
      {"source": one, "weight": 1.0},
      {"source": two, "weight": 1.0},
    ),
    data__eval_fraction=0.0,
    total_steps=0,
    epochs=2.0,
    optimizer__schedule="linear",
  )
  run = build_run(config, Workdir.at(tmp_path))
  assert run.config.total_steps == 2 * 36 // config.batch_size
  assert float(run.program.schedule(run.config.total_steps)) == 0.0
  assert float(run.program.schedule(run.config.total_steps - 1)) > 0.0
  config.optimizer.warmup_steps = 100
  with pytest.raises(ValueError, match="warmup_steps=100 must be below total"):
    build_run(config, Workdir.at(tmp_path))


def test_data_that_teach_the_loss_nothing_stop_the_run(tmp_path):
  tied = {"score_chosen": 1, "score_rejected": 1}
  records = [
    {"prompt": f"{i}", "chosen": "good", "rejected": "bad"} | tied
    for i in range(8)
  ]
  source = write_lines(tmp_path / "ties.jsonl", records)
  refuse(
    make_config(data__source=source),
    "loss 'dpo' learns nothing from any of the 8 groups: 8 tied_scores",
  )
  refuse(make_config(data__source=source, loss__name="kto"), "16 tied_scores")


def test_a_workdir_of_another_config_is_left_alone(tmp_path):
  config = make_config(total_steps=1)
  train(config, tmp_path)
  before = snapshot(tmp_path)
  with pytest.raises(ValueError, match="seed: 0 there, 1 now"):
    train(make_config(total_steps=1, seed=1), tmp_path)
  assert snapshot(tmp_path) == before


def write_groups(path, group):
  """Records of the kind that a loss reads."""
  with path.open("w") as file:
    for i in range(16):
      prompt = f"Film {i}: the plot "
      texts = [f"was fine {i}.", f"was dull, {i}!", f"is {i}."]
      record = {
        "single": {"completion": texts[i % 2], "label": i % 2 == 0},
        "ranking": {"responses": texts, "scores": [2.0, 0.5, -1.0]},
      }.get(
        group,
        {
          "chosen": texts[0],
          "rejected": texts[1],
          "score_chosen": 1.5,
          "score_rejected": -0.5,
        },
      )
      file.write(json.dumps({"prompt": prompt, **record}) + "\n")


def sequences_of_a_batch(config, workdir):
  """Sequences of a run's first batch, whose reference has other weights."""
  run = build_run(config, Workdir.at(workdir))
  program, mesh = run.program, run.program.placement.mesh
  source = model_sources.parse("random")
  params, ref_params = (
    source.load(program.policy, mesh, seed=seed) for seed in (0, 1)
  )
  batch = program.placement.place_rows(run.data.train.batch(0))
  return program.eval_step(params, ref_params, batch)


def keep_needed(objective, sequences):
  """Leaves out the optional fields that a loss does not say it reads."""
  others = FIELDS.keys() - objective.needs
  return sequences.replace(**dict.fromkeys(others))


def descend(objective, sequences):
  """Losses of a batch before, between and after two steps down the gradient.

  The steps change the log-probs and values themselves.
  """
  names = ("logps", "head_logps", "sampled_logps", "values")
  names += ("complement_logps",)
  sums = {
    name: getattr(sequences, name)
    for name in names
    if getattr(sequences, name) is not None
  }

  def total(sums):
    given = sequences.replace(**sums)
    return objective.apply(given, objective.init())[0].sum()

  losses = [total(sums)]
  for _ in range(2):
    gradients = jax.grad(total)(sums)
    largest = jnp.max(jnp.stack([jnp.abs(g).max() for g in gradients.values()]))
    sums = {k: x - 1e-2 / largest * gradients[k] for k, x in sums.items()}
    losses.append(total(sums))
  return losses


@pytest.mark.slow
@pytest.mark.parametrize("group", ["pair", "single", "ranking"])
def test_every_loss_trains(tmp_path, monkeypatch, group):
  """All losses of a kind of group in one run; then each alone on a batch.

  `tests/online/test_online.py` trains those on samples.
  """
  # Tested above, and one more program to compile.
  monkeypatch.setattr(initial_state, "check_first_loss", lambda *args: None)
  kinds = {group, "first"} if group == "pair" else {group}
  names = [name for name, row in CATALOGUE.items() if row.group in kinds]
  write_groups(tmp_path / "data.jsonl", group)
  config = make_config(
    total_steps=2,
    reference__kind="frozen",
    data__source=f"jsonl:{tmp_path}/data.jsonl",
    data__eval_fraction=0.0,
    data__layout="padded",  # a single shape
    optimizer__learning_rate=1e-4,
  )
  del config.loss
  config.loss = tuple({"name": name, "weight": 1.0} for name in names)
  train(config, tmp_path / "run")
  rows = curve(tmp_path / "run")
  assert len(rows) == 2
  for row in rows:
    assert all(math.isfinite(row[f"loss/{name}"]) for name in names)
  assert rows[0]["grad_norm"] > 0.0
  sequences = sequences_of_a_batch(config, tmp_path)
  objectives = [build_objective({"name": name}) for name in names]

  @jax.jit
  def measure_all(sequences):
    return [measure.measure(o, keep_needed(o, sequences)) for o in objectives]

  for name, figures in zip(names, measure_all(sequences), strict=True):
    assert np.isfinite(figures[f"{name}/loss"]).all(), name
    assert (figures[f"{name}/gradient_weight"] > 0.0).any(), name

  @jax.jit
  def descend_all(sequences):
    return [descend(o, keep_needed(o, sequences)) for o in objectives]

  for name, losses in zip(names, descend_all(sequences), strict=True):
    assert losses[0] > losses[1] > losses[2], (name, losses)


@pytest.mark.parametrize("name", CATALOGUE)
def test_a_recorded_loss_is_the_loss_that_was_named(tmp_path, name):
  """It has the defaults of its knobs; those that it does not read are None."""
  objective = build_objective({"name": name})
  config = make_config(loss__name=name)
  if objective.group == "samples":
    config.online.update(dict(kind="rollouts", judge="sentiment"))
  resume.record(config_lib.resolve(config), {}, {}, Workdir.at(tmp_path))
  recorded = json.loads((tmp_path / "config.json").read_text())["loss"]
  read = [k for k in KNOBS if k in CATALOGUE[name].knobs]
  for knob in set(KNOBS) - set(read):
    assert recorded[knob] is None, knob
  assert build_objective(recorded) == objective


def test_help_is_answered_without_jax():
  """Importing it takes seconds, and help needs none of it."""
  code = (
    "import runpy, sys; sys.argv = ['train', '--help']\n"
    "try: runpy.run_module('dpo_jax.train', run_name='__main__')\n"
    "except SystemExit as done: assert not done.code\n"
    "assert 'jax' not in sys.modules\n"
  )
  process = faults.spawn(code)
  out, error = process.communicate(timeout=60)
  assert process.returncode == 0, error
  assert "--coordinator_address" in str(out)


def test_compiled_programs_are_kept_by_default(tmp_path, monkeypatch):
  before = jax.config.jax_compilation_cache_dir
  monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
  try:
    for directory, wanted in (
      ("off", None),
      ("", str(tmp_path / "dpo_jax" / "compiled")),
      (str(tmp_path / "mine"), str(tmp_path / "mine")),
    ):
      jax.config.update("jax_compilation_cache_dir", None)
      use_compilation_cache(directory)
      assert jax.config.jax_compilation_cache_dir == wanted
    use_compilation_cache("")  # what JAX was told comes first
    assert jax.config.jax_compilation_cache_dir == str(tmp_path / "mine")
  finally:
    jax.config.update("jax_compilation_cache_dir", before)
