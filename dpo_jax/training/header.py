"""The header of a run: its model, objective, data and steps in a few rows."""

import collections
from collections.abc import Iterable, Mapping, Sequence
import textwrap
from typing import Any

import jax
import numpy as np

from dpo_jax import config as config_lib
from dpo_jax.data import packing
from dpo_jax.data.loader import Loader
from dpo_jax.data.sets import Data
from dpo_jax.losses import CATALOGUE
from dpo_jax.training.program import Program
from dpo_jax.training.setup import Run

# Columns of a line; in a pipe 20 more hold the time.
WIDTH = 99
_LABEL = 12
_KEPT = "\N{NO-BREAK SPACE}"
# Batches that are packed to measure the padding.
_NUM_PACKED = 8

_REFERENCES = {
  "cached": "log-probs computed once",
  "frozen": "a copy that runs in every step",
  "adapter_off": "the policy without its adapters",
  "ema": "a copy that follows the policy",
}

Rows = list[tuple[str, str]]


def format_rows(rows: Sequence[tuple[str, str]]) -> list[str]:
  """Formats labels and texts as lines of two aligned columns.

  Args:
    rows: a label and its text; a long text continues on the next lines, and an
      empty one gives no line.
  """
  lines = []
  for label, text in rows:
    # A long label gets a space too.
    indent = max(_LABEL, len(label) + 1)
    lines += textwrap.wrap(
      text,
      WIDTH,
      initial_indent=label.ljust(indent),
      subsequent_indent=" " * _LABEL,
      break_on_hyphens=False,
      break_long_words=False,  # a path to be copied
    )
  return [line.replace(_KEPT, " ") for line in lines]


def join(items: Iterable[str], separator: str = ", ") -> str:
  """Joins items so that `format_rows` breaks lines between them only."""
  return separator.join(item.replace(" ", _KEPT) for item in items)


def held_out(data: Data) -> dict[str, Loader]:
  """Returns the held-out sets by their split in metrics.jsonl."""
  return {config_lib.split_name(n): loader for n, loader in data.eval.items()}


def split_label(split: str) -> str:
  """Names a held-out split: "held out", and its name if there are several."""
  return " ".join(["held out", *split.split("/")[1:]])


def describe(run: Run) -> Rows:
  """Describes a run, as pairs of a label and a text."""
  return [
    *describe_program(run.program, run.config),
    *describe_data(run),
    ("workdir", str(run.workdir)),
  ]


def describe_program(program: Program, config: Any) -> Rows:
  """Describes what is compiled: model, devices, loss and optimizer.

  Args:
    program: built from the config.
    config: resolved.
  """
  mesh = program.placement.mesh
  device, hosts = mesh.devices.flat[0], jax.process_count()
  axes = [f"{axis} {size}" for axis, size in mesh.shape.items() if size > 1]
  devices = f"{mesh.size:,} x {device.device_kind}"
  if device.platform not in device.device_kind.lower():
    devices += f" ({device.platform})"
  return [
    ("model", _describe_model(program, config.policy)),
    ("dtypes", _describe_dtypes(program)),
    ("devices", devices + (f" on {hosts} hosts" if hosts > 1 else "")),
    ("mesh", f"{', '.join(axes) or 'one device'} ({config.parallelism})"),
    ("loss", describe_loss(program.objective.to_dict())),
    ("reference", _describe_reference(config)),
    ("optimizer", _describe_optimizer(config.optimizer)),
  ]


def _describe_model(program: Program, policy: Any) -> str:
  shape = program.policy.config
  name = policy.init
  if name == "random":
    name = f"{policy.preset}, random weights"
  whole = program.policy.abstract_params()
  total, trained = (
    sum(leaf.size for leaf in jax.tree.leaves(tree))
    for tree in (whole, program.split_params(whole)[0])
  )
  part = "all trained"
  if trained < total:
    part = f"{trained:,} of them trained ({100 * trained / total:.2g} %)"
  return f"{name} ({shape.family}): {total:,} parameters, {part}"


def _describe_dtypes(program: Program) -> str:
  parts = program.split_params(program.policy.abstract_params())
  names = ["parameters" if parts[1] is None else "trained parameters", "others"]
  texts = [
    f"{name} {', '.join(sorted({str(x.dtype) for x in jax.tree.leaves(part)}))}"
    for name, part in zip(names, parts, strict=True)
    if part is not None
  ]
  return ", ".join([*texts, f"compute {program.policy.config.compute_dtype}"])


def describe_loss(loss: Mapping[str, Any] | Sequence[Mapping[str, Any]]) -> str:
  """Describes a loss by its name and knobs.

  Args:
    loss: loss from `Objective.to_dict`; or several, each with its weight.
  """
  if not isinstance(loss, Mapping):
    return " + ".join(describe_loss(term) for term in loss)
  row = CATALOGUE[loss["name"]]
  knobs = [
    f"{name} {value:g}" if isinstance(value, float) else f"{name} {value}"
    for name, value in loss.items()
    # The row's own reward and link are what its name says.
    if name != "name" and getattr(row, name, None) != value
  ]
  return loss["name"] + (f" ({', '.join(knobs)})" if knobs else "")


def _describe_reference(config: Any) -> str:
  kind = config.reference.kind
  if kind == "none":
    return kind
  start = config.reference.init or "policy.init"
  return f"{kind}: {_REFERENCES[kind]}, from {start}"


def _describe_optimizer(optimizer: Any) -> str:
  rate = f"{optimizer.name}, rate {optimizer.learning_rate:g}"
  if optimizer.warmup_steps:
    rate += f" after {optimizer.warmup_steps:,} steps of warm-up"
  shape = optimizer.schedule
  shape = shape if shape == "constant" else f"{shape} to 0"
  return (
    f"{rate}, then {shape}; gradients clipped at {optimizer.max_grad_norm:g}"
  )


def describe_data(run: Run) -> Rows:
  """Describes the sources, the splits and the steps."""
  data, config = run.data, run.config
  sets = held_out(data)
  shares = mixture_shares(config.data.sources)
  rows = [
    ("data", describe_report(report) + shares.get(source, ""))
    for source, report in data.reports().items()
  ]
  is_online = config.online.kind != "none"
  rows.append(
    ("prompts" if is_online else "train", describe_lengths(data.train))
  )
  for split, loader in sets.items():
    rows.append((split_label(split), describe_lengths(loader)))
  if not is_online:
    rows.append(("a step", describe_batches(data.train)))
  return [*rows, ("steps", _describe_steps(config, len(data.train.indices)))]


def mixture_shares(entries: Sequence[Mapping[str, Any]]) -> dict[str, str]:
  """Describes the share of the training draws that each source has.

  Args:
    entries: `config.data.sources`.

  Returns:
    Text to append to a line, by source.
  """
  weights = collections.Counter()
  for entry in entries:
    weights[entry["source"]] += entry["weight"]
  return {
    source: f"; {100 * weight / weights.total():.3g} % of the training groups"
    for source, weight in weights.items()
  }


def describe_report(report: Mapping[str, Any]) -> str:
  """Describes as a sentence what was read of a source, dropped and cut.

  Args:
    report: see `Store.report`.
  """
  counts = report["dropped"] | {"broken": report["broken"]}
  dropped = [f"{n:,} {reason}" for reason, n in counts.items() if n]
  cut = [
    f"{report[key]:,} {what}"
    for key, what in (
      ("prompts_cut", "prompts"),
      ("responses_cut", "responses"),
    )
    if report[key]
  ]
  return (
    f"{report['source']}: {report['groups']:,} groups of"
    f" {report['records']:,} records; dropped: {', '.join(dropped) or 'none'};"
    f" cut: {', '.join(cut) or 'none'}; columns not read:"
    f" {', '.join(report['unread']) or 'none'}"
  )


def describe_lengths(loader: Loader) -> str:
  """Describes how many groups a loader has, and their tokens."""
  tokens = packing.group_tokens(
    loader.store.lengths[loader.indices], loader.plan.layout
  )
  median, most = np.percentile(tokens, [50, 95])
  return (
    f"{len(tokens):,} groups; tokens a group: median {median:,.0f}, 95 %"
    f" {most:,.0f}, longest {tokens.max():,}"
  )


def measure_batches(loader: Loader) -> tuple[float, float]:
  """Returns the tokens of a training step, and the share of its padding.

  Both are means over the first 8 steps.
  """
  capacity = tokens = 0
  for step in range(_NUM_PACKED):
    chosen = loader.order(step)
    lengths = packing.group_tokens(
      loader.store.lengths[chosen], loader.plan.layout
    )
    scored = loader.store.num_scored[chosen].sum(1, dtype=np.int64)
    shape, _ = loader.plan.pack(lengths, scored)
    capacity += shape.num_rows * shape.row.num_tokens
    tokens += int(lengths.sum())
  return tokens / _NUM_PACKED, 1 - tokens / capacity


def describe_batches(loader: Loader) -> str:
  """Describes the batches of training: groups, tokens, shapes, padding."""
  tokens, padding = measure_batches(loader)
  by_rows = collections.defaultdict(list)
  for shape in loader.plan.shapes:
    by_rows[shape.num_rows].append(f"{shape.row.num_tokens:,}")
  shapes = ", ".join(
    f"{rows:,} x {' or '.join(sizes)}" for rows, sizes in by_rows.items()
  )
  return (
    f"{loader.batch_size:,} groups, about {tokens:,.0f} tokens; rows x tokens:"
    f" {shapes}; {100 * padding:.0f} % padding"
  )


def _describe_steps(config: Any, num_groups: int) -> str:
  texts = [f"{config.total_steps:,}"]
  if config.online.kind == "none":
    epoch = num_groups / config.batch_size
    texts[0] += f", {config.total_steps / epoch:,.2f} epochs of {epoch:,.1f}"
  for key, what in (("eval", "evaluation"), ("checkpoint", "checkpoint")):
    every = config[key].every_steps
    texts.append(f"{what} " + (f"every {every:,}" if every else "at the end"))
  return join(texts, "; ")
