"""Exact metrics of policies and reward models of an enumerable task."""

from collections.abc import Callable

import numpy as np

from dpo_jax import judges
from experiments import exact_task, trained
from experiments.exact_space import Space
from experiments.exact_task import Task
from experiments.sweep import Row

# (task, log-probs of all completions) -> further metrics of a policy.
Measure = Callable[[Task, np.ndarray], Row]


def measure(
  folder: str,
  *,
  reference: str,
  space: Space,
  beta: float | None,
  extra: Measure | None = None,
) -> list[Row]:
  """Measures a run's last policy by enumeration.

  Args:
    folder: folder of the run.
    reference: folder of the reference, which has the task.
    space: prompts and completions.
    beta: beta of the optimum to compare with, or None.
    extra: further metrics.

  Returns:
    One row: `Task.metrics`, and those of `extra`.
  """
  task = Task.read(reference, space)
  logps = exact_task.all_logps(*trained.load(folder), space)
  further = extra(task, logps) if extra else {}
  return [task.metrics(logps, beta) | further]


def measure_steps(
  folder: str, *, reference: str, space: Space, beta: float
) -> list[Row]:
  """Measures every checkpoint of a run by enumeration.

  Returns:
    A row for each checkpoint: `step` and `Task.metrics`; see `measure`.
  """
  task = Task.read(reference, space)
  return [
    {"step": step}
    | task.metrics(exact_task.all_logps(policy, params, space), beta)
    for step, policy, params in trained.load_steps(folder)
  ]


def measure_reward_model(folder: str, *, reference: str) -> list[Row]:
  """Measures how often a reward model agrees with labels of reference pairs.

  Args:
    folder: folder of the reward model's run.
    reference: folder of the reference, which has the task.

  Returns:
    One row: `accuracy`, and `bayes_accuracy`, that of the true reward.
  """
  texts = [exact_task.to_text(ids) for ids in exact_task.completions()]
  judge = judges.get_judge(f"reward:{folder}")
  scores = [
    judges.ask(judge, [prompt] * len(texts), texts)
    for prompt in exact_task.PROMPTS
  ]
  accuracy, bayes = Task.read(reference).pair_accuracy(np.array(scores))
  return [{"accuracy": accuracy, "bayes_accuracy": bayes}]
