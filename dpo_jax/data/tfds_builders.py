"""TFDS builders for preference data, which TFDS's own catalogue lacks.

They are stored as array_record, the one format that reads without TensorFlow.
Importing this module registers them: `tfds:hh_rlhf/harmless_base`,
`tfds:review_pairs`.
"""

from collections.abc import Iterator
import gzip
import json
from typing import Any

import numpy as np
import tensorflow_datasets as tfds

from dpo_jax.data import synthetic
from dpo_jax.system.inputs import is_there


class HhRlhf(tfds.core.GeneratorBasedBuilder):
  """Anthropic's helpful and harmless preferences (arXiv:2204.05862).

  One config for each folder of the release; records are transcripts,
  {"chosen", "rejected"}.
  """

  VERSION = tfds.core.Version("1.0.0")
  BUILDER_CONFIGS = [
    tfds.core.BuilderConfig(name=name)
    for name in (
      "helpful_base",
      "helpful_online",
      "helpful_rejection_sampled",
      "harmless_base",
    )
  ]
  MANUAL_DOWNLOAD_INSTRUCTIONS = """
  Put train.jsonl.gz and test.jsonl.gz of a folder of the release
  (github.com/anthropics/hh-rlhf, say harmless-base/) into
  MANUAL_DIR/hh_rlhf/harmless_base/, for the config harmless_base.
  """

  def _info(self) -> tfds.core.DatasetInfo:
    return tfds.core.DatasetInfo(
      builder=self,
      description=self.__doc__,
      features=tfds.features.FeaturesDict(
        {
          "chosen": tfds.features.Text(),
          "rejected": tfds.features.Text(),
        }
      ),
      homepage="https://github.com/anthropics/hh-rlhf",
    )

  def _split_generators(self, dl_manager: Any) -> dict[str, Any]:
    folder = dl_manager.manual_dir / "hh_rlhf" / self.builder_config.name
    paths = {split: folder / f"{split}.jsonl.gz" for split in ("train", "test")}
    found = {split: path for split, path in paths.items() if is_there(path)}
    if not found:
      raise FileNotFoundError(
        f"{folder} holds neither train.jsonl.gz nor test.jsonl.gz."
        f"{self.MANUAL_DOWNLOAD_INSTRUCTIONS}"
      )
    return {split: self._generate_examples(p) for split, p in found.items()}

  def _generate_examples(self, path: Any) -> Iterator[tuple[int, dict]]:
    with path.open("rb") as whole, gzip.open(whole) as file:
      for index, line in enumerate(file):
        try:
          record = json.loads(line)
          sides = {key: record[key] for key in ("chosen", "rejected")}
        except (ValueError, KeyError, TypeError) as error:
          raise ValueError(
            f"{path}:{index + 1}: not a record with chosen and rejected:"
            f" {error!r}"
          ) from error
        yield index, sides


class ReviewPairs(tfds.core.GeneratorBasedBuilder):
  """The synthetic review task, with its ground-truth rewards."""

  VERSION = tfds.core.Version("1.0.0")
  NUM = {"train": 10_000, "test": 1_000}

  def _info(self) -> tfds.core.DatasetInfo:
    text, number = tfds.features.Text(), tfds.features.Scalar(np.float32)
    return tfds.core.DatasetInfo(
      builder=self,
      description=self.__doc__,
      features=tfds.features.FeaturesDict(
        {
          "prompt": text,
          "chosen": text,
          "rejected": text,
          "score_chosen": number,
          "score_rejected": number,
        }
      ),
    )

  def _split_generators(self, dl_manager: Any) -> dict[str, Any]:
    del dl_manager
    return {
      split: self._generate_examples(num, seed)
      for seed, (split, num) in enumerate(self.NUM.items())
    }

  def _generate_examples(
    self, num: int, seed: int
  ) -> Iterator[tuple[int, dict]]:
    yield from enumerate(synthetic.review_pairs(num, seed))
