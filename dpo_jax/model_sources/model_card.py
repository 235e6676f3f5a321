"""Model card of an export: README.md of its folder."""

from collections.abc import Mapping
import json

from dpo_jax import config as config_lib
from dpo_jax.model_sources.parse import TrainedRun
from dpo_jax.records.metrics import read_last_evaluation
from dpo_jax.records.workdir import Workdir
from dpo_jax.system.files import read_json


def model_card(run: TrainedRun, *, base: str, is_adapter: bool) -> str:
  """Writes the README.md of an export: model, data, metrics and config.

  Args:
    run: run that trained the policy.
    base: name of the model that the run started from.
    is_adapter: whether the export holds adapters alone.
  """
  config, workdir = run.config, run.workdir
  loss = config["loss"]
  name = (
    loss["name"]
    if isinstance(loss, Mapping)
    else "+".join(term["name"] for term in loss)
  )
  metrics = read_last_evaluation(workdir, config["data"])
  mixture = config["data"].get("sources") or [config["data"]]
  sources = ", ".join(f"`{entry['source']}`" for entry in mixture)
  revision = "unknown"
  if workdir.git.exists():
    revision = workdir.git.read_text().split("\n")[-2]
  library = "peft" if is_adapter else "transformers"
  opening = ["---", f"library_name: {library}"]
  if is_adapter:
    opening.append(f"base_model: {base}")
  opening += ["tags:", "- dpo_jax", f"- {name}", "---"]
  load = ["model = AutoModelForCausalLM.from_pretrained(FOLDER)"]
  if is_adapter:
    place = f'f"{{FOLDER}}/{base}"' if base == "base" else repr(base)
    load = [
      f"model = AutoModelForCausalLM.from_pretrained({place})",
      "model = PeftModel.from_pretrained(model, FOLDER)",
    ]
  lines = [
    *opening,
    f"# {name} with dpo_jax",
    "",
    f"Trained from `{base}` on {sources} for"
    f" {config['total_steps']} steps of {config['batch_size']} groups.",
    "",
    "```python",
    *load,
    "```",
    "",
    f"- code: dpo_jax at {revision}",
    f"- data digest: {_data_digest(workdir)}",
    "",
    "## Held-out metrics of the last evaluation",
    "",
    "| metric | value |",
    "|---|---|",
    *(f"| {key} | {value:.6g} |" for key, value in sorted(metrics.items())),
    "",
    "## Config",
    "",
    "```json",
    json.dumps(config, indent=2, sort_keys=True),
    "```",
  ]
  return "\n".join(lines) + "\n"


def _data_digest(workdir: Workdir) -> str:
  if not workdir.data.exists():
    return "unknown"
  identity = config_lib.flatten(read_json(workdir.data))
  return "; ".join(f"{name}: {value}" for name, value in identity)
