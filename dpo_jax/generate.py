"""Asks a policy: streams its answers, chats, or compares two policies.

  python -m dpo_jax.generate --workdir=runs/dpo --prompt="the film was"
  python -m dpo_jax.generate --init=hf:FOLDER --chat
  python -m dpo_jax.generate --workdir=runs/dpo --prompts=prompts.jsonl \
      --out=answers.jsonl
  python -m dpo_jax.generate --compare=hf:FOLDER,run:runs/dpo --prompt="..."

A prompt is read as the data of a run are: a text as it is, messages by the chat
template. `--prompts` reads a JSONL file with "prompt" in each line, or a text
file with a prompt in each line. It answers them in batches.
"""

from collections.abc import Callable, Iterator
import contextlib
import signal
import sys
from typing import Any

from absl import flags
from etils import epath

from dpo_jax import command_line
from dpo_jax.models.generate import Sampling
from dpo_jax.records.lines import GrowingFile
from dpo_jax.viewing import answers
from dpo_jax.viewing.open_policy import OpenPolicy, Prompt
from dpo_jax.viewing.terminal import make_console


def main() -> None:
  given = flags.FLAGS
  if given.chat == bool(given.prompt or given.prompts):
    raise ValueError("give --prompt or --prompts, or --chat without them")
  if given.system and not given.chat:
    raise ValueError("--system is for --chat: other prompts hold their own")
  if given.chat and given.num_samples > 1:
    raise ValueError(f"--num_samples={given.num_samples}: a chat has 1 answer")
  if given.out and epath.Path(given.out).exists():
    raise ValueError(f"--out={given.out} exists: choose another file")
  prompts: list[Prompt] = list(given.prompt or [])
  if given.prompts:
    prompts += answers.read_prompts(given.prompts)
  prompts = answers.repeat(prompts, given.num_samples)
  policies = [
    OpenPolicy.open(init, dtype=given.dtype, key=key)
    for key, init in _sources(given)
  ]
  settings = [
    policy.sampling(
      max_response_tokens=given.max_response_tokens,
      temperature=given.temperature,
      top_k=given.top_k,
      top_p=given.top_p,
    )
    for policy in policies
  ]
  with _lines(given.out) as write_line:
    if given.compare:
      _compare(policies, prompts, settings, write_line)
    else:
      _ask(policies[0], prompts, settings[0], write_line)


def _sources(given: Any) -> list[tuple[str, str]]:
  """Returns the policies to ask: the flag that names each, and its spelling.

  Raises:
    ValueError: none or several of --workdir, --init and --compare; or not two
      policies to compare.
  """
  named = [name for name in ("workdir", "init", "compare") if given[name].value]
  if len(named) != 1:
    raise ValueError(
      "name the policy by one of --workdir=WORKDIR, --init=hf:FOLDER and"
      f" --compare=A,B; given: {', '.join(named) or 'none'}"
    )
  if given.workdir:
    return [("--workdir", f"run:{given.workdir}")]
  if given.init:
    return [("--init", given.init)]
  if len(given.compare) != 2 or given.chat:
    raise ValueError(
      f"--compare={','.join(given.compare)} must name two policies, each as"
      " --init does, and takes no --chat"
    )
  return [("--compare", init) for init in given.compare]


def _ask(
  policy: OpenPolicy,
  prompts: list[Prompt],
  settings: Sampling,
  write_line: Callable[[str], None],
) -> None:
  """Chats, or answers prompts: in batches with --prompts, or as tokens come.

  Each answer is also written as a JSON line by `write_line`, and with
  --prompts and without --out it is printed as one.
  """
  given = flags.FLAGS
  seed = given.seed
  if given.chat:
    signal.signal(signal.SIGINT, signal.default_int_handler)  # stops an answer
    found = answers.chat(
      policy, settings, system=given.system, seed=seed, read=_read, write=_write
    )
  elif given.prompts:
    found = policy.sample(prompts, settings, seed=seed, label="sampling")
  else:
    found = answers.show_streams(
      policy, prompts, settings, seed=seed, write=_write
    )
  for answer in found:
    line = answers.to_json(answer, policy=policy.name, seed=seed)
    if given.prompts and not given.out:
      _write(f"{line}\n")
    write_line(line)


def _compare(
  policies: list[OpenPolicy],
  prompts: list[Prompt],
  settings: list[Sampling],
  write_line: Callable[[str], None],
) -> None:
  """Prints two policies' answers in columns, and writes them as JSON lines."""
  seed = flags.FLAGS.seed
  compared = answers.compare(policies, prompts, settings, seed=seed)
  answers.show_side_by_side(make_console(), policies, compared)
  names = [policy.name for policy in policies]
  for row in zip(*compared, strict=True):
    for name, (answer, logps) in zip(names, row, strict=True):
      by_policy = dict(zip(names, logps, strict=True))
      write_line(
        answers.to_json(answer, policy=name, seed=seed, logps=by_policy)
      )


@contextlib.contextmanager
def _lines(path: str) -> Iterator[Callable[[str], None]]:
  """Gives a function that appends a line to a file, and closes it at the end.

  The file is opened at the first line; what it holds is kept, except an
  unfinished last line.

  Args:
    path: file; "" writes nowhere.
  """
  file = None

  def write_line(line: str) -> None:
    nonlocal file
    if path and file is None:
      file = GrowingFile(epath.Path(path))
    if file is not None:
      file.append(f"{line}\n")

  try:
    yield write_line
  finally:
    if file is not None:
      file.close()


def _read() -> str:
  return input("> " if sys.stdin.isatty() else "")


def _write(text: str) -> None:
  print(text, end="", flush=True)


def define_flags() -> None:
  flags.DEFINE_string("workdir", "", "run whose best checkpoint answers")
  flags.DEFINE_string("init", "", "model: hf:FOLDER, hub:ORG/NAME@REVISION")
  flags.DEFINE_list("compare", [], "two models, such as hf:FOLDER,run:WORKDIR")
  flags.DEFINE_multi_string("prompt", None, "prompt; give it again for more")
  flags.DEFINE_string("prompts", "", "file of prompts, .jsonl or a line each")
  flags.DEFINE_bool("chat", False, "hold a conversation by the chat template")
  flags.DEFINE_string("system", "", "system message of a chat")
  flags.DEFINE_integer("num_samples", 1, "answers to each prompt", 1)
  flags.DEFINE_integer("max_response_tokens", 256, "longest answer", 1)
  flags.DEFINE_float("temperature", 1.0, "0 takes the likeliest token", 0.0)
  flags.DEFINE_integer("top_k", 0, "likeliest tokens to choose from; 0: all", 0)
  flags.DEFINE_float("top_p", 1.0, "mass of the nucleus", 1e-6, 1.0)
  flags.DEFINE_integer("seed", 0, "seed of the samples")
  flags.DEFINE_string("out", "", "JSONL file for the answers")
  flags.DEFINE_string("dtype", "", "dtype of weights and matmuls")


if __name__ == "__main__":
  define_flags()
  command_line.run(main)
