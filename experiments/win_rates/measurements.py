"""Win rates of policies against reference responses, and of Best-of-N."""

from collections.abc import Sequence
import dataclasses
from typing import Any

import numpy as np

from dpo_jax import judges
from dpo_jax.data import sources, store, tokenizers
from dpo_jax.models.decoder import Policy
from dpo_jax.parallel.placement import Placement
from dpo_jax.training import samples as samples_lib
from dpo_jax.training.samples import Samples
from experiments import trained
from experiments.sweep import Row
from experiments.win_rates.plan import Plan

_SEED = 17
_SHOWN = 5  # samples of each measurement that are written


@dataclasses.dataclass(frozen=True)
class Bench:
  """Prompts, the responses to beat, and the judge of both.

  Attributes:
    plan: plan of the task.
    tokenizer: tokenizer of the policies.
    references: a reference response to each prompt.
    judge: the truth, or a judge that compares two responses.
  """

  plan: Plan
  tokenizer: tokenizers.Tokenizer
  references: Samples
  judge: judges.Judge | judges.Comparer

  @classmethod
  def load(cls, plan: Plan, domain: str, policy_folder: str) -> "Bench":
    """Reads the prompts and references of a domain.

    Args:
      plan: plan of the task.
      domain: "posts", "news" or "questions".
      policy_folder: run whose tokenizer and limits of length count.
    """
    data = trained.settings_of(policy_folder).data
    tokenizer = trained.open_tokenizer(policy_folder)
    opened = store.build_store(
      sources.open_source(plan.eval_source(domain)),
      tokenizer,
      store.Limits(data.max_tokens, data.max_prompt_tokens),
      data.cache_dir,
    )
    indices = np.arange(len(opened))
    prompts = samples_lib.held_out_prompts(
      opened, indices, plan.size["prompts"], max_tokens=data.max_prompt_tokens
    )
    judge = plan.load_judge(domain)
    references = samples_lib.take_chosen(
      opened, indices, prompts, tokenizer, judge, is_labelled=False
    )
    return cls(plan, tokenizer, references, judge)

  def sample(
    self, policy: Policy, params: Any, temperature: float, *, count: int = 1
  ) -> Samples:
    """Draws `count` samples for every prompt, and does not judge them.

    Samples of one prompt are adjacent.
    """
    return samples_lib.draw_samples(
      policy,
      params,
      [p for p in self.references.prompts for _ in range(count)],
      self.tokenizer,
      None,
      seed=_SEED,
      config=self.plan.eval_config(temperature),
      placement=Placement(trained.mesh_of(params)),
      batch_size=self.plan.size["sample_batch"],
    )

  def win_rate(self, drawn: Samples, path: str, **labels: Any) -> Row:
    """Compares a sample of each prompt with its reference.

    Args:
      drawn: one sample for each prompt, in order.
      path: JSONL file that the first samples are appended to.
      **labels: columns that the row begins with.

    Returns:
      `labels`; `reward`, the mean true reward, at the tiny scale; and
      `Wins.metrics`: `win_rate`, its 95 % interval `win_rate_low` and
      `win_rate_high`, `order_bias` and `left_out`.

    Raises:
      ValueError: the judge gives no finite number, or no probability.
      JudgeError: a judge on a server does not answer.
    """
    row: Row = dict(labels)
    rewards = None
    if not isinstance(self.judge, judges.Comparer):
      rewards = judges.ask(
        self.judge, drawn.prompt_texts, drawn.texts, key="the judge"
      )
      row["reward"] = float(rewards.mean())
    drawn = dataclasses.replace(drawn, rewards=rewards)
    wins = samples_lib.wins_over(drawn, self.references, self.judge)
    assert wins is not None, "there are references and a judge"
    trained.write_samples(path, drawn, _SHOWN, labels)
    return row | wins.metrics(drawn.prompts)


def pick_best(drawn: Samples, scores: np.ndarray, count: int) -> Samples:
  """Returns the best of the first `count` samples of each prompt.

  Args:
    drawn: samples; those of one prompt are adjacent.
    scores: f64 [prompts, samples of each].
    count: N.
  """
  num_prompts, num_samples = scores.shape
  best = scores[:, :count].argmax(1) + num_samples * np.arange(num_prompts)

  def take(values: Sequence[Any]) -> list[Any]:
    return [values[i] for i in best]

  return Samples(
    take(drawn.prompts),
    take(drawn.responses),
    take(drawn.prompt_texts),
    take(drawn.texts),
    None,
  )


def temperatures(
  folder: str,
  *,
  plan: Plan,
  policy: str,
  values: Sequence[float],
  domain: str = "",
  all_steps: bool = False,
) -> list[Row]:
  """Measures a policy's win rate at each temperature.

  Args:
    folder: folder of this measurement, for samples.jsonl.
    plan: plan of the task.
    policy: folder of the policy's run.
    values: temperatures.
    domain: domain of the prompts; "" is that of the task.
    all_steps: whether every checkpoint is measured, or the last alone.

  Returns:
    A row for each checkpoint and temperature: `domain`, `step`, `temperature`
    and those of `Bench.win_rate`.
  """
  bench = Bench.load(plan, domain or plan.task, policy)
  path = f"{folder}/samples.jsonl"
  load = trained.load_steps if all_steps else trained.load_last
  rows = []
  for step, decoder, params in load(policy):
    for value in values:
      drawn = bench.sample(decoder, params, value)
      labels = dict(domain=domain or plan.task, step=step, temperature=value)
      rows.append(bench.win_rate(drawn, path, **labels))
  return rows


def best_of(
  folder: str,
  *,
  plan: Plan,
  policy: str,
  reward_model: str,
  values: Sequence[float],
  counts: Sequence[int],
  by_truth: bool = False,
) -> list[Row]:
  """Measures the win rate of the best of N samples at each temperature.

  Args:
    folder: folder of this measurement, for samples.jsonl.
    plan: plan of the task.
    policy: folder of the run of the policy that is sampled.
    reward_model: folder of the run of the reward model that chooses.
    values: temperatures; not 0, at which all samples are one.
    counts: numbers of samples N; fewer samples are the first of the most.
    by_truth: whether the truth chooses in rows of their own.

  Returns:
    A row for each temperature, chooser and N: `temperature`, `count` (N),
    `chosen_by` ("reward model" or "truth") and those of `Bench.win_rate`.
  """
  bench = Bench.load(plan, plan.task, policy)
  choosers = {"reward model": judges.get_judge(f"reward:{reward_model}")}
  if by_truth and not isinstance(bench.judge, judges.Comparer):
    choosers["truth"] = bench.judge
  [(_, decoder, params)] = trained.load_last(policy)
  rows = []
  for value in values:
    drawn = bench.sample(decoder, params, value, count=max(counts))
    for name, chooser in choosers.items():
      scores = judges.ask(chooser, drawn.prompt_texts, drawn.texts, key=name)
      scores = scores.reshape(-1, max(counts))
      for count in counts:
        best = pick_best(drawn, scores, count)
        labels = dict(temperature=value, count=count, chosen_by=name)
        rows.append(bench.win_rate(best, f"{folder}/samples.jsonl", **labels))
  return rows
