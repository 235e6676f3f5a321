"""Tasks with a true reward: demonstrations, pairs, judge and tokenizer."""

from collections.abc import Callable, Iterator
import dataclasses
import json
import math
import os
import random

import tokenizers as hf_tokenizers

from dpo_jax import judges
from dpo_jax.system.files import write_atomically
from experiments.win_rates import posts, questions

_EOS = "<eos>"


@dataclasses.dataclass(frozen=True)
class Task:
  """Prompts, the responses that people write, and the truth about them.

  Attributes:
    draw_prompt: rng -> prompt.
    draw_response: (rng, prompt) -> response.
    reward: (prompt, response) -> true reward, higher is better.
  """

  draw_prompt: Callable[[random.Random], str]
  draw_response: Callable[[random.Random, str], str]
  reward: Callable[[str, str], float]

  @property
  def judge(self) -> judges.Judge:
    """The truth as a judge."""
    return judges.per_text(self.reward)

  def demonstrations(self, num: int, seed: int) -> Iterator[dict[str, str]]:
    """Yields `num` prompts with a response: {"prompt", "completion"}."""
    rng = random.Random(f"demonstrations {seed}")
    for _ in range(num):
      prompt = self.draw_prompt(rng)
      yield {"prompt": prompt, "completion": self.draw_response(rng, prompt)}

  def pairs(self, num: int, seed: int) -> Iterator[dict[str, str]]:
    """Yields {"prompt", "chosen", "rejected"}, labelled by Bradley-Terry.

    P(first is chosen) = sigmoid(r_first - r_second) of two responses of unequal
    reward.
    """
    rng = random.Random(f"pairs {seed}")
    for _ in range(num):
      prompt = self.draw_prompt(rng)
      rewards = [0.0, 0.0]
      while rewards[0] == rewards[1]:
        pair = [self.draw_response(rng, prompt) for _ in range(2)]
        rewards = [self.reward(prompt, text) for text in pair]
      if rng.random() >= 1.0 / (1.0 + math.exp(rewards[1] - rewards[0])):
        pair.reverse()
      yield {"prompt": prompt, "chosen": pair[0], "rejected": pair[1]}


TASKS = {
  "posts": Task(posts.draw_post, posts.draw_summary, posts.reward),
  "news": Task(posts.draw_news, posts.draw_summary, posts.reward),
  "questions": Task(
    questions.draw_question, questions.draw_answer, questions.reward
  ),
}


def write_tokenizer(folder: str) -> None:
  """Writes a tokenizer.json whose tokens are the words of all tasks."""
  words = [_EOS, *sorted({*posts.WORDS, *questions.WORDS})]
  vocab = {word: i for i, word in enumerate(words)}
  model = hf_tokenizers.models.WordLevel(vocab=vocab, unk_token=_EOS)
  whole = hf_tokenizers.Tokenizer(model)
  whole.pre_tokenizer = hf_tokenizers.pre_tokenizers.WhitespaceSplit()
  whole.add_special_tokens([_EOS])
  os.makedirs(folder, exist_ok=True)
  write_atomically(f"{folder}/tokenizer.json", whole.to_str())
  config = json.dumps({"eos_token": _EOS})
  write_atomically(f"{folder}/tokenizer_config.json", config)


def write_records(path: str, records: Iterator[dict[str, str]]) -> None:
  """Writes records as JSON lines."""
  write_atomically(path, "".join(json.dumps(row) + "\n" for row in records))
