"""Builds the runs of the experiments that measure win rates.

They share policies: in one workdir each is trained once.
"""

from collections.abc import Callable, Sequence
import functools
import itertools
import os
from typing import Any

from dpo_jax.data import sources
from experiments.sweep import Row, Run, Settings
from experiments.win_rates import measurements
from experiments.win_rates.plan import METHODS, REFERENCES, Plan, check_settings
from experiments.win_rates.tasks import (
  TASKS,
  write_records,
  write_tokenizer,
)

_EVAL_SEED = 99
# Domain of the paper's table 1, and what its articles are cut to.
_NEWS = "hub:abisee/cnn_dailymail/3.0.0@main:test"
_MOST_WORDS = 300


class Builder:
  """Builds runs; a policy is added once, with all that it starts from."""

  def __init__(self, settings: Settings):
    check_settings(settings)
    self.settings = settings
    self.runs: dict[str, Run] = {}

  def plan(self, task: str) -> Plan:
    return Plan(self.settings, task)

  @property
  def seeds(self) -> range:
    return range(self.plan("posts").size["seeds"])

  def add_data(self, domain: str) -> tuple[str, ...]:
    """Adds the run that writes the data of a domain, where one is needed.

    The paper's scale reads public data, and only the news are rewritten.

    Returns:
      Its name, or nothing.
    """
    is_tiny = self.settings.scale == "tiny"
    if not is_tiny and domain != "news":
      return ()
    name = f"{domain}_data"
    size = self.plan(domain).size
    inputs: dict[str, Any] = {"num": 2 * size["prompts"]}
    work: Callable[..., None] = write_articles
    if is_tiny:
      names = ("demonstrations", "pairs", "seeds")
      inputs = {"domain": domain, **{key: size[key] for key in names}}
      work = write_data
    self.runs[name] = Run(
      name,
      {"method": "data", "task": domain, "seed": 0},
      work=functools.partial(work, **inputs),
      measure=_no_rows,
      inputs=inputs,
    )
    return (name,)

  def add_policy(self, task: str, method: str, seed: int) -> str:
    """Adds a policy or reward model with what it starts from; returns its name.

    Args:
      task: "posts" or "questions".
      method: one of METHODS.
      seed: seed of its order of data and samples.
    """
    plan = self.plan(task)
    name = plan.run_name(method, seed)
    if name in self.runs:
      return name
    after = self.add_data(task)
    if start := plan.start(method):
      after += (self.add_policy(task, start, seed),)
    if method == "ppo":
      after += (self.add_policy(task, "reward_model", seed),)
    config = plan.config(method, 0 if method == "sft" else seed)
    self.runs[name] = Run(
      name,
      {"method": METHODS[method], "task": task, "seed": seed},
      config,
      after=after,
      measure=_no_rows,
      num_params=plan.num_params,
      tokens_per_group=plan.tokens_per_group,
    )
    return name

  def add_measurement(
    self,
    name: str,
    task: str,
    method: str,
    seed: int,
    function: Callable[..., list[Row]],
    *,
    policy: str,
    needs: Sequence[str] = (),
    samples: int,
    judged: int,
    inputs: dict[str, Any],
    **options: Any,
  ) -> None:
    """Adds a run that measures a policy and trains nothing.

    Args:
      name: name of the run.
      task: task of the policy.
      method: name in tables.
      seed: seed of the policy.
      function: function of `measurements`.
      policy: method that trained the policy.
      needs: names of further runs that it reads.
      samples: samples that it draws, for the estimate.
      judged: pairs that it has judged, for the estimate.
      inputs: arguments of `function`, which decide the result.
      **options: further arguments, such as folders.
    """
    plan = self.plan(task)
    after = self.add_policy(task, policy, seed)
    questions, dollars = plan.judge_cost(judged)
    self.runs[name] = Run(
      name,
      {"method": method, "task": task, "seed": seed},
      after=(after, *needs),
      measure=functools.partial(
        function,
        plan=plan,
        policy=plan.folder(policy, seed),
        **inputs,
        **options,
      ),
      inputs={**inputs, **self.settings.evaluation},
      num_params=plan.num_params,
      sampled_tokens=samples * (plan.tokens_per_group / 2),
      questions=questions,
      dollars=dollars,
    )

  def add_temperatures(
    self,
    experiment: str,
    task: str,
    method: str,
    seed: int,
    values: Sequence[float],
    *,
    domain: str = "",
    all_steps: bool = False,
  ) -> None:
    """Adds a run that measures a policy's win rate at temperatures.

    The policy and all that it needs are added too, unless they exist.

    Args:
      experiment: prefix of the run's name.
      task: "posts" or "questions".
      method: one of METHODS, which trained the policy.
      seed: seed of the policy.
      values: temperatures.
      domain: domain of the prompts; "" is that of the task.
      all_steps: whether every checkpoint is measured, or the last alone.
    """
    plan = self.plan(task)
    num_steps = 1
    if all_steps:
      num_steps = plan.config(method, seed).checkpoint.keep - 1
    num = plan.size["prompts"] * len(values) * num_steps
    domain = domain or task
    self.add_measurement(
      f"{experiment}_{domain}_{method}_s{seed}",
      task,
      METHODS[method],
      seed,
      measurements.temperatures,
      policy=method,
      needs=self.add_data(domain),
      samples=num,
      judged=num,
      inputs={"values": values, "domain": domain, "all_steps": all_steps},
    )

  def add_best_of(
    self,
    experiment: str,
    task: str,
    seed: int,
    values: Sequence[float],
    counts: Sequence[int],
    *,
    by_truth: bool = False,
  ) -> None:
    """Adds a run that measures the best of N samples of the reference.

    The reward model that chooses, and all it needs, are added too.

    Args:
      experiment: prefix of the run's name.
      task: "posts" or "questions".
      seed: seed of the policies.
      values: temperatures, not 0.
      counts: numbers of samples N.
      by_truth: whether the truth chooses in rows of their own.
    """
    plan = self.plan(task)
    reward_model = self.add_policy(task, "reward_model", seed)
    num = plan.size["prompts"] * len(values)
    self.add_measurement(
      f"{experiment}_{task}_best_of_s{seed}",
      task,
      f"Best-of-{counts[0]}" if len(counts) == 1 else "Best-of-N",
      seed,
      measurements.best_of,
      policy=REFERENCES[task],
      needs=(reward_model,),
      samples=num * max(counts),
      judged=num * len(counts),
      inputs={"values": values, "counts": counts, "by_truth": by_truth},
      reward_model=plan.folder("reward_model", seed),
    )


def _no_rows(folder: str) -> list[Row]:
  del folder
  return []


def write_data(
  folder: str, *, domain: str, demonstrations: int, pairs: int, seeds: int
) -> None:
  """Writes a domain's data as files in a folder.

  They are tokenizer/, demonstrations.jsonl, pairs_sSEED.jsonl for each seed,
  and eval.jsonl, 1,000 held-out demonstrations.

  Args:
    folder: folder to write.
    domain: key of TASKS.
    demonstrations: number of demonstrations.
    pairs: number of pairs for each seed.
    seeds: number of files of pairs.
  """
  task = TASKS[domain]
  write_tokenizer(f"{folder}/tokenizer")
  write_records(
    f"{folder}/demonstrations.jsonl", task.demonstrations(demonstrations, 0)
  )
  for seed in range(seeds):
    write_records(f"{folder}/pairs_s{seed}.jsonl", task.pairs(pairs, seed))
  write_records(f"{folder}/eval.jsonl", task.demonstrations(1_000, _EVAL_SEED))


def write_articles(folder: str, *, num: int, source: str = _NEWS) -> None:
  """Writes articles as posts to summarise, and their highlights.

  FOLDER/eval.jsonl has {"prompt", "completion"} on each line.

  Args:
    folder: folder of the run.
    num: articles to write.
    source: records with `article` and `highlights`.
  """
  rows = []
  for _, record in itertools.islice(sources.open_source(source), num):
    words = record["article"].split()[:_MOST_WORDS]
    prompt = " ".join(words) + "\n\nTL;DR:"
    rows.append({"prompt": prompt, "completion": " " + record["highlights"]})
  os.makedirs(folder, exist_ok=True)
  write_records(f"{folder}/eval.jsonl", iter(rows))
