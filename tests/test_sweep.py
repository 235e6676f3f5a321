"""Sweeps: each run is executed once, resumed, locked and reported."""

import json
import multiprocessing
import os
import signal
import subprocess
import sys

import pytest

from dpo_jax.config import default_config
from dpo_jax.records.metrics import read_metrics
from dpo_jax.system.files import write_json
from experiments import sweep
from experiments.sweep import Run, Settings, grid
from tests import faults, tiny


def make_sweep(calls, **inputs):
  """Two runs that train nothing; the second starts from the first."""

  def work(name):
    return lambda folder: calls.append(name)

  return [
    Run(
      "b",
      {"method": "b", "seed": 0},
      after=("a",),
      work=work("b"),
      measure=lambda folder: [{"reward": 2.0}, {"reward": 3.0}],
      inputs=inputs,
    ),
    Run(
      "a",
      {"method": "a", "seed": 0},
      work=work("a"),
      measure=lambda folder: [{"reward": 1.0}],
    ),
  ]


def execute(runs, workdir, **choice):
  return sweep.execute(runs, sweep.choose(runs, **choice), str(workdir))


def test_each_run_is_executed_once_after_those_that_it_starts_from(tmp_path):
  calls = []
  runs = make_sweep(calls)
  assert execute(runs, tmp_path) == {}
  assert calls == ["a", "b"]
  assert execute(runs, tmp_path) == {}
  assert calls == ["a", "b"]
  found = sweep.collect(str(tmp_path))
  assert [(r["run"], r["reward"]) for r in found.rows] == [
    ("a", 1.0),
    ("b", 2.0),
    ("b", 3.0),
  ]
  assert found.missing == []


def test_only_includes_the_runs_that_a_run_starts_from():
  runs = [*make_sweep([]), Run("c", {})]
  assert [r.name for r in sweep.choose(runs, only=["b"])] == ["a", "b"]
  with pytest.raises(ValueError, match=r"no such run\. This .* a, c, b"):
    sweep.choose(runs, only=["d"])


def test_shards_divide_the_sweep_evenly():
  runs = [Run(str(i), {}) for i in range(7)]
  parts = [sweep.choose(runs, shard=f"{i}/3") for i in range(3)]
  assert sorted(r.name for part in parts for r in part) == list("0123456")
  assert max(map(len, parts)) - min(map(len, parts)) <= 1
  for wrong in ("3/3", "1", "a/b", "-1/2"):
    with pytest.raises(ValueError, match="must be i/n"):
      sweep.choose(runs, shard=wrong)


def test_cycles_and_repeated_names_are_refused():
  with pytest.raises(ValueError, match="names a run twice: a"):
    sweep.in_order([Run("a", {}), Run("a", {})])
  with pytest.raises(ValueError, match="a after b\n  b after a"):
    sweep.in_order([Run("a", {}, after=("b",)), Run("b", {}, after=("a",))])


def test_changed_inputs_are_refused_before_anything_is_executed(tmp_path):
  execute(make_sweep([], flips=0.1), tmp_path)
  calls = []
  with pytest.raises(
    ValueError, match=r"b: inputs.flips was 0.1 and is 0.2\n.*another workdir"
  ):
    execute(make_sweep(calls, flips=0.2), tmp_path)
  assert calls == []


def test_a_changed_loss_is_refused_and_a_changed_log_is_not(tmp_path):
  def runs(**changes):
    def work(folder):
      raise FloatingPointError("stop before the training")

    config = default_config()
    config.update_from_flattened_dict(changes)
    return [Run("a", {}, config=config, work=work)]

  stopped = {"a": "FloatingPointError: stop before the training"}
  assert execute(runs(), tmp_path) == stopped
  assert execute(runs(**{"log.every_steps": 3}), tmp_path) == stopped
  with pytest.raises(ValueError, match=r"config.loss.beta was None and is 0.3"):
    execute(runs(**{"loss.beta": 0.3}), tmp_path)
  # A spec that is older than a key stands for its default.
  spec = json.loads((tmp_path / "a" / "spec.json").read_text())
  del spec["config.numerics.skip_spikes"]
  (tmp_path / "a" / "spec.json").write_text(json.dumps(spec))
  assert execute(runs(), tmp_path) == stopped
  with pytest.raises(ValueError, match=r"skip_spikes was 0\.0 and is 9\.0"):
    execute(runs(**{"numerics.skip_spikes": 9.0}), tmp_path)


def test_a_failed_run_stops_only_those_that_start_from_it(tmp_path):
  runs = make_sweep([])
  fails = []

  def work(folder):
    if not fails:
      raise FloatingPointError("not a number")

  runs[1] = Run("a", {"method": "a"}, work=work, measure=runs[1].measure)
  runs.append(Run("c", {"method": "c"}, measure=lambda f: [{"reward": 9.0}]))
  failures = execute(runs, tmp_path)
  assert failures == {
    "a": "FloatingPointError: not a number",
    "b": "it starts from a, which failed",
  }
  found = sweep.collect(str(tmp_path))
  assert [row["run"] for row in found.rows] == ["c"]
  assert found.missing == [
    "a: failed: FloatingPointError: not a number",
    "b: not started",
  ]
  fails.append("no more")
  assert execute(runs, tmp_path) == {}
  assert not sweep.collect(str(tmp_path)).missing


def test_a_half_finished_run_is_reported_with_its_step(tmp_path):
  execute([], tmp_path)
  write_json(tmp_path / "sweep.json", [{"name": "a", "labels": {"seed": 1}}])
  folder = tmp_path / "a"
  write_json(folder / "spec.json", {})
  write_json(folder / "config.json", {"total_steps": 50})
  (folder / "metrics.jsonl").write_text('{"step": 20, "split": "train"}\n')
  found = sweep.collect(str(tmp_path))
  assert found.missing == ["a: half-finished: step 20 of 50"]
  with pytest.raises(FileNotFoundError, match="holds no sweep"):
    sweep.collect(str(tmp_path / "elsewhere"))


def _hold(workdir, is_held, may_end):
  """Executes run `a`, and waits in the middle of it."""

  def work(folder):
    is_held.set()
    may_end.wait(60)

  runs = [Run("a", {"method": "a", "seed": 0}, work=work)]
  sweep.execute(runs, runs, workdir)


def test_a_second_worker_on_a_run_is_refused_until_the_first_ends(tmp_path):
  context = multiprocessing.get_context("spawn")
  is_held, may_end = context.Event(), context.Event()
  other = context.Process(
    target=_hold, args=(str(tmp_path), is_held, may_end), daemon=True
  )
  other.start()
  assert is_held.wait(60)
  runs = make_sweep([])
  with pytest.raises(sweep.Locked, match=rf"process {other.pid} on .*--shard"):
    execute(runs, tmp_path)
  other.kill()
  other.join()
  assert execute(runs, tmp_path) == {}


def test_mean_and_spread_over_seeds():
  rows = [
    {"method": "x", "seed": 0, "reward": 1.0, "kl": 5.0},
    {"method": "x", "seed": 1, "reward": 3.0, "kl": None},
    {"method": "y", "seed": 0, "reward": 7.0},
  ]
  x, y = sweep.mean_and_spread(rows, ["method"], ["reward", "kl"])
  assert (x["seeds"], x["reward"], x["kl"]) == (2, 2.0, 5.0)
  assert x["reward_spread"] == pytest.approx(2**0.5)
  assert (y["seeds"], y["reward_spread"]) == (1, 0.0)


def test_estimate_by_hand():
  config = default_config()
  config.policy.preset = "tiny"
  config.data.max_tokens, config.data.max_prompt_tokens = 100, 50
  config.batch_size, config.total_steps = 10, 7
  row = sweep.estimate([Run("a", {}, config=config)], "tiny")[0]
  layer = 64 * 16 * 2 * (4 + 2) + 3 * 64 * 160 + 2 * 64
  params = 384 * 64 + 2 * layer + 64
  assert float(row["FLOPs"]) == pytest.approx(
    (6 + 2) * params * 100 * 2 * 10 * 7, rel=0.01
  )
  assert row["hours"] > 8 / 3600


def test_csv_has_every_column_of_every_row(tmp_path):
  path = tmp_path / "rows.csv"
  sweep.write_csv([{"a": 1}, {"b": "x"}], str(path))
  assert path.read_text().splitlines() == ["a,b", "1,", ",x"]


@pytest.mark.parametrize(
  ("given", "then"),
  [
    ("", "--xla_backend_optimization_level=1"),
    ("--a=2", "--a=2 --xla_backend_optimization_level=1"),
    ("--xla_backend_optimization_level=3", None),
  ],
)
def test_compile_soon_keeps_a_given_optimization_level(
  given, then, monkeypatch
):
  monkeypatch.setenv("XLA_FLAGS", given)
  sweep.compile_soon()
  assert os.environ["XLA_FLAGS"] == (then or given)


_SWEEP = """
import sys
from experiments import sweep
from tests import tiny
from dpo_jax.records.metrics import read_metrics

def measure(folder):
  return [read_metrics(folder, "train")[-1]]

def config(workdir, init):
  made = tiny.make_config(
    total_steps=8, checkpoint__every_steps=2, data__eval_fraction=0.0,
    data__source="synthetic:review_pairs:40",
    data__cache_dir=workdir + "/cache", policy__init=init,
  )
  return made

workdir = sys.argv[1]
sweep.compile_once(sys.argv[2])
runs = [
  sweep.Run("one", {"method": "one"}, config(workdir, "random"),
              measure=measure),
  sweep.Run("two", {"method": "two"},
              config(workdir, f"run:{workdir}/one"), after=("one",),
              measure=measure),
]
print("failures", sweep.execute(runs, sweep.choose(runs), workdir))
"""


@pytest.mark.slow
def test_a_killed_sweep_resumes_to_the_same_rows(tmp_path):
  def rows(name):
    found = sweep.collect(str(tmp_path / name))
    assert not found.missing
    timed = ("groups_per_second", "tokens_per_second", "host_wait_fraction")
    return [
      {k: v for k, v in row.items() if k not in timed} for row in found.rows
    ]

  def run(name):
    return faults.spawn(
      _SWEEP,
      str(tmp_path / name),
      str(tmp_path),
      JAX_DISABLE_MOST_OPTIMIZATIONS="1",
    )

  whole = run("whole")
  assert whole.wait(300) == 0, whole.communicate()[0]
  checkpoints = tmp_path / "killed" / "two" / "checkpoints"
  killed = run("killed")
  code = faults.kill_when(
    killed,
    lambda: checkpoints.exists() and any(checkpoints.glob("*/manifest.json")),
    signal.SIGKILL,
  )
  assert code == -signal.SIGKILL
  found = sweep.collect(str(tmp_path / "killed"))
  assert [row["run"] for row in found.rows] == ["one"]
  assert found.missing[0].startswith("two: half-finished: step")
  again = run("killed")
  assert again.wait(300) == 0, again.communicate()[0]
  assert rows("killed") == rows("whole")


@pytest.mark.slow
def test_dry_run_prints_the_cost_and_writes_nothing(tmp_path):
  """With `--only`, the 3 runs are DPO and the two that it starts from."""
  done = subprocess.run(
    [
      *(sys.executable, "-m", "experiments.beta_ablation", "--dry_run"),
      *(f"--workdir={tmp_path}/w", "--only=dpo_0.5_s0"),
    ],
    cwd=faults.ROOT,
    env=faults.environment(),
    capture_output=True,
    text=True,
    check=True,
  )
  lines = done.stdout.splitlines()
  names = [line.split()[0] for line in lines[-5:-2]]
  assert names == ["reference", "pairs_bradley_terry_0_s0", "dpo_0.5_s0"]
  assert lines[-1].startswith("3 runs, ")
  assert lines[-1].endswith(" hours on 2 CPU cores")
  assert not (tmp_path / "w").exists()


def write_sweep(tmp_path, value):
  path = tmp_path / "sweep.json"
  path.write_text(json.dumps(value) if not isinstance(value, str) else value)
  return str(path)


def test_a_grid_has_a_run_for_each_combination(tmp_path):
  choices = grid.read_choices(
    write_sweep(tmp_path, {"loss.beta": [0.1, 0.5], "seed": [0, 1]})
  )
  runs = grid.Grid(tiny.make_config(), choices).runs(Settings("w", "tiny"))
  assert [run.name for run in runs] == [
    "beta=0.1_seed=0",
    "beta=0.1_seed=1",
    "beta=0.5_seed=0",
    "beta=0.5_seed=1",
  ]
  assert [(r.config.loss.beta, r.config.seed) for r in runs] == [
    (0.1, 0),
    (0.1, 1),
    (0.5, 0),
    (0.5, 1),
  ]
  assert runs[3].labels == {"beta": 0.5, "seed": 1}


def test_listed_runs_keep_the_other_keys_of_the_config(tmp_path):
  rows = [{"loss.name": "dpo"}, {"loss.name": "simpo", "loss.beta": 2.0}]
  choices = grid.read_choices(write_sweep(tmp_path, rows))
  config = tiny.make_config()
  runs = grid.Grid(config, choices).runs(Settings("w", "tiny"))
  # DPO's own beta, where neither the config nor the sweep has one.
  assert [run.labels["beta"] for run in runs] == [0.1, 2.0]
  assert [run.config.loss.name for run in runs] == ["dpo", "simpo"]
  assert config.loss.name == "dpo"


@pytest.mark.parametrize(
  ("value", "message"),
  [
    ("{", "is not JSON"),
    ({"loss.beta": 0.1}, "'loss.beta' must have a list of values"),
    ([], "must hold an object"),
    ([1], "must hold an object"),
    (
      {"loss.bta": [0.1]},
      "config.loss.bta is unknown. Did you mean .loss.beta",
    ),
    ({"loss.beta": [-1.0]}, r"run beta=-1: .*loss.beta"),
    ({"loss.beta": ["a"]}, "run beta=a: "),
  ],
)
def test_mistakes_in_a_sweep_are_named_before_a_run_starts(
  tmp_path, value, message
):
  with pytest.raises(ValueError, match=message):
    choices = grid.read_choices(write_sweep(tmp_path, value))
    config = tiny.make_config(loss__beta=0.1)
    grid.Grid(config, choices).runs(Settings("w", "tiny"))


@pytest.mark.usefixtures("in_haste")
def test_a_swept_config_is_trained_and_measured(tmp_path):
  config = tiny.make_config(total_steps=1, eval__every_steps=1)
  swept = grid.Grid(config, [{"loss.beta": 0.1}, {"loss.beta": 0.5}])
  workdir = str(tmp_path / "w")
  runs = swept.runs(Settings(workdir, "tiny"))
  assert sweep.execute(runs, runs, workdir) == {}
  found = swept.collect(workdir)
  assert [row["beta"] for row in found.rows] == [0.1, 0.5]
  for row in found.rows:
    last = read_metrics(os.path.join(workdir, row["run"]), "eval")[-1]
    assert row["eval/loss"] == last["loss"]
    assert row["eval/reward/accuracy"] == last["reward/accuracy"]
  assert {row["beta"] for row in swept.table(found.rows)} == {0.1, 0.5}
  files = swept.plot(found.rows, str(tmp_path / "sweep"))
  assert all(os.path.exists(file) for file in files)


def test_seeds_of_a_sweep_are_averaged():
  rows = [
    {"run": f"r{i}", "beta": beta, "seed": seed, "eval/loss": loss}
    for i, (beta, seed, loss) in enumerate(
      [(0.1, 0, 1.0), (0.1, 1, 3.0), (0.5, 0, 0.5), (0.5, 1, 0.5)]
    )
  ]
  rows.append({"run": "r4", "beta": 1.0, "seed": 0, "eval/loss": None})
  config = tiny.make_config(checkpoint__best_metric="eval/loss")
  table = grid.Grid(config, []).table(rows)
  assert [row["beta"] for row in table] == [1.0, 0.1, 0.5]  # the best last
  assert [(row["eval/loss"], row["seeds"]) for row in table[1:]] == [
    (2.0, 2),
    (0.5, 2),
  ]


def test_lists_among_the_swept_values_are_labels_too(tmp_path):
  config = tiny.make_config()
  choices = [{"eval.losses": [name]} for name in ("ipo", "hinge")]
  swept = grid.Grid(config, choices)
  labels = [run.labels["losses"] for run in swept.runs(Settings("w", "tiny"))]
  assert len(set(labels)) == 2
  rows = [{"run": "r", "losses": x, "eval/loss": 1.0} for x in labels]
  assert len(swept.table(rows)) == 2
  assert all(map(os.path.exists, swept.plot(rows, str(tmp_path / "s"))))


def test_runs_without_an_evaluation_are_listed_and_not_plotted(tmp_path):
  swept = grid.Grid(tiny.make_config(), [])
  rows = [{"run": "a", "beta": 0.1}, {"run": "b", "beta": 0.2}]
  assert [row["beta"] for row in swept.table(rows)] == [0.1, 0.2]
  assert swept.plot(rows, str(tmp_path / "s")) == []


def test_an_estimate_of_epochs_asks_for_steps():
  config = tiny.make_config(epochs=1.0, total_steps=None)
  with pytest.raises(ValueError, match="run a has epochs, whose steps depend"):
    sweep.estimate([Run("a", {}, config)], "tiny")
