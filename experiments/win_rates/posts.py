"""Synthetic posts and their summaries, whose truth is a formula.

A post tells a deed, its place and a mood, and says other things. A summary is
good if it has these facts, no wrong ones, and little more. News tell the same
facts in other words, and name a second person, as no post does: a second domain
for the same summaries.
"""

import itertools
import math
import random

_VALUES: dict[str, tuple[str, ...]] = {
  "who": ("sister", "boss", "friend", "uncle"),
  "deed": ("quit", "won", "fell", "married"),
  "place": ("paris", "oslo", "lima", "tokyo"),
  "mood": ("angry", "glad", "tired", "afraid"),
}
_KINDS = {value: kind for kind, values in _VALUES.items() for value in values}
# Reward of a right fact; a wrong one costs as much, and half of the best fact.
_WEIGHTS = {"who": 1.0, "deed": 1.5, "place": 1.0, "mood": 0.75}
_WRONG = 0.5
_REPEATED = 0.5
_PER_WORD = 0.1  # cost of every word
_ASIDE_WORD = 0.6  # further cost of words that are neither facts nor joints
# Words of a summary that say nothing themselves; others cost as a repetition.
_JOINTS = {"in", ",", "and"}

_POST = ("my {who} {deed} .", "in {place} .", "i am {mood} .")
_POST_ASIDES = ("it rains .", "first post .", "thanks .", "sorry .")
_NEWS = ("{place} :", "one {who} {deed} today .", "many feel {mood} .")
_NEWS_ASIDES = ("it rains .", "more at nine .", "prices rise .", "no comment .")
_NEWS_THANKS = "thanks to a {who} ."
END = "tl;dr:"
# Shares of summaries that have a fact, and an aside by a writer of average
# care: the most likely summary lacks a fact and has an aside.
_HAS = {"who": 0.8, "deed": 0.85, "place": 0.4, "mood": 0.35}
_ASIDES = ("it rains", "first post")

WORDS = sorted(
  {
    word
    for text in (*_POST, *_POST_ASIDES, *_NEWS, *_NEWS_ASIDES, *_ASIDES)
    for word in (*text.split(), *_NEWS_THANKS.split())
    if "{" not in word
  }
  | _JOINTS
  | set(_KINDS)
  | {END}
)


def draw_post(rng: random.Random) -> str:
  """Draws a post: three sentences of facts and two asides, in any order."""
  sentences = [*_fill(_POST, rng), *rng.sample(_POST_ASIDES, 2)]
  rng.shuffle(sentences)
  return " ".join([*sentences, END])


def draw_news(rng: random.Random) -> str:
  """Draws news: facts in their order between two asides and a second person."""
  place, event, mood = _fill(_NEWS, rng)
  others = [who for who in _VALUES["who"] if who not in event.split()]
  thanks = _NEWS_THANKS.format(who=rng.choice(others))
  between = [*rng.sample(_NEWS_ASIDES, 2), thanks]
  rng.shuffle(between)
  first, second, third = between
  return " ".join([place, first, event, second, mood, third, END])


def _fill(sentences: tuple[str, ...], rng: random.Random) -> list[str]:
  facts = {kind: rng.choice(values) for kind, values in _VALUES.items()}
  return [sentence.format(**facts) for sentence in sentences]


def read_facts(prompt: str) -> dict[str, str]:
  """Returns the facts of a post or of news, by kind.

  The person of the facts stands before the deed.
  """
  words = prompt.split()
  following = itertools.pairwise(words)
  return {
    _KINDS[word]: word
    for word, after in following
    if word in _KINDS and (_KINDS[word] != "who" or _KINDS.get(after) == "deed")
  }


def draw_summary(rng: random.Random, prompt: str) -> str:
  """Draws a person's summary, which may lack facts or have wrong ones.

  A writer's care, a standard normal, makes wrong facts and asides rarer.
  """
  care = rng.gauss(0.0, 1.0)

  def happens(log_odds: float) -> bool:
    return rng.random() < 1.0 / (1.0 + math.exp(care - log_odds))

  told = {}
  for kind, fact in read_facts(prompt).items():
    if rng.random() < _HAS[kind]:
      is_wrong = happens(-2.5)
      told[kind] = rng.choice(_VALUES[kind]) if is_wrong else fact
  parts = [told[kind] for kind in ("who", "deed") if kind in told]
  if "place" in told:
    parts += ["in", told["place"]]
  if "mood" in told:
    parts += [",", told["mood"]]
  if happens(0.5):
    parts += [",", rng.choice(_ASIDES)]
  return " ".join(parts) or _ASIDES[0]


def reward(prompt: str, summary: str) -> float:
  """Computes the ground-truth reward of a summary, at most 3.85.

  A right fact adds its weight, once. Wrong and repeated facts cost, and so do
  words other than facts and joints ("in", "," and "and"). Every word, joints
  included, costs a little more: the four facts with two joints have 3.65.
  """
  facts, told, total = read_facts(prompt), set(), 0.0
  for word in summary.split():
    kind = _KINDS.get(word)
    total -= _PER_WORD
    if kind is None:
      total -= 0.0 if word in _JOINTS else _ASIDE_WORD
    elif word != facts.get(kind):
      total -= _WEIGHTS[kind] + _WRONG
    elif kind in told:
      total -= _REPEATED
    else:
      total += _WEIGHTS[kind]
      told.add(kind)
  return total
