"""data.json: the data of a run, and what its later starts have changed."""

from collections.abc import Mapping
import datetime
import logging
from typing import Any

from dpo_jax.records.workdir import Workdir
from dpo_jax.system.files import read_json, write_json

_LOG = logging.getLogger(__name__)


def add_to_history(
  workdir: Workdir, accepted: Mapping[str, list[str]], step: int | None = None
) -> None:
  """Logs what `resume.allow` has taken, and adds it to data.json.

  Args:
    workdir: run directory; process 0 writes.
    accepted: differences by kind.
    step: step that the run has gone back to.
  """
  for kind, lines in accepted.items():
    _LOG.warning("resume.allow=%s takes:\n  %s", kind, "\n  ".join(lines))
  now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
  entry = {"at": now, "step": step, "accepted": dict(accepted)}
  history = [*read_history(workdir), entry]
  write_json(workdir.data, read_data(workdir) | {"history": history})


def read_data(workdir: Workdir) -> dict[str, Any]:
  """Reads data.json; {} where there is none."""
  return read_json(workdir.data) if workdir.data.exists() else {}


def read_history(workdir: Workdir) -> list[dict[str, Any]]:
  """Reads what `resume` has changed, the latest last.

  Raises:
    ValueError: a damaged data.json; names it.
  """
  found = read_data(workdir).get("history", [])
  if not isinstance(found, list) or not all(isinstance(x, dict) for x in found):
    raise ValueError(
      f'{workdir.data} is damaged: "history" must be a list of objects. Restore'
      " it from a copy"
    )
  return found


def is_described(known: Mapping[str, Any]) -> bool:
  """Returns whether data.json holds more than a history."""
  return "train" in known
