"""Controlled sentiment: reward against KL, the DPO paper's fig. 2 left.

  python -m experiments.imdb_sentiment --workdir=runs/imdb_sentiment
  python -m experiments.imdb_sentiment --workdir=runs/stories \
      --policy=stories260k --reviews=imdb_train.jsonl.gz
  python -m experiments.imdb_sentiment --scale=paper --workdir=runs/imdb \
      --policy=gpt2-large --reviews=tfds

Prefixes -> four completions each -> rewards by a classifier -> six pairs each
-> every method over its sweep, its checkpoints measured for gold reward and KL
to the reference (Rafailov et al. 2023, arXiv:2305.18290, sec. 6.1).

Without --reviews it is the synthetic review task, whose true reward is known
and labels the pairs too. With them a classifier of one half of the reviews
labels, and one of the other half is gold; with one for both, over-optimisation
could not show. The paper's gold is a RoBERTa; ours is a bag of n-grams, so
rewards are not the paper's. With --policy at `tiny` the policy is its own
reference and writes its own prefixes; at `paper` it is first fine-tuned on the
reviews.
"""

from collections.abc import Iterator, Sequence
import dataclasses
import functools
import gzip
import itertools
import json
import sys
from typing import Any

import matplotlib.pyplot as plt
import numpy as np

from dpo_jax import judges, model_sources
from dpo_jax.config import default_config, loss_config
from dpo_jax.data import synthetic, tokenizers
from dpo_jax.judges.classifier import fit_classifier
from dpo_jax.models import generate
from dpo_jax.system.files import write_atomically
from dpo_jax.training import samples
from experiments import exact_sweep, harness, trained
from experiments.harness import Row, Run, Settings

# Sizes by scale; the paper's are those of its sec. 6.1 and app. C.1.
_SIZES: dict[str, dict[str, Any]] = {
  "tiny": dict(
    prompts=512,
    eval_prompts=192,
    prefix_tokens=8,
    response_tokens=40,
    steps=150,
    every=50,
    batch_size=64,
    learning_rate=1e-4,
    dpo=(0.1, 0.5, 1.0),
    unlikelihood=(0.1, 0.5),
    kl_targets=(3.0, 6.0),
    seeds=1,
    best_of=(4, 16),
    reviews=8_000,
  ),
  "paper": dict(
    prompts=25_000,
    eval_prompts=1024,
    prefix_tokens=8,
    response_tokens=48,
    steps=2400,
    every=100,
    batch_size=64,
    learning_rate=1e-6,
    dpo=(0.05, 0.1, 1.0, 5.0),
    unlikelihood=(0.05, 0.1, 0.5, 1.0),
    kl_targets=(3.0, 6.0, 9.0, 12.0),
    seeds=3,
    best_of=(4, 16, 64),
    reviews=25_000,
  ),
}
_SAMPLES = 4
# KL and reward, read off the paper's figure: approximate.
_PAPER = {
  "DPO (paper)": ((2.0, 0.90), (3.0, 0.95), (5.0, 0.99)),
  "PPO (paper)": ((5.0, 0.73), (10.0, 0.90)),
  "PPO on the truth (paper)": ((5.0, 0.75), (10.0, 0.88)),
  "Unlikelihood (paper)": ((1.0, 0.58), (4.0, 0.77), (9.0, 0.95)),
}


def read_reviews(source: str, num: int) -> Iterator[dict[str, Any]]:
  """{"text", "label"} of reviews: a JSONL file, or "tfds" for imdb_reviews.

  Raises:
    FileNotFoundError: no such file.
    ValueError: a line that is not a review.
  """
  if source == "tfds":
    import tensorflow_datasets as tfds  # slow to import, and rarely wanted

    builder = tfds.builder("imdb_reviews", file_format="array_record")
    builder.download_and_prepare(file_format="array_record")
    for row in itertools.islice(builder.as_data_source(split="train"), num):
      text = row["text"]
      text = text.decode("utf-8") if isinstance(text, bytes) else text
      yield {"text": text, "label": int(row["label"])}
    return
  opener = gzip.open if source.endswith(".gz") else open
  with opener(source, "rt", encoding="utf-8") as file:
    for number, line in enumerate(itertools.islice(file, num), 1):
      row = json.loads(line)
      if not isinstance(row.get("text"), str) or row.get("label") not in (0, 1):
        raise ValueError(
          f'{source}:{number}: a review is {{"text": ..., "label": 0 or 1}},'
          f" and this has {', '.join(row)}"
        )
      yield {"text": row["text"], "label": int(row["label"])}


@dataclasses.dataclass(frozen=True)
class _Plan:
  """Paths and sizes of one sweep."""

  settings: Settings

  @property
  def size(self) -> dict[str, Any]:
    return _SIZES[self.settings.scale]

  @property
  def root(self) -> str:
    return self.settings.workdir

  @property
  def is_tuned(self) -> bool:
    """Whether the reference is fine-tuned first."""
    return not self.settings.policy or self.settings.scale == "paper"

  @property
  def reference(self) -> str:
    if self.is_tuned:
      return f"run:{self.root}/reference"
    return f"hf:{self.settings.policy}"

  @property
  def tokenizer(self) -> str:
    return self.settings.policy or "bytes"

  @property
  def labeller(self) -> str:
    if self.settings.reviews:
      return f"classifier:{self.root}/classifiers/labeller.npz"
    return "sentiment"

  @property
  def gold(self) -> str:
    if self.settings.reviews:
      return f"classifier:{self.root}/classifiers/gold.npz"
    return "sentiment"

  def base(self, steps: int) -> Any:
    """The config that all runs begin with."""
    size, config = self.size, default_config()
    config.policy.init = self.reference
    config.policy.preset = "1m"
    config.data.tokenizer = self.tokenizer
    config.data.max_tokens = 160 if self.tokenizer == "bytes" else 64
    config.data.max_prompt_tokens = config.data.max_tokens // 2
    config.data.eval_fraction = 0.0
    config.data.cache_dir = f"{self.root}/cache"
    config.reference.cache_dir = f"{self.root}/reference_logps"
    # A pair in bytes is twice as long.
    config.batch_size = size["batch_size"] // (1 if self.settings.policy else 2)
    config.total_steps = steps
    config.optimizer.learning_rate = size["learning_rate"]
    config.optimizer.warmup_steps = 10 if self.settings.scale == "tiny" else 150
    config.eval.every_steps = 0
    config.checkpoint.every_steps = size["every"]
    config.checkpoint.keep = 1 + steps // size["every"]
    config.log.every_steps = 10
    config.log.progress = False
    return config

  @property
  def response_tokens(self) -> int:
    """A byte is less of a text than a token."""
    size = self.size["response_tokens"]
    return 80 if self.tokenizer == "bytes" else size

  def policy(self) -> tuple[Any, Any]:
    """The reference's decoder and parameters."""
    config = self.base(1)
    source = model_sources.parse(self.reference)
    decoder = source.policy(config.policy)
    params = source.load(decoder, trained.one_mesh(), seed=0)
    return decoder, params

  def bench(self) -> trained.Bench:
    with open(f"{self.root}/pairs/eval_prompts.json", encoding="utf-8") as file:
      prompts = json.load(file)
    policy, params = self.policy()
    return trained.Bench(
      tokenizers.load_tokenizer(self.tokenizer),
      prompts,
      judges.get_judge(self.gold, key="gold"),
      policy,
      params,
      self.response_tokens,
    )


def _fit_classifiers(folder: str, *, plan: _Plan) -> None:
  """A labeller and a gold judge, from halves that share no review."""
  rows = list(read_reviews(plan.settings.reviews, 10**9))
  order = np.random.default_rng(0).permutation(len(rows))
  order = order[: plan.size["reviews"]]
  halves = np.array_split(order, 2)
  for name, half in zip(("labeller", "gold"), halves, strict=True):
    found = fit_classifier(
      [rows[i]["text"] for i in half], [rows[i]["label"] for i in half]
    )
    found.write(f"{folder}/{name}.npz")


def _measure_classifiers(folder: str, *, plan: _Plan) -> list[Row]:
  """Accuracy of each on the other's half: on reviews it has not seen."""
  rows = list(read_reviews(plan.settings.reviews, 10**9))
  order = np.random.default_rng(0).permutation(len(rows))
  halves = np.array_split(order[: plan.size["reviews"]], 2)
  out = {}
  for name, half in zip(("labeller", "gold"), halves[::-1], strict=True):
    judge = judges.get_judge(f"classifier:{folder}/{name}.npz")
    texts = [rows[i]["text"] for i in half]
    logits = judges.ask(judge, [""] * len(texts), texts)
    labels = np.array([rows[i]["label"] for i in half])
    out[f"{name}_accuracy"] = float(((logits > 0) == labels).mean())
  return [out]


def _write_demonstrations(folder: str, *, plan: _Plan) -> None:
  """Reviews cut after their first words: what the reference is tuned on."""
  with open(f"{folder}/texts.jsonl", "w", encoding="utf-8") as file:
    if plan.settings.reviews:
      reviews = read_reviews(plan.settings.reviews, plan.size["reviews"])
      for review in reviews:
        words = review["text"].split(" ")
        row = {
          "prompt": " ".join(words[:5]),
          "completion": " " + " ".join(words[5:]),
        }
        if len(words) > 8:
          file.write(json.dumps(row) + "\n")
    else:
      for row in synthetic.review_demonstrations(20_000, 0):
        file.write(json.dumps(row) + "\n")


def _prompts(
  plan: _Plan, policy: Any, params: Any, num: int
) -> list[list[int]]:
  """Token ids of prefixes: of reviews, or of the policy's own texts."""
  tokenizer = tokenizers.load_tokenizer(plan.tokenizer)
  begin = [] if tokenizer.bos_id is None else [tokenizer.bos_id]
  length = plan.size["prefix_tokens"]
  if not plan.is_tuned:
    found: dict[tuple[int, ...], None] = {}
    for seed in range(20):
      texts = generate.sample(
        policy,
        params,
        [begin or [tokenizer.eos_id]] * num,
        seed=1000 + seed,
        max_response_tokens=length,
        temperature=1.0,
        stop_ids=tokenizer.stop_ids,
      )
      whole = [tuple(t) for t in texts if tokenizer.eos_id not in t]
      found |= dict.fromkeys(whole)
      if len(found) >= num:
        break
    return [[*begin, *ids] for ids in list(found)[:num]]
  if plan.settings.reviews:
    rows = read_reviews(plan.settings.reviews, 2 * num)
    texts = [" ".join(row["text"].split(" ")[:5]) for row in rows]
  else:
    rows = synthetic.review_demonstrations(20 * num, 1)
    texts = [row["prompt"] for row in rows]
  texts = list(dict.fromkeys(texts))[:num]
  ids = tokenizer.encode(texts, is_rendered=False, is_continuation=False)
  return [[*begin, *row] for row in ids]


def _write_pairs(folder: str, *, plan: _Plan) -> None:
  """Prompts, four completions each, and the pairs that the labeller orders."""
  policy, params = plan.policy()
  size, tokenizer = plan.size, tokenizers.load_tokenizer(plan.tokenizer)
  total = size["prompts"] + size["eval_prompts"]
  prompts = _prompts(plan, policy, params, total)
  held_out = min(size["eval_prompts"], len(prompts) // 4)
  eval_prompts, prompts = prompts[:held_out], prompts[held_out:]
  with open(f"{folder}/eval_prompts.json", "w", encoding="utf-8") as file:
    json.dump(eval_prompts, file)
  bench = trained.Bench(
    tokenizer,
    prompts,
    judges.get_judge(plan.labeller, key="labeller"),
    policy,
    params,
    plan.response_tokens,
  )
  samples = bench.sample(policy, params, seed=7, count=_SAMPLES)
  if not np.ptp(samples.rewards):
    raise ValueError(
      f"the labeller {plan.labeller} gives all {len(samples.texts)} completions"
      f" {samples.rewards[0]}: there is no pair to learn from, and the first is"
      f" {samples.texts[0]!r}"
    )
  lines = [
    json.dumps(row) + "\n"
    for start in range(0, len(samples.texts), _SAMPLES)
    for row in _order_pairs(
      samples, range(start, start + _SAMPLES), tokenizer.stop_ids
    )
  ]
  write_atomically(f"{folder}/pairs.jsonl", "".join(lines))


def _order_pairs(
  samples: samples.Samples, group: Sequence[int], stop_ids: Sequence[int]
) -> Iterator[dict[str, Any]]:
  """Records of every two samples of a prompt that are not worth the same."""
  for one, other in itertools.combinations(group, 2):
    best, worst = sorted((one, other), key=lambda i: -samples.rewards[i])
    if samples.rewards[best] == samples.rewards[worst]:
      continue
    yield {
      "prompt": samples.prompt_texts[best],
      "chosen": samples.texts[best],
      "rejected": samples.texts[worst],
      # A text that was cut short must not teach to stop there.
      "truncated": [
        samples.responses[i][-1] not in stop_ids for i in (best, worst)
      ],
    }


def _measure(folder: str, *, plan: _Plan) -> list[Row]:
  """Every checkpoint: reward and KL from fresh samples of it."""
  bench, rows = plan.bench(), []
  samples_path = f"{folder}/gold_samples.jsonl"
  open(samples_path, "w", encoding="utf-8").close()
  for step, policy, params in trained.load_steps(folder):
    samples = bench.sample(policy, params, seed=11)
    rows.append({"step": step, **bench.figures(policy, params, samples)})
    trained.write_samples(samples_path, step, samples, 5)
  return rows


def _measure_reference(folder: str, *, plan: _Plan) -> list[Row]:
  """The reference, held against nothing."""
  bench = plan.bench()
  samples = bench.sample(bench.ref_policy, bench.ref_params, seed=11)
  trained.write_samples(f"{folder}/gold_samples.jsonl", 0, samples, 5)
  return [{"step": 0, **trained.reward_figures(samples.rewards), "kl": 0.0}]


def _measure_best_of(folder: str, *, plan: _Plan, num: int) -> list[Row]:
  """The labeller's best of `num` samples; its KL is known but for ties."""
  bench = plan.bench()
  drawn = bench.sample(bench.ref_policy, bench.ref_params, seed=13, count=num)
  labeller = judges.get_judge(plan.labeller, key="labeller")
  scores = judges.ask(labeller, drawn.prompt_texts, drawn.texts, key="labeller")
  best = scores.reshape(-1, num).argmax(1) + num * np.arange(len(bench.prompts))
  chosen = bench.judge(
    [drawn.prompts[i] for i in best], [drawn.responses[i] for i in best]
  )
  trained.write_samples(f"{folder}/gold_samples.jsonl", 0, chosen, 5)
  kl = float(np.log(num) - (num - 1) / num)
  return [{"step": 0, **trained.reward_figures(chosen.rewards), "kl": kl}]


def runs(settings: Settings) -> list[Run]:
  """Classifiers, reference, pairs, and every method over its sweep.

  Raises:
    ValueError: the paper's scale without a policy and reviews.
  """
  plan = _Plan(settings)
  if settings.scale == "paper" and not (settings.policy and settings.reviews):
    raise ValueError(
      "--scale=paper takes --policy=FOLDER of gpt2-large and --reviews=tfds, or"
      " a JSONL file of reviews"
    )
  inputs = {
    "policy": settings.policy,
    "reviews": settings.reviews,
    "scale": settings.scale,
  }
  num_params = 774_000_000 if settings.scale == "paper" else 0
  out: list[Run] = []

  def add(name: str, method: str, knob: str = "", seed: int = 0, **fields: Any):
    labels = {"method": method, "knob": knob, "seed": seed}
    run = Run(name, labels, inputs=inputs, num_params=num_params, **fields)
    out.append(run)

  def bound(function: Any, **others: Any) -> Any:
    return functools.partial(function, plan=plan, **others)

  before: tuple[str, ...] = ()
  if settings.reviews:
    add(
      "classifiers",
      "classifiers",
      work=bound(_fit_classifiers),
      measure=bound(_measure_classifiers),
    )
    before = ("classifiers",)
  if plan.is_tuned:
    config = plan.base(400 if settings.scale == "tiny" else 390)
    config.policy.init = (
      f"hf:{settings.policy}" if settings.policy else "random"
    )
    config.data.source = f"jsonl:{plan.root}/reference/texts.jsonl"
    config.loss = loss_config("sft")
    config.checkpoint.keep = 2
    config.checkpoint.every_steps = 0
    if not settings.policy:
      config.batch_size = 16
      config.optimizer.name = "adamw"
      config.optimizer.learning_rate = 2e-3
      config.optimizer.schedule = "cosine"
      config.optimizer.max_grad_norm = 1.0
    else:
      config.optimizer.learning_rate = 1e-5
    add(
      "reference",
      "tuning",
      config=config,
      after=before,
      work=bound(_write_demonstrations),
      measure=lambda folder: [],
    )
    before += ("reference",)
  add(
    "pairs",
    "pairs",
    after=before,
    work=bound(_write_pairs),
    measure=lambda folder: [],
  )
  before += ("pairs",)
  add("sft", "reference", after=before, measure=bound(_measure_reference))
  for num in plan.size["best_of"]:
    measure = bound(_measure_best_of, num=num)
    add(
      f"best_of_{num}", "Best-of-N", f"N={num}", after=before, measure=measure
    )
  _add_methods(plan, add, bound, before)
  return out


def _add_methods(plan: _Plan, add: Any, bound: Any, before: Any) -> None:
  """Adds what is trained on the pairs, or on samples of the policy."""
  size = plan.size

  def config(loss: dict[str, Any], seed: int = 0) -> Any:
    made = plan.base(size["steps"])
    made.seed = seed
    made.data.source = f"jsonl:{plan.root}/pairs/pairs.jsonl"
    made.loss = loss_config(loss["name"])
    made.loss.update(loss)
    return made

  def train(name: str, method: str, knob: str, made: Any, *others: str) -> None:
    add(
      name,
      method,
      knob,
      made.seed,
      config=made,
      after=(*before, *others),
      measure=bound(_measure),
    )

  for beta in size["dpo"]:
    made = config(dict(name="dpo", beta=beta))
    train(f"dpo_{beta:g}", "DPO", f"beta={beta:g}", made)
  for alpha in size["unlikelihood"]:
    made = config(dict(name="unlikelihood", alpha=alpha))
    train(f"unlikelihood_{alpha:g}", "Unlikelihood", f"alpha={alpha:g}", made)
  for seed in range(size["seeds"]):
    made = config(dict(name="preferred_ft"), seed)
    train(f"preferred_ft_s{seed}", "Preferred-FT", "", made)
  made = config(dict(name="reward_model"))
  made.checkpoint.keep, made.checkpoint.every_steps = 2, 0
  add(
    "reward_model",
    "reward model",
    config=made,
    after=before,
    measure=lambda folder: [],
  )
  learned = f"reward:{plan.root}/reward_model"
  for target in size["kl_targets"]:
    for method, judge, needed in (
      ("PPO", learned, ("reward_model",)),
      ("PPO on the labeller", plan.labeller, ()),
    ):
      made = config(dict(name="ppo", value_weight=0.1))
      made.online.update(
        dict(
          kind="rollouts",
          judge=judge,
          every_steps=4,
          epochs=2,
          num_samples=1,
          max_response_tokens=plan.response_tokens,
          kl_target=target,
        )
      )
      name = f"{method.lower().replace(' ', '_')}_kl{target:g}"
      train(name, method, f"target={target:g}", made, *needed)


def collect(workdir: str) -> harness.Collected:
  return harness.collect(workdir)


_FIGURES = ("reward", "p_positive", "kl", "kl_error")


def table(rows: list[Row]) -> list[Row]:
  """A line for each checkpoint, means over seeds."""
  rows = [row for row in rows if "reward" in row]
  columns = ("method", "knob", "step")
  means = harness.mean_and_spread(rows, columns, _FIGURES)
  for row in means:
    del row["p_positive_spread"], row["kl_error_spread"]
  return means


def plot(rows: list[Row], path: str) -> list[str]:
  """Gold reward, and p(positive), against the KL to the reference."""
  figure, axes = plt.subplots(1, 2, figsize=(12, 4.8), layout="constrained")
  means = harness.mean_and_spread(
    [row for row in rows if "reward" in row],
    ("method", "knob", "step"),
    _FIGURES,
  )
  exact_sweep.draw(axes[0], means, "kl", "reward")
  exact_sweep.draw(axes[1], means, "kl", "p_positive")
  # A method has one colour, here and in the paper.
  methods = list(dict.fromkeys(row["method"] for row in means))
  for name, points in _PAPER.items():
    method = name.removesuffix(" (paper)")
    if method not in methods:
      methods.append(method)
    kls, rewards = zip(*points, strict=True)
    color = exact_sweep.colour(methods.index(method))
    axes[1].plot(kls, rewards, "--", color=color, label=name, alpha=0.6)
  axes[0].set(xlabel="KL to the reference (nats)", ylabel="gold reward")
  axes[1].set(
    xlabel="KL to the reference (nats)",
    ylabel="sigmoid of the reward; dashed: the paper's p(positive)",
    xlim=(-0.5, 25),
  )
  axes[1].legend(fontsize=7)
  written = harness.save_figure(figure, rows, path)
  plt.close(figure)
  return written


if __name__ == "__main__":
  harness.main(sys.modules[__name__], table)
