"""Runs of a sweep: their order, and the part that a worker does."""

from collections.abc import Callable, Mapping, Sequence
import dataclasses
import json
from typing import Any

from dpo_jax import config as config_lib
from dpo_jax.records import resume

SCALES = ("tiny", "paper")

Row = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Settings:
  """Choices of a command line.

  Attributes:
    workdir: folder of the sweep.
    scale: "tiny" or "paper".
    policy: folder of a Hugging Face model, or "" for the experiment's own.
    reviews: JSONL file of real reviews, "tfds" for imdb_reviews, or "".
    evaluation: keys of the judge on a server, such as "eval.judge".
  """

  workdir: str
  scale: str
  policy: str = ""
  reviews: str = ""
  evaluation: Mapping[str, Any] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Run:
  """One piece of work that is done once, in its own folder.

  Attributes:
    name: folder name; unique in the sweep.
    labels: columns that its rows begin with, such as method, beta and seed.
    config: config that `dpo_jax.train` trains, or None.
    after: names of runs that must be finished before it starts.
    work: (folder) -> None, called before the training: makes files.
    measure: (folder) -> rows, called after the training; None: one row, of the
      labels alone.
    inputs: other values that `work` and `measure` depend on. A change of
      them is refused, as one of the config is.
    num_params: parameters of the policy, for the estimate, where the policy's
      folder is not on this machine; 0: read from the policy.
    tokens_per_group: tokens of a group, for the estimate; 0: data.max_tokens
      for each response.
    sampled_tokens: tokens that `measure` samples, prompts included, for the
      estimate.
    questions: questions that `measure` asks a judge on a server.
    dollars: cost of these, at most.
  """

  name: str
  labels: Mapping[str, Any]
  config: Any = None
  after: tuple[str, ...] = ()
  work: Callable[[str], None] | None = None
  measure: Callable[[str], list[Row]] | None = None
  inputs: Mapping[str, Any] = dataclasses.field(default_factory=dict)
  num_params: int = 0
  tokens_per_group: float = 0.0
  sampled_tokens: float = 0.0
  questions: int = 0
  dollars: float = 0.0

  def spec(self) -> dict[str, Any]:
    """Returns everything that decides the run's result, as plain JSON."""
    flat = dict(config_lib.flatten(self.config)) if self.config else {}
    keys = {
      f"config.{k}": v for k, v in flat.items() if resume.decides_result(k)
    }
    keys |= {f"inputs.{k}": v for k, v in self.inputs.items()}
    keys |= {f"labels.{k}": v for k, v in self.labels.items()}
    keys["after"] = list(self.after)
    return json.loads(json.dumps(keys, default=str))


def in_order(runs: Sequence[Run]) -> list[Run]:
  """Sorts runs so that each comes after those that it starts from.

  Raises:
    ValueError: a name that occurs twice, a missing name, or a cycle.
  """
  by_name = {run.name: run for run in runs}
  if len(by_name) != len(runs):
    names = [run.name for run in runs]
    twice = sorted({name for name in names if names.count(name) > 1})
    raise ValueError(f"the sweep names a run twice: {', '.join(twice)}")
  done: dict[str, Run] = {}
  waiting = list(runs)
  while waiting:
    ready = [r for r in waiting if all(name in done for name in r.after)]
    if not ready:
      lines = [f"{r.name} after {', '.join(r.after)}" for r in waiting]
      raise ValueError(
        "these runs wait for each other, or for one that the sweep does not"
        " have:\n  " + "\n  ".join(lines[:10])
      )
    done |= {run.name: run for run in ready}
    waiting = [run for run in waiting if run.name not in done]
  return list(done.values())


def choose(
  runs: Sequence[Run], *, only: Sequence[str] = (), shard: str = "0/1"
) -> list[Run]:
  """Chooses the runs that this worker does, in order.

  Args:
    runs: the whole sweep.
    only: names of runs; the runs that they start from are chosen too.
    shard: "i/n" for the i-th (from 0) of n workers.

  Returns:
    The worker's runs.

  Raises:
    ValueError: an unknown name, or a shard that is not of this form.
  """
  ordered = in_order(runs)
  by_name = {run.name: run for run in ordered}
  unknown = sorted(set(only) - by_name.keys())
  if unknown:
    raise ValueError(
      f"--only={','.join(unknown)}: no such run. This sweep has:"
      f" {', '.join(by_name)}"
    )
  wanted = set(only) or by_name.keys()
  for run in reversed(ordered):
    if run.name in wanted:
      wanted = wanted | set(run.after)
  index, _, count = shard.partition("/")
  if not (index.isdecimal() and count.isdecimal() and int(index) < int(count)):
    raise ValueError(
      f"--shard={shard!r} must be i/n with 0 <= i < n, such as 0/4"
    )
  chosen = [run for run in ordered if run.name in wanted]
  return chosen[int(index) :: int(count)]
