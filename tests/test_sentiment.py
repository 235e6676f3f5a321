"""Experiments on text: their plans, and one run at the smallest size."""

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
from experiments import harness, imdb_sentiment, loss_ablation

NAMES = (
  "exact_frontier",
  "imdb_sentiment",
  "beta_ablation",
  "loss_ablation",
  "label_noise",
  "online_vs_offline",
)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("scale", harness.SCALES)
def test_every_run_of_every_experiment_has_a_config_that_holds(name, scale):
  module = importlib.import_module(f"experiments.{name}")
  settings = harness.Settings("W", scale, policy="gpt2", reviews="tfds")
  runs = harness.in_order(module.runs(settings))
  trained = [run for run in runs if run.config is not None]
  assert len(trained) > 5
  for run in trained:
    resolve(run.config)
    build_objective(run.config.loss)
    assert json.dumps(run.spec())


def test_the_paper_s_scale_asks_for_its_policy():
  with pytest.raises(ValueError, match="takes --policy=FOLDER"):
    imdb_sentiment.runs(harness.Settings("W", "paper"))


def test_every_loss_of_pairs_is_in_the_ablation():
  left_out = set(CATALOGUE) - set(loss_ablation.names())
  assert left_out == {"ppo", "reinforce", "reward_model"}


def test_the_best_trial_of_a_loss_counts():
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


def test_a_sample_that_was_cut_short_teaches_no_eos(tmp_path):
  """Of four samples of a prompt one reached its end, id 257 of bytes."""
  responses = [[*b" a", 257], [*b" bcd"], [*b" efg"], [*b" hij"]]
  drawn = samples.Samples(
    prompts=[list(b"p")] * 4,
    responses=responses,
    prompt_texts=["p"] * 4,
    texts=[" a", " bcd", " efg", " hij"],
    rewards=np.array([1.0, 3.0, 2.0, 2.0]),
  )
  tokenizer = tokenizers.load_tokenizer("bytes")
  rows = list(imdb_sentiment._order_pairs(drawn, range(4), tokenizer.stop_ids))
  pairs = [(row["chosen"], row["rejected"]) for row in rows]
  assert pairs == [
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
  for index, (chosen, rejected) in enumerate(pairs):
    parts = [part.tolist() for part in opened.group(index)[1:]]
    assert parts == [ids[chosen], ids[rejected]]


def test_reviews_are_read_and_checked(tmp_path):
  path = tmp_path / "reviews.jsonl.gz"
  with gzip.open(path, "wt") as file:
    file.write('{"text": "good", "label": 1, "id": 3}\n{"text": "bad"}\n')
  reviews = imdb_sentiment.read_reviews(str(path), 10)
  assert next(reviews) == {"text": "good", "label": 1}
  with pytest.raises(ValueError, match=r"gz:2: a review is .* this has text"):
    next(reviews)


@pytest.mark.slow
def test_the_smallest_sweep_goes_through(in_haste, tmp_path, monkeypatch):
  """Synthetic reviews; every method's way from prompts to a row."""
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
  sizes = imdb_sentiment._SIZES["tiny"] | small
  monkeypatch.setitem(imdb_sentiment._SIZES, "tiny", sizes)
  # A policy of so few steps writes no word that the truth knows.
  rng = np.random.default_rng(0)
  path = str(tmp_path / "judge.npz")
  Classifier(rng.normal(0, 2, 4096).astype(np.float32), 0.0).write(path)
  for who in ("labeller", "gold"):
    monkeypatch.setattr(imdb_sentiment._Plan, who, f"classifier:{path}")
  monkeypatch.setattr(imdb_sentiment._Plan, "response_tokens", 16)
  workdir = str(tmp_path)
  runs = imdb_sentiment.runs(harness.Settings(workdir, "tiny"))
  tuning = next(run for run in runs if run.name == "reference")
  tuning.config.total_steps = 12
  assert harness.execute(runs, harness.choose(runs), workdir) == {}
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
