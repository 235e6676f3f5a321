"""A task in which every completion can be enumerated.

Four prompts of two letters; by default completions of four letters out of
eight, so 4,096 for each prompt. All probabilities are known. So are E[r], the
KL, the optimum pi* = pi_ref exp(r / beta) / Z, and the regret of any policy.
"""

import dataclasses
import functools
import json
import os
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dpo_jax.models.decoder import Policy
from dpo_jax.system.files import write_atomically
from experiments.exact_rewards import raw_rewards, without_length
from experiments.exact_space import FIXED, Space, to_text

NUM_LETTERS, LENGTH, PROMPTS = FIXED.num_letters, FIXED.length, FIXED.prompts
# Standard deviation of the reward under the reference.
_DEVIATION = 1.5
# Largest error of the identity J(pi*) - J(pi) = beta KL(pi || pi*).
IDENTITY_TOLERANCE = 1e-4


def completions() -> np.ndarray:
  """Returns all completions of the default task: i32 [4096, 4]."""
  return FIXED.responses()


def language(seed: int, num_letters: int = FIXED.num_letters) -> np.ndarray:
  """Returns p(next | two before) of a Markov language: f64 [V, V, V]."""
  logits = np.random.default_rng((seed, 0)).normal(0, 1, (num_letters,) * 3)
  weights = np.exp(logits)
  return weights / weights.sum(-1, keepdims=True)


def write_demonstrations(
  path: str, num: int, seed: int, space: Space = FIXED
) -> None:
  """Writes texts of the language, {"prompt", "completion"} on each line.

  With an end token every number of letters from 1 on is equally likely.

  Args:
    path: JSONL file.
    num: number of texts.
    seed: seed of the language and of the texts.
    space: prompts, letters and lengths.
  """
  rng = np.random.default_rng((seed, 1))
  # A uniform number selects the letter by the cumulative distribution.
  cumulative = language(seed, space.num_letters).cumsum(-1)
  prompts = rng.integers(0, len(space.prompts), num)
  texts = np.concatenate(
    [space.prompt_ids()[prompts], np.zeros((num, space.length), np.int32)], 1
  )
  for position in range(2, 2 + space.length):
    row = cumulative[texts[:, position - 2], texts[:, position - 1]]
    drawn = (rng.random((num, 1)) > row).sum(-1)
    texts[:, position] = np.minimum(drawn, space.num_letters - 1)
  ends = np.full(num, space.length)
  if space.has_end:
    ends = rng.integers(1, space.length + 1, num)
  write_lines(
    path,
    (
      {"prompt": space.prompts[p], "completion": to_text(text[2 : 2 + end])}
      for p, text, end in zip(prompts, texts, ends, strict=True)
    ),
  )


def write_lines(path: str, rows: Any) -> None:
  write_atomically(path, "".join(json.dumps(row) + "\n" for row in rows))


@dataclasses.dataclass(frozen=True)
class Task:
  """Exact reference and rewards of P prompts with N completions each.

  Attributes:
    ref_logps: f64 [P, N], log pi_ref, nats.
    rewards: f64 [P, N]; under the reference of mean 0 for each prompt, and of
      standard deviation 1.5. With an end token the mean is 0 at every length.
    space: prompts and completions.
  """

  ref_logps: np.ndarray
  rewards: np.ndarray
  space: Space = FIXED

  @classmethod
  def make(
    cls, ref_logps: np.ndarray, seed: int, space: Space = FIXED
  ) -> "Task":
    """Makes a task of `raw_rewards` of a seed, scaled under the reference."""
    rewards = raw_rewards(seed, space)
    if space.has_end:
      rewards = without_length(rewards, ref_logps, space.num_tokens)
    ref = np.exp(ref_logps)
    rewards = rewards - (ref * rewards).sum(-1, keepdims=True)
    variance = (ref * rewards**2).sum(-1).mean()
    return cls(ref_logps, rewards * _DEVIATION / np.sqrt(variance), space)

  def write(self, folder: str) -> None:
    """Writes task.npz, and table.jsonl for the judge `table:`."""
    np.savez(
      os.path.join(folder, "task.npz"),
      ref_logps=self.ref_logps,
      rewards=self.rewards,
    )
    self.write_table(os.path.join(folder, "table.jsonl"))

  def write_table(self, path: str) -> None:
    """Writes the rewards as a table of the judge `table:`."""
    write_lines(
      path,
      (
        {"prompt": prompt, "response": text, "reward": float(reward)}
        for prompt, rewards in zip(
          self.space.prompts, self.rewards, strict=True
        )
        for text, reward in zip(self.space.texts, rewards, strict=True)
      ),
    )

  @classmethod
  def read(cls, folder: str, space: Space = FIXED) -> "Task":
    with np.load(os.path.join(folder, "task.npz")) as file:
      return cls(file["ref_logps"], file["rewards"], space)

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

  @functools.cached_property
  def _frontier(self) -> tuple[np.ndarray, np.ndarray]:
    return self.frontier()

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
      at that KL, 1 at a KL of 0. With a beta also `total_variation` from pi*,
      and `regret`, J(pi*) - J(pi).

    Raises:
      ValueError: the probabilities do not sum to 1, or the regret differs from
        beta KL(pi || pi*).
    """
    mass = np.exp(logps).sum(-1)
    if np.abs(mass - 1.0).max() > 1e-4:
      raise ValueError(f"the probabilities of all completions sum to {mass}")
    reward, kl = self.reward_and_kl(logps)
    kls, rewards = self._frontier
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
      path: JSONL file, see `write_chosen`.
      num: number of pairs, the first of 2 num whose completions differ.
      label: "bradley_terry", or "argmax" for the larger reward.
      flips: fraction of labels that are flipped.
      seed: seed of the draws.
      beginnings: letters, from "a" on, that completions may begin with.
    """
    rng = np.random.default_rng((seed, 3))
    prompts = rng.integers(0, len(self.space.prompts), 2 * num)
    drawn = self.draw(prompts, 2, rng, self._begins_with(beginnings))
    differs = np.flatnonzero(drawn[:, 0] != drawn[:, 1])[:num]
    prompts, drawn = prompts[differs], drawn[differs]
    wins = self.label(prompts, drawn, label, rng)
    wins ^= rng.random(len(wins)) < flips
    self.write_chosen(
      path, prompts, np.where(wins[:, None], drawn, drawn[:, ::-1])
    )

  def _begins_with(self, beginnings: int) -> np.ndarray:
    """Returns which completions begin with one of so many letters: bool [N].

    Letters count from "a" on; the empty completion is among them.
    """
    first = np.array([text[:1] for text in self.space.texts])
    return first < chr(ord("a") + beginnings)

  def draw(
    self,
    prompts: np.ndarray,
    num: int,
    rng: np.random.Generator,
    is_drawn: np.ndarray | bool = True,
  ) -> np.ndarray:
    """Draws indices of completions of the reference: i64 [n, num].

    An empty one is never drawn: files of data may not hold it.

    Args:
      prompts: i64 [n], indices.
      num: completions of each prompt.
      rng: source of the draws.
      is_drawn: bool [N], whether a completion may be drawn.
    """
    probs = np.exp(self.ref_logps) * is_drawn
    if self.space.has_end:
      probs[:, 0] = 0.0
    cumulative = probs.cumsum(-1)
    cumulative /= cumulative[:, -1:]
    drawn = np.empty((len(prompts), num), np.int64)
    for p in range(len(self.space.prompts)):
      mine = prompts == p
      uniform = rng.random((mine.sum(), num))
      drawn[mine] = np.searchsorted(cumulative[p], uniform)
    return drawn

  def label(
    self,
    prompts: np.ndarray,
    drawn: np.ndarray,
    label: str,
    rng: np.random.Generator,
  ) -> np.ndarray:
    """Returns whether the first of each pair is the chosen one: bool [n].

    Args:
      prompts: i64 [n], indices.
      drawn: i64 [n, 2], indices of completions.
      label: "bradley_terry" for a draw; any other for the larger reward.
      rng: source of the draws.
    """
    rewards = self.rewards[prompts[:, None], drawn]
    gap = rewards[:, 0] - rewards[:, 1]
    if label == "bradley_terry":
      return rng.random(len(gap)) < 1.0 / (1.0 + np.exp(-gap))
    return gap > 0

  def write_chosen(
    self, path: str, prompts: np.ndarray, pairs: np.ndarray
  ) -> None:
    """Writes {"prompt", "chosen", "rejected"} on each line of a JSONL file.

    Args:
      path: JSONL file.
      prompts: i64 [n], indices.
      pairs: i64 [n, 2], indices of completions, the chosen one first.
    """
    texts = self.space.texts
    write_lines(
      path,
      (
        {
          "prompt": self.space.prompts[p],
          "chosen": texts[w],
          "rejected": texts[x],
        }
        for p, (w, x) in zip(prompts, pairs, strict=True)
      ),
    )


def all_logps(policy: Policy, params: Any, space: Space = FIXED) -> np.ndarray:
  """Computes log pi of every completion for every prompt: f64 [P, N].

  One forward pass over all beginnings, 512 by default, gives the distribution
  of the letter at every position.
  """
  heads = space.strings(space.length - 1)
  out = []
  for prompt in space.prompt_ids():
    tokens = np.concatenate(
      [np.tile(prompt, (len(heads), 1)), heads], 1
    ).astype(np.int32)
    logits = np.asarray(_logits(policy, params, tokens), np.float64)
    logits = logits[:, len(prompt) - 1 :]
    top = logits.max(-1, keepdims=True)
    logps = logits - top - np.log(np.exp(logits - top).sum(-1, keepdims=True))
    ended, begun = [], np.zeros(1)
    for i in range(space.length):
      # Every beginning of i letters once: heads are sorted.
      found = logps[:: space.num_letters ** (space.length - 1 - i), i]
      found = begun[:, None] + found
      if space.has_end:
        ended.append(found[:, space.num_letters])
      begun = found[:, : space.num_letters].reshape(-1)
    out.append(np.concatenate([*ended, begun]))
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
