"""Sentiment: data, configs of all experiments, and one small sweep."""

import gzip
import importlib
import json

import numpy as np
import pytest

from dpo_jax.config import resolve
from dpo_jax.data import sources, store, tokenizers
from dpo_jax.judges.classifier import Classifier
from dpo_jax.losses import CATALOGUE, build_objective
from dpo_jax.training import samples
from experiments import imdb_sentiment, loss_ablation, sweep
from experiments.sentiment import pairs, plan, reviews

NAMES = (
  "exact_frontier",
  "imdb_sentiment",
  "beta_ablation",
  "loss_ablation",
  "label_noise",
  "online_vs_offline",
  "on_policy_ablation",
  "coverage",
)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("scale", sweep.SCALES)
def test_every_run_of_every_experiment_has_a_valid_config(name, scale):
  module = importlib.import_module(f"experiments.{name}")
  settings = sweep.Settings("W", scale, policy="gpt2", reviews="tfds")
  runs = sweep.in_order(module.runs(settings))
  trained = [run for run in runs if run.config is not None]
  assert len(trained) > 5
  for run in trained:
    resolve(run.config)
    build_objective(run.config.loss)
    assert json.dumps(run.spec())


def test_paper_scale_requires_a_policy():
  with pytest.raises(ValueError, match="takes --policy=FOLDER"):
    imdb_sentiment.runs(sweep.Settings("W", "paper"))


def test_the_ablation_has_every_loss_of_pairs():
  left_out = set(CATALOGUE) - set(loss_ablation.names())
  needs_scores = {"odpo", "reward_aware"}
  assert left_out == {"ppo", "reinforce", "reward_model"} | needs_scores


def test_the_table_has_the_best_trial_of_each_loss():
  rows = [
    {"method": "dpo", "knob": "a", "reward": 1.0, "kl": 1.0, "share": 0.5},
    {"method": "dpo", "knob": "b", "reward": 2.0, "kl": 1.0, "share": 0.5},
    {"method": "ipo", "knob": "a", "reward": 1.8, "kl": 0.4, "share": 0.5},
    {"method": "frontier", "reward": 9.0, "kl": 0.4},
  ]
  table = loss_ablation.table(rows)
  assert [(r["method"], r["knob"], r["trials"]) for r in table] == [
    ("ipo", "a", 1),
    ("dpo", "b", 2),
  ]


def test_only_samples_that_ended_keep_their_eos_in_pairs(tmp_path):
  """One of four samples ends with EOS, id 257 of the byte tokenizer."""
  responses = [[*b" a", 257], [*b" bcd"], [*b" efg"], [*b" hij"]]
  drawn = samples.Samples(
    prompts=[list(b"p")] * 4,
    responses=responses,
    prompt_texts=["p"] * 4,
    texts=[" a", " bcd", " efg", " hij"],
    rewards=np.array([1.0, 3.0, 2.0, 2.0]),
  )
  tokenizer = tokenizers.load_tokenizer("bytes")
  rows = list(pairs.order_pairs(drawn, range(4), tokenizer.stop_ids))
  ordered = [(row["chosen"], row["rejected"]) for row in rows]
  assert ordered == [
    (" bcd", " a"),
    (" efg", " a"),
    (" hij", " a"),
    (" bcd", " efg"),
    (" bcd", " hij"),
  ]
  path = tmp_path / "pairs.jsonl"
  path.write_text("".join(json.dumps(row) + "\n" for row in rows))
  opened = store.build_store(
    sources.open_source(f"jsonl:{path}"),
    tokenizer,
    store.Limits(100, 50),
    str(tmp_path / "cache"),
  )
  ids = dict(zip(drawn.texts, responses, strict=True))
  for index, (chosen, rejected) in enumerate(ordered):
    parts = [part.tolist() for part in opened.group(index)[1:]]
    assert parts == [ids[chosen], ids[rejected]]


def test_a_line_without_a_review_is_refused(tmp_path):
  path = tmp_path / "reviews.jsonl.gz"
  with gzip.open(path, "wt") as file:
    file.write('{"text": "good", "label": 1, "id": 3}\n{"text": "bad"}\n')
  read = reviews.read_reviews(str(path), 10)
  assert next(read) == {"text": "good", "label": 1}
  with pytest.raises(ValueError, match=r"gz:2: a review is .* this has text"):
    next(read)


@pytest.mark.slow
def test_a_small_sweep_measures_every_method(in_haste, tmp_path, monkeypatch):
  """Synthetic reviews, from prompts to the rows of every method."""
  small = dict(
    prompts=12,
    eval_prompts=4,
    steps=2,
    every=1,
    batch_size=8,
    dpo=(0.5,),
    unlikelihood=(0.1,),
    kl_targets=(3.0,),
    best_of=(2,),
  )
  sizes = plan.SIZES["tiny"] | small
  monkeypatch.setitem(plan.SIZES, "tiny", sizes)
  # After so few steps the policy writes no word that the true reward knows.
  rng = np.random.default_rng(0)
  path = str(tmp_path / "judge.npz")
  Classifier(rng.normal(0, 2, 4096).astype(np.float32), 0.0).write(path)
  for judge in ("labeller", "gold"):
    monkeypatch.setattr(plan.Plan, judge, f"classifier:{path}")
  monkeypatch.setattr(plan.Plan, "response_tokens", 16)
  workdir = str(tmp_path)
  runs = imdb_sentiment.runs(sweep.Settings(workdir, "tiny"))
  tuning = next(run for run in runs if run.name == "reference")
  tuning.config.total_steps = 12
  assert sweep.execute(runs, sweep.choose(runs), workdir) == {}
  found = imdb_sentiment.collect(workdir)
  assert not found.missing
  rows = [row for row in found.rows if "reward" in row]
  methods = {row["method"] for row in rows}
  assert methods == {
    "reference",
    "Best-of-N",
    "DPO",
    "Unlikelihood",
    "Preferred-FT",
    "PPO",
    "PPO on the labeller",
  }
  assert {row["step"] for row in rows if row["method"] == "DPO"} == {1, 2}
  assert all(row["kl"] == row["kl"] for row in rows)
  files = imdb_sentiment.plot(found.rows, f"{workdir}/figure")
  assert len(files) == 3
  assert imdb_sentiment.table(found.rows)
