"""Answers of policies: as they come, as JSON lines, side by side, in a chat."""

from collections.abc import Callable, Iterable, Iterator, Sequence
import itertools
import json
import logging
import string
import time
from typing import Any

from etils import epath
from rich.console import Console
from rich.table import Table
from rich.text import Text

from dpo_jax.data.messages import Message
from dpo_jax.models.generate import Sampling
from dpo_jax.viewing.open_policy import Answer, OpenPolicy, Prompt
from dpo_jax.viewing.terminal import visible

_LOG = logging.getLogger(__name__)
_LETTERS = string.ascii_uppercase  # of the policies that are compared
_HELP = "Ctrl-D ends the chat, Ctrl-C an answer; /new begins another chat"


def read_prompts(path: str) -> list[Prompt]:
  """Reads prompts from a file.

  Args:
    path: .jsonl, with "prompt" in each line: a text, or a list of messages;
      any other file has a prompt in each line. Blank lines are skipped.

  Returns:
    Prompts in the order of the file.

  Raises:
    FileNotFoundError: no such file.
    ValueError: a line without a prompt, or no prompt at all.
  """
  file = epath.Path(path)
  if not file.exists():
    raise FileNotFoundError(f"--prompts={path}: the file does not exist")
  try:
    text = file.read_bytes().decode("utf-8-sig")  # a pipe may be read too
  except UnicodeDecodeError as error:
    raise ValueError(f"--prompts={path} is not UTF-8: {error}") from error
  lines = [
    (number, line)
    # Not `splitlines`, which splits at characters that a text may hold.
    for number, line in enumerate(text.split("\n"), 1)
    if line.strip()
  ]
  if not lines:
    raise ValueError(f"--prompts={path} holds no prompt")
  if not path.endswith(".jsonl"):
    return [line.rstrip("\r") for _, line in lines]
  return [_parse_prompt(line, f"{path}:{number}") for number, line in lines]


def _parse_prompt(line: str, where: str) -> Prompt:
  try:
    prompt = json.loads(line)["prompt"]
  except (ValueError, TypeError, KeyError) as error:
    raise ValueError(f'{where}: no JSON object with "prompt"') from error
  is_messages = isinstance(prompt, list) and all(
    isinstance(m, dict) and {"role", "content"} <= m.keys() for m in prompt
  )
  if not prompt or not (isinstance(prompt, str) or is_messages):
    raise ValueError(
      f'{where}: "prompt" must be a text, or a list of messages with role and'
      " content"
    )
  return prompt


def repeat(prompts: Sequence[Prompt], num_samples: int) -> list[Prompt]:
  """Repeats each prompt; its copies are adjacent."""
  return [p for p in prompts for _ in range(num_samples)]


def to_json(answer: Answer, **columns: Any) -> str:
  """Formats an answer as a JSON line.

  Args:
    answer: answer of a policy.
    **columns: further columns, such as the name of the policy.

  Returns:
    An object of "prompt", "response", "is_complete", "num_tokens" (of the
    response) and the columns; without a line end.
  """
  row = {
    "prompt": answer.prompt,
    "response": answer.text,
    "is_complete": answer.is_complete,
    "num_tokens": len(answer.ids),
  }
  return json.dumps({**row, **columns}, ensure_ascii=False)


def show_streams(
  policy: OpenPolicy,
  prompts: Iterable[Prompt],
  settings: Sampling,
  *,
  seed: int,
  write: Callable[[str], Any],
) -> Iterator[Answer]:
  """Answers prompts one by one, writing the text as it comes; yields answers.

  Args:
    policy: policy to ask.
    prompts: texts, or messages.
    settings: settings of sampling.
    seed: seed of the whole call.
    write: shows a piece of text at once.
  """
  for index, prompt in enumerate(prompts):
    stream = policy.stream(prompt, settings, seed=seed, index=index)
    begins = visible(prompt) if isinstance(prompt, str) else ""
    yield _show_stream(stream, write, begins=begins)


def _show_stream(
  stream: Iterator[str | Answer], write: Callable[[str], Any], begins: str = ""
) -> Answer:
  """Writes the pieces of an answer, logs its speed, and returns it.

  Args:
    stream: see `OpenPolicy.stream`.
    write: shows a piece of text at once.
    begins: text to show before the first piece.
  """
  began = time.monotonic()
  first = None
  for piece in stream:
    if first is None:
      first = time.monotonic()
      write(begins)
    if isinstance(piece, Answer):
      write("\n" if piece.is_complete else " [cut off]\n")
      rest = len(piece.ids) - 1
      seconds = max(time.monotonic() - first, 1e-9)
      _LOG.info(
        "the first token after %.1f s, compiling included; then %.0f tokens a"
        " second",
        first - began,
        rest / seconds,
      )
      return piece
    write(visible(piece))
  raise AssertionError("a stream ends with its answer")


def chat(
  policy: OpenPolicy,
  settings: Sampling,
  *,
  system: str,
  seed: int,
  read: Callable[[], str],
  write: Callable[[str], Any],
) -> Iterator[Answer]:
  """Holds a conversation by the chat template of a model.

  "/new" forgets what was said. A message that Ctrl-C stops, or that is too long
  for the model, is shown as such and forgotten.

  Args:
    policy: policy to talk to.
    settings: settings of sampling.
    system: system message; "" for none.
    seed: seed of the conversation.
    read: asks for the next message; EOFError ends the chat.
    write: shows a piece of text at once.

  Yields:
    Each answer that was not stopped, after its text was written. One that
    reached the limit of tokens is among them.

  Raises:
    ValueError: a model without a chat template.
  """
  if not policy.tokenizer.has_chat_template:
    raise ValueError(
      f"{policy.name} has no chat template: ask it with --prompt, without"
      " --chat"
    )
  begin = [{"role": "system", "content": system}] if system else []
  messages: list[Message] = list(begin)
  write(f"{_HELP}\n")
  for index in itertools.count():
    try:
      said = read()
    except EOFError:
      return
    if said.strip() == "/new":
      messages = list(begin)
      continue
    if not said.strip():
      continue
    asked = [*messages, {"role": "user", "content": said}]
    try:
      stream = policy.stream(asked, settings, seed=seed, index=index)
      answer = _show_stream(stream, write)
    except KeyboardInterrupt:
      write("\n[stopped: this message and its answer are forgotten]\n")
      continue
    except ValueError as error:  # too long for the model, for one
      write(f"error: {error}\n")
      continue
    messages = [*asked, {"role": "assistant", "content": answer.text}]
    yield answer


def compare(
  policies: Sequence[OpenPolicy],
  prompts: Sequence[Prompt],
  settings: Sequence[Sampling],
  *,
  seed: int,
) -> list[list[tuple[Answer, list[float | None]]]]:
  """Answers prompts by several policies, with the log-probs of each answer.

  Args:
    policies: policies to ask.
    prompts: texts, or messages.
    settings: settings of sampling of each policy.
    seed: seed of each policy's samples.

  Returns:
    For each policy and prompt the answer, and its log-prob in nats under every
    policy; None where another tokenizer is used.
  """
  compared = []
  for policy, its_settings in zip(policies, settings, strict=True):
    label = f"sampling {policy.name}"
    answers = [*policy.sample(prompts, its_settings, seed=seed, label=label)]
    columns = [
      other.logps(answers).tolist()
      if other.tokenizer.digest == policy.tokenizer.digest
      else [None] * len(answers)
      for other in policies
    ]
    logps = [list(row) for row in zip(*columns, strict=True)]
    compared.append(list(zip(answers, logps, strict=True)))
  return compared


def show_side_by_side(
  console: Console,
  policies: Sequence[OpenPolicy],
  compared: Sequence[Sequence[tuple[Answer, list[float | None]]]],
) -> None:
  """Prints the answers of policies to each prompt in columns.

  Args:
    console: console to print on; a narrow one gets narrow columns.
    policies: policies that answered.
    compared: their answers, from `compare`.
  """
  for row in zip(*compared, strict=True):
    table = Table(
      title=Text(visible(f"prompt: {_shown(row[0][0].prompt)}")),
      title_justify="left",
      show_lines=True,
      expand=True,
    )
    for letter, policy in zip(_LETTERS, policies, strict=False):
      title = Text(f"{letter}: {policy.name}")
      table.add_column(title, ratio=1, overflow="fold")
    table.add_row(
      *(Text(visible(answer.text.strip("\n"))) for answer, _ in row)
    )
    table.add_row(*(_scores(logps) for _, logps in row))
    console.print(table)


def _scores(logps: Sequence[float | None]) -> Text:
  """Returns the log-prob of an answer under each policy that has one."""
  known = [
    f"{letter} {logp:,.2f}"
    for letter, logp in zip(_LETTERS, logps, strict=False)
    if logp is not None
  ]
  return Text(f"log-prob: {', '.join(known)}")


def _shown(prompt: Prompt) -> str:
  if isinstance(prompt, str):
    return prompt
  return "\n".join(f"{m['role']}: {m['content']}" for m in prompt)
