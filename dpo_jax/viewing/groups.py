"""Groups of a batch on a terminal: of a run to be, or of a dumped step."""

from collections.abc import Iterable, Sequence
import logging
import tempfile
from typing import Any

from etils import epath
import jax
from rich.console import Console
from rich.text import Text

from dpo_jax import model_sources
from dpo_jax.data.addresses import find_addresses
from dpo_jax.data.groups import Limits
from dpo_jax.data.tokenizers import Tokenizer
from dpo_jax.parallel import mesh
from dpo_jax.records.workdir import Workdir
from dpo_jax.system.files import read_json
from dpo_jax.training import header, nonfinite
from dpo_jax.training.setup import Run, build_run
from dpo_jax.viewing import rows
from dpo_jax.viewing.rows import Group

_LOG = logging.getLogger(__name__)


def build(config: Any) -> Run:
  """Builds the run of a config to look at it, on any machine.

  Args:
    config: complete. A mesh that these devices cannot form becomes one device.

  Raises:
    ValueError: see `setup.build_run`.
  """
  grid = None
  try:
    mesh.settle_sizes(config.mesh, jax.device_count())
  except ValueError:
    _LOG.warning(
      "mesh=%s is not of this machine: batches are packed as for one device",
      dict(config.mesh),
    )
    grid = mesh.make_mesh({}, jax.devices()[:1])
  with tempfile.TemporaryDirectory() as folder:  # nothing is written to it
    return build_run(config, Workdir.at(folder), on=grid, acts_on_checks=False)


def show(
  console: Console,
  run: Run,
  split: str,
  step: int,
  num_groups: int,
  *,
  with_ids: bool,
) -> None:
  """Prints the first groups of a batch as a step gets them.

  Args:
    console: console to print on.
    run: run that is built.
    split: "train", "eval" or "eval/NAME".
    step: training step, or batch of an evaluation.
    num_groups: groups to print.
    with_ids: whether to print the id of each token.

  Raises:
    ValueError: a split or batch that the run does not have.
  """
  loaders = {"train": run.data.train, **header.held_out(run.data)}
  if split not in loaders:
    raise ValueError(f"--split={split} must be one of {', '.join(loaders)}")
  loader = loaders[split]
  if split == "train":
    batch = loader.batch(step)
  elif step < (count := loader.num_eval_batches()):
    batch = loader.eval_batch(step)
  else:
    raise ValueError(f"--step={step}: {split} has {count} batches, 0 the first")
  found = list(rows.read_groups(batch))[:num_groups]
  where = find_addresses(loader.store, [group.example_id for group in found])
  data = run.config.data
  console.print(rows.legend())
  _print_groups(
    console,
    found,
    where,
    run.data.tokenizer,
    Limits(data.max_tokens, data.max_prompt_tokens),
    with_ids=with_ids,
  )


def show_dump(
  console: Console, path: epath.PathLike, num_groups: int, *, with_ids: bool
) -> None:
  """Prints groups of a step that was not finite, the guilty ones first.

  Args:
    console: console to print on.
    path: WORKDIR/nonfinite/STEP.npz.
    num_groups: groups to print.
    with_ids: whether to print the id of each token.

  Raises:
    FileNotFoundError: no such file, or it is not in the workdir of its run.
  """
  path = epath.Path(path)
  facts = path.with_suffix(".json")
  for file in (path, facts):
    if not file.exists():
      raise FileNotFoundError(f"--dump={path}: {file} does not exist")
  trained = model_sources.TrainedRun.at(path.parent.parent)
  record = read_json(facts)
  by_id = {group["id"]: group for group in record["groups"]}
  found = list(rows.read_groups(nonfinite.read_batch(path)))
  found.sort(key=lambda group: not by_id[group.example_id]["is_guilty"])
  found = found[:num_groups]
  labels = []
  for group in found:
    its = by_id[group.example_id]
    numbers = [f"{k} {its[k]}" for k in ("loss", "gradient_weight", "logps")]
    guilt = "guilty, " if its["is_guilty"] else ""
    labels.append(f"{its['address']}, {guilt}{', '.join(numbers)}")
  data = trained.config["data"]
  console.print(f"step {record['step']}: {record['fault']}")
  console.print(rows.legend())
  _print_groups(
    console,
    found,
    labels,
    trained.open_tokenizer(),
    Limits(data["max_tokens"], data["max_prompt_tokens"]),
    with_ids=with_ids,
  )


def _print_groups(
  console: Console,
  groups: Iterable[Group],
  labels: Sequence[str],
  tokenizer: Tokenizer,
  limits: Limits,
  *,
  with_ids: bool,
) -> None:
  has_color = console.color_system is not None and not console.no_color
  for group, label in zip(groups, labels, strict=True):
    title = f"\ngroup {group.example_id}, row {group.row}: {label}"
    console.print(Text(title, "bold"), soft_wrap=True)
    for part in group.parts:
      console.print(Text(_describe(part, group, limits), "dim"))
      console.print(
        rows.render_part(
          part, tokenizer, with_ids=with_ids, has_color=has_color
        ),
        soft_wrap=not console.is_terminal,
      )


def _describe(part: rows.Part, group: Group, limits: Limits) -> str:
  count = len(part.ids)
  if part.slot < 0:
    limit = " (at its limit)" if group.is_prompt_at_limit(limits) else ""
    return f"prompt, {count:,} tokens{limit}"
  score = group.scores[part.slot]
  num_scored = part.is_scored.sum()
  return (
    f"response {part.slot}, score {score:g}, {count:,} tokens, {num_scored:,}"
    " scored"
  )
