"""Quickstart, replay, the table of losses, and their documentation."""

import itertools
import json

import matplotlib.pyplot as plt
import numpy as np
import pytest

from configs import reviews
from dpo_jax import losses
from dpo_jax.losses import build_objective
from dpo_jax.records import eval_logps
from dpo_jax.records.eval_logps import read_records
from dpo_jax.records.metrics import MetricsWriter, read_metrics
from dpo_jax.records.workdir import Workdir
from dpo_jax.train import train
from dpo_jax.training.evaluation import displacement
from experiments import (
  loss_docs,
  loss_functions,
  loss_table,
  quickstart,
  replay,
  sweep,
)
from tests.tiny import make_config

pytestmark = pytest.mark.usefixtures("in_haste")


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
  """A short run that also measures other losses."""
  workdir = tmp_path_factory.mktemp("run")
  config = make_config(
    total_steps=3,
    eval__losses=("ipo", "hinge", "sft", "wpo"),
    eval__max_groups=12,
    data__eval_fraction=0.3,
    data__cache_dir=str(workdir / "cache"),
  )
  train(config, workdir / "dpo")
  return workdir / "dpo"


@pytest.fixture
def quickstarted(tmp_path):
  """Made-up files of a quickstart, with gains in reward of 0 to 100."""
  for stage in ("sft", "dpo"):
    writer = MetricsWriter(tmp_path / stage, is_writer=True)
    for step in range(0, 101, 5):
      row = {"loss": 1 - step / 200, "reward/accuracy": 0.5 + step / 400}
      row |= {"log_ratio/chosen": -step / 50, "log_ratio/rejected": -step / 20}
      row |= {"sample/reward": step / 50, "sample/reward_error": 0.1}
      row |= {"sample/win_rate": 0.855, "kl": 2.8}
      row |= {"sample/win_rate_low": 0.8, "sample/win_rate_high": 0.9}
      for split in ("train", "eval"):
        writer.write(step, split, row)
    writer.close()
  gains = np.random.default_rng(0).permutation(101)
  lines = [
    {"step": step, "prompt": f"p{i}", "response": f"r{step}"}
    | {"reward": 0.5 + (step > 0) * float(gain)}
    for step in (0, 100)
    for i, gain in enumerate(gains)
  ]
  text = "".join(json.dumps(line) + "\n" for line in lines)
  (tmp_path / "dpo" / "samples.jsonl").write_text(text)
  return tmp_path


def test_samples_are_the_quartiles_of_the_gain_in_reward(quickstarted):
  picked = quickstart.pick_samples(quickstarted)
  gains = [s["dpo_reward"] - s["sft_reward"] for s in picked]
  assert gains == [25.0, 50.0, 75.0]
  assert [s["sft_reward"] for s in picked] == [0.5] * 3
  text = quickstart.format_samples(picked)
  assert text.splitlines()[0].startswith("Samples at the 25, 50 and 75 %")
  assert "  DPO +25.50 'r100'" in text


def test_the_quickstart_plot_is_small_and_its_summary_is_right(quickstarted):
  assert quickstart.summarise(quickstarted) == (
    "DPO took the true reward of samples from 0.00 to 2.00; 86 % of them win"
    " against SFT's, at a KL of 2.8 nats"
  )
  path = quickstarted / "quickstart.png"
  quickstart.plot(quickstarted, path)
  assert path.read_bytes()[:4] == b"\x89PNG"
  assert path.stat().st_size < 150_000


def test_a_curve_is_the_mean_of_five_neighbours():
  values = np.random.default_rng(0).normal(size=12)
  wanted = [values[max(0, i - 2) : i + 3].mean() for i in range(12)]
  np.testing.assert_allclose(quickstart.smooth(values), wanted, rtol=1e-12)


def test_twenty_lines_of_a_plot_have_different_colours():
  assert len({sweep.colour(number) for number in range(20)}) == 20


def test_labels_of_curves_do_not_overlap_and_stay_inside():
  figure, axis = plt.subplots(figsize=(4, 2.5))
  for number, end in enumerate([0.5, 0.97, 0.98, 0.99, 1.0]):
    axis.plot([0, 1], [0, end], label=f"m{number}")
  sweep.label_curves(axis)
  figure.canvas.draw()
  boxes = [text.get_window_extent() for text in axis.texts]
  assert [text.get_text() for text in axis.texts] == [f"m{n}" for n in range(5)]
  for below, above in itertools.pairwise(boxes):
    assert below.y1 <= above.y0
  inside = axis.get_window_extent()
  assert inside.y0 < boxes[0].y0 and boxes[-1].y1 < inside.y1
  plt.close(figure)


def test_losses_md_is_current():
  """If this fails: python -m experiments.loss_docs."""
  written = (loss_docs.FOLDER / "losses.md").read_text(encoding="utf-8")
  assert written == loss_docs.render()


def test_the_documents_of_a_new_loss_are_written_at_once(tmp_path, monkeypatch):
  """docs/api.md has a function that functions.py did not have before."""
  text = loss_functions.render_functions()
  committed = loss_docs.FUNCTIONS.read_text()
  monkeypatch.setattr(loss_docs, "FUNCTIONS", tmp_path / "functions.py")
  monkeypatch.setattr(loss_docs, "FOLDER", tmp_path)
  monkeypatch.setattr(loss_docs, "plot", lambda path: None)
  monkeypatch.delattr(losses, "reward_aware_loss")
  loss_docs.main()
  assert (tmp_path / "functions.py").read_text() == committed == text
  assert "reward_aware_loss(" in (tmp_path / "api.md").read_text()


def test_the_curve_of_dpo_is_its_closed_form():
  margins = np.array([-2.0, 0.0, 2.0], np.float32)
  loss, slope = loss_docs.curve("dpo", margins)
  np.testing.assert_allclose(loss, np.log1p(np.exp(-0.1 * margins)), rtol=1e-5)
  np.testing.assert_allclose(
    slope, -0.1 / (1 + np.exp(0.1 * margins)), rtol=1e-5
  )


def test_replayed_losses_equal_those_of_the_evaluation(trained):
  last = read_metrics(trained, "eval")[-1]
  sequences = replay.to_sequences(read_records(trained)[3])
  for name in ("dpo", "ipo", "hinge", "sft", "wpo"):
    objective = build_objective({"name": name})
    row = replay.replay(objective, sequences)
    wanted = last["loss"] if name == "dpo" else last[f"{name}/loss"]
    assert row["loss"] == pytest.approx(wanted, rel=1e-4), name
    if name != "dpo":
      assert row["gradient weight"] == pytest.approx(
        last[f"{name}/gradient_weight"], rel=1e-4
      )
  dpo = replay.replay(build_objective({"name": "dpo"}), sequences)
  assert dpo["accuracy"] == pytest.approx(last["reward/accuracy"])


def test_replay_gives_the_reason_for_each_loss_left_out(trained):
  sequences = replay.to_sequences(read_records(trained)[3])
  chosen, left_out = replay.objectives_for(
    sequences, {name: {"name": name} for name in ("dpo", "tdpo", "kto")}
  )
  assert list(chosen) == ["dpo"]
  assert left_out["tdpo"] == "reads kl, which were not saved"
  assert "'single'" in left_out["kto"]


def test_replay_writes_the_displacement_plot(trained):
  path = replay.draw(trained)
  assert path.name == "displacement.png"
  assert path.read_bytes()[:4] == b"\x89PNG"


def test_replay_reads_the_beta_that_a_run_was_trained_with(trained, tmp_path):
  loss = replay.read_loss(trained)
  assert replay.trained_beta(loss) == 0.1
  assert build_objective(loss) == build_objective({"name": "dpo"})
  workdir = Workdir.at(tmp_path)
  workdir.write_config({"loss": {"name": "dpo", "beta": 2}})
  workdir.model.write_text("{}")
  assert replay.trained_beta(replay.read_loss(tmp_path)) == 2


@pytest.mark.parametrize(
  ("text", "config"),
  [
    ("dpo", {"name": "dpo"}),
    (
      "ipo:tau=0.2:length_normalize=true",
      {"name": "ipo", "tau": 0.2, "length_normalize": True},
    ),
    (
      "f_dpo:divergence=forward_kl",
      {"name": "f_dpo", "divergence": "forward_kl"},
    ),
  ],
)
def test_a_loss_to_replay_is_parsed_with_its_knobs(text, config):
  assert replay.parse_loss(text) == config
  build_objective(config)


def test_a_knob_to_replay_without_a_value_is_refused():
  with pytest.raises(ValueError, match=r"NAME:KNOB=VALUE"):
    replay.parse_loss("ipo:tau")


def test_replay_without_saved_log_probs_names_the_setting(tmp_path):
  with pytest.raises(FileNotFoundError, match=r"eval\.save_logps=True"):
    read_records(tmp_path)


def test_calibration_by_hand():
  z = np.log(np.array([1.5, 1 / 1.5, 4.0, 9.0]))  # p = .6 .6 .8 .9
  rows = replay.calibration(z * np.array([1, 1, 1, -1]), num_bins=2)
  assert [row["pairs"] for row in rows] == [2, 2]
  assert rows[0]["mean prediction"] == pytest.approx(0.6)
  assert rows[0]["right"] == 0.5
  assert rows[1]["mean prediction"] == pytest.approx(0.85)
  assert rows[1]["right"] == 0.5


def test_displacement_by_hand():
  """Gradient weights .5, .1, .9, and lengths that rise with the margin."""
  margins = np.array([0.0, np.log(9.0), -np.log(9.0), np.nan])
  lengths = np.array([[5, 5], [9, 5], [1, 5], [3, 3]])
  moved = displacement(margins, lengths)
  assert moved["pull/0.5"] == pytest.approx(1 / 3)
  assert moved["pull/0.1"] == pytest.approx(1 / 3)
  assert moved["pull/0.9"] == pytest.approx(1 / 3)
  assert moved["pull/1.0"] == 0.0
  assert moved["length_margin_correlation"] == pytest.approx(1.0)
  still = displacement(np.zeros(3), lengths[:3])
  assert still["length_margin_correlation"] == 0.0
  assert still["pull/0.5"] == 1.0


def test_saved_log_probs_are_read_back_unchanged(tmp_path):
  records = {"logps": np.array([[1.5, -2.0]], np.float32)}
  eval_logps.write_records(Workdir.at(tmp_path), 7, records)
  back = read_records(tmp_path)
  assert list(back) == [7]
  np.testing.assert_array_equal(back[7]["logps"], records["logps"])


@pytest.mark.parametrize(
  ("loss", "others", "message"),
  [
    ("dpo", ("tdpo",), "reads kl, which a run of loss 'dpo'"),
    ("dpo", ("kto",), "reads mismatched_logps"),
    ("dpo", ("bco",), "groups of the kind 'single'"),
    ("dpo", ("reward_model",), "reads values"),
    ("simpo", ("dpo",), "reads ref_logps"),
    ("dpo", ("ipoo",), "Did you mean 'ipo'"),
  ],
)
def test_losses_that_a_run_cannot_measure_are_refused(
  tmp_path, loss, others, message
):
  config = make_config(loss__name=loss, eval__losses=others)
  with pytest.raises(ValueError, match=message):
    train(config, tmp_path)


@pytest.mark.slow
def test_tr_dpo_moves_the_reference_and_resumes(tmp_path):
  """With a hard update at every step the loss stays at log 2."""
  shared = dict(
    reference__kind="ema",
    data__layout="padded",
    data__eval_fraction=0.0,
    checkpoint__every_steps=2,
  )
  config = make_config(
    total_steps=4,
    reference__alpha=1.0,
    reference__every_steps=1,
    **shared,
  )
  train(config, tmp_path / "hard")
  losses = [row["loss"] for row in read_metrics(tmp_path / "hard", "train")]
  np.testing.assert_allclose(losses, np.log(2), atol=1e-4)
  soft = make_config(
    total_steps=4, reference__alpha=0.5, reference__every_steps=2, **shared
  )
  train(soft, tmp_path / "whole")
  half = make_config(
    total_steps=2, reference__alpha=0.5, reference__every_steps=2, **shared
  )
  train(half, tmp_path / "parts")
  train(soft, tmp_path / "parts")
  whole, parts = (
    [row["loss"] for row in read_metrics(tmp_path / name, "train")]
    for name in ("whole", "parts")
  )
  assert whole == parts
  assert abs(whole[3] - np.log(2)) > 1e-3


@pytest.mark.slow
def test_a_list_of_losses_trains(tmp_path):
  config = make_config(
    total_steps=2, data__layout="padded", data__eval_fraction=0.0
  )
  del config.loss
  config.loss = (
    {"name": "dpo", "weight": 0.8},
    {"name": "sft", "weight": 1.0},
  )
  train(config, tmp_path)
  rows = read_metrics(tmp_path, "train")
  for row in rows:
    wanted = 0.8 * row["loss/dpo"] + row["loss/sft"]
    assert row["loss"] == pytest.approx(wanted, rel=1e-5)
  resolved = json.loads((tmp_path / "config.json").read_text())["loss"]
  assert [term["name"] for term in resolved] == ["dpo", "sft"]
  assert resolved[0]["beta"] == 0.1


@pytest.mark.slow
def test_the_table_of_losses_starts_each_from_the_same_policy(
  tmp_path, monkeypatch
):
  """DPO's first loss is log 2; `sft` has a folder of its own."""
  get_config = reviews.get_config

  def small(stage):
    config = get_config(stage)
    config.policy.preset = "tiny"
    config.optimizer.warmup_steps = 0
    config.log.every_steps = 1
    config.data.cache_dir = str(tmp_path / "cache")
    return config

  monkeypatch.setattr(reviews, "get_config", small)
  names = ["sft", "dpo"]
  rows = loss_table.run(str(tmp_path), names, steps=2, sft_steps=3)
  assert [row["loss"] for row in rows] == names
  assert [row["finite"] for row in rows] == ["yes", "yes"]
  assert float(rows[1]["first"]) == pytest.approx(np.log(2), abs=1e-4)
  first = {
    name: read_metrics(tmp_path / name, "train")[0]["loss"]
    for name in ("start", "sft")
  }
  # The policy has learned before `sft` begins.
  assert first["sft"] < first["start"]
