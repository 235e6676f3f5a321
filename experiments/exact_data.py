"""Pairs of the exact task that `Task.write_pairs` does not write."""

import numpy as np

from experiments.exact_task import Task


def write_similar_pairs(
  task: Task, path: str, num: int, *, num_equal: int, seed: int
) -> None:
  """Writes Bradley-Terry pairs that agree at exactly `num_equal` positions.

  The reference draws one completion, and then the other among those that share
  that many letters with it, in proportion to their probabilities.

  Args:
    task: completions of one length.
    path: JSONL file, see `Task.write_chosen`.
    num: number of pairs.
    num_equal: positions at which the two have the same letter.
    seed: seed of the draws.
  """
  rng = np.random.default_rng((seed, 4))
  prompts = rng.integers(0, len(task.space.prompts), num)
  first = task.draw(prompts, 1, rng)[:, 0]
  ids = task.space.responses()
  drawn = np.empty((num, 2), np.int64)
  for row, prompt, one in zip(drawn, prompts, first, strict=True):
    is_similar = (ids == ids[one]).sum(-1) == num_equal
    weights = np.where(is_similar, np.exp(task.ref_logps[prompt]), 0.0)
    row[:] = one, rng.choice(len(ids), p=weights / weights.sum())
  wins = task.label(prompts, drawn, "bradley_terry", rng)
  pairs = np.where(wins[:, None], drawn, drawn[:, ::-1])
  task.write_chosen(path, prompts, pairs)
