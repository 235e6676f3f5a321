"""Parses the spelling of a judge in a config.

sentiment          the true reward of the built-in reviews
table:FILE         rewards by prompt and response: a JSONL file
reward:WORKDIR     a run that was trained with loss `reward_model`
classifier:FILE    a text classifier trained here, see `judges.classifier`
api:MODEL          a model on a server, which compares two responses: `api`
"""

from typing import Any

from dpo_jax.data import synthetic
from dpo_jax.judges.api import ApiJudge
from dpo_jax.judges.base import Judge, per_text
from dpo_jax.judges.classifier import Classifier
from dpo_jax.judges.orders import Comparer
from dpo_jax.judges.reward_model import RewardModel
from dpo_jax.judges.table import read_table

# Judges that score a response.
KINDS = ("sentiment", "table:FILE", "reward:WORKDIR", "classifier:FILE")


def get_judge(name: str, *, key: str = "eval.judge") -> Judge | None:
  """Returns the judge of single responses that a config names; '' is none.

  Args:
    name: one of KINDS.
    key: config key, for errors.

  Returns:
    The judge. A reward model's weights are loaded when it is first asked.

  Raises:
    ValueError: an unknown name, or a judge that only compares responses.
    FileNotFoundError: no such file or run.
  """
  if not name:
    return None
  kind, _, where = name.partition(":")
  if kind == "sentiment" and not where:
    return per_text(lambda prompt, response: synthetic.sentiment(response))
  if kind == "table" and where:
    return read_table(where)
  if kind == "reward" and where:
    return RewardModel(where)
  if kind == "classifier" and where:
    logits = Classifier.read(where).logits
    # Prompt and response as one text.
    return lambda prompts, responses: logits(
      [p + r for p, r in zip(prompts, responses, strict=True)]
    )
  if kind == "api" and where:
    raise ValueError(
      f"{key}={name!r} compares two responses, and {key} must score one: only"
      f" eval.judge takes it. Use one of {', '.join(KINDS)}"
    )
  raise ValueError(f"{key}={name!r} must be '' or one of {', '.join(KINDS)}")


def get_eval_judge(settings: Any) -> Judge | Comparer | None:
  """Returns the judge of `eval.judge`, which may compare two responses.

  Args:
    settings: `config.eval`.

  Returns:
    A Comparer for 'api:MODEL', otherwise see `get_judge`; None for ''.

  Raises:
    ValueError: see `get_judge` and `ApiJudge`, or a template that is not read.
    FileNotFoundError: no such file or run.
  """
  kind, _, model = settings.judge.partition(":")
  if kind == "api" and model:
    return ApiJudge(model, settings)
  if settings.judge_prompt:
    raise ValueError(
      f"eval.judge_prompt={settings.judge_prompt!r} is set, and only"
      f" eval.judge='api:MODEL' reads it; the judge is {settings.judge!r}"
    )
  return get_judge(settings.judge)
