"""Prompts, completions of the reference, and pairs that the labeller orders."""

from collections.abc import Iterator, Sequence
import itertools
import json
from typing import Any

import numpy as np

from dpo_jax import judges
from dpo_jax.data import synthetic, tokenizers
from dpo_jax.models import generate
from dpo_jax.models.decoder import Policy
from dpo_jax.system.files import write_atomically
from dpo_jax.training.samples import Samples
from experiments import trained
from experiments.sentiment.plan import Plan
from experiments.sentiment.reviews import read_reviews

# Completions of each prompt.
_SAMPLES = 4
# Draws of as many prefixes as are wanted; repeated ones are dropped.
_MOST_DRAWS = 20


def make_prompts(
  plan: Plan, policy: Policy, params: Any, num: int
) -> list[list[int]]:
  """Makes distinct prompts: starts of reviews, or of the policy's own texts.

  Args:
    plan: plan of the sweep.
    policy: decoder of the reference.
    params: parameters of the reference.
    num: prompts wanted; fewer come back where fewer are distinct.

  Returns:
    Token ids, with BOS where the tokenizer has one.
  """
  tokenizer = tokenizers.load_tokenizer(plan.tokenizer)
  begin = [] if tokenizer.bos_id is None else [tokenizer.bos_id]
  if not plan.is_tuned:
    found: dict[tuple[int, ...], None] = {}
    for seed in range(_MOST_DRAWS):
      texts = generate.sample(
        policy,
        params,
        [begin or [tokenizer.eos_id]] * num,
        generate.Sampling(plan.size["prefix_tokens"], 1.0, tokenizer.stop_ids),
        seed=1000 + seed,
      )
      whole = [tuple(t) for t in texts if tokenizer.eos_id not in t]
      found |= dict.fromkeys(whole)
      if len(found) >= num:
        break
    return [[*begin, *ids] for ids in list(found)[:num]]
  if plan.settings.reviews:
    rows = read_reviews(plan.settings.reviews, 2 * num)
    texts = [" ".join(row["text"].split(" ")[:5]) for row in rows]
  else:
    rows = synthetic.review_demonstrations(20 * num, 1)
    texts = [row["prompt"] for row in rows]
  texts = list(dict.fromkeys(texts))[:num]
  ids = tokenizer.encode(texts, is_rendered=False, is_continuation=False)
  return [[*begin, *row] for row in ids]


def write_pairs(folder: str, *, plan: Plan) -> None:
  """Samples the reference, and writes held-out prompts and ordered pairs.

  FOLDER/eval_prompts.json has token ids of the held-out prompts. The pairs of
  all other prompts are in FOLDER/pairs.jsonl, see `order_pairs`.

  Raises:
    ValueError: the labeller gives all completions the same reward.
  """
  policy, params = plan.load_reference()
  size, tokenizer = plan.size, tokenizers.load_tokenizer(plan.tokenizer)
  total = size["prompts"] + size["eval_prompts"]
  prompts = make_prompts(plan, policy, params, total)
  held_out = min(size["eval_prompts"], len(prompts) // 4)
  eval_prompts, prompts = prompts[:held_out], prompts[held_out:]
  with open(f"{folder}/eval_prompts.json", "w", encoding="utf-8") as file:
    json.dump(eval_prompts, file)
  bench = trained.Bench(
    tokenizer,
    prompts,
    judges.get_judge(plan.labeller, key="labeller"),
    policy,
    params,
    plan.response_tokens,
  )
  samples = bench.sample(policy, params, seed=7, count=_SAMPLES)
  if not np.ptp(samples.rewards):
    raise ValueError(
      f"the labeller {plan.labeller} gives all {len(samples.texts)} completions"
      f" {samples.rewards[0]}, so there is no pair to learn from. The first"
      f" completion is {samples.texts[0]!r}"
    )
  lines = [
    json.dumps(row) + "\n"
    for start in range(0, len(samples.texts), _SAMPLES)
    for row in order_pairs(
      samples, range(start, start + _SAMPLES), tokenizer.stop_ids
    )
  ]
  write_atomically(f"{folder}/pairs.jsonl", "".join(lines))


def order_pairs(
  samples: Samples, group: Sequence[int], stop_ids: Sequence[int]
) -> Iterator[dict[str, Any]]:
  """Yields records of every two samples of a prompt with different rewards.

  Args:
    samples: samples with rewards.
    group: indices of the prompt's samples.
    stop_ids: ids that end a response.

  Yields:
    {"prompt", "chosen", "rejected", "truncated"}: texts, and whether the chosen
    and the rejected response were cut off.
  """
  for one, other in itertools.combinations(group, 2):
    best, worst = sorted((one, other), key=lambda i: -samples.rewards[i])
    if samples.rewards[best] == samples.rewards[worst]:
      continue
    yield {
      "prompt": samples.prompt_texts[best],
      "chosen": samples.texts[best],
      "rejected": samples.texts[worst],
      # A text that was cut short must not teach to stop there.
      "truncated": [
        samples.responses[i][-1] not in stop_ids for i in (best, worst)
      ],
    }
