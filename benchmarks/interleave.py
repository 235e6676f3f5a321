"""Runs contenders in turn on one machine, each in its own process.

A contender serves commands on stdin. "start" takes the first step, and "run N"
N more; both answer with metrics. Turns are short, so that other work on the
machine slows all contenders alike.
"""

import argparse
from collections.abc import Callable, Mapping, Sequence
import contextlib
import json
import os
import pathlib
import resource
import subprocess
import sys
import time
from typing import IO, Any, Protocol

import numpy as np

MARK = "@@"  # libraries write to stdout too
_ROOT = str(pathlib.Path(__file__).parents[1])


class Trainer(Protocol):
  """A trainer that a contender's process serves."""

  def start(self) -> dict[str, Any]:
    """Compiles, takes the first step, and answers as `run` does."""

  def run(self, num_steps: int) -> dict[str, Any]:
    """Takes steps, and answers with `Stopwatch.stop` and metrics."""


def serve(trainer: Trainer) -> None:
  """Answers each command of stdin with a line of JSON, until stdin ends."""
  for line in sys.stdin:
    command, *arguments = line.split()
    if command == "start":
      answer = trainer.start()
    else:
      answer = trainer.run(int(arguments[0]))
    print(MARK + json.dumps(answer), flush=True)


def read_work(
  folder: str,
) -> tuple[dict[str, Any], list[list[np.ndarray]]]:
  """Reads what `benchmarks.peers.export` wrote.

  Returns:
    The content of work.json, and token ids of every group: prompt, chosen,
    rejected.
  """
  work = json.loads((pathlib.Path(folder) / "work.json").read_text())
  lengths = np.array(work["lengths"])
  tokens = np.load(f"{folder}/tokens.npy")
  parts = iter(np.split(tokens, np.cumsum(lengths)[:-1]))
  return work, [[next(parts) for _ in group] for group in lengths]


class Stopwatch:
  """Measures time and memory of a turn."""

  def __init__(self, work: Mapping[str, Any], steps: Sequence[int]):
    """Starts the clock.

    Args:
      work: `batch_size`, and by step `tokens`, `useful_flops` and
        `shared_flops`; see `workload.Work`.
      steps: indices of the turn's steps in `work`.
    """
    self._work, self._steps = work, steps
    self._began, self._cpu_began = time.monotonic(), time.process_time()

  def stop(self, **metrics: Any) -> dict[str, Any]:
    """Returns the turn's answer: its time, work and memory.

    Returns:
      "seconds" and "cpu_seconds"; "steps" and "pairs"; "tokens", "useful_flops"
      and "shared_flops", sums over the steps; "peak_rss_mb"; and the entries of
      `metrics`.
    """
    seconds = time.monotonic() - self._began
    cpu_seconds = time.process_time() - self._cpu_began
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return {
      "seconds": seconds,
      "cpu_seconds": cpu_seconds,
      "steps": len(self._steps),
      "pairs": len(self._steps) * self._work["batch_size"],
      **{
        name: sum(self._work[name][i] for i in self._steps)
        for name in ("tokens", "useful_flops", "shared_flops")
      },
      "peak_rss_mb": usage.ru_maxrss / 1024,
      **metrics,
    }


class Contender:
  """A process that takes training steps on command."""

  def __init__(
    self,
    name: str,
    command: Sequence[str],
    *,
    env: Mapping[str, str] | None = None,
    stderr: IO[str] | None = None,
  ):
    """Starts the process in the project's folder, where it waits.

    Args:
      name: name in the table.
      command: command line.
      env: variables to add to the environment.
      stderr: file for its messages; None: those of this process.
    """
    self.name, self.command = name, list(command)
    self._process = subprocess.Popen(
      self.command,
      stdin=subprocess.PIPE,
      stdout=subprocess.PIPE,
      stderr=stderr,
      env={**os.environ, **(env or {})},
      cwd=_ROOT,
      text=True,
    )
    self.first: dict[str, Any] = {}
    self.turns: list[dict[str, Any]] = []

  def ask(self, command: str) -> dict[str, Any]:
    """Sends a command, "start" or "run N", and waits for the answer.

    Raises:
      RuntimeError: the process ended without one.
    """
    with contextlib.suppress(BrokenPipeError):  # it ended: raised below
      self._process.stdin.write(command + "\n")
      self._process.stdin.flush()
    for line in self._process.stdout:
      if line.startswith(MARK):
        return json.loads(line.removeprefix(MARK))
    raise RuntimeError(
      f"{self.name} ended with code {self._process.wait()} at {command!r}:"
      f" {' '.join(self.command)}"
    )

  def kill(self) -> None:
    """Stops the process at once; a question that waits then raises."""
    self._process.kill()

  def close(self) -> None:
    """Ends the process."""
    with contextlib.suppress(BrokenPipeError):
      self._process.stdin.close()
    self._process.wait()


def ours(
  name: str,
  options: Sequence[str],
  env: Mapping[str, str] | None = None,
) -> Contender:
  """Starts a contender that runs `benchmarks.ours` with these options."""
  command = [sys.executable, "-m", "benchmarks.ours", *options]
  return Contender(name, command, env=env)


def add_options(
  parser: argparse.ArgumentParser, *, num_turns: int, steps_a_turn: int
) -> None:
  """Adds options for the number and length of turns."""
  parser.add_argument("--num_turns", type=int, default=num_turns)
  parser.add_argument("--steps_a_turn", type=int, default=steps_a_turn)


def measure(
  contenders: Sequence[Contender],
  options: argparse.Namespace,
  *,
  check: Callable[[Sequence[Contender]], None] = lambda contenders: None,
) -> list[dict[str, Any]]:
  """Starts contenders, warms them up, times them in turn, and ends them.

  Args:
    contenders: processes; each keeps its answers.
    options: parsed options of `add_options`.
    check: called after all first steps, and before anything is timed.

  Returns:
    One row for each contender; see `summarize`.
  """
  try:
    for contender in contenders:
      contender.first = contender.ask("start")
    check(contenders)
    for turn in range(1 + options.num_turns):
      for contender in contenders:
        answer = contender.ask(f"run {options.steps_a_turn}")
        if turn:  # the first warms up
          contender.turns.append(answer)
    return [summarize(contender) for contender in contenders]
  finally:
    for contender in contenders:
      contender.close()


def check_same_work(contenders: Sequence[Contender]) -> None:
  """Checks that all contenders took the same first step.

  Raises:
    ValueError: losses or gradient norms differ by more than 1e-4, relative.
  """
  first = contenders[0].first
  for contender in contenders[1:]:
    for name in ("loss", "grad_norm"):
      one, other = first[name], contender.first[name]
      if abs(one - other) > 1e-4 * abs(one):
        raise ValueError(
          f"{contender.name} has {name} {other} at the first step, and"
          f" {contenders[0].name} has {one}: they do not do the same work"
        )


def times_as_fast(mine: Contender, peer: Contender) -> float:
  """Returns how many times as many tokens a second `mine` has as `peer`.

  It is the median of the ratios of single turns.
  """
  ratios = [
    (a["tokens"] / a["seconds"]) / (b["tokens"] / b["seconds"])
    for a, b in zip(mine.turns, peer.turns, strict=True)
  ]
  return float(np.median(ratios))


def summarize(contender: Contender) -> dict[str, Any]:
  """Summarises the turns of a contender as a row of a table.

  Returns:
    "name"; medians over turns: "pairs_per_second", "tokens_per_second",
    "useful_gflops_per_second", "shared_gflops_per_second",
    "tokens_per_cpu_second" and "useful_gflops_per_cpu_second", on a CPU also
    "fraction_of_matmul_peak" and "cpu_fraction_of_matmul_peak"; two
    "tokens_per_second_quartiles"; of the last turn "peak_rss_mb" and any
    "peak_device_gib"; over all turns "padding" and "host_wait_fraction"; of the
    first step "first_step_s", "first_loss" and "first_grad_norm".
  """
  turns = contender.turns
  rates = np.array([t["tokens"] / t["seconds"] for t in turns])
  low, middle, high = np.percentile(rates, [25, 50, 75])

  def median(numerator: str) -> float:
    return float(np.median([t[numerator] / t["seconds"] for t in turns]))

  device = {}
  if "peak_device_gib" in turns[0]:
    device["peak_device_gib"] = turns[-1]["peak_device_gib"]
  of_peak = {}
  if "matmul_flops_per_second" in turns[0]:
    for name, time in (("", "seconds"), ("cpu_", "cpu_seconds")):
      of_peak[f"{name}fraction_of_matmul_peak"] = float(
        np.median(
          [
            t["useful_flops"] / t[time] / t[f"matmul_flops_per_{name}second"]
            for t in turns
          ]
        )
      )
  return {
    "name": contender.name,
    "pairs_per_second": median("pairs"),
    "tokens_per_second": float(middle),
    "tokens_per_second_quartiles": [float(low), float(high)],
    "useful_gflops_per_second": median("useful_flops") / 1e9,
    "shared_gflops_per_second": median("shared_flops") / 1e9,
    "tokens_per_cpu_second": float(
      np.median([t["tokens"] / t["cpu_seconds"] for t in turns])
    ),
    "useful_gflops_per_cpu_second": float(
      np.median([t["useful_flops"] / t["cpu_seconds"] for t in turns])
    )
    / 1e9,
    **of_peak,
    "peak_rss_mb": turns[-1]["peak_rss_mb"],
    **device,
    "padding": float(np.mean([t["padding"] for t in turns])),
    "host_wait_fraction": sum(t.get("host_wait_s", 0.0) for t in turns)
    / sum(t["seconds"] for t in turns),
    "first_step_s": contender.first.get("first_step_s"),
    "first_loss": contender.first["loss"],
    "first_grad_norm": contender.first["grad_norm"],
  }
