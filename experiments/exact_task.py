"""A task in which every completion can be enumerated.

Four prompts of two letters, completions of four letters out of eight: 4,096 to
a prompt. All probabilities are known, and with them E[r], the KL, the optimum
pi* = pi_ref exp(r / beta) / Z and the regret of any policy.
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
# Of the reward under the reference.
_DEVIATION = 1.5
# What the identity J(pi*) - J(pi) = beta KL(pi || pi*) may be missed by.
IDENTITY_TOLERANCE = 1e-4


def completions() -> np.ndarray:
  """All of them: i32 [4096, 4]."""
  axes = np.meshgrid(*[np.arange(NUM_LETTERS)] * LENGTH, indexing="ij")
  return np.stack(axes, -1).reshape(-1, LENGTH).astype(np.int32)


def to_text(ids: Sequence[int]) -> str:
  return "".join(chr(ord("a") + int(i)) for i in ids)


def _prompt_ids() -> np.ndarray:
  return np.array([[ord(c) - ord("a") for c in p] for p in PROMPTS], np.int32)


def language(seed: int) -> np.ndarray:
  """A Markov language of order 2: f64 [8, 8, 8], p(next | two before)."""
  logits = np.random.default_rng((seed, 0)).normal(0, 1, (NUM_LETTERS,) * 3)
  weights = np.exp(logits)
  return weights / weights.sum(-1, keepdims=True)


def write_demonstrations(path: str, num: int, seed: int) -> None:
  """Texts of the language: {"prompt", "completion"} a line."""
  rng = np.random.default_rng((seed, 1))
  # Where in the cumulative distribution a uniform number falls.
  cumulative = language(seed).cumsum(-1)
  prompts = rng.integers(0, len(PROMPTS), num)
  texts = np.concatenate(
    [_prompt_ids()[prompts], np.zeros((num, LENGTH), np.int32)], 1
  )
  for place in range(2, 2 + LENGTH):
    row = cumulative[texts[:, place - 2], texts[:, place - 1]]
    drawn = (rng.random((num, 1)) > row).sum(-1)
    texts[:, place] = np.minimum(drawn, NUM_LETTERS - 1)
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
  """Unigrams, bigrams and the first with the last, by prompt: [4, 4096]."""
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
  """Exact probabilities and rewards of P prompts and N completions.

  Attributes:
    ref_logps: f64 [P, N], log pi_ref, nats.
    rewards: f64 [P, N]; mean 0 and deviation 1.5 under the reference.
  """

  ref_logps: np.ndarray
  rewards: np.ndarray

  @classmethod
  def make(cls, ref_logps: np.ndarray, seed: int) -> "Task":
    """Scales the rewards to the reference."""
    rewards = raw_rewards(seed)
    ref = np.exp(ref_logps)
    rewards = rewards - (ref * rewards).sum(-1, keepdims=True)
    variance = (ref * rewards**2).sum(-1).mean()
    return cls(ref_logps, rewards * _DEVIATION / np.sqrt(variance))

  def write(self, folder: str) -> None:
    """task.npz, and table.jsonl for the judge `table:`."""
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
    """log pi*, the maximum of E[r] - beta KL: f64 [P, N]."""
    logits = self.ref_logps + self.rewards / beta
    top = logits.max(-1, keepdims=True)
    return logits - top - np.log(np.exp(logits - top).sum(-1, keepdims=True))

  def best_of(self, num: int) -> np.ndarray:
    """log-probs of the best of `num` samples of the reference: f64 [P, N]."""
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
    """log-probs of a chosen response, Bradley-Terry labels: f64 [P, N].

    2 pi_ref(y) E_y'[sigmoid(r(y) - r(y'))]: what Preferred-FT fits. Below
    2 pi_ref everywhere, so its KL is below log 2.
    """
    out = np.empty_like(self.ref_logps)
    for row, logps, rewards in zip(
      out, self.ref_logps, self.rewards, strict=True
    ):
      wins = 1.0 / (1.0 + np.exp(rewards[None] - rewards[:, None]))
      row[:] = logps + np.log(2.0 * wins @ np.exp(logps))
    return out

  def frontier(self, num: int = 60) -> tuple[np.ndarray, np.ndarray]:
    """KL and E[r] of the optima, KL ascending: f64 [num] each."""
    points = [
      self.reward_and_kl(self.optimum(beta))
      for beta in np.geomspace(50.0, 0.02, num)
    ]
    rewards, kls = np.array(points).T
    return kls, rewards

  def reward_and_kl(self, logps: np.ndarray) -> tuple[float, float]:
    """E[r] and KL(pi || pi_ref), nats; prompts count the same."""
    probs = np.exp(logps)
    reward = (probs * self.rewards).sum(-1).mean()
    kl = (probs * (logps - self.ref_logps)).sum(-1).mean()
    return float(reward), float(kl)

  def figures(self, logps: np.ndarray, beta: float | None) -> dict[str, float]:
    """All that is known of a policy.

    Args:
      logps: f64 [P, N], of all completions.
      beta: for what is held against an optimum; None leaves that out.

    Returns:
      `reward`, `kl`; `share`, of the frontier's reward at that KL; with a beta
      `total_variation` from pi* and `regret`, J(pi*) - J(pi).

    Raises:
      ValueError: probabilities that do not sum to 1, or a regret that is not
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
        f"J(pi*) - J(pi) is {regret:.6f}, and beta KL(pi || pi*) {gap:.6f}:"
        " they are the same by algebra"
      )
    distance = 0.5 * np.abs(np.exp(logps) - np.exp(optimum)).sum(-1).mean()
    return out | {"regret": regret, "total_variation": float(distance)}

  def pair_accuracy(self, scores: np.ndarray) -> tuple[float, float]:
    """How often scores order a labelled pair right, and Bayes' own rate.

    Args:
      scores: f64 [P, N].

    Returns:
      Probabilities over pairs of the reference and Bradley-Terry labels.
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
    self, path: str, num: int, *, label: str, flips: float, seed: int
  ) -> None:
    """Pairs of the reference's completions, labelled.

    Args:
      path: JSONL file to write.
      num: pairs; equal ones are drawn again.
      label: "bradley_terry" or "argmax".
      flips: fraction of labels that are turned round.
      seed: seed of the draws.
    """
    rng = np.random.default_rng((seed, 3))
    prompts = rng.integers(0, len(PROMPTS), 2 * num)
    cumulative = np.exp(self.ref_logps).cumsum(-1)
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
  """log pi of every completion to every prompt: f64 [P, 4096].

  They come from the distributions after all 512 beginnings of three letters,
  and after the beginnings of those.
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
    for place in range(LENGTH - 1):
      total += np.take_along_axis(
        logps[:, place], heads[:, place : place + 1], -1
      )[:, 0]
    out.append((total[:, None] + logps[:, LENGTH - 1]).reshape(-1))
  return np.array(out)


@jax.jit(static_argnames="policy")
def _logits(policy: Policy, params: Any, tokens: Any) -> jax.Array:
  positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
  ones = jnp.ones_like(tokens)
  hidden = policy.hidden_states(
    params, tokens, positions, ones, jnp.zeros_like(tokens)
  )
  return policy.readout(params).logits(hidden)
