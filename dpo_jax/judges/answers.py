"""Answers of a judge that costs money: a file that is only appended to."""

import json
import logging
import os
import threading
from typing import Any

from dpo_jax.system import files, inputs

_LOG = logging.getLogger(__name__)


class Answers:
  """Answers by key, a JSON object a line; threads may share them.

  An answer is in the file once `add` returns. A line that a crash has cut is
  skipped, and its question asked again.
  """

  def __init__(self, path: str):
    """Reads the answers that are there.

    Args:
      path: local file; it and its folder are made by the first answer.

    Raises:
      ValueError: a path that is not local.
    """
    if inputs.is_remote(path):
      raise ValueError(
        f"answers of a judge cannot be appended to {path}: name a local folder"
      )
    self.path = path
    self._lock = threading.Lock()
    self._answers: dict[str, str] = {}
    self._ends_whole = True
    if os.path.exists(path):
      self._read()

  def _read(self) -> None:
    with open(self.path, "rb") as file:
      content = file.read()
    self._ends_whole = content.endswith(b"\n") or not content
    num_damaged = 0
    for line in content.splitlines():
      try:
        row = files.parse_json(line.decode())
        self._answers[row["key"]] = str(row["answer"])
      except (ValueError, KeyError, TypeError):
        num_damaged += 1
    if num_damaged:
      _LOG.warning("%s: skipped %d damaged lines", self.path, num_damaged)

  def __contains__(self, key: str) -> bool:
    return key in self._answers

  def __getitem__(self, key: str) -> str:
    return self._answers[key]

  def add(self, key: str, answer: str, **fields: Any) -> None:
    """Appends an answer to the file, and keeps it.

    Args:
      key: digest of the question.
      answer: text of the judge.
      **fields: numbers to keep with it in the file.
    """
    line = json.dumps({"key": key, "answer": answer, **fields}) + "\n"
    with self._lock:
      if not self._answers:
        os.makedirs(os.path.dirname(self.path), exist_ok=True)
      start = "" if self._ends_whole else "\n"
      content = (start + line).encode()
      # One write, which no other process that appends can cut.
      with (
        files.naming(self.path, len(content)),
        open(self.path, "ab", buffering=0) as file,
      ):
        file.write(content)
      self._ends_whole = True
      self._answers[key] = answer
