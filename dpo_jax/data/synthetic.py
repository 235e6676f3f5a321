"""Built-in task with a known reward: short film reviews.

Prompts are beginnings of reviews, responses their ends, both drawn from a
small grammar; the ground-truth reward is the sentiment of the response, read
off a lexicon with intensifiers and negation. So everything that a paper's
sentiment experiment measures can be measured here without a download.
"""

from collections.abc import Iterator
import math
import random
import re

MAX_REWARD = 4.0

_ADJECTIVES = {
  "superb": 1.5,
  "lovely": 1.0,
  "great": 1.0,
  "moving": 1.0,
  "clever": 0.75,
  "good": 0.75,
  "fine": 0.5,
  "long": 0.0,
  "loud": 0.0,
  "odd": -0.25,
  "slow": -0.5,
  "bad": -0.75,
  "dull": -1.0,
  "clumsy": -1.0,
  "boring": -1.0,
  "awful": -1.5,
}
_INTENSIFIERS = {"very": 1.5, "truly": 1.5, "rather": 0.75, "a bit": 0.5}
_VERDICTS = {
  "I loved it": 1.5,
  "I would see it again": 1.0,
  "I liked it": 0.75,
  "I am glad it is over": -1.0,
  "I left early": -1.0,
  "I hated it": -1.5,
}
_ASPECTS = ("acting", "plot", "music", "ending", "script", "story", "cast")
_TITLES = (
  "Red Harbor",
  "The Last Train",
  "Winter Light",
  "Two Brothers",
  "Paper Moon",
  "The Long Night",
  "Silver Lake",
  "Open Water",
  "Glass Hill",
  "The Visitor",
  "Early Snow",
  "A Quiet Street",
  "Blue Iron",
  "The Ferry",
  "Night Garden",
  "Summer Debt",
)
_DAYS = ("Monday", "Friday", "Sunday", "a train", "a plane", "television")
_VERBS = ("was", "is", "felt", "seemed")

_PHRASES = sorted(map(re.escape, (*_INTENSIFIERS, *_VERDICTS)), key=len)
_TOKEN = re.compile(rf"(?:{'|'.join(reversed(_PHRASES))})\b|[A-Za-z]+")


def sentiment(text: str) -> float:
  """Ground-truth reward of a response: its sentiment, in [-4, 4].

  Adjectives and verdicts add their weight, times that of each intensifier right
  before them, and with their sign turned after "not". Other words add nothing.
  The case of letters counts.
  """
  total, factor = 0.0, 1.0
  for token in _TOKEN.findall(text):
    if token in _INTENSIFIERS:
      factor *= _INTENSIFIERS[token]
    elif token == "not":
      factor *= -1.0
    else:
      weight = _ADJECTIVES.get(token, _VERDICTS.get(token, 0.0))
      total += factor * weight
      factor = 1.0
  return max(-MAX_REWARD, min(MAX_REWARD, total))


def _prompt(rng: random.Random) -> str:
  return (
    f"We saw {rng.choice(_TITLES)} on {rng.choice(_DAYS)}."
    f" The {rng.choice(_ASPECTS)}"
  )


def _response(rng: random.Random) -> str:
  # One mood for the whole review: reviews that are mixed word by word would
  # leave nothing for a sequence-level preference to pick up.
  mood = rng.gauss(0.0, 1.0)

  def draw(weights: dict[str, float]) -> str:
    odds = [math.exp(mood * w) for w in weights.values()]
    return rng.choices(list(weights), odds)[0]

  def phrase() -> str:
    roll = rng.random()
    if roll < 0.15:
      # "not" turns the sign, so the word is drawn from the other mood.
      odds = [math.exp(-mood * w) for w in _ADJECTIVES.values()]
      return f"not {rng.choices(list(_ADJECTIVES), odds)[0]}"
    if roll < 0.45:
      return f"{rng.choice(list(_INTENSIFIERS))} {draw(_ADJECTIVES)}"
    return draw(_ADJECTIVES)

  text = f" {rng.choice(_VERBS)} {phrase()}"
  if rng.random() < 0.6:
    text += f", and the {rng.choice(_ASPECTS)} {rng.choice(_VERBS)} {phrase()}"
  text += "."
  if rng.random() < 0.5:
    text += f" {draw(_VERDICTS)}."
  return text


def review_demonstrations(num: int, seed: int) -> Iterator[dict]:
  """Yields `num` reviews without a label: {"prompt", "completion"}."""
  rng = random.Random(f"demonstrations {seed}")
  for _ in range(num):
    yield {"prompt": _prompt(rng), "completion": _response(rng)}


def review_pairs(num: int, seed: int) -> Iterator[dict]:
  """Yields `num` pairs of reviews, labelled by Bradley-Terry on `sentiment`.

  P(first is chosen) = sigmoid(r_first - r_second): labels are as noisy as DPO's
  model of preferences assumes. The two reviews never score the same, because a
  loss learns nothing from such a pair.

  Yields:
    {"prompt", "chosen", "rejected", "score_chosen", "score_rejected"}; the
    scores are the sentiments, in [-4, 4].
  """
  rng = random.Random(f"pairs {seed}")
  for _ in range(num):
    prompt = _prompt(rng)
    rewards = [0.0, 0.0]
    while rewards[0] == rewards[1]:
      pair = [_response(rng), _response(rng)]
      rewards = [sentiment(text) for text in pair]
    if rng.random() >= 1.0 / (1.0 + math.exp(rewards[1] - rewards[0])):
      pair.reverse()
      rewards.reverse()
    yield {
      "prompt": prompt,
      "chosen": pair[0],
      "rejected": pair[1],
      "score_chosen": rewards[0],
      "score_rejected": rewards[1],
    }


TASKS = {
  "review_demonstrations": review_demonstrations,
  "review_pairs": review_pairs,
}
