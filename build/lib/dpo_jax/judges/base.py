"""Judges: functions that score responses; their answers are checked."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

# (prompts, responses) -> a reward for each, higher is better.
Judge = Callable[[Sequence[str], Sequence[str]], Any]


def per_text(function: Callable[[str, str], float]) -> Judge:
  """Makes a judge of a function of one prompt and one response."""

  def judge(prompts, responses):
    pairs = zip(prompts, responses, strict=True)
    return [function(prompt, response) for prompt, response in pairs]

  return judge


def ask(
  judge: Judge,
  prompts: Sequence[str],
  responses: Sequence[str],
  *,
  key: str = "eval.judge",
) -> np.ndarray:
  """Asks a judge for the rewards of responses, and checks its answer.

  Args:
    judge: judge to ask.
    prompts: texts.
    responses: texts, one for each prompt.
    key: config key of the judge, for errors.

  Returns:
    f64 [n], finite.

  Raises:
    ValueError: the answer is not one finite number for each response.
  """
  given = judge(prompts, responses)
  try:
    rewards = np.asarray(given, np.float64)
  except (TypeError, ValueError):
    rewards = None
  if rewards is None or rewards.shape != (len(responses),):
    raise ValueError(
      f"{key} must give one number for each of {len(responses)} responses, and"
      f" gave {shorten(given)}"
    )
  bad = np.flatnonzero(~np.isfinite(rewards))
  if len(bad):
    raise ValueError(
      f"{key} gave {rewards[bad[0]]} for {responses[bad[0]]!r}: a reward must"
      " be finite"
    )
  return rewards


def shorten(value: Any) -> str:
  text = repr(value)
  return text if len(text) <= 80 else f"{text[:77]}..."
