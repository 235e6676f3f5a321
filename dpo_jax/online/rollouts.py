"""Samples of the policy in training: sampled, judged, labelled, measured."""

from collections.abc import Callable, Sequence
import functools
import logging
from typing import Any

import jax
import numpy as np

from dpo_jax import judges
from dpo_jax.data.loader import Loader
from dpo_jax.data.scoring import score_all
from dpo_jax.data.tokenizers import Tokenizer
from dpo_jax.losses import policy_gradient
from dpo_jax.models import generate
from dpo_jax.parallel.mesh import on_mesh
from dpo_jax.training import forward
from dpo_jax.training.program import Program

_LOG = logging.getLogger(__name__)

_MAX_BATCH = 1024  # prompts sampled at once

# Fields of Sequences that `make_measure` gives, where the loss needs them.
_MEASURED = (
  "logps",
  "ref_logps",
  "token_mask",
  "token_logps",
  "ref_token_logps",
  "token_values",
  "values",
)


def sample_responses(
  program: Program,
  params: Any,
  prompts: Sequence[Sequence[int]],
  tokenizer: Tokenizer,
  judge: judges.Judge,
  *,
  seed: int,
  num_samples: int,
  max_tokens: int,
  temperature: float,
  label: str = "",
) -> tuple[np.ndarray, np.ndarray]:
  """Samples responses from the policy and asks the judge for their rewards.

  Args:
    program: program of the run.
    params: parameters of the policy.
    prompts: n prompts, token ids.
    tokenizer: reads prompts and responses for the judge.
    judge: gives a reward for each response.
    seed: seed of the samples.
    num_samples: K, responses to each prompt.
    max_tokens: M, longest response.
    temperature: sampling temperature.
    label: name of the work for `progress.track`; "" shows nothing.

  Returns:
    i32 [n, K, M] responses, -1 after the end; f64 [n, K] rewards.

  Raises:
    ValueError: a judge that does not give one finite number for each.
  """
  repeated = [list(prompt) for prompt in prompts for _ in range(num_samples)]
  sampled = generate.sample(
    program.policy,
    params,
    repeated,
    generate.Sampling(max_tokens, temperature, tokenizer.stop_ids),
    seed=seed,
    batch_size=min(len(repeated), _MAX_BATCH),
    rows=program.placement.row_sharding,
    label=label,
  )
  rewards = judges.ask(
    judge,
    [tokenizer.decode(prompt) for prompt in repeated],
    [tokenizer.decode(response) for response in sampled],
    key="online.judge",
  )
  responses = np.full((len(repeated), max_tokens), -1, np.int32)
  for row, response in zip(responses, sampled, strict=True):
    row[: len(response)] = response
  shape = (len(prompts), num_samples)
  return responses.reshape(*shape, -1), rewards.reshape(shape)


def are_cut(responses: np.ndarray, tokenizer: Tokenizer) -> np.ndarray:
  """Returns which responses were cut: they do not end with a stop token.

  An empty one counts as cut. A tokenizer whose EOS is not in its vocabulary
  writes texts of one length, and none of them is cut.

  Args:
    responses: i32 [n, K, M], -1 after the end.
    tokenizer: tokenizer of the policy.

  Returns:
    bool [n, K].
  """
  if tokenizer.eos_id >= tokenizer.vocab_size:
    return np.zeros(responses.shape[:2], bool)
  lengths = (responses >= 0).sum(-1, keepdims=True)
  last = np.take_along_axis(responses, np.maximum(lengths - 1, 0), -1)
  return ~np.isin(last[..., 0], tokenizer.stop_ids)


def label_pairs(
  responses: np.ndarray,
  rewards: np.ndarray,
  *,
  label: str,
  flips: float,
  rng: np.random.Generator,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
  """Makes a pair of each group: the chosen response, then the rejected one.

  Args:
    responses: i32 [n, K, M], -1 after the end.
    rewards: f64 [n, K].
    label: "argmax", best against worst; or "bradley_terry", a draw between
      the first two by the difference of their rewards.
    flips: share of the pairs whose order is reversed.
    rng: source of the draws.

  Returns:
    i32 [n, 2, M] pairs, all -1 for a tie; f32 [n, 2] rewards; bool [n], which
    groups are ties: equal responses, or with "argmax" equal rewards.
  """
  rows = np.arange(len(rewards))
  if label == "argmax":
    order = np.argsort(-rewards, 1, kind="stable")[:, [0, -1]]
    is_tied = rewards[rows, order[:, 0]] == rewards[rows, order[:, 1]]
  else:
    gap = rewards[:, 0] - rewards[:, 1]
    wins = rng.random(len(gap)) < 1.0 / (1.0 + np.exp(-gap))
    order = np.where(wins[:, None], [[0, 1]], [[1, 0]])
    is_tied = np.zeros(len(gap), bool)
  is_flipped = rng.random(len(rewards)) < flips
  order = np.where(is_flipped[:, None], order[:, ::-1], order)
  pairs = responses[rows[:, None], order]
  # Neither of two equal responses, or of two equally good ones, is preferred.
  is_tied |= (pairs[:, 0] == pairs[:, 1]).all(-1)
  if is_tied.all() and jax.process_index() == 0:
    _LOG.warning(
      "every sampled pair is a tie, which teaches nothing: the judge gives"
      " equal rewards, or the responses are equal"
    )
  pairs = np.where(is_tied[:, None, None], -1, pairs)
  return pairs, rewards[rows[:, None], order].astype(np.float32), is_tied


def make_measure(
  program: Program, max_tokens: int
) -> Callable[[Any, Any, Loader], dict[str, np.ndarray]]:
  """Builds (params, ref_params, loader) -> fields of Sequences, by name.

  Args:
    program: program of the run; its loss decides which fields are read.
    max_tokens: M, longest response.

  Returns:
    A function that computes the fields for the n groups of a loader: logps and
    ref_logps, f32 [n, K]. If the loss reads advantages, also values, f32
    [n, K]; token_logps, ref_token_logps and token_values, f32 [n, K, M]; and
    token_mask, bool [n, K, M]. All are 0 for a group that no batch has.
  """
  needs = frozenset()
  if "advantages" in program.objective.needs:
    needs = frozenset({"token_logps", "token_values", "values"})

  def read(params, ref_params, batch):
    sequences = forward.read_sequences(
      program.policy,
      params,
      ref_params,
      batch,
      chunk_size=program.chunk_size,
      needs=needs,
      max_tokens=max_tokens,
    )
    found = {name: getattr(sequences, name) for name in _MEASURED}
    return {name: x for name, x in found.items() if x is not None}

  compiled = on_mesh(program.placement.mesh)(
    jax.jit(read, out_shardings=program.placement.replicated)
  )

  def measure(params, ref_params, loader):
    read_batch = functools.partial(compiled, params, ref_params)
    ids, found = score_all(read_batch, loader, program.placement)

    def of_all(values: np.ndarray) -> np.ndarray:
      # A tie has no responses, so no batch holds it.
      out = np.zeros((len(loader.indices), *values.shape[1:]), values.dtype)
      out[ids] = values
      return out

    return jax.tree.map(of_all, found)

  return measure


def mean_kl(responses: np.ndarray, log_ratios: np.ndarray) -> float:
  """Estimates KL(policy || reference) from the samples, nats a response.

  Args:
    responses: i32 [n, K, M], -1 after the end; one of nothing but -1 is left
      out.
    log_ratios: f32 [n, K], log pi / pi_ref; 0 where left out.
  """
  is_there = (responses >= 0).any(-1)
  return float(log_ratios.sum() / max(is_there.sum(), 1))


def advantage_fields(
  rewards: np.ndarray,
  measured: dict[str, np.ndarray],
  is_cut: np.ndarray,
  *,
  kl_weight: float,
  discount: float,
  gae_lambda: float,
) -> dict[str, np.ndarray]:
  """Computes PPO's advantages and returns by GAE.

  The advantages are whitened over all tokens of a sampling; returns are not.

  Args:
    rewards: f64 [n, K].
    measured: fields from `make_measure`.
    is_cut: bool [n, K]; a response that was cut continues, at the value that
      the value head gives it.
    kl_weight: weight of a token's log-ratio in its reward.
    discount: gamma of GAE.
    gae_lambda: lambda of GAE.

  Returns:
    "old_token_logps", "old_token_values", "advantages" and "returns", fields of
    `Batch.on_policy`: f32 [n, K, M] each.
  """
  shape = measured["token_logps"].shape
  flat = {
    name: values.reshape(-1, shape[-1])
    for name, values in measured.items()
    if values.ndim == 3
  }
  advantages, returns = _advantages(
    rewards.reshape(-1).astype(np.float32),
    flat["token_logps"],
    flat["ref_token_logps"],
    flat["token_values"],
    np.where(is_cut, measured["values"], 0.0).reshape(-1),
    flat["token_mask"],
    kl_weight,
    discount,
    gae_lambda,
  )
  return {
    "old_token_logps": measured["token_logps"],
    "old_token_values": measured["token_values"],
    "advantages": np.asarray(advantages).reshape(shape),
    "returns": np.asarray(returns).reshape(shape),
  }


@jax.jit
def _advantages(
  scores: jax.Array,
  logps: jax.Array,
  ref_logps: jax.Array,
  values: jax.Array,
  last_values: jax.Array,
  mask: jax.Array,
  kl_weight: float,
  discount: float,
  gae_lambda: float,
) -> tuple[jax.Array, jax.Array]:
  """Computes whitened advantages, and returns as they are: f32 [B, M] each."""
  shaped = policy_gradient.shape_rewards(
    scores, logps, ref_logps, mask, kl_coef=kl_weight, estimator="k1"
  )
  advantages, returns = policy_gradient.gae(
    shaped,
    values,
    mask,
    last_values,
    discount=discount,
    gae_lambda=gae_lambda,
  )
  return policy_gradient.whiten(advantages, mask, shift_mean=True), returns
