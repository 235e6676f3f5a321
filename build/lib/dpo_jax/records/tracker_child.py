"""Child process that sends what a run records to a tracker.

It reads a JSON object a line: the settings, then {"step", "metrics"},
{"step", "samples"} or {"plot"}, until its input ends. It writes one too:
{"link"}, where the run is shown, or {"error"}. This file imports nothing of
dpo_jax, and runs without it.
"""

from collections.abc import Mapping
import json
import os
import signal
import sys
from typing import Any

# Seconds after which a call of a tracker that has not returned ends the child.
_CALL_S = 300


def main() -> None:
  """Sends what stdin holds; ends with code 1 after an error."""
  out = os.fdopen(os.dup(1), "w")
  os.dup2(2, 1)  # trackers print

  def tell(**message: str) -> None:
    out.write(json.dumps(message) + "\n")
    out.flush()

  try:
    signal.alarm(_CALL_S)
    tracker = _Tracker(json.loads(sys.stdin.readline()))
    tell(link=tracker.link)
    signal.alarm(0)
    for line in sys.stdin:
      signal.alarm(_CALL_S)
      tracker.send(json.loads(line))
      signal.alarm(0)
    signal.alarm(_CALL_S)
    tracker.close()
  except BaseException as error:
    tell(error=f"{type(error).__name__}: {error}")
    os._exit(1)  # without the tracker's own wait at the exit


class _Tracker:
  """A run of W&B, or of trackio, which has the same interface."""

  def __init__(self, settings: Mapping[str, Any]):
    """Opens the run of these settings, or resumes it.

    Args:
      settings: "kind", "project", "name", "id", "folder", "mode", "config".
    """
    opening = {name: settings[name] for name in ("project", "name", "config")}
    if settings["kind"] == "wandb":
      import wandb

      self._run = wandb.init(
        **opening,
        id=settings["id"],
        resume="allow",
        dir=settings["folder"],
        mode=None if settings["mode"] == "auto" else settings["mode"],
        settings=wandb.Settings(silent=True),
      )
      self._module: Any = wandb
      self.link = str(self._run.url or self._run.dir)
    else:
      import trackio

      # It knows a run by its name alone.
      opening["name"] += f"-{settings['id'][:8]}"
      self._run = trackio.init(**opening, resume="allow", embed=False)
      self._module = trackio
      self.link = f"trackio show --project {settings['project']}"

  def send(self, message: Mapping[str, Any]) -> None:
    if "metrics" in message:
      self._run.log(message["metrics"], step=message["step"])
    elif "samples" in message:
      rows = message["samples"]
      columns = list(rows[0])
      data = [[row[name] for name in columns] for row in rows]
      table = self._module.Table(columns=columns, data=data)
      self._run.log({"samples": table}, step=message["step"])
    else:
      name = os.path.splitext(os.path.basename(message["plot"]))[0]
      self._run.log({name: self._module.Image(message["plot"])})

  def close(self) -> None:
    self._run.finish()


if __name__ == "__main__":
  main()
