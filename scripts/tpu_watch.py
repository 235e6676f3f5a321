"""Watches a run on Cloud TPU: creates, installs, starts, and deletes."""

import argparse
import datetime
import json
import time

import tpu_commands
import tpu_state

# Consecutive failures to create, install or start that end a watch, and most
# restarts of a run whose process was lost.
_MOST_FAILURES = 3
_MOST_RESTARTS = 5


def start(options: argparse.Namespace) -> tpu_commands.Commands:
  """Returns commands that copy code, models and data, and start the run."""
  stages = (tpu_commands.install, tpu_commands.ship, tpu_commands.train)
  return [command for stage in stages for command in stage(options)]


def planned(options: argparse.Namespace) -> tpu_commands.Commands:
  """Lists the commands of a watch in which nothing fails."""
  mark = f"{tpu_commands.workdir(options)}/finished.json"
  return [
    ["gcloud", "storage", "cat", mark],
    *tpu_commands.describe(options),
    *tpu_commands.create(options),
    *start(options),
    *tpu_commands.report(options),
    *tpu_commands.delete(options),
  ]


class Watch:
  """Watches a request and its run.

  A state that is unknown, because a connection was lost or an answer is late,
  is asked for again after `poll_s`. The watch acts only on answers of Google or
  of the run.
  """

  def __init__(self, options: argparse.Namespace):
    self._options = options
    self._mark = f"{tpu_commands.workdir(options)}/finished.json"
    self._suspended = self._failures = self._ends = 0
    self._lost = self._restarts = 0

  def run(self) -> int:
    """Watches until the run has finished or failed; returns the exit code."""
    while True:
      code = self._look()
      if code is not None:
        return code
      time.sleep(self._options.poll_s)

  def _look(self) -> int | None:
    request = tpu_state.read_request(self._options)
    tpu_state.say(f"{self._options.name}: {request.describe()}")
    finished_at = self._finished_at()
    if finished_at and request.state == "ABSENT":
      tpu_state.say(
        f"{self._mark} says that the run is finished: nothing is created. To"
        f" train for more steps: gcloud storage rm {self._mark}"
      )
      return 0
    if finished_at and request.created_at:
      if finished_at >= request.created_at:
        tpu_state.say(f"{self._mark} says that the run is finished")
        tpu_state.run_all(
          tpu_commands.delete(self._options),
          timeout_s=self._options.work_timeout_s,
        )
        return None  # until Google says that nothing is left
      tpu_state.say(
        f"{self._mark} is older than these machines: the run continues"
      )
    if request.state == "FAILED":
      tpu_state.say(f"the request failed: {request.reason}. It is not deleted")
      return 1
    if request.state == "SUSPENDED":
      return self._suspend()
    if request.state != "UNKNOWN":
      self._suspended = 0
    if request.state == "ABSENT":
      return self._try(tpu_commands.create(self._options), "be created")
    return self._tend() if request.state == "ACTIVE" else None

  def _finished_at(self) -> datetime.datetime | None:
    """Reads when the run finished; None if it has not, or if unknown."""
    command = ["gcloud", "storage", "cat", self._mark]
    answer = tpu_state.ask(command, self._options.timeout_s)
    if answer.code == 0:
      try:
        return tpu_state.parse_time(json.loads(answer.out)["finished_at"])
      except (ValueError, KeyError, TypeError):
        tpu_state.say(f"{self._mark} is not understood: {answer.out!r:.200}")
    elif not answer.is_absent:
      tpu_state.say(f"{self._mark}: unknown, {answer.error}")
    return None

  def _suspend(self) -> int | None:
    if not self._options.spot:
      tpu_state.say(
        "the request is suspended, and it is not a spot machine: see Google's"
        " console. It is not deleted"
      )
      return 1
    self._suspended += 1
    if self._suspended < 2:
      return None
    tpu_state.say("suspended twice: the spot machine was preempted")
    tpu_state.run_all(
      tpu_commands.delete(self._options), timeout_s=self._options.work_timeout_s
    )
    self._suspended = 0
    return None

  def _try(self, commands: tpu_commands.Commands, what: str) -> int | None:
    code = tpu_state.run_all(commands, timeout_s=self._options.work_timeout_s)
    self._failures = self._failures + 1 if code else 0
    if self._failures < _MOST_FAILURES:
      return None
    tpu_state.say(
      f"the machines could not {what}, {_MOST_FAILURES} times in a row. They"
      " are not deleted"
    )
    return code

  def _tend(self) -> int | None:
    """Starts the run if no worker has one, and acts on its state.

    Returns:
      The exit code of the watch, or None to look again.
    """
    states = [w.state for w in tpu_state.read_workers(self._options)]
    if not states:
      return None
    tpu_state.say(f"workers: {', '.join(states)}")
    ended = sorted({int(s.split()[1]) for s in states if s.startswith("ended")})
    if any(ended):
      return self._end(max(ended))
    if ended and set(states) == {"ended 0"}:
      self._ends += 1
      if self._ends < 2:
        return None  # look for finished.json once more
      tpu_state.say(
        f"the run has ended with 0, and {self._mark} does not exist"
      )
      return self._end(1)
    if set(states) <= {"running", "ended 0"}:
      self._lost = 0
      return None
    if set(states) != {"none"}:
      self._lost += 1
      if self._lost < 2:
        return None  # it may be about to start
      self._lost = 0
      self._restarts += 1
      if self._restarts > _MOST_RESTARTS:
        tpu_state.say(f"the run was lost {_MOST_RESTARTS} times")
        return self._end(1)
      tpu_state.say("the run is lost on a worker: starting it again on all")
      if tpu_state.run_all(
        tpu_commands.kill(self._options), timeout_s=self._options.timeout_s
      ):
        return None
    commands = start(self._options)
    return self._try(commands, "start the run")

  def _end(self, code: int) -> int:
    """Ends the watch of a run that will not continue by itself.

    Prints its log. Deletes the machines only with --delete, and not after a
    preemption.

    Returns:
      `code`, the exit code of the run.
    """
    tpu_state.show_logs(self._options)
    tpu_state.say(f"the run has ended with exit code {code}")
    options = self._options
    if options.delete and code != tpu_commands.EXIT_PREEMPTED:
      tpu_state.run_all(
        tpu_commands.delete(options), timeout_s=options.work_timeout_s
      )
      return code
    where = f"--name={options.name} --zone={options.zone}"
    tpu_state.say("The machines are kept, and are charged for. To delete them:")
    tpu_state.say(f"  python scripts/launch_tpu.py delete {where}")
    return code
