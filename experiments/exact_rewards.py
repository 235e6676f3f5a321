"""Rewards of the task of `exact_task.py`: sums of random features."""

import numpy as np

from experiments.exact_space import FIXED, Space


def raw_rewards(seed: int, space: Space = FIXED) -> np.ndarray:
  """Returns unscaled rewards by prompt: f64 [P, N].

  Sums of random weights of unigrams, of bigrams, and of the pair of first and
  last letter.
  """
  rng = np.random.default_rng((seed, 2))
  ids = space.responses()
  is_letter = ids >= 0
  is_pair = is_letter[:, 1:]
  last = ids[np.arange(len(ids)), is_letter.sum(-1) - 1]
  total = np.zeros((len(space.prompts), len(ids)))
  for row in total:
    unigram = rng.normal(0, 1, space.num_letters)
    bigram = rng.normal(0, 1, (space.num_letters,) * 2)
    ends = rng.normal(0, 1, (space.num_letters,) * 2)
    pairs = np.where(is_pair, bigram[ids[:, :-1], ids[:, 1:]], 0.0)
    row += np.where(is_letter, unigram[ids], 0.0).sum(-1) + pairs.sum(-1)
    row += np.where(is_letter[:, 0], ends[ids[:, 0], last], 0.0)
  return total


def without_length(
  rewards: np.ndarray, ref_logps: np.ndarray, num_tokens: np.ndarray
) -> np.ndarray:
  """Subtracts the reference's mean reward at each length: f64 [P, N].

  Args:
    rewards: f64 [P, N].
    ref_logps: f64 [P, N], log-probs under the reference.
    num_tokens: i64 [N], length of each response.
  """
  out = rewards.copy()
  for length in np.unique(num_tokens):
    those = num_tokens == length
    weights = np.exp(ref_logps[:, those])
    mean = (weights * rewards[:, those]).sum(-1) / weights.sum(-1)
    out[:, those] -= mean[:, None]
  return out
