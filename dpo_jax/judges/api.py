"""A judge on a server with OpenAI's interface, which compares two responses.

Each question is asked once: answers are kept in a file, see `answers`.
"""

from collections.abc import Mapping, Sequence
from concurrent import futures
import hashlib
import json
import logging
import math
import os
import re
from typing import Any

import jax

from dpo_jax.judges.answers import Answers
from dpo_jax.judges.base import shorten
from dpo_jax.judges.chat_server import (
  ChatServer,
  Unanswered,
  read_extra_body,
)
from dpo_jax.judges.orders import Comparer, JudgeError
from dpo_jax.parallel import hosts
from dpo_jax.system import files, inputs

_LOG = logging.getLogger(__name__)
_CHARS_PER_TOKEN = 4  # of English
_NAMED = 5  # questions without an answer that the log names

DEFAULT_PROMPT = """\
A user wrote to two assistants. Compare their answers: which one helps the user
more? Weigh whether an answer is correct, does what was asked, and is safe. A
longer answer is not a better one. The order of the answers means nothing.

<conversation>
{prompt}
</conversation>

<answer_a>
{first}
</answer_a>

<answer_b>
{second}
</answer_b>

Reply with one word: A, B or tie."""

_PLACEHOLDER = re.compile(r"\{(prompt|first|second)\}")
# A line such as "B", "Final answer: A" or "The answer is A", without marks.
_VERDICT = re.compile(
  r"(?:[\w ]*:)? ?(?:(?:the |my )?(?:better |best |final )?"
  r"(?:answer|response|verdict) is )?(?:boxed )?(?:text )?"
  r"(?:answer |response )?(a|b|tie)(?: is better)?",
  re.IGNORECASE,
)
_VALUES = {"a": 1.0, "b": 0.0, "tie": 0.5}


class ApiJudge(Comparer):
  """Compares responses by a model on a server, at temperature 0.

  `eval.api.extra_body` may set another temperature.
  """

  def __init__(
    self, model: str, settings: Any, server: ChatServer | None = None
  ):
    """Reads the template and the answers that are kept; asks nothing yet.

    Args:
      model: name of the model, as the server knows it.
      settings: `config.eval`.
      server: server to ask; None for that of `eval.api`.

    Raises:
      ValueError: a template without a placeholder, no address, no key, or
        fields of a request that are not JSON.
      FileNotFoundError: no such template.
    """
    self._model, self._settings = model, settings.api
    self._template = read_template(settings.judge_prompt)
    self._server = server or ChatServer(model, settings.api)
    folder = settings.api.cache_dir or os.path.join(files.cache_dir(), "judge")
    name = re.sub(r"[^\w.-]", "_", model)
    self._answers = Answers(os.path.join(folder, f"{name}.jsonl"))

  def compare(
    self,
    prompts: Sequence[str],
    firsts: Sequence[str],
    seconds: Sequence[str],
  ) -> list[float]:
    """Compares responses; see `Comparer.compare`.

    Process 0 asks, and tells the others.

    Returns:
      For each prompt 1.0 if the first is better, 0.0 if the second is, 0.5 for
      a tie, NaN where the answer is missing or is none of these.

    Raises:
      JudgeError: the server does not answer any more, or more than
        `eval.api.max_left_out` of the questions get none of A, B and tie.
    """
    questions = [
      (self._key(*shown), self._fill(*shown))
      for shown in zip(prompts, firsts, seconds, strict=True)
    ]
    found = hosts.together(lambda: self._try(questions))
    found = json.loads(hosts.gather_texts(json.dumps(found))[0])
    if "error" in found:
      raise JudgeError(found["error"])
    return found["answers"]

  def _try(self, questions: Sequence[tuple[str, str]]) -> dict[str, Any]:
    if jax.process_index() > 0:
      return {}
    try:
      return {"answers": self._compare(questions)}
    except JudgeError as error:
      return {"error": str(error)}

  def _compare(self, questions: Sequence[tuple[str, str]]) -> list[float]:
    todo = {k: text for k, text in questions if k not in self._answers}
    self._log_estimate(todo, len(questions))
    faults = _Faults(
      math.floor(self._settings.max_left_out * len(questions)),
      self._answers.path,
    )
    for key, text in dict(questions).items():
      if key in self._answers:
        faults.look_at(text, self._answers[key])
    self._ask(todo, faults)
    return [
      parse_verdict(self._answers[key]) if key in self._answers else math.nan
      for key, _ in questions
    ]

  def _ask(self, todo: Mapping[str, str], faults: "_Faults") -> None:
    """Asks questions, several at a time, and keeps the answers in the file.

    Args:
      todo: key -> text of each question.
      faults: counts questions without an answer.

    Raises:
      JudgeError: the server does not answer any more, or too many faults.
    """
    self._server.start()
    pool = futures.ThreadPoolExecutor(self._settings.num_parallel)
    try:
      asked = {pool.submit(self._ask_one, k, t): t for k, t in todo.items()}
      for done in futures.as_completed(asked):
        faults.look_at(asked[done], done.result())
    except BaseException:  # KeyboardInterrupt too
      self._server.stop()
      raise
    finally:
      pool.shutdown(cancel_futures=True)

  def _ask_one(self, key: str, text: str) -> str | Unanswered:
    try:
      answer = self._server.complete(text)
    except Unanswered as error:
      return error
    self._answers.add(
      key,
      answer.text,
      tokens_in=answer.tokens_in,
      tokens_out=answer.tokens_out,
    )
    return answer.text

  def _log_estimate(self, todo: Mapping[str, str], num_questions: int) -> None:
    """Logs an estimate of calls, tokens and cost before the first call.

    Args:
      todo: key -> text of the questions that have no answer in the file.
      num_questions: number of all questions.
    """
    tokens_in = sum(map(len, todo.values())) / _CHARS_PER_TOKEN
    tokens_out = len(todo) * self._server.max_tokens
    prices = self._settings.price_in, self._settings.price_out
    cost = (tokens_in * prices[0] + tokens_out * prices[1]) / 1e6
    _LOG.info(
      "%-11s %s: %d questions, %d to ask; about %s tokens in, at most %s out%s."
      " Answers: %s",
      "judge",
      self._model,
      num_questions,
      len(todo),
      f"{tokens_in:,.0f}",
      f"{tokens_out:,}",
      f", at most about ${cost:,.2f}" if any(prices) else "",
      self._answers.path,
    )

  def _fill(self, prompt: str, first: str, second: str) -> str:
    texts = {"prompt": prompt, "first": first, "second": second}
    return _PLACEHOLDER.sub(lambda match: texts[match[1]], self._template)

  def _key(self, prompt: str, first: str, second: str) -> str:
    """Returns a digest of model, max_tokens, template, extra body and texts."""
    settings = [self._model, self._settings.max_tokens, self._template]
    # Left out where it is empty: digests are those of older versions.
    extra = read_extra_body(self._settings.extra_body)
    shown = [prompt, first, second, *([extra] if extra else [])]
    text = json.dumps([*settings, *shown], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


class _Faults:
  """Counts questions without an answer, and stops above a limit."""

  def __init__(self, limit: int, path: str):
    self._limit, self._path, self._count = limit, path, 0

  def look_at(self, question: str, answer: str | Unanswered) -> None:
    """Counts an answer that is none of A, B and tie, and logs the first five.

    Args:
      question: text, for the log.
      answer: text of the judge, or why there is none.

    Raises:
      JudgeError: there are more of them than the limit.
    """
    if isinstance(answer, str) and not math.isnan(parse_verdict(answer)):
      return
    self._count += 1
    said = str(answer) if isinstance(answer, Exception) else shorten(answer)
    if self._count <= _NAMED:
      _LOG.warning(
        "judge: left out, neither A, B nor tie: %s, to %s",
        said,
        shorten(question[-200:]),
      )
    if self._count > self._limit:
      raise JudgeError(
        f"the judge gave no usable answer to {self._count} questions, and"
        f" eval.api.max_left_out allows {self._limit}; the last: {said}. Change"
        f" the model or eval.judge_prompt, or raise the limit. {self._path} has"
        " the answers"
      )


def read_template(path: str) -> str:
  """Reads a template of questions; "" is DEFAULT_PROMPT.

  Raises:
    FileNotFoundError: no such file.
    ValueError: a placeholder is missing.
  """
  if not path:
    return DEFAULT_PROMPT
  text = files.read_text(inputs.existing(path))
  missing = {"prompt", "first", "second"} - set(_PLACEHOLDER.findall(text))
  if missing:
    names = ", ".join(f"{{{name}}}" for name in sorted(missing))
    raise ValueError(
      f"eval.judge_prompt={path!r} lacks {names}: a template has {{prompt}},"
      " {first} and {second}, and asks for a last line of A, B or tie"
    )
  return text


def parse_verdict(answer: str) -> float:
  """Reads the last line of an answer: A 1.0, B 0.0, tie 0.5, otherwise NaN."""
  lines = [line for line in answer.splitlines() if line.strip()]
  # Marks of Markdown and LaTeX, as in **A**, __B__, answer_a and \boxed{A}.
  words = re.sub(r"[^\w:]|_", " ", lines[-1]).split() if lines else []
  match = _VERDICT.fullmatch(" ".join(words))
  return _VALUES[match[1].lower()] if match else math.nan
