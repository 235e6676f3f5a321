"""A config is complete, spelled right, and belongs to one run."""

import importlib
import json
import os
import subprocess
import sys

import ml_collections
import pytest

from dpo_jax import config as config_lib
from dpo_jax.config import (
  VALUES,
  check_keys,
  default_config,
  resolve,
  with_values,
)
from dpo_jax.data import packing, reading
from dpo_jax.losses import CATALOGUE, KNOBS, build_objective
from dpo_jax.models import config as model_config
from dpo_jax.parallel.pmap import PARALLELISMS
from dpo_jax.records import commits, resume
from dpo_jax.records.metrics import read_metrics
from dpo_jax.records.workdir import Workdir
from tests import faults, tiny

CONFIGS = faults.ROOT / "configs"


def test_the_default_config_is_complete():
  check_keys(default_config())


def test_an_unknown_key_is_refused_with_the_nearest_name():
  config = default_config()
  config.optimizer.lerning_rate = 1e-3
  with pytest.raises(ValueError) as error:
    check_keys(config)
  assert "config.optimizer.lerning_rate is unknown" in str(error.value)
  assert "Did you mean 'optimizer.learning_rate'?" in str(error.value)


def test_a_peers_name_of_a_key_is_answered_with_ours():
  config = default_config()
  config.lr = 1e-3
  config.beta = 0.1
  with pytest.raises(ValueError) as error:
    check_keys(config)
  assert "mean 'optimizer.learning_rate'?" in str(error.value)
  assert "mean 'loss.beta'?" in str(error.value)
  with pytest.raises(ValueError, match=r"mean 'gamma_over_beta'\?"):
    build_objective({"name": "simpo", "gamma": 0.5})


def test_every_unknown_and_missing_key_is_named_at_once():
  config = default_config()
  del config.eval["judge"]
  del config["seed"]
  config.data.sauce = "x"
  with pytest.raises(ValueError) as error:
    check_keys(config)
  message = str(error.value)
  assert "config.eval.judge is missing" in message
  assert "config.seed is missing" in message
  assert "config.data.sauce is unknown" in message
  assert message.count("\n") == 2


@pytest.mark.parametrize(
  ("key", "value"),
  [
    ("total_steps", 0),
    ("batch_size", 0),
    ("accumulation_steps", 0),
    ("eval.every_steps", -1),
    ("log.every_steps", 0),
    ("checkpoint.every_steps", -1),
    ("eval.temperature", -0.5),
    ("eval.temperature", float("nan")),
    ("eval.top_k", -1),
    ("eval.top_p", 0.0),
    ("eval.top_p", 1.5),
    ("eval.max_response_tokens", 0),
    ("optimizer.max_grad_norm", 0.0),
    ("optimizer.max_grad_norm", float("nan")),
    ("optimizer.weight_decay", -0.1),
    ("optimizer.b2", 1.0),
    ("optimizer.learning_rate", -1e-3),
    ("optimizer.learning_rate", float("nan")),
    ("optimizer.learning_rate", float("inf")),
    ("optimizer.warmup_steps", -1),
    ("data.max_prompt_tokens", 0),
  ],
)
def test_a_value_out_of_range_is_refused_by_its_name(key, value):
  config = default_config()
  config.update_from_flattened_dict({key: value})
  with pytest.raises(ValueError, match=f"{key}={value} is outside"):
    resolve(config)


@pytest.mark.parametrize(
  ("overrides", "message"),
  [
    (
      {"optimizer.schedule": "cosin"},
      "must be one of constant, cosine, linear",
    ),
    ({"optimizer.name": "adam"}, "must be one of adamw, rmsprop, adafactor,"),
    (
      {"optimizer.schedule": "cosine", "optimizer.warmup_steps": 1000},
      "warmup_steps=1000 must be below total_steps=1000",
    ),
    ({"data.max_prompt_tokens": 512}, "must be below data.max_tokens=512"),
    ({"profile.steps": "3:3"}, "must be FIRST:LAST"),
    ({"workdir.lock_timeout_s": 0.5}, r"is outside \[1, inf\)"),
    ({"batch_size": True}, "batch_size=True must be a whole number"),
    ({"optimizer.learning_rate": 1e39}, "learning_rate must be at most 3.40e"),
    ({"seed": 10**5000}, "seed must be at most 3.40e"),
    (
      {"data.sources": ({"source": "jsonl:a", "weight": 10**400},)},
      "weight of 'jsonl:a' must be at most 3.40e",
    ),
    (
      {"log.trackers": "wandb,mlflow"},
      "'mlflow' must be one of wandb, trackio",
    ),
    ({"log.wandb_mode": "off"}, "must be one of auto, online, offline"),
    ({"eval.samples_every_steps": 100}, "set eval.num_samples above 0"),
    (
      {"eval.num_samples": 1, "eval.samples_every_steps": 150},
      "150 must be a multiple of eval.every_steps=100",
    ),
    (
      {
        "eval.num_samples": 1,
        "eval.samples_every_steps": 1,
        "eval.every_steps": 0,
      },
      "must be a multiple of eval.every_steps=0",
    ),
  ],
)
def test_values_that_do_not_fit_are_refused(overrides, message):
  config = default_config()
  with config.ignore_type():
    config.update_from_flattened_dict(overrides)
  with pytest.raises(ValueError, match=message):
    resolve(config)


def test_choices_are_those_that_the_modules_offer():
  offered = {
    "parallelism": PARALLELISMS,
    "policy.param_dtype": model_config.DTYPES,
    "policy.compute_dtype": model_config.DTYPES,
    "policy.remat": model_config.REMAT_POLICIES,
    "policy.attention": model_config.ATTENTION_BACKENDS,
    "data.layout": packing.LAYOUTS,
    "data.scored_turns": reading.SCORED_TURNS,
    "data.special_tokens": reading.SPECIAL_TOKENS,
  }
  for key, names in offered.items():
    assert set(VALUES[key].choices) == set(names), key


def test_a_resolved_config_is_read_only_and_stays_as_it_is():
  given = default_config()
  resolved = resolve(given)
  assert given.loss.beta is None and resolved.loss.beta == 0.1
  assert resolved.reference.kind == "cached"
  with pytest.raises(AttributeError):
    resolved.seed = 1
  assert resolve(resolved).to_dict() == resolved.to_dict()
  pinned = with_values(resolved, {"policy.init": "run:x"})
  assert (pinned.policy.init, resolved.policy.init) == ("run:x", "random")


def test_losses_of_a_list_are_resolved_and_read_only():
  config = default_config()
  losses = ({"name": "ipo", "weight": 1.0}, {"name": "sft", "weight": 0.5})
  with config.ignore_type():
    config.loss = losses
  resolved = resolve(config)
  assert [loss["weight"] for loss in resolved.loss] == [1.0, 0.5]
  assert (
    resolved.loss[0]["tau"] == build_objective({"name": "ipo"}).knobs["tau"]
  )
  with pytest.raises(TypeError):
    resolved.loss[0]["weight"] = 2.0


@pytest.mark.parametrize(
  ("overrides", "wanted"),
  [
    ({}, ("eval/reward/accuracy", False)),
    ({"loss.name": "sft"}, ("eval/loss", True)),
    ({"checkpoint.best_metric": "eval/ipo/loss"}, ("eval/ipo/loss", True)),
    ({"checkpoint.best_metric": ""}, ("", False)),
  ],
)
def test_the_best_metric_follows_from_the_loss(overrides, wanted):
  config = default_config()
  config.update_from_flattened_dict(overrides)
  checkpoint = resolve(config).checkpoint
  assert (checkpoint.best_metric, checkpoint.best_is_lower) == wanted


@pytest.mark.parametrize(
  "path", sorted(CONFIGS.glob("[a-z]*.py")), ids=lambda p: p.stem
)
def test_the_configs_that_ship_are_complete(path):
  module = importlib.import_module(f"configs.{path.stem}")
  for variant in module.VARIANTS:
    assert resolve(module.get_config(variant)).loss.name in CATALOGUE
  with pytest.raises(ValueError, match=f"{path.stem}.py:none.* must be"):
    module.get_config("none")


def test_keeping_one_checkpoint_is_refused():
  # The one before stays until the latest is known to be whole.
  config = default_config()
  config.checkpoint.keep = 1
  with pytest.raises(ValueError, match=r"checkpoint.keep=1 is outside \[2,"):
    resolve(config)


def test_knobs_of_a_loss_are_placeholders():
  for name in ("dpo", "ipo", "sft"):
    config = config_lib.loss_config(name)
    assert config.name == name
    for knob, meaning in KNOBS.items():
      assert config[knob] is None
      # A placeholder has the type of its knob, so that a flag of it parses.
      assert config.get_type(knob) is meaning.type


@pytest.mark.parametrize("name", CATALOGUE)
def test_a_knob_that_a_loss_does_not_read_is_refused(name):
  reads = CATALOGUE[name].knobs
  for knob, meaning in KNOBS.items():
    if knob in reads:
      continue
    config = config_lib.loss_config(name)
    config[knob] = {float: 0.25, bool: True, str: "x"}[meaning.type]
    with pytest.raises(ValueError) as error:
      build_objective(config)
    assert f"loss.{knob}={config[knob]}" in str(error.value)
    assert f"loss {name!r} does not read it" in str(error.value)
    assert all(read in str(error.value) for read in reads)


def test_flatten_gives_every_leaf_its_dotted_name():
  config = ml_collections.ConfigDict({"a": 1, "b": {"c": 2, "d": {"e": 3}}})
  wanted = {"a": 1, "b.c": 2, "b.d.e": 3}
  assert dict(config_lib.flatten(config)) == wanted
  assert dict(config_lib.flatten(config.to_dict())) == wanted


def settle(config, workdir):
  """Compares a config with its workdir and records it, as a start does."""
  config, workdir = resolve(config), Workdir.at(workdir)
  accepted = resume.check_same_config(config, workdir)
  resume.record(config, {}, accepted, workdir)
  return accepted


def test_same_config_resumes(tmp_path):
  settle(tiny.make_config(), tmp_path)
  before = (tmp_path / "config.json").read_text()
  settle(tiny.make_config(), tmp_path)
  assert (tmp_path / "config.json").read_text() == before
  assert json.loads(before)["optimizer"]["learning_rate"] == 1e-3


def test_infinity_and_placeholders_survive_the_file(tmp_path):
  config = tiny.make_config(optimizer__max_grad_norm=float("inf"))
  settle(config, tmp_path)
  settle(config, tmp_path)
  there = json.loads((tmp_path / "config.json").read_text())
  assert there["optimizer"]["max_grad_norm"] == float("inf")
  assert there["loss"]["tau"] is None


@pytest.mark.fault(48)
def test_the_workdir_of_another_run_is_refused_with_the_difference(tmp_path):
  settle(tiny.make_config(loss__beta=0.1, seed=1), tmp_path)
  before = (tmp_path / "config.json").read_text()
  with pytest.raises(ValueError) as error:
    settle(tiny.make_config(loss__beta=0.2, seed=1), tmp_path)
  message = str(error.value)
  assert "loss.beta: 0.1 there, 0.2 now" in message
  assert "seed" not in message
  assert str(tmp_path) in message
  assert (tmp_path / "config.json").read_text() == before


def test_keys_that_do_not_affect_results_may_change(tmp_path):
  settle(tiny.make_config(), tmp_path)
  changed = tiny.make_config(
    total_steps=99,
    parallelism="pmap",
    logps_chunk=7,
    policy__remat="full",
    log__every_steps=50,
    mesh__data=2,
    data__cache_dir="/elsewhere",
    checkpoint__every_steps=7,
  )
  settle(changed, tmp_path)
  there = json.loads((tmp_path / "config.json").read_text())
  assert there["total_steps"] == 99


def test_hub_branch_stays_at_the_commit_of_the_first_start(tmp_path):
  commit, other = "a" * 40, "b" * 40
  sources = ({"source": "hub:o/n@main", "weight": 1.0},)
  recorded = ({"source": f"hub:o/n/default@{commit}:train", "weight": 1.0},)
  given = {
    "data__source": "",
    "policy__init": "hub:o/mm@main",
    "data__eval_sources": "x=hub:o/n@main:test,y=jsonl:z",
  }
  pinned = given | {
    "policy__init": f"hub:o/mm@{commit}",
    "data__eval_sources": f"x=hub:o/n/default@{commit}:test,y=jsonl:z",
  }
  settle(tiny.make_config(**pinned, data__sources=recorded), tmp_path)

  def spelled(**overrides):
    config = tiny.make_config(**{**given, "data__sources": sources} | overrides)
    return commits.recorded_spellings(resolve(config), Workdir.at(tmp_path))

  found = spelled()
  assert found["policy.init"] == f"hub:o/mm@{commit}"
  assert found["data.sources.0"] == f"hub:o/n/default@{commit}:train"
  assert found["data.eval_sources.x"] == f"hub:o/n/default@{commit}:test"
  assert found["data.eval_sources.y"] == "jsonl:z"
  # Another repository, and a commit that is spelled, are what they say.
  for init in ("hub:o/m@main", f"hub:o/mm@{other}"):
    assert spelled(policy__init=init)["policy.init"] == init
  new = ({"source": "hub:o/n@main:other", "weight": 1.0},)
  assert spelled(data__sources=new)["data.sources.0"] == "hub:o/n@main:other"


def test_kill_during_a_write_keeps_the_old_config(tmp_path, monkeypatch):
  settle(tiny.make_config(), tmp_path)
  before = (tmp_path / "config.json").read_text()

  def die(file):
    os.truncate(file, 10)
    raise KeyboardInterrupt

  monkeypatch.setattr(os, "fsync", die)
  with pytest.raises(KeyboardInterrupt):
    settle(tiny.make_config(total_steps=99), tmp_path)
  assert (tmp_path / "config.json").read_text() == before


def type_in(*flags):
  """`python -m dpo_jax.train flags`: exit code and all that it printed."""
  done = subprocess.run(
    [sys.executable, "-m", "dpo_jax.train", *flags],
    cwd=faults.ROOT,
    env=faults.environment() | {"JAX_DISABLE_MOST_OPTIMIZATIONS": "1"},
    capture_output=True,
    text=True,
    timeout=120,
    check=False,
  )
  return done.returncode, done.stdout + done.stderr


@pytest.mark.slow
@pytest.mark.parametrize(
  ("flag", "message"),
  [
    (
      "--config.loss.nme=ipo",
      "config.loss.nme is unknown. Did you mean 'loss.name'?",
    ),
    ("--config.optimzer.name=adamw", "Did you mean 'optimizer.name'?"),
    ("--config.beta=0.1", "Did you mean 'loss.beta'?"),
    ("--config.loss.name=dpo_norm", "mean 'length_normalized_dpo'?"),
    ("--config=configs/nowhere.py", "configs/nowhere.py"),
    ("--workdir=", "workdir='' must name"),
    ("batch_size=3", "unexpected arguments: batch_size=3"),
    ("--config.loss.name=ip", "Did you mean 'ipo'?"),
    ("--config.loss.tau=0.2", "loss 'sft' does not read it"),
    ("--config.batch_size=many", "invalid literal for int()"),
    ("--config.batch_size=0", "batch_size=0 is outside [1, inf)"),
    ("--nonsense=1", "Unknown command line flag 'nonsense'"),
  ],
)
def test_a_typing_error_is_named_on_the_command_line(tmp_path, flag, message):
  workdir = tmp_path / "run"
  code, output = type_in(
    "--config=configs/reviews.py:sft", f"--workdir={workdir}", flag
  )
  assert code == 1
  assert message in output and "Traceback" not in output
  assert not workdir.exists()


@pytest.mark.slow
def test_a_loss_by_name_alone_trains_with_its_own_defaults(tmp_path):
  config = tmp_path / "small.py"
  config.write_text(
    "from tests import tiny\n"
    "def get_config():\n"
    "  return tiny.make_config(\n"
    "    total_steps=1,\n"
    "    reference__kind='frozen',\n"
    "    data__source='synthetic:review_pairs:40',\n"
    "    data__eval_fraction=0.2,\n"
    "    data__layout='padded',\n"
    "  )\n"
  )
  workdir = tmp_path / "run"
  code, output = type_in(
    f"--config={config}", f"--workdir={workdir}", "--config.loss.name=ipo"
  )
  assert code == 0, output
  resolved = json.loads((workdir / "config.json").read_text())["loss"]
  # Azar et al. give tau = 0.1; every other knob is left alone.
  assert resolved.pop("name") == "ipo"
  assert {k: v for k, v in resolved.items() if v is not None} == {
    "reward": "summed_or_mean_log_ratio",
    "link": "squared",
    "tau": 0.1,
    "length_normalize": False,
  }
  # The metrics are shown as a table, also of a run that is finished.
  again, printed = type_in(
    f"--config={config}", f"--workdir={workdir}", "--config.loss.name=ipo"
  )
  assert again == 0, printed
  lines = printed.splitlines()
  assert any("before: the workdir holds all 1 steps" in x for x in lines)
  [line] = [x for x in lines if "loss  " in x and "ipo" not in x]
  last = read_metrics(workdir, "eval")[-1]["loss"]
  assert line.split()[-1] == f"{last:.4f}"
