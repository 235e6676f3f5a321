"""Samples of a policy on held-out prompts: rewards, win rate and KL."""

from collections.abc import Callable, Sequence
import dataclasses
import logging
import math
from typing import Any

import numpy as np

from dpo_jax import judges
from dpo_jax.data import batch_plan
from dpo_jax.data.loader import Loader
from dpo_jax.data.store import Store
from dpo_jax.data.tokenizers import Tokenizer
from dpo_jax.models import generate
from dpo_jax.models.decoder import Policy
from dpo_jax.parallel.placement import Placement
from dpo_jax.training.reference import compute_logps

_LOG = logging.getLogger(__name__)

# Metrics of `sample_metrics` and `sampled_kl`, with a judge and a reference.
SAMPLE_METRICS = (
  "sample/tokens",
  "sample/reward",
  "sample/reward_error",
  "sample/win_rate",
  "sample/win_rate_low",
  "sample/win_rate_high",
  "kl",
  "kl_error",
)


@dataclasses.dataclass(frozen=True)
class Samples:
  """Responses of a policy to held-out prompts.

  Attributes:
    prompts: token ids.
    responses: token ids.
    prompt_texts: decoded.
    texts: responses, decoded.
    rewards: f64 [n] from the judge; None without one, or with one that only
      compares responses.
  """

  prompts: list[list[int]]
  responses: list[list[int]]
  prompt_texts: list[str]
  texts: list[str]
  rewards: np.ndarray | None


def held_out_prompts(
  store: Store, indices: np.ndarray, num: int, *, max_tokens: int
) -> list[list[int]]:
  """Returns the first distinct prompts, repeated if fewer than `num`.

  Args:
    store: groups.
    indices: held-out groups.
    num: prompts wanted.
    max_tokens: longest prompt that leaves room for a response; longer ones are
      skipped.

  Returns:
    Token ids of `num` prompts.

  Raises:
    ValueError: every prompt is longer.
  """
  distinct: dict[tuple[int, ...], None] = {}
  for index in indices:
    if store.lengths[index, 0] <= max_tokens:
      distinct[tuple(store.group(index)[0].tolist())] = None
    if len(distinct) == num:
      break
  if not distinct:
    raise ValueError(
      f"no held-out prompt has at most {max_tokens} tokens, so none leaves room"
      " for a sample: lower eval.max_response_tokens"
    )
  prompts = [list(prompt) for prompt in distinct]
  if len(prompts) < num:
    _LOG.warning(
      "eval.num_samples=%d: only %d held-out prompts differ, so they repeat,"
      " and the interval of the win rate counts each once",
      num,
      len(prompts),
    )
  return [prompts[i % len(prompts)] for i in range(num)]


def draw_samples(
  policy: Policy,
  params: Any,
  prompts: Sequence[Sequence[int]],
  tokenizer: Tokenizer,
  judge: judges.Judge | judges.Comparer | None,
  *,
  seed: int,
  config: Any,
  placement: Placement,
  batch_size: int = 64,
  label: str = "",
) -> Samples:
  """Samples a response to each prompt and asks the judge for its reward.

  Args:
    policy: the decoder.
    params: parameters of the policy.
    prompts: token ids.
    tokenizer: tokenizer of the policy.
    judge: gives the rewards, or None.
    seed: seed of the samples.
    config: `config.eval`.
    placement: mesh that the prompts are split over.
    batch_size: prompts sampled at once.
    label: name of the work for `progress.track`; "" shows nothing.

  Returns:
    The samples.

  Raises:
    ValueError: the judge does not give a finite number for each.
  """
  responses = generate.sample(
    policy,
    params,
    prompts,
    generate.Sampling(
      config.max_response_tokens,
      config.temperature,
      tokenizer.stop_ids,
      config.top_k,
      config.top_p,
    ),
    seed=seed,
    batch_size=batch_size,
    rows=placement.row_sharding,
    label=label,
  )
  return _judge_all(prompts, responses, tokenizer, judge)


def take_chosen(
  store: Store,
  indices: np.ndarray,
  prompts: Sequence[Sequence[int]],
  tokenizer: Tokenizer,
  judge: judges.Judge | judges.Comparer | None,
  *,
  is_labelled: bool,
) -> Samples:
  """Returns the chosen response to each prompt, as samples to compare with.

  Args:
    store: groups.
    indices: held-out groups.
    prompts: token ids, from `held_out_prompts`.
    tokenizer: tokenizer of the policy.
    judge: gives the rewards, or None.
    is_labelled: whether a group is one response with a label.

  Raises:
    ValueError: a prompt without a chosen response, or see `draw_samples`.
  """
  chosen: dict[tuple[int, ...], list[int]] = {}
  for index in indices:
    if store.lengths[index, 1] and (
      not is_labelled or store.score[index, 0] > 0
    ):
      prompt, response = store.group(index)[:2]
      chosen.setdefault(tuple(prompt.tolist()), response.tolist())
  for prompt in prompts:
    if tuple(prompt) not in chosen:
      text = tokenizer.decode(prompt)
      raise ValueError(f"no held-out group has a chosen response to {text!r}")
  responses = [chosen[tuple(prompt)] for prompt in prompts]
  return _judge_all(prompts, responses, tokenizer, judge)


def _judge_all(
  prompts: Sequence[Sequence[int]],
  responses: list[list[int]],
  tokenizer: Tokenizer,
  judge: judges.Judge | judges.Comparer | None,
) -> Samples:
  """Decodes responses, and asks the judge for their rewards."""
  prompt_texts = [tokenizer.decode(prompt) for prompt in prompts]
  texts = [tokenizer.decode(response) for response in responses]
  return Samples(
    [list(prompt) for prompt in prompts],
    responses,
    prompt_texts,
    texts,
    _rewards(judge, prompt_texts, texts),
  )


def _rewards(
  judge: judges.Judge | judges.Comparer | None,
  prompts: Sequence[str],
  responses: Sequence[str],
) -> np.ndarray | None:
  if judge is None or isinstance(judge, judges.Comparer):
    return None
  return judges.ask(judge, prompts, responses)


def wins_over(
  samples: Samples,
  others: Samples | None,
  judge: judges.Judge | judges.Comparer | None,
) -> judges.Wins | None:
  """Compares samples with other responses to the same prompts.

  Args:
    samples: samples of the policy.
    others: samples of the reference, or chosen responses; or None.
    judge: judge of both.

  Returns:
    The results, ties a half; None without others or a judge.

  Raises:
    JudgeError: a judge that compares does not answer.
  """
  if others is None:
    return None
  if isinstance(judge, judges.Comparer):
    return judges.compare_in_both_orders(
      judge, samples.prompt_texts, samples.texts, others.texts
    )
  if samples.rewards is None:
    return None
  wins = 0.5 * (np.sign(samples.rewards - others.rewards) + 1.0)
  return judges.Wins(wins, wins)


def sample_metrics(
  samples: Samples, wins: judges.Wins | None
) -> dict[str, float]:
  """Computes the reward of samples, and their win rate.

  Args:
    samples: samples of the policy.
    wins: their results against others, from `wins_over`.

  Returns:
    `sample/tokens`, the mean length; with rewards `sample/reward`, their mean,
    and `sample/reward_error`, its standard error; with results
    `sample/win_rate` and its 95 % interval, `sample/win_rate_low` and `_high`.
    A judge that compares adds `sample/order_bias` and `sample/left_out`, see
    `judges.Wins`.
  """
  metrics = {
    "sample/tokens": float(np.mean([len(r) for r in samples.responses]))
  }
  if samples.rewards is not None:
    metrics["sample/reward"] = float(samples.rewards.mean())
    metrics["sample/reward_error"] = _standard_error(samples.rewards)
  if wins is not None:
    of_orders = () if samples.rewards is None else ("order_bias", "left_out")
    metrics |= {
      f"sample/{name}": value
      for name, value in wins.metrics(samples.prompts).items()
      if name not in of_orders
    }
  return metrics


def sampled_kl(
  logps_step: Callable[..., Any],
  params: Any,
  ref_params: Any,
  samples: Samples,
  placement: Placement,
  *,
  batch_size: int,
) -> dict[str, float]:
  """Estimates KL(pi || pi_ref) per response from the policy's samples.

  The mean of log pi(y|x) - log pi_ref(y|x) over y ~ pi. It is unbiased if the
  samples were drawn at temperature 1 from the whole vocabulary.

  Args:
    logps_step: compiled `reference.make_logps_step`.
    params: parameters of the policy.
    ref_params: parameters of the reference.
    samples: samples of the policy.
    placement: mesh.
    batch_size: groups a batch.

  Returns:
    `kl`, nats a response, and `kl_error`, its standard error.
  """
  policy_logps, ref_logps = (
    score_responses(
      logps_step,
      p,
      samples.prompts,
      samples.responses,
      placement,
      batch_size=batch_size,
    )
    for p in (params, ref_params)
  )
  log_ratios = (policy_logps - ref_logps).astype(np.float64)
  return {
    "kl": float(log_ratios.mean()),
    "kl_error": _standard_error(log_ratios),
  }


def score_responses(
  logps_step: Callable[..., Any],
  params: Any,
  prompts: Sequence[Sequence[int]],
  responses: Sequence[Sequence[int]],
  placement: Placement,
  *,
  batch_size: int,
) -> np.ndarray:
  """Computes the log-prob of a response to each prompt.

  Args:
    logps_step: compiled `reference.make_logps_step`.
    params: parameters of the policy.
    prompts: token ids.
    responses: token ids, one response for each prompt.
    placement: mesh.
    batch_size: groups a batch.

  Returns:
    f32 [n], nats.
  """
  groups = list(zip(prompts, responses, strict=True))
  store = Store.from_groups(groups, np.ones((len(groups), 1)))
  indices = np.arange(len(store))
  plan = batch_plan.make_plan(
    store,
    indices,
    batch_size=min(batch_size, len(store)),
    row_tokens=0,
    row_multiple=placement.num_row_shards,
    layout="shared",
  )
  loader = Loader(store, indices, plan, min(batch_size, len(store)), seed=0)
  return compute_logps(logps_step, params, loader, placement)[:, 0]


def _standard_error(values: np.ndarray) -> float:
  if len(values) < 2:
    return math.nan
  return float(values.std(ddof=1) / math.sqrt(len(values)))
