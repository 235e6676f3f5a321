"""Runs that train a part of the policy: adapters, or what is not frozen."""

import dataclasses
import json

import jax
import numpy as np
import pytest

from dpo_jax import trees
from dpo_jax.model_sources import TrainedRun, parse
from dpo_jax.models import lora
from dpo_jax.models.config import ModelConfig
from dpo_jax.models.decoder import Policy
from dpo_jax.parallel import mesh
from dpo_jax.records.checkpoint import Checkpoints
from dpo_jax.records.metrics import read_metrics
from dpo_jax.train import train
from tests import tiny

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("in_haste")]
ALL = {"data": -1}


def make_config(**overrides):
  return tiny.make_config(
    **{"lora__rank": 2, "optimizer__learning_rate": 1e-2, **overrides}
  )


def load(workdir):
  """A run's policy, as another run would start from it."""
  run = TrainedRun.at(workdir)
  config = dataclasses.replace(run.trained_model, lora=None)
  return run.load(Policy(config), mesh.make_mesh(ALL), seed=0)


def saved_names(workdir):
  """Paths of what the latest checkpoint holds."""
  reader = Checkpoints(
    workdir, keep=2, best_metric="", best_is_lower=False, is_reader=True
  )
  found = reader._checkpointer.checkpointables_metadata(reader.steps[-1])
  reader.close()
  return [
    trees.path_name(path)
    for part in ("params", "rest")
    for path, _ in jax.tree_util.tree_leaves_with_path(found.metadata[part])
  ]


def test_adapters_learn_and_are_all_that_is_saved(tmp_path):
  # Few pairs, seen again and again: a random base can learn no more.
  few = dict(data__source="synthetic:review_pairs:16", data__eval_fraction=0.0)
  train(make_config(total_steps=24, lora__rank=4, **few), tmp_path)
  losses = [row["loss"] for row in read_metrics(tmp_path, "train")]
  assert losses[0] == pytest.approx(np.log(2), abs=1e-5)
  assert np.mean(losses[-4:]) < 0.5
  names = saved_names(tmp_path)
  arrays = [name for name in names if "layers/" in name]
  assert arrays and all("lora_" in name for name in arrays), arrays
  assert not any("embedding" in name for name in names)


@pytest.mark.parametrize("kind", ["frozen", "adapter_off"])
def test_a_live_reference_is_the_cached_one(tmp_path, kind):
  # Where a gradient is next to zero, Adam makes a step of rounding; less so
  # with a larger epsilon.
  knobs = dict(optimizer__epsilon=1e-3)
  cached, live = (
    train(make_config(reference__kind=k, **knobs), tmp_path / k)
    for k in ("cached", kind)
  )
  # Programs round the sums that ratios are differences of in their own ways.
  rounding = float(np.spacing(np.float32(-live["eval/logps/chosen"])))
  for name in ("loss", "reward/margin", "log_ratio/chosen"):
    assert live[f"eval/{name}"] == pytest.approx(
      cached[f"eval/{name}"], abs=4 * rounding
    )


def test_auto_turns_adapters_off_for_what_no_cache_holds(tmp_path):
  train(make_config(loss__name="tdpo"), tmp_path)
  config = json.loads((tmp_path / "config.json").read_text())
  assert config["reference"]["kind"] == "adapter_off"
  assert read_metrics(tmp_path, "train")[0]["loss"] == pytest.approx(
    np.log(2), abs=1e-5
  )


def test_ten_steps_are_five_and_five_more(tmp_path):
  knobs = dict(checkpoint__every_steps=5, lora__targets="query|up")
  train(make_config(total_steps=10, **knobs), tmp_path / "whole")
  train(make_config(total_steps=5, **knobs), tmp_path / "parts")
  train(make_config(total_steps=10, **knobs), tmp_path / "parts")
  jax.tree.map(
    np.testing.assert_array_equal,
    load(tmp_path / "whole"),
    load(tmp_path / "parts"),
  )


def test_the_next_run_starts_from_the_merged_policy(tmp_path):
  first = tmp_path / "first"
  train(make_config(total_steps=6), first)
  params = load(first)
  assert not lora.has_adapters(params)
  # Its loss on the pairs is below log 2 by itself, against the same start;
  # as its own reference it is at log 2.
  figures = train(
    make_config(policy__init=f"run:{first}", total_steps=1), tmp_path / "next"
  )
  rows = read_metrics(tmp_path / "next", "eval")
  assert rows[0]["loss"] == pytest.approx(np.log(2), abs=1e-5)
  assert rows[0]["logps/chosen"] == pytest.approx(
    read_metrics(first, "eval")[-1]["logps/chosen"], rel=1e-4
  )
  assert np.isfinite(figures["eval/loss"])


def test_adapters_of_another_base_are_refused(tmp_path):
  base, run = tmp_path / "base", tmp_path / "run"
  full = dict(lora=None, loss__name="sft", reference__kind="none")
  train(tiny.make_config(**full, total_steps=1), base)
  train(make_config(policy__init=f"run:{base}", total_steps=2), run)
  # The base is trained on, as if nothing hung on it.
  train(tiny.make_config(**full, total_steps=3), base)
  with pytest.raises(ValueError, match="trained parts of another model"):
    load(run)
  with pytest.raises(ValueError, match="trained parts of another model"):
    train(make_config(policy__init=f"run:{base}", total_steps=4), run)


def test_frozen_parameters_stay_and_the_others_move(tmp_path):
  train(
    tiny.make_config(policy__frozen="embedding|norm", total_steps=2), tmp_path
  )
  policy = Policy(
    ModelConfig.from_dict(json.loads((tmp_path / "model.json").read_text()))
  )
  start = parse("random").load(policy, mesh.make_mesh(ALL), seed=0)
  now = load(tmp_path)
  np.testing.assert_array_equal(now["embedding"], start["embedding"])
  moved = now["layers"]["up"]["kernel"] - start["layers"]["up"]["kernel"]
  assert np.abs(moved).max() > 1e-4
  assert not any("embedding" in name for name in saved_names(tmp_path))


def dtypes_of(workdir):
  """Dtypes of the run's parameters by name, as it starts."""
  policy = Policy(
    ModelConfig.from_dict(json.loads((workdir / "model.json").read_text()))
  )
  return {
    trees.path_name(path): str(leaf.dtype)
    for path, leaf in jax.tree_util.tree_leaves_with_path(
      policy.abstract_params()
    )
  }


@pytest.mark.parametrize(
  "overrides",
  [
    {"lora__rank": 2},
    {"lora__rank": 2, "loss__name": "reward_model"},
    {"lora__rank": 0, "policy__frozen": "^embedding|mlp_norm"},
    {"lora__rank": 0, "policy__frozen": "kernel", "reference__kind": "frozen"},
  ],
  ids=str,
)
def test_what_is_trained_is_float32_whatever_the_rest_is(tmp_path, overrides):
  config = make_config(
    policy__param_dtype="bfloat16", total_steps=1, **overrides
  )
  train(config, tmp_path / "run")
  saved = set(saved_names(tmp_path / "run"))
  found = dtypes_of(tmp_path / "run")
  assert set(found.values()) == {"float32", "bfloat16"}
  for name, dtype in found.items():
    # A checkpoint holds what is trained.
    assert (dtype == "float32") == (name in saved), name


@pytest.mark.parametrize("rank", [0, 2])
def test_a_run_with_a_bfloat16_part_resumes_and_is_a_start(tmp_path, rank):
  """Another run takes it in float32."""
  config = make_config(
    policy__param_dtype="bfloat16",
    policy__frozen="" if rank else "^embedding",
    lora__rank=rank,
    total_steps=1,
  )
  train(config, tmp_path / "run")
  config.total_steps = 2
  train(config, tmp_path / "run")
  after = tiny.make_config(
    policy__init=f"run:{tmp_path / 'run'}", total_steps=1
  )
  train(after, tmp_path / "after")
  assert set(dtypes_of(tmp_path / "after").values()) == {"float32"}


def test_small_steps_are_not_lost_beside_a_bfloat16_part(tmp_path):
  """A rate of 1e-6 moves as many weights as where all is float32."""
  moved = {}
  for dtype in ("float32", "bfloat16"):
    config = tiny.make_config(
      policy__frozen="^embedding",
      policy__param_dtype=dtype,
      optimizer__name="rmsprop",
      optimizer__learning_rate=1e-6,
    )
    train(config, tmp_path / dtype)
    recorded = json.loads((tmp_path / dtype / "model.json").read_text())
    policy = Policy(ModelConfig.from_dict(recorded))
    start = parse("random").load(policy, mesh.make_mesh(ALL), seed=0)
    run = TrainedRun.at(tmp_path / dtype)
    now = run.load_trained(policy, mesh.make_mesh(ALL))
    kernel = now["layers"]["up"]["kernel"]
    before = start["layers"]["up"]["kernel"]
    moved[dtype] = np.mean(np.asarray(kernel) != np.asarray(before))
  assert moved["float32"] > 0.9
  assert moved["bfloat16"] == pytest.approx(moved["float32"], abs=0.02)


def test_merged_adapters_are_not_rounded_to_the_base(tmp_path):
  """An adapter far below bfloat16's spacing is in the next run's weights."""
  config = make_config(
    policy__param_dtype="bfloat16", optimizer__learning_rate=1e-5
  )
  train(config, tmp_path / "run")
  run = TrainedRun.at(tmp_path / "run")
  recorded = run.trained_model
  grid = mesh.make_mesh(ALL)
  wide = Policy(dataclasses.replace(recorded, lora=None, param_dtype="float32"))
  merged = run.load(wide, grid, seed=0)
  base = run.load_base(Policy(recorded), grid)
  change = merged["layers"]["up"]["kernel"] - base["layers"]["up"]["kernel"]
  # Weights of 0.02 stand 1.2e-4 apart in bfloat16.
  assert 0 < np.abs(change).max() < 1e-4
  assert (np.asarray(change) != 0).mean() > 0.9


def test_bfloat16_where_everything_is_trained_is_refused(tmp_path):
  config = tiny.make_config(policy__param_dtype="bfloat16")
  with pytest.raises(ValueError, match=r"param_dtype='bfloat16' .*float32"):
    train(config, tmp_path)
  assert not (tmp_path / "config.json").exists()


@pytest.mark.parametrize(
  ("overrides", "message"),
  [
    ({"lora__rank": 0, "reference__kind": "adapter_off"}, "lora.rank above 0"),
    ({"lora__targets": "q_proj"}, "matches none of"),
    (
      {"reference__kind": "frozen", "reference__init": "hf:tests"},
      "reference.kind='cached'",
    ),
    ({"lora__rank": -1}, "lora.rank=-1"),
  ],
)
def test_what_does_not_go_together_is_refused(tmp_path, overrides, message):
  with pytest.raises(ValueError, match=message):
    train(make_config(**overrides), tmp_path)
