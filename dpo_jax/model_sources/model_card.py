"""Model card of an export: README.md of its folder."""

from collections.abc import Mapping
import json
import re
from typing import Any

from dpo_jax.model_sources.parse import TrainedRun
from dpo_jax.records.metrics import read_evaluation
from dpo_jax.records.workdir import Workdir
from dpo_jax.system.files import read_json

_BOUNDS = ("_low", "_high", "_error")  # of the metric without the suffix
# A path of two parts at least, such as /home/me/pairs.jsonl; no URL.
_ABSOLUTE = re.compile(r"(?<![\w/.}])/(?:[^\s/\"'`,|]+/)+([^\s/\"'`,|]+/?)")
# Lines of code that give a model its inputs.
_PROMPT = ('inputs = tokenizer("We saw", return_tensors="pt")',)
_CHAT = (
  'messages = [{"role": "user", "content": "Name three colours."}]',
  "inputs = tokenizer.apply_chat_template(",
  "  messages,",
  "  add_generation_prompt=True,",
  "  return_dict=True,",
  '  return_tensors="pt",',
  ")",
)


def model_card(
  run: TrainedRun,
  *,
  folder: str,
  name: str,
  base: str,
  hub_base: str,
  is_adapter: bool,
) -> str:
  """Returns the README.md of an export.

  Args:
    run: run that trained the policy.
    folder: folder of the export.
    name: ORG/NAME that it is uploaded to, or ""; the card of an upload leaves
      out folders of this machine.
    base: name of the model that the run started from; "base" where the export
      of adapters holds it.
    hub_base: ORG/NAME of that model, or "".
    is_adapter: whether the export holds adapters alone.
  """
  config, workdir = run.config, run.workdir
  loss = config["loss"]
  losses = (
    loss["name"]
    if isinstance(loss, Mapping)
    else "+".join(term["name"] for term in loss)
  )
  commands = "\n".join(workdir.read_lines(workdir.command))
  sections = [
    _front_matter(hub_base, losses, is_adapter),
    f"# {losses} with dpo_jax",
    f"Step {run.best_step} of {config['total_steps']} ({config['batch_size']}"
    f" groups a step), trained from `{base}`.",
    "License: unknown. Those of the base model and of the data apply.",
    _fenced("python", _snippet(run, folder, name, base, is_adapter)),
    "## Held-out metrics",
    _metrics(run),
    "## Data",
    _data(workdir),
    "## Training",
    f"Code: dpo_jax at {', then '.join(workdir.read_lines(workdir.git))}",
    _fenced("bash", commands or "# The command was not recorded."),
    _fenced("json", json.dumps(config, indent=2, sort_keys=True)),
  ]
  card = "\n\n".join(sections) + "\n"
  return without_folders(card) if name else card


def without_folders(text: str) -> str:
  """Replaces the folders of absolute paths by three dots: ".../pairs.jsonl"."""
  return _ABSOLUTE.sub(lambda match: f".../{match[1]}", text)


def _fenced(language: str, text: str) -> str:
  return f"```{language}\n{text}\n```"


def _front_matter(hub_base: str, losses: str, is_adapter: bool) -> str:
  lines = [f"library_name: {'peft' if is_adapter else 'transformers'}"]
  if hub_base:  # the Hub refuses folders
    lines.append(f"base_model: {hub_base}")
  lines += ["license: unknown", "tags:", "- dpo_jax", f"- {losses}"]
  return "\n".join(["---", *lines, "---"])


def _snippet(
  run: TrainedRun, folder: str, name: str, base: str, is_adapter: bool
) -> str:
  """Returns code that loads the export and samples from it."""
  where = "folder"
  if is_adapter:
    where = 'f"{folder}/base"' if base == "base" else json.dumps(base)
  lines = ["from transformers import AutoModelForCausalLM, AutoTokenizer"]
  if is_adapter:
    lines.insert(0, "from peft import PeftModel")
  if name:
    lines.insert(0, "from huggingface_hub import snapshot_download")
    lines.append(f"folder = snapshot_download({json.dumps(name)})")
  else:
    lines.append(f"folder = {json.dumps(folder)}")
  lines += [
    f"tokenizer = AutoTokenizer.from_pretrained({where})",
    f"model = AutoModelForCausalLM.from_pretrained({where})",
  ]
  if is_adapter:
    lines.append("model = PeftModel.from_pretrained(model, folder)")
  lines += [
    *(_CHAT if run.open_tokenizer().has_chat_template else _PROMPT),
    "tokens = model.generate(**inputs, max_new_tokens=64)",
    "print(tokenizer.decode(tokens[0]))",
  ]
  return "\n".join(lines)


def _metrics(run: TrainedRun) -> str:
  """Returns a table of held-out metrics: a row each, by name.

  Its columns are the evaluation at the best step and the last evaluation.
  """
  data = run.config["data"]
  columns = {
    f"step {run.best_step}": read_evaluation(
      run.workdir, data, step=run.best_step
    ),
    "last evaluation": read_evaluation(run.workdir, data),
  }
  columns = {title: found for title, found in columns.items() if found}
  names = sorted({name for found in columns.values() for name in found})
  rows = [
    [name, *(_format(name, found) for found in columns.values())]
    for name in names
    if not name.endswith(_BOUNDS)
  ]
  note = "In parentheses a 95 % interval; after +- a standard error."
  return f"{_table(['metric', *columns], rows)}\n\n{note}"


def _format(name: str, metrics: Mapping[str, float]) -> str:
  if name not in metrics:
    return ""
  low, high, error = (metrics.get(f"{name}{bound}") for bound in _BOUNDS)
  text = f"{metrics[name]:.6g}"
  if low is not None and high is not None:
    return f"{text} ({low:.4g} to {high:.4g})"
  return text if error is None else f"{text} +- {error:.3g}"


def _data(workdir: Workdir) -> str:
  """Returns a table of name, groups and sha256 of all data of a run.

  Its rows are the sources, the splits and the tokenizer's parts. It is empty if
  the run has no data.json.
  """
  known = read_json(workdir.data) if workdir.data.exists() else {}
  splits = [
    [name, entry["groups"], entry["content"]]
    for name, entry in known.items()
    if isinstance(entry, Mapping) and "content" in entry
  ]
  sources = [
    [f"`{source}`", report["groups"], report["content"]]
    for source, report in known.get("reports", {}).items()
  ]
  tokenizer = [[key, "", x] for key, x in known.get("tokenizer", {}).items()]
  rows = [*sources, *splits, *tokenizer]
  return _table(["source, split or tokenizer's part", "groups", "sha256"], rows)


def _table(heading: list[str], rows: list[list[Any]]) -> str:
  lines = [heading, ["---"] * len(heading), *rows]
  return "\n".join(f"| {' | '.join(map(str, line))} |" for line in lines)
