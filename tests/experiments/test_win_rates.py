"""Win rates: the truth, data, configs of both scales, judges and figures."""

import json
import math

import numpy as np
import pytest

from dpo_jax import judges
from dpo_jax.config import resolve
from dpo_jax.data import tokenizers
from dpo_jax.losses import build_objective
from dpo_jax.records.metrics import format_table
from dpo_jax.training.samples import Samples
from experiments import (
  best_of_n,
  hh_dialogue,
  ood_summaries,
  sweep,
  tldr_temperature,
)
from experiments.sweep import cost
from experiments.win_rates import figures, measurements, posts, questions
from experiments.win_rates import plan as plan_lib
from experiments.win_rates import runs as runs_lib
from experiments.win_rates.plan import Plan
from experiments.win_rates.tasks import TASKS, write_tokenizer

MODULES = (tldr_temperature, hh_dialogue, best_of_n, ood_summaries)
PAPER = {
  "eval.judge": "api:judge",
  "eval.api.url": "http://localhost:1/v1",
  "eval.api.key_variable": "",
  "eval.api.price_in": 2.0,
  "eval.api.price_out": 8.0,
}
POST = "in oslo . thanks . my boss won . i am glad . sorry . tl;dr:"
QUESTION = "human: how do i clean a boat ? assistant:"
HARM = "human: how do i burn a boat ? assistant:"


@pytest.mark.parametrize(
  ("summary", "reward"),
  [
    ("", 0.0),
    ("boss won in oslo , glad", 4.25 - 0.6),
    ("boss won", 2.5 - 0.2),
    ("uncle won", 1.5 - (1.0 + 0.5) - 0.2),
    ("boss boss", 1.0 - 0.5 - 0.2),
    ("won , thanks", 1.5 - 0.6 - 0.3),
  ],
)
def test_the_truth_of_a_summary_by_hand(summary, reward):
  assert posts.reward(POST, summary) == pytest.approx(reward)


@pytest.mark.parametrize(
  ("prompt", "answer", "reward"),
  [
    (QUESTION, "for the boat use soap and water . enjoy !", 3.0 - 0.5),
    (QUESTION, "soap soap", 1.0 - 0.1),
    (QUESTION, "soap water sponge brush", 3.0 - 0.2),
    (QUESTION, "for the bike use glue .", -0.5 - 1.0 - 0.3),
    (QUESTION, "soap that was a dull question .", 1.0 - 1.0 - 0.35),
    (QUESTION, "sorry , i can not help with that .", -1.0 - 0.45),
    (HARM, "sorry , i can not help with that .", 2.0 - 0.45),
    (HARM, "for the boat use petrol .", -0.75 - 0.3),
  ],
)
def test_the_truth_of_an_answer_by_hand(prompt, answer, reward):
  assert questions.reward(prompt, answer) == pytest.approx(reward)


def test_the_second_person_of_news_is_not_a_fact():
  news = "oslo : thanks to a uncle . one boss won today . many feel glad ."
  assert posts.read_facts(news) == posts.read_facts(POST)
  assert posts.reward(news, "boss won") == posts.reward(POST, "boss won")


@pytest.mark.parametrize("domain", TASKS)
def test_all_words_of_a_task_have_a_token(domain, tmp_path):
  write_tokenizer(str(tmp_path))
  tokenizer = tokenizers.load_tokenizer(str(tmp_path))
  task = TASKS[domain]
  for row in [*task.demonstrations(200, 1), *task.pairs(100, 1)]:
    for text in row.values():
      [ids] = tokenizer.encode([text], is_rendered=False, is_continuation=True)
      assert tokenizer.decode(ids) == text
      assert tokenizer.eos_id not in ids


@pytest.mark.parametrize("domain", TASKS)
def test_labels_of_pairs_are_bradley_terry(domain):
  """The share of right labels is the mean of the larger probability."""
  task = TASKS[domain]
  gaps = np.array(
    [
      task.reward(row["prompt"], row["chosen"])
      - task.reward(row["prompt"], row["rejected"])
      for row in task.pairs(2_000, 0)
    ]
  )
  expected = (1.0 / (1.0 + np.exp(-np.abs(gaps)))).mean()
  assert (gaps > 0).mean() == pytest.approx(expected, abs=0.03)
  assert (gaps != 0).all()


@pytest.mark.parametrize("module", MODULES, ids=lambda m: m.__name__)
@pytest.mark.parametrize("scale", sweep.SCALES)
def test_every_run_has_a_valid_config(module, scale):
  given = PAPER if scale == "paper" else {}
  settings = sweep.Settings("W", scale, evaluation=given)
  runs = sweep.in_order(module.runs(settings))
  for run in runs:
    assert json.dumps(run.spec())
    if run.config is not None:
      resolve(run.config)
      build_objective(run.config.loss)
  asks = [run for run in runs if run.questions]
  assert bool(asks) == (scale == "paper")


def test_experiments_share_the_policies_of_a_workdir():
  settings = sweep.Settings("W", "tiny")
  first, second = (
    {run.name: run.spec() for run in module.runs(settings)}
    for module in (tldr_temperature, ood_summaries)
  )
  shared = first.keys() & second.keys()
  assert {"posts_sft", "posts_dpo_s0", "posts_ppo_s2"} <= shared
  assert all(first[name] == second[name] for name in shared)


def test_the_cost_of_the_judge_by_hand(capsys):
  """256 pairs in two orders; 256 + 2 * 64 + 120 tokens in, 64 out."""
  plan = Plan(sweep.Settings("W", "paper", evaluation=PAPER), "posts")
  assert plan.config("dpo", 0).data.max_prompt_tokens == 256
  questions, dollars = plan.judge_cost(256)
  assert questions == 512
  tokens_in = 256 + 2 * 64 + 120
  assert dollars == pytest.approx(512 * (tokens_in * 2 + 64 * 8) / 1e6)
  run = sweep.Run("a", {}, questions=questions, dollars=dollars)
  cost.print_estimate([run], "paper")
  assert (
    "512 questions to the judge, at most about $" in capsys.readouterr().out
  )


@pytest.mark.parametrize(
  ("scale", "given", "message"),
  [
    ("paper", {}, r"takes --config\.eval\.judge=api:MODEL, and has ''"),
    ("paper", {"eval.judge": "sentiment"}, r"and has 'sentiment'"),
    (
      "tiny",
      {"eval.judge": "api:x"},
      r"at --scale=tiny the judge is the truth",
    ),
    ("paper", {**PAPER, "loss.beta": 1.0}, r"^loss\.beta: only --config\.eval"),
  ],
)
def test_settings_of_the_judge_that_nothing_reads_are_refused(
  scale, given, message
):
  settings = sweep.Settings("W", scale, evaluation=given)
  with pytest.raises(ValueError, match=message):
    tldr_temperature.runs(settings)


def make_bench(judge, num=4):
  """A bench of one prompt, whose reference has an average reward."""
  plan = Plan(sweep.Settings("W", "tiny"), "posts")
  reference = "boss won"
  rewards = None
  if not isinstance(judge, judges.Comparer):
    rewards = np.full(num, posts.reward(POST, reference))
  others = Samples(
    [[i] for i in range(num)],
    [[1]] * num,
    [POST] * num,
    [reference] * num,
    rewards,
  )
  return measurements.Bench(plan, None, others, judge)


def make_samples(texts):
  num = len(texts)
  ids = [[i] for i in range(num)]
  return Samples(ids, [[1]] * num, [POST] * num, list(texts), None)


def test_the_win_rate_by_hand(tmp_path):
  """Two wins, a tie and a loss of four; samples are written with rewards."""
  bench = make_bench(TASKS["posts"].judge)
  drawn = make_samples(
    ["boss won in oslo", "boss won , glad", "boss won", "uncle won"]
  )
  path = tmp_path / "samples.jsonl"
  row = bench.win_rate(drawn, str(path), temperature=0.5)
  assert row["win_rate"] == 0.625
  assert row["win_rate_low"] < 0.625 < row["win_rate_high"]
  assert row["temperature"] == 0.5
  written = [json.loads(line) for line in path.read_text().splitlines()]
  assert written[2]["reward"] == pytest.approx(2.3)
  assert written[2]["temperature"] == 0.5


class _Comparer(judges.Comparer):
  """Gives one answer to all pairs."""

  def __init__(self, answer):
    self.answer = answer

  def compare(self, prompts, firsts, seconds):
    return [self.answer] * len(prompts)


@pytest.mark.parametrize(
  ("judge", "message"),
  [
    (judges.per_text(lambda p, r: math.nan), "the judge gave nan for"),
    (judges.per_text(lambda p, r: "better"), "must give one number for each"),
    (lambda p, r: [1.0], "must give one number for each of 4"),
    (_Comparer(7.0), "the judge gave 7 for pair 0"),
    (_Comparer("A"), "must give one probability for each"),
  ],
)
def test_a_judge_that_answers_nonsense_is_refused(judge, message, tmp_path):
  drawn = make_samples(["a", "b", "c", "d"])
  with pytest.raises(ValueError, match=message):
    make_bench(judge).win_rate(drawn, str(tmp_path / "samples.jsonl"))


def test_a_judge_that_always_takes_the_first_gives_a_half(tmp_path):
  drawn = make_samples(["a", "b", "c", "d"])
  path = str(tmp_path / "samples.jsonl")
  row = make_bench(_Comparer(1.0)).win_rate(drawn, path)
  assert (row["win_rate"], row["order_bias"]) == (0.5, 1.0)
  assert "reward" not in row


def test_the_best_of_the_first_n_samples_of_each_prompt():
  drawn = make_samples(["a", "b", "c", "d", "e", "f"])
  scores = np.array([[1.0, 0.0, 2.0], [0.0, 5.0, 3.0]])
  best = {n: measurements.pick_best(drawn, scores, n).texts for n in (1, 2, 3)}
  assert best == {1: ["a", "d"], 2: ["a", "e"], 3: ["c", "e"]}


def plant(module, workdir):
  """Writes results of all runs of an experiment, as if they were measured.

  Win rates rise with the number in a row's labels, and differ between seeds.
  """
  runs = module.runs(sweep.Settings(workdir, "tiny"))
  planted = []
  for run in runs:
    values = run.inputs.get("values", ())
    rows = [
      {"temperature": value, "step": step, "count": count, "chosen_by": by}
      | {"domain": run.inputs.get("domain", "")}
      | {"win_rate": 0.4 + 0.1 * value + 0.01 * run.labels["seed"]}
      | {"win_rate_low": 0.3, "win_rate_high": 0.7}
      for value in values
      for step in ((15, 30) if run.inputs.get("all_steps") else (90,))
      for count in run.inputs.get("counts", (1,))
      for by in ("reward model", "truth")[: 1 + run.inputs.get("by_truth", 0)]
    ]
    planted.append(
      sweep.Run(run.name, run.labels, measure=lambda folder, rows=rows: rows)
    )
  name = module.__name__.rpartition(".")[2]
  assert sweep.execute(planted, planted, workdir, name=name) == {}


@pytest.mark.parametrize("module", MODULES, ids=lambda m: m.__name__)
def test_collect_table_and_plot_of_planted_results(module, tmp_path):
  plant(module, str(tmp_path))
  found = module.collect(str(tmp_path))
  assert found.missing == []
  table = module.table(found.rows)
  assert "+- 0.010" in format_table(table)
  png, pdf, _ = module.plot(found.rows, str(tmp_path / "figure"))
  assert 0 < (tmp_path / "figure.png").stat().st_size < 100_000
  assert png.endswith(".png") and pdf.endswith(".pdf")


def test_each_experiment_of_a_workdir_collects_its_own_runs(tmp_path):
  plant(tldr_temperature, str(tmp_path))
  plant(ood_summaries, str(tmp_path))
  for module, begin in ((tldr_temperature, "tldr"), (ood_summaries, "ood")):
    rows = figures.measured(module.collect(str(tmp_path)).rows)
    assert {row["run"].partition("_")[0] for row in rows} == {begin}


def test_the_table_has_mean_and_spread_of_seeds():
  rows = [
    {"method": "DPO", "temperature": t, "win_rate": w, "win_rate_low": 0.0}
    | {"win_rate_high": 1.0, "seed": seed}
    for t in (1.0, 0.0)
    for seed, w in ((0, 0.5 - t / 10), (1, 0.7 - t / 10))
  ]
  table = figures.pivot(rows, ("method",), "temperature", "T {:g}".format)
  assert table == [
    {"method": "DPO", "T 0": "0.600 +- 0.141", "T 1": "0.500 +- 0.141"}
  ]


def test_articles_become_posts_to_summarise(tmp_path):
  path = tmp_path / "articles.jsonl"
  long = {"article": "word " * 400, "highlights": "short"}
  path.write_text((json.dumps(long) + "\n") * 3)
  runs_lib.write_articles(str(tmp_path), num=2, source=f"jsonl:{path}")
  lines = (tmp_path / "eval.jsonl").read_text().splitlines()
  assert len(lines) == 2
  row = json.loads(lines[0])
  assert row["prompt"] == " ".join(["word"] * 300) + "\n\nTL;DR:"
  assert row["completion"] == " short"


@pytest.mark.slow
def test_a_small_sweep_measures_every_method(in_haste, tmp_path, monkeypatch):
  """From data to the rows of all four experiments, in one workdir."""
  small = dict(seeds=1, demonstrations=64, pairs=64, prompts=4, best_of=2)
  small |= dict(most_samples=2, sample_batch=8)
  sizes = plan_lib.SIZES["tiny"] | small
  monkeypatch.setitem(plan_lib.SIZES, "tiny", sizes)
  steps = dict.fromkeys(plan_lib.TINY_STEPS, 24)  # warm-up takes 20
  monkeypatch.setattr(plan_lib, "TINY_STEPS", steps)
  methods = {}
  for module in MODULES:
    runs = module.runs(sweep.Settings(str(tmp_path), "tiny"))
    name = module.__name__.rpartition(".")[2]
    assert sweep.execute(runs, runs, str(tmp_path), name=name) == {}
    found = module.collect(str(tmp_path))
    assert not found.missing
    rows = figures.measured(found.rows)
    assert all(0 <= row["win_rate"] <= 1 for row in rows)
    methods[name] = {row["method"] for row in rows}
  three = {"DPO", "Preferred-FT", "SFT", "Best-of-2"}
  assert methods["tldr_temperature"] == three | {"PPO"}
  assert methods["hh_dialogue"] == three
  assert methods["best_of_n"] == {"Best-of-N"}
  assert methods["ood_summaries"] == {"DPO", "PPO", "SFT"}
  assert not list(tmp_path.glob("*/failed.json"))
