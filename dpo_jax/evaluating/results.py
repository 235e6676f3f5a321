"""Results of an evaluation: WORKDIR/evaluations/NAME.jsonl, and a table.

{"kind": "evaluation", "step": ..., "changes": ..., ...}   the first line
{"kind": "metrics", "step": ..., "split": ..., ...}        for each set
{"kind": "sample", "prompt": ..., "response": ..., ...}    for each sample
"""

from collections.abc import Iterator, Mapping
import dataclasses
import hashlib
import json
import math
import re
from typing import Any

from etils import epath

from dpo_jax.judges import Wins
from dpo_jax.records.metrics import as_numbers, format_table
from dpo_jax.records.workdir import Workdir
from dpo_jax.system.files import write_atomically
from dpo_jax.training.samples import Samples


@dataclasses.dataclass(frozen=True)
class Results:
  """Results of one evaluation.

  Attributes:
    path: file that holds them, once `write` was called.
    header: step, settings and data of the evaluation.
    metrics: metrics of each held-out set, by split.
    samples: a JSON object for each sample.
  """

  path: epath.Path
  header: Mapping[str, Any]
  metrics: Mapping[str, Mapping[str, Any]]
  samples: list[dict[str, Any]]

  def write(self) -> None:
    """Writes `path`, a JSON object a line, whole or not at all."""
    text = "".join(json.dumps(row) + "\n" for row in self._rows())
    write_atomically(self.path, text)

  def _rows(self) -> Iterator[dict[str, Any]]:
    yield {"kind": "evaluation", **self.header}
    for split, metrics in self.metrics.items():
      where = {"step": self.header["step"], "split": split}
      yield {"kind": "metrics", **where, **as_numbers(metrics)}
    for row in self.samples:
      yield {"kind": "sample", **row}

  def table(self) -> str:
    """Formats the metrics as text: a row for each, a column for each split.

    NaN where a split does not have the metric.
    """
    names = dict.fromkeys(n for found in self.metrics.values() for n in found)
    return format_table(
      [
        {"metric": name}
        | {
          split: float(found.get(name, math.nan))
          for split, found in self.metrics.items()
        }
        for name in names
      ]
    )


def result_path(
  workdir: Workdir,
  name: str,
  step: int,
  settings: Mapping[str, Any],
  *,
  overwrite: bool,
) -> epath.Path:
  """Returns the path of an evaluation's file, WORKDIR/evaluations/NAME.jsonl.

  Args:
    workdir: run directory.
    name: name of the file; "" for the step and a digest of the settings, so
      that the same evaluation has the same name.
    step: step that is evaluated.
    settings: all that tells this evaluation from others; values by key.
    overwrite: whether the file may exist.

  Raises:
    ValueError: the file exists, or a name that is a path.
  """
  if name and not re.fullmatch(r"\w[\w.-]*", name):
    raise ValueError(
      f"name={name!r} must be letters, digits, '_', '-' and '.': it is the name"
      f" of a file in {workdir.evaluations}"
    )
  if not name:
    text = json.dumps(settings, sort_keys=True, default=str)
    name = f"{step}-{hashlib.sha256(text.encode()).hexdigest()[:8]}"
  path = workdir.evaluations / f"{name}.jsonl"
  if path.exists() and not overwrite:
    raise ValueError(
      f"{path} exists: choose another --name, or replace it with --overwrite"
    )
  return path


def sample_rows(
  drawn: Samples, others: Samples | None, wins: Wins | None
) -> list[dict[str, Any]]:
  """Returns a JSON object for each sample.

  Args:
    drawn: samples of the policy.
    others: responses that they were compared with, or None.
    wins: results of the comparison, or None.

  Returns:
    "prompt" and "response", texts; "reward", where the judge gives rewards;
    "other" and "other_reward", where there are others; "wins", where there are
    results: 1 if the response is better, 0.5 for a tie, None without an answer.
  """
  rows: list[dict[str, Any]] = []
  for i, (prompt, text) in enumerate(
    zip(drawn.prompt_texts, drawn.texts, strict=True)
  ):
    row = {"prompt": prompt, "response": text}
    if drawn.rewards is not None:
      row["reward"] = float(drawn.rewards[i])
    if others is not None:
      row["other"] = others.texts[i]
      if others.rewards is not None:
        row["other_reward"] = float(others.rewards[i])
    if wins is not None:
      row |= as_numbers({"wins": wins.of_pairs[i]})
    rows.append(row)
  return rows
