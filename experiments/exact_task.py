"""A task in which every completion can be enumerated.

Four prompts of two letters; completions of four letters out of eight, so 4,096
for each prompt. All probabilities are known. So are E[r], the KL, the optimum
pi* = pi_ref exp(r / beta) / Z, and the regret of any policy.
"""

from collections.abc import Sequence
import dataclasses
import json
import os
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dpo_jax.models.decoder import Policy
from dpo_jax.system.files import write_atomically

NUM_LETTERS, LENGTH = 8, 4
PROMPTS = ("ab", "cd", "ef", "gh")
# Standard deviation of the reward under the reference.
_DEVIATION = 1.5
# Largest error of the identity J(pi*) - J(pi) = beta KL(pi || pi*).
IDENTITY_TOLERANCE = 1e-4


def completions() -> np.ndarray:
  """Returns all completions: i32 [4096, 4]."""
  axes = np.meshgrid(*[np.arange(NUM_LETTERS)] * LENGTH, indexing="ij")
  return np.stack(axes, -1).reshape(-1, LENGTH).astype(np.int32)


def to_text(ids: Sequence[int]) -> str:
  return "".join(chr(ord("a") + int(i)) for i in ids)


def _prompt_ids() -> np.ndarray:
  return np.array([[ord(c) - ord("a") for c in p] for p in PROMPTS], np.int32)


def language(seed: int) -> np.ndarray:
  """Returns p(next | two before) of a Markov language: f64 [8, 8, 8]."""
  logits = np.random.default_rng((seed, 0)).normal(0, 1, (NUM_LETTERS,) * 3)
  weights = np.exp(logits)
  return weights / weights.sum(-1, keepdims=True)


def write_demonstrations(path: str, num: int, seed: int) -> None:
  """Writes texts of the language, {"prompt", "completion"} on each line.

  Args:
    path: JSONL file.
    num: number of texts.
    seed: seed of the language and of the texts.
  """
  rng = np.random.default_rng((seed, 1))
  # A uniform number selects the letter by the cumulative distribution.
  cumulative = language(seed).cumsum(-1)
  prompts = rng.integers(0, len(PROMPTS), num)
  texts = np.concatenate(
    [_prompt_ids()[prompts], np.zeros((num, LENGTH), np.int32)], 1
  )
  for position in range(2, 2 + LENGTH):
    row = cumulative[texts[:, position - 2], texts[:, position - 1]]
    drawn = (rng.random((num, 1)) > row).sum(-1)
    texts[:, position] = np.minimum(drawn, NUM_LETTERS - 1)
  _write_lines(
    path,
    (
      {"prompt": PROMPTS[p], "completion": to_text(text[2:])}
      for p, text in zip(prompts, texts, strict=True)
    ),
  )


def _write_lines(path: str, rows: Any) -> None:
  write_atomically(path, "".join(json.dumps(row) + "\n" for row in rows))


def raw_rewards(seed: int) -> np.ndarray:
  """Returns unscaled rewards by prompt: f64 [4, 4096].

  Sums of random weights of unigrams, of bigrams, and of the pair of first and
  last letter.
  """
  rng = np.random.default_rng((seed, 2))
  ids = completions()
  total = np.zeros((len(PROMPTS), len(ids)))
  for row in total:
    unigram = rng.normal(0, 1, NUM_LETTERS)
    bigram = rng.normal(0, 1, (NUM_LETTERS, NUM_LETTERS))
    ends = rng.normal(0, 1, (NUM_LETTERS, NUM_LETTERS))
    row += unigram[ids].sum(-1) + bigram[ids[:, :-1], ids[:, 1:]].sum(-1)
    row += ends[ids[:, 0], ids[:, -1]]
  return total


@dataclasses.dataclass(frozen=True)
class Task:
  """Exact reference and rewards of P prompts with N completions each.

  Attributes:
    ref_logps: f64 [P, N], log pi_ref, nats.
    rewards: f64 [P, N]; under the reference of mean 0 for each prompt, and of
      standard deviation 1.5.
  """

  ref_logps: np.ndarray
  rewards: np.ndarray

  @classmethod
  def make(cls, ref_logps: np.ndarray, seed: int) -> "Task":
    """Makes a task whose rewards are scaled under the reference."""
    rewards = raw_rewards(seed)
    ref = np.exp(ref_logps)
    rewards = rewards - (ref * rewards).sum(-1, keepdims=True)
    variance = (ref * rewards**2).sum(-1).mean()
    return cls(ref_logps, rewards * _DEVIATION / np.sqrt(variance))

  def write(self, folder: str) -> None:
    """Writes task.npz, and table.jsonl for the judge `table:`."""
    np.savez(
      os.path.join(folder, "task.npz"),
      ref_logps=self.ref_logps,
      rewards=self.rewards,
    )
    texts = [to_text(ids) for ids in completions()]
    _write_lines(
      os.path.join(folder, "table.jsonl"),
      (
        {"prompt": prompt, "response": text, "reward": float(reward)}
        for prompt, rewards in zip(PROMPTS, self.rewards, strict=True)
        for text, reward in zip(texts, rewards, strict=True)
      ),
    )

  @classmethod
  def read(cls, folder: str) -> "Task":
    with np.load(os.path.join(folder, "task.npz")) as file:
      return cls(file["ref_logps"], file["rewards"])

  def optimum(self, beta: float) -> np.ndarray:
    """Returns log pi*, the maximum of E[r] - beta KL: f64 [P, N]."""
    logits = self.ref_logps + self.rewards / beta
    top = logits.max(-1, keepdims=True)
    return logits - top - np.log(np.exp(logits - top).sum(-1, keepdims=True))

  def best_of(self, num: int) -> np.ndarray:
    """Returns log-probs of the best of `num` reference samples: f64 [P, N]."""
    out = np.empty_like(self.ref_logps)
    for row, logps, rewards in zip(
      out, self.ref_logps, self.rewards, strict=True
    ):
      order = np.argsort(rewards, kind="stable")
      below = np.concatenate([[0.0], np.cumsum(np.exp(logps[order]))])
      below /= below[-1]
      # F^N - G^N = (F - G) (F^{N-1} + ... + G^{N-1}), without cancellation.
      high, low = below[1:], below[:-1]
      powers = sum(high**k * low ** (num - 1 - k) for k in range(num))
      row[order] = logps[order] + np.log(powers)
    return out

  def preferred(self) -> np.ndarray:
    """Returns log-probs of a chosen response: f64 [P, N].

    Preferred-FT fits this distribution: with Bradley-Terry labels it is
    2 pi_ref(y) E_y'[sigmoid(r(y) - r(y'))]. It is below 2 pi_ref everywhere, so
    its KL is below log 2.
    """
    out = np.empty_like(self.ref_logps)
    for row, logps, rewards in zip(
      out, self.ref_logps, self.rewards, strict=True
    ):
      wins = 1.0 / (1.0 + np.exp(rewards[None] - rewards[:, None]))
      row[:] = logps + np.log(2.0 * wins @ np.exp(logps))
    return out

  def frontier(self, num: int = 60) -> tuple[np.ndarray, np.ndarray]:
    """Returns KL and E[r] of optima, KL ascending: f64 [num] each."""
    points = [
      self.reward_and_kl(self.optimum(beta))
      for beta in np.geomspace(50.0, 0.02, num)
    ]
    rewards, kls = np.array(points).T
    return kls, rewards

  def reward_and_kl(self, logps: np.ndarray) -> tuple[float, float]:
    """Returns E[r] and KL(pi || pi_ref), nats, means over the prompts."""
    probs = np.exp(logps)
    reward = (probs * self.rewards).sum(-1).mean()
    kl = (probs * (logps - self.ref_logps)).sum(-1).mean()
    return float(reward), float(kl)

  def metrics(self, logps: np.ndarray, beta: float | None) -> dict[str, float]:
    """Computes the exact metrics of a policy.

    Args:
      logps: f64 [P, N], log-probs of all completions.
      beta: beta of the optimum to compare with, or None for no comparison.

    Returns:
      `reward`; `kl`, nats; and `share`, the reward divided by the frontier's
      at that KL. With a beta also `total_variation` from pi*, and `regret`,
      J(pi*) - J(pi).

    Raises:
      ValueError: the probabilities do not sum to 1, or the regret differs from
        beta KL(pi || pi*).
    """
    mass = np.exp(logps).sum(-1)
    if np.abs(mass - 1.0).max() > 1e-4:
      raise ValueError(f"the probabilities of all completions sum to {mass}")
    reward, kl = self.reward_and_kl(logps)
    kls, rewards = self.frontier()
    best = float(np.interp(kl, kls, rewards))
    out = {"reward": reward, "kl": kl, "share": reward / best if kl else 1.0}
    if beta is None:
      return out
    optimum = self.optimum(beta)
    best_reward, best_kl = self.reward_and_kl(optimum)
    regret = best_reward - beta * best_kl - (reward - beta * kl)
    gap = beta * (np.exp(logps) * (logps - optimum)).sum(-1).mean()
    if abs(regret - gap) > IDENTITY_TOLERANCE:
      raise ValueError(
        f"J(pi*) - J(pi) is {regret:.6f}, and beta KL(pi || pi*) is {gap:.6f}:"
        f" they must agree to {IDENTITY_TOLERANCE:g}"
      )
    distance = 0.5 * np.abs(np.exp(logps) - np.exp(optimum)).sum(-1).mean()
    return out | {"regret": regret, "total_variation": float(distance)}

  def pair_accuracy(self, scores: np.ndarray) -> tuple[float, float]:
    """Computes how often scores agree with a label, and the Bayes rate.

    Args:
      scores: f64 [P, N]; a tie counts a half.

    Returns:
      Probabilities of agreement of `scores`, and of the best scores, over
      pairs from the reference with Bradley-Terry labels.
    """
    ours, bayes = [], []
    for logps, rewards, row in zip(
      self.ref_logps, self.rewards, scores, strict=True
    ):
      ref = np.exp(logps)
      wins = 1.0 / (1.0 + np.exp(rewards[None] - rewards[:, None]))
      right = 0.5 * (1.0 + np.sign(row[:, None] - row[None]))
      ours.append(ref @ (wins * right + (1 - wins) * (1 - right)) @ ref)
      bayes.append(ref @ np.maximum(wins, 1 - wins) @ ref)
    return float(np.mean(ours)), float(np.mean(bayes))

  def write_pairs(
    self,
    path: str,
    num: int,
    *,
    label: str,
    flips: float,
    seed: int,
    beginnings: int = NUM_LETTERS,
  ) -> None:
    """Writes labelled pairs of completions that the reference draws.

    Args:
      path: JSONL file.
      num: number of pairs; a pair of equal completions is drawn again.
      label: "bradley_terry", or "argmax" for the larger reward.
      flips: fraction of labels that are flipped.
      seed: seed of the draws.
      beginnings: letters, from "a" on, that completions may begin with.
    """
    rng = np.random.default_rng((seed, 3))
    prompts = rng.integers(0, len(PROMPTS), 2 * num)
    is_covered = np.arange(self.ref_logps.shape[1]) < (
      beginnings * NUM_LETTERS ** (LENGTH - 1)
    )
    cumulative = (np.exp(self.ref_logps) * is_covered).cumsum(-1)
    cumulative /= cumulative[:, -1:]
    drawn = np.empty((2 * num, 2), np.int64)
    for p in range(len(PROMPTS)):
      mine = prompts == p
      uniform = rng.random((mine.sum(), 2))
      drawn[mine] = np.searchsorted(cumulative[p], uniform)
    differs = np.flatnonzero(drawn[:, 0] != drawn[:, 1])[:num]
    prompts, drawn = prompts[differs], drawn[differs]
    rewards = self.rewards[prompts[:, None], drawn]
    gap = rewards[:, 0] - rewards[:, 1]
    wins = gap > 0
    if label == "bradley_terry":
      wins = rng.random(len(gap)) < 1.0 / (1.0 + np.exp(-gap))
    wins ^= rng.random(len(gap)) < flips
    drawn = np.where(wins[:, None], drawn, drawn[:, ::-1])
    texts = [to_text(ids) for ids in completions()]
    _write_lines(
      path,
      (
        {"prompt": PROMPTS[p], "chosen": texts[w], "rejected": texts[x]}
        for p, (w, x) in zip(prompts, drawn, strict=True)
      ),
    )


def all_logps(policy: Policy, params: Any) -> np.ndarray:
  """Computes log pi of every completion for every prompt: f64 [P, 4096].

  One forward pass over the 512 beginnings of three letters gives the
  distributions of all four letters.
  """
  heads = completions().reshape(-1, NUM_LETTERS, LENGTH)[:, 0, : LENGTH - 1]
  out = []
  for prompt in _prompt_ids():
    tokens = np.concatenate(
      [np.tile(prompt, (len(heads), 1)), heads], 1
    ).astype(np.int32)
    logits = np.asarray(_logits(policy, params, tokens), np.float64)
    logits = logits[:, len(prompt) - 1 :]
    top = logits.max(-1, keepdims=True)
    logps = logits - top - np.log(np.exp(logits - top).sum(-1, keepdims=True))
    total = np.zeros(len(heads))
    for i in range(LENGTH - 1):
      total += np.take_along_axis(logps[:, i], heads[:, i : i + 1], -1)[:, 0]
    out.append((total[:, None] + logps[:, LENGTH - 1]).reshape(-1))
  return np.array(out)


@jax.jit(static_argnames="policy")
def _logits(policy: Policy, params: Any, tokens: Any) -> jax.Array:
  """Computes logits at every position: [N, T, V]."""
  positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
  ones = jnp.ones_like(tokens)
  hidden = policy.hidden_states(
    params, tokens, positions, ones, jnp.zeros_like(tokens)
  )
  return policy.readout(params).logits(hidden)
