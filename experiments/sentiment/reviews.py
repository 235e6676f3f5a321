"""Reviews, the classifiers that learn from them, and demonstrations."""

from collections.abc import Iterator
import gzip
import itertools
import json
from typing import Any

import numpy as np

from dpo_jax import judges
from dpo_jax.data import synthetic
from dpo_jax.judges.classifier import fit_classifier
from experiments.sentiment.plan import Plan
from experiments.sweep import Row

_ALL = 10**9


def read_reviews(source: str, num: int) -> Iterator[dict[str, Any]]:
  """Yields the first reviews as {"text", "label"}, the label 0 or 1.

  Args:
    source: JSONL file, gzipped or not, or "tfds" for imdb_reviews.
    num: most reviews to yield.

  Raises:
    FileNotFoundError: the file does not exist.
    ValueError: a line does not hold a review.
  """
  if source == "tfds":
    import tensorflow_datasets as tfds  # slow to import, and rarely wanted

    builder = tfds.builder("imdb_reviews", file_format="array_record")
    builder.download_and_prepare(file_format="array_record")
    for row in itertools.islice(builder.as_data_source(split="train"), num):
      text = row["text"]
      text = text.decode("utf-8") if isinstance(text, bytes) else text
      yield {"text": text, "label": int(row["label"])}
    return
  opener = gzip.open if source.endswith(".gz") else open
  with opener(source, "rt", encoding="utf-8") as file:
    for number, line in enumerate(itertools.islice(file, num), 1):
      row = json.loads(line)
      if not isinstance(row.get("text"), str) or row.get("label") not in (0, 1):
        raise ValueError(
          f'{source}:{number}: a review is {{"text": ..., "label": 0 or 1}},'
          f" and this has {', '.join(row)}"
        )
      yield {"text": row["text"], "label": int(row["label"])}


def _read_halves(plan: Plan) -> list[tuple[list[str], np.ndarray]]:
  """Draws `plan.size["reviews"]` reviews, and splits them into two halves.

  Every call returns the same halves. No line of the source is in both.

  Returns:
    Texts and labels (i64 [n], 0 or 1) of the first half, and of the second.
  """
  rows = list(read_reviews(plan.settings.reviews, _ALL))
  order = np.random.default_rng(0).permutation(len(rows))
  halves = np.array_split(order[: plan.size["reviews"]], 2)
  return [
    (
      [rows[i]["text"] for i in half],
      np.array([rows[i]["label"] for i in half]),
    )
    for half in halves
  ]


def fit_classifiers(folder: str, *, plan: Plan) -> None:
  """Fits the labeller on one half of the reviews, the gold judge on the other.

  Writes FOLDER/labeller.npz and FOLDER/gold.npz. Were they one classifier,
  over-optimisation could not show.
  """
  for name, (texts, labels) in zip(
    ("labeller", "gold"), _read_halves(plan), strict=True
  ):
    fit_classifier(texts, labels).write(f"{folder}/{name}.npz")


def measure_classifiers(folder: str, *, plan: Plan) -> list[Row]:
  """Measures each classifier's accuracy on the half that it has not seen.

  Returns:
    One row: `labeller_accuracy` and `gold_accuracy`.
  """
  out = {}
  for name, (texts, labels) in zip(
    ("labeller", "gold"), _read_halves(plan)[::-1], strict=True
  ):
    judge = judges.get_judge(f"classifier:{folder}/{name}.npz")
    logits = judges.ask(judge, [""] * len(texts), texts)
    out[f"{name}_accuracy"] = float(((logits > 0) == labels).mean())
  return [out]


def write_demonstrations(folder: str, *, plan: Plan) -> None:
  """Writes the texts that the reference is tuned on to FOLDER/texts.jsonl.

  They are {"prompt", "completion"}: reviews cut after five words, those of
  eight words or fewer left out; or without reviews the synthetic ones.
  """
  with open(f"{folder}/texts.jsonl", "w", encoding="utf-8") as file:
    if plan.settings.reviews:
      reviews = read_reviews(plan.settings.reviews, plan.size["reviews"])
      for review in reviews:
        words = review["text"].split(" ")
        row = {
          "prompt": " ".join(words[:5]),
          "completion": " " + " ".join(words[5:]),
        }
        if len(words) > 8:
          file.write(json.dumps(row) + "\n")
    else:
      for row in synthetic.review_demonstrations(20_000, 0):
        file.write(json.dumps(row) + "\n")
