"""Evaluations repeat what a run measured, and change nothing of it."""

import hashlib
import itertools
import json
import logging
import pathlib
import shutil

import numpy as np
import pytest

from dpo_jax import judges
from dpo_jax.data import synthetic
from dpo_jax.evaluating.evaluation import evaluate
from dpo_jax.intervals import wilson_interval
from dpo_jax.records.checkpoint import Checkpoints
from dpo_jax.records.eval_logps import read_records
from dpo_jax.records.lock import RunLock
from dpo_jax.records.metrics import read_metrics
from dpo_jax.records.workdir import Workdir
from dpo_jax.train import train
from dpo_jax.training import logps_cache
from tests import faults, tiny
from tests.judges import chat_stand_in

pytestmark = pytest.mark.usefixtures("in_haste")


@pytest.fixture(scope="module")
def workdir(in_haste, tmp_path_factory):
  """A DPO run with the steps 2 and 4, of which the first is the best."""
  folder = tmp_path_factory.mktemp("runs") / "dpo"
  config = tiny.make_config(
    data__source="synthetic:review_pairs:60",
    data__eval_fraction=0.3,
    data__cache_dir=str(folder.parent / "cache"),
    checkpoint__every_steps=2,
    checkpoint__best_metric="eval/loss",
    checkpoint__best_is_lower=False,  # the loss falls, so the first is best
    eval__every_steps=2,
    eval__num_samples=4,
    eval__max_response_tokens=8,
    eval__judge="sentiment",
  )
  train(config, folder)
  return folder


@pytest.fixture
def copied(workdir, tmp_path):
  """A copy that a test may damage."""
  shutil.copytree(workdir, tmp_path / "run")
  return tmp_path / "run"


def digests(folder):
  """sha256 of each file of a run, without its evaluations."""
  return {
    path.relative_to(folder): hashlib.sha256(path.read_bytes()).hexdigest()
    for path in sorted(folder.rglob("*"))
    if path.is_file() and path.parent.name != "evaluations"
  }


def rows_of(results, kind):
  rows = [json.loads(line) for line in results.path.read_text().splitlines()]
  return [
    {k: x for k, x in r.items() if k != "kind"}
    for r in rows
    if r["kind"] == kind
  ]


def check_repeats(folder):
  before = digests(folder)
  found = evaluate(folder, {}, step="latest", name="again", overwrite=True)
  assert rows_of(found, "metrics") == read_metrics(folder, "eval")[-1:]
  assert digests(folder) == before
  return found


def test_the_last_evaluation_is_repeated_bit_for_bit(workdir):
  found = check_repeats(workdir)
  [header] = rows_of(found, "evaluation")
  assert (header["step"], header["changes"]) == (4, {})
  assert (header["judge"], header["against"]) == ("sentiment", "reference")
  data = json.loads((workdir / "data.json").read_text())
  assert header["data"]["eval"] == data["eval"]
  samples = [
    json.loads(line)
    for line in (workdir / "samples.jsonl").read_text().splitlines()
  ]
  wanted = [row["response"] for row in samples if row["step"] == 4]
  assert [r["response"] for r in rows_of(found, "sample")] == wanted


@pytest.mark.slow
def test_means_of_the_loss_and_a_moving_reference_are_repeated(tmp_path):
  config = tiny.make_config(
    loss__name="bco_pair",
    reference__kind="ema",
    reference__every_steps=1,
    total_steps=2,
    data__eval_fraction=0.3,
  )
  train(config, tmp_path / "run")
  check_repeats(tmp_path / "run")


@pytest.mark.slow
def test_a_run_without_a_reference_is_measured_by_a_loss_with_one(tmp_path):
  """SFT of adapters: log-ratios are to the policy without them."""
  config = tiny.make_config(
    loss__name="sft",
    lora__rank=2,
    optimizer__learning_rate=1e-2,
    total_steps=2,
    data__eval_fraction=0.3,
  )
  train(config, tmp_path / "run")
  before = digests(tmp_path / "run")
  found = evaluate(tmp_path / "run", {"loss.name": "dpo", "loss.beta": 0.5})
  records = read_records(tmp_path / "run")
  chosen = records[2]["logps"][:, 0] - records[0]["logps"][:, 0]
  metrics = found.metrics["eval"]
  assert abs(chosen.mean()) > 0.1
  np.testing.assert_allclose(
    metrics["log_ratio/chosen"], chosen.mean(), rtol=1e-4
  )
  np.testing.assert_allclose(
    metrics["reward/chosen"], 0.5 * chosen.mean(), rtol=1e-4
  )
  assert digests(tmp_path / "run") == before
  changed = found.header["changes"]
  assert changed["loss.name"] == {"run": "sft", "here": "dpo"}
  with pytest.raises(ValueError, match="'reward_model' reads a value head"):
    evaluate(tmp_path / "run", {"loss.name": "reward_model"})


def test_other_data_losses_and_more_samples_change_nothing_of_a_run(workdir):
  before = digests(workdir)
  found = evaluate(
    workdir,
    {
      "data.eval_sources": (
        "other=synthetic:review_pairs:20,more=synthetic:review_pairs:30"
      ),
      "eval.losses": ("ipo",),
      "eval.max_groups": 12,
      "eval.num_samples": 6,
    },
    name="other",
  )
  assert digests(workdir) == before
  assert list(found.metrics) == ["eval/other", "eval/more"]
  assert found.metrics["eval/more"]["num_groups"] == 12
  assert "ipo/loss" in found.metrics["eval/other"]
  assert len(rows_of(found, "sample")) == 6
  written = {r["split"]: r for r in rows_of(found, "metrics")}
  assert written["eval/other"]["loss"] == found.metrics["eval/other"]["loss"]


def test_each_set_whose_records_have_changed_is_named(tmp_path, caplog):
  """A set that the evaluation reads elsewhere does not hide the others."""

  def write(name, num):
    pairs = synthetic.review_pairs(num, seed=0)
    lines = "".join(json.dumps(pair) + "\n" for pair in pairs)
    (tmp_path / name).write_text(lines)

  def sets(**files):
    found = (f"{k}=jsonl:{tmp_path / name}" for k, name in files.items())
    return ",".join(found)

  for name in "abc":
    write(name, 10)
  config = tiny.make_config(
    total_steps=1, data__eval_sources=sets(one="a", two="b")
  )
  train(config, tmp_path / "run")
  for name in "abc":
    write(name, 9)
  given = {"data.eval_sources": sets(one="c", two="b"), "eval.num_samples": 0}
  with caplog.at_level(logging.WARNING, "dpo_jax"):
    evaluate(tmp_path / "run", given)
  changed = [r.message for r in caplog.records if "have changed" in r.message]
  assert [text.split()[3] for text in changed] == ["eval/two"]


def test_a_loss_with_running_means_starts_its_own(workdir):
  given = {"loss.name": "bco_pair", "eval.num_samples": 0}
  found = evaluate(workdir, given).metrics["eval"]
  row = read_metrics(workdir, "eval")[1]
  assert row["step"] == 2
  np.testing.assert_allclose(
    found["log_ratio/chosen"], row["log_ratio/chosen"], rtol=1e-6
  )
  assert np.isfinite(found["loss"]) and found["loss"] != row["loss"]


@pytest.mark.slow
def test_a_loss_that_reads_every_token_of_the_reference_gets_it(workdir):
  """The run has cached sums alone."""
  given = {"loss.name": "tdpo", "eval.num_samples": 0}
  found = evaluate(workdir, given)
  assert found.header["changes"]["reference.kind"]["here"] == "frozen"
  row = read_metrics(workdir, "eval")[1]
  np.testing.assert_allclose(
    found.metrics["eval"]["log_ratio/chosen"],
    row["log_ratio/chosen"],
    rtol=1e-4,
  )


def test_cached_log_probs_that_changed_are_refused(copied):
  [path] = (copied / "reference").glob("*.npy")
  content = path.read_bytes()
  faults.flip_byte(path)
  with pytest.raises(ValueError, match="is damaged: its sha256"):
    evaluate(copied, {})
  path.write_bytes(content)
  logps = np.load(path)
  logps_cache.write_cache(path.parent, path.stem, logps + 1.0, {})
  with pytest.raises(ValueError, match="other log-probs than this run began"):
    evaluate(copied, {})


def test_another_judge_scores_the_same_samples(workdir, tmp_path):
  given = {"eval.num_samples": 8}
  rows = rows_of(evaluate(workdir, given, step="latest", name="8"), "sample")
  # Samples that are not the reference's win and lose in turn.
  turn = itertools.cycle((1.0, -2.0))
  rewards = {}
  for row in rows:
    rewards[row["prompt"], row["other"]] = 0.0
    if row["response"] != row["other"]:
      rewards[row["prompt"], row["response"]] = next(turn)
  pairs = [
    (rewards[r["prompt"], r["response"]], rewards[r["prompt"], r["other"]])
    for r in rows
  ]
  wins = [
    0.5 + 0.5 * (ours > theirs) - 0.5 * (ours < theirs)
    for ours, theirs in pairs
  ]
  assert set(wins) == {0.0, 0.5, 1.0}
  table = tmp_path / "table.jsonl"
  with table.open("w") as file:
    for (prompt, text), reward in rewards.items():
      line = {"prompt": prompt, "response": text, "reward": reward}
      file.write(json.dumps(line) + "\n")
  given |= {"eval.judge": f"table:{table}"}
  found = evaluate(workdir, given, step="latest")
  got = rows_of(found, "sample")
  assert [r["response"] for r in got] == [r["response"] for r in rows]
  assert [(r["reward"], r["other_reward"]) for r in got] == pairs
  assert [r["wins"] for r in got] == wins
  metrics = found.metrics["eval"]
  assert metrics["sample/win_rate"] == np.mean(wins)
  bounds = metrics["sample/win_rate_low"], metrics["sample/win_rate_high"]
  assert bounds == wilson_interval(float(np.mean(wins)), 8)


def test_an_api_judge_compares_with_the_chosen_responses(
  workdir, tmp_path, monkeypatch
):
  """The stand-in takes the first unless the second is a review."""
  chosen = {r["prompt"]: r["chosen"] for r in synthetic.review_pairs(60, 0)}
  texts = set(chosen.values())

  def answer(question):
    second = question.split("<answer_b>\n")[1].split("\n</answer_b>")[0]
    return "B" if second in texts else "A"

  monkeypatch.setenv("OPENAI_API_KEY", "sk-secret")
  with chat_stand_in.serve(answer) as server:
    given = {
      "eval.judge": "api:model",
      "eval.api.url": server.url,
      "eval.api.cache_dir": str(tmp_path / "answers"),
    }
    found = evaluate(workdir, given, against="chosen", name="api")
    assert len(server.requests) == 8
    again = evaluate(workdir, given, against="chosen", name="api2")
    assert len(server.requests) == 8
  assert again.metrics == found.metrics
  rows = rows_of(found, "sample")
  assert [r["other"] for r in rows] == [chosen[r["prompt"]] for r in rows]
  metrics = found.metrics["eval"]
  assert (metrics["sample/win_rate"], metrics["sample/order_bias"]) == (0, 0)
  assert "sample/reward" not in metrics
  assert "sk-secret" not in found.path.read_text()


def test_a_judge_that_does_not_answer_stops_an_evaluation_and_no_run(
  workdir, tmp_path, caplog
):
  given = {
    "eval.judge": "api:model",
    "eval.api.url": "http://127.0.0.1:9/v1",  # where no server is
    "eval.api.key_variable": "",
    "eval.api.cache_dir": str(tmp_path / "answers"),
    "eval.api.max_tries": 1,
  }
  with pytest.raises(judges.JudgeError, match="no answer in 1 tries"):
    evaluate(workdir, given, against="chosen", name="none")
  assert not (workdir / "evaluations" / "none.jsonl").exists()
  config = tiny.make_config(
    data__eval_fraction=0.3,
    eval__num_samples=4,
    eval__max_response_tokens=8,
    optimizer__learning_rate=1e-2,
    **{key.replace(".", "__"): value for key, value in given.items()},
  )
  metrics = train(config, tmp_path / "run")
  assert "eval/sample/tokens" in metrics
  assert "eval/sample/win_rate" not in metrics
  assert "step 4 are not judged: http://127.0.0.1:9/v1" in caplog.text
  assert (tmp_path / "run" / "checkpoints" / "4").exists()


@pytest.mark.parametrize(
  ("step", "wanted"), [("best", 2), ("latest", 4), ("2", 2)]
)
def test_the_step_is_the_one_that_was_asked_for(workdir, step, wanted):
  found = evaluate(
    workdir, {"eval.num_samples": 0}, step=step, name=f"at-{step}"
  )
  row = next(r for r in read_metrics(workdir, "eval") if r["step"] == wanted)
  assert found.header["step"] == wanted
  assert found.metrics["eval"]["loss"] == row["loss"]


def test_a_run_that_is_trained_keeps_its_lock(workdir):
  with RunLock(Workdir.at(workdir), timeout_s=30.0) as lock:
    before = (workdir / "lock.json").read_bytes()
    evaluate(workdir, {"eval.num_samples": 0}, name="during")
    assert (workdir / "lock.json").read_bytes() == before
    lock.check()


def test_a_damaged_or_unfinished_step_is_left_where_it_is(copied):
  faults.flip_byte(faults.largest_file(copied / "checkpoints" / "4"))
  before = digests(copied)
  found = evaluate(copied, {}, step="latest")
  assert found.header["step"] == 2
  (copied / "checkpoints" / "2" / "manifest.json").unlink()
  with pytest.raises(FileNotFoundError, match="has lost its checkpoints"):
    evaluate(copied, {})
  del before[pathlib.Path("checkpoints/2/manifest.json")]
  assert digests(copied) == before


def test_a_run_without_a_checkpoint_says_when_it_saves(copied):
  shutil.rmtree(copied / "checkpoints")
  with pytest.raises(FileNotFoundError, match="has lost its checkpoints"):
    evaluate(copied, {})
  (copied / "finished.json").unlink()
  with pytest.raises(
    FileNotFoundError, match=r"no finished checkpoint yet.*every 2 steps"
  ):
    evaluate(copied, {})
  assert not (copied / "checkpoints").exists()


def test_a_step_that_is_deleted_meanwhile_is_replaced(copied, monkeypatch):
  """As a running run does, which keeps a few."""
  restore = Checkpoints.restore_without_optimizer

  def delete_first(self, target, *, step):
    if step == 2:
      shutil.rmtree(copied / "checkpoints" / "2")
    return restore(self, target, step=step)

  monkeypatch.setattr(Checkpoints, "restore_without_optimizer", delete_first)
  assert evaluate(copied, {}).header["step"] == 4


@pytest.mark.parametrize(
  ("given", "message"),
  [
    ({"optimizer.learning_rate": 1.0}, r"does not take optimizer\.learning_r"),
    (
      {"policy.preset": "1m", "seed": 1},
      r"take policy\.preset, seed: it",
    ),
    ({"data.eval_fraction": 0.5}, r"does not take data\.eval_fraction"),
    ({"policy.compute_dtype": "bfloat16"}, r"take policy\.compute_dtype"),
    ({"data.max_tokens": 8}, r"data\.max_tokens: the held-out groups are a p"),
    ({"eval.every_steps": 1}, r"does not read eval\.every_steps"),
    ({"loss.tau": 1.0}, r"loss\.tau"),
    (
      {"eval.num_samples": 0, "eval.judge": "sentiment"},
      r"eval\.judge='sentiment' needs samples",
    ),
    ({"eval.temperature": -1.0}, r"eval\.temperature=-1\.0"),
  ],
)
def test_keys_that_would_change_what_was_trained_are_refused(
  workdir, given, message
):
  with pytest.raises(ValueError, match=message):
    evaluate(workdir, given)


def test_steps_runs_and_names_that_do_not_exist_are_named(workdir, tmp_path):
  with pytest.raises(ValueError, match=r"step='3' must be best, .*: 2, 4"):
    evaluate(workdir, {}, step="3")
  with pytest.raises(FileNotFoundError, match="is not the workdir of a run"):
    evaluate(tmp_path / "none", {})
  with pytest.raises(ValueError, match="against='them' must be one of refer"):
    evaluate(workdir, {}, against="them")
  with pytest.raises(ValueError, match="must be letters, digits"):
    evaluate(workdir, {}, name="../config")


def test_results_are_replaced_only_when_told(workdir):
  given = {"eval.num_samples": 0}
  found = evaluate(workdir, given)
  with pytest.raises(ValueError, match=r"exists: choose another --name"):
    evaluate(workdir, given)
  assert evaluate(workdir, given, overwrite=True).path == found.path
  other = evaluate(workdir, {"eval.num_samples": 0, "eval.max_groups": 3})
  assert other.path != found.path
  assert "reward/accuracy" in found.table()
