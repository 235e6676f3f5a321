"""A trained policy as a Hugging Face folder.

  python -m dpo_jax.export --workdir=runs/dpo --out=exported
  python -m dpo_jax.export --workdir=runs/dpo --out=adapter --adapter

config.json, safetensors, tokenizer files, generation_config.json and a model
card: what transformers and vLLM open. `--adapter` writes the adapters of a run
alone, as peft has them; where the run did not start from a model that
transformers opens, that start goes to OUT/base. The best checkpoint is taken,
adapters merged.
"""

from collections.abc import Mapping
import dataclasses
import json
import logging
from typing import Any

from absl import flags
from etils import epath
import jax

from dpo_jax import command_line
from dpo_jax import config as config_lib
from dpo_jax.data import tokenizer_files, tokenizers
from dpo_jax.model_sources import HuggingFaceModel, TrainedRun
from dpo_jax.models import huggingface
from dpo_jax.models.config import DTYPES
from dpo_jax.models.decoder import Policy
from dpo_jax.models.huggingface import peft
from dpo_jax.parallel import mesh
from dpo_jax.records.metrics import read_last_evaluation
from dpo_jax.records.workdir import Workdir
from dpo_jax.system import files
from dpo_jax.system.files import read_json

_LOG = logging.getLogger(__name__)


def export(
  workdir: epath.PathLike,
  out: epath.PathLike,
  *,
  dtype: str = "",
  only_adapter: bool = False,
) -> None:
  """Writes a run's best policy to a folder.

  Args:
    workdir: of the run.
    out: folder to write; it must not hold a model already.
    dtype: of the weights; "" is float32, in which they were trained; of a
      base beside adapters, that of the run.
    only_adapter: write the adapters alone.

  Raises:
    FileNotFoundError: no run, or one without a checkpoint.
    ValueError: a folder that holds a model, an unknown dtype, or
      `only_adapter` of a run that has none.
  """
  run, out = TrainedRun.at(workdir), epath.Path(out)
  model = run.trained_model
  if dtype and dtype not in DTYPES:
    raise ValueError(f"dtype={dtype!r} must be one of {', '.join(DTYPES)}")
  if only_adapter and model.lora is None:
    raise ValueError(
      f"{run.workdir} trained no adapters (lora.rank is 0): leave --adapter out"
    )
  for name in ("config.json", "adapter_config.json"):
    if (out / name).exists():
      raise ValueError(f"{out} holds a model already: choose another folder")
  placement = mesh.make_mesh({"data": -1})
  if only_adapter:
    dtype = dtype or model.param_dtype
    base = _export_adapter(run, out, dtype, placement)
  else:
    dtype = dtype or "float32"
    policy = Policy(
      dataclasses.replace(model, lora=None, frozen="", param_dtype="float32")
    )
    params = run.load(policy, placement, seed=run.config["seed"])
    _write_model(out, run, policy, params, dtype)
    base = run.start.card_name
  card = model_card(run, base=base, is_adapter=only_adapter)
  (out / "README.md").write_text(card)


def _write_model(
  out: epath.Path,
  run: TrainedRun,
  policy: Policy,
  params: Any,
  dtype: str,
) -> None:
  """Writes weights, config and tokenizer."""
  if policy.config.value_head:
    _LOG.warning("the value head is not exported: transformers has none")
    params = {k: x for k, x in params.items() if k != "value_head"}
    policy = Policy(dataclasses.replace(policy.config, value_head=False))
  tokenizer = run.open_tokenizer()
  huggingface.save_params(
    out, policy, params, dtype=dtype, token_ids=_token_ids(tokenizer)
  )
  tokenizer_files.save_tokenizer(tokenizer, out)
  _write_generation_config(out, run.config, tokenizer)


def _export_adapter(
  run: TrainedRun, out: epath.Path, dtype: str, placement: Any
) -> str:
  """Writes the adapters, and their base where transformers cannot open it.

  Returns:
    What the card calls the base.
  """
  model = run.trained_model
  policy = Policy(model)
  params = run.load_trained(policy, placement)
  if isinstance(run.start, HuggingFaceModel):
    base, revision = run.start.name, run.start.revision
    name = base
  else:
    weights = run.load_base(policy, placement)
    bare = dataclasses.replace(model, lora=None, frozen="", value_head=False)
    base, revision, name = str(out / "base"), None, "base"
    _write_model(out / "base", run, Policy(bare), weights, dtype)
  peft.save_adapter(out, params, model, base=base, revision=revision)
  return name


def _token_ids(tokenizer: tokenizers.Tokenizer) -> dict[str, Any]:
  pad_id = tokenizer.pad_id
  return {
    "bos_token_id": tokenizer.bos_id,
    "eos_token_id": tokenizer.eos_id,
    "pad_token_id": tokenizer.eos_id if pad_id is None else pad_id,
  }


def _write_generation_config(
  out: epath.Path, config: Mapping[str, Any], tokenizer: tokenizers.Tokenizer
) -> None:
  stops = list(tokenizer.stop_ids)
  raw = _token_ids(tokenizer) | {
    "eos_token_id": stops if len(stops) > 1 else stops[0],
    "do_sample": config["eval"]["temperature"] > 0,
  }
  if raw["do_sample"]:
    raw |= {
      "temperature": config["eval"]["temperature"],
      "top_p": config["eval"]["top_p"],
      "top_k": config["eval"]["top_k"],
    }
  (out / "generation_config.json").write_text(json.dumps(raw, indent=2) + "\n")


def model_card(run: TrainedRun, *, base: str, is_adapter: bool) -> str:
  """README.md of an export: what was trained, on what, with which metrics.

  Args:
    run: what was trained.
    base: what the run started from.
    is_adapter: whether the export holds adapters alone.
  """
  config, workdir = run.config, run.workdir
  loss = config["loss"]
  name = (
    loss["name"]
    if isinstance(loss, Mapping)
    else "+".join(term["name"] for term in loss)
  )
  figures = read_last_evaluation(workdir, config["data"])
  mixture = config["data"].get("sources") or [config["data"]]
  sources = ", ".join(f"`{entry['source']}`" for entry in mixture)
  revision = "unknown"
  if workdir.git.exists():
    revision = workdir.git.read_text().strip()
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
    "## Held-out figures of the last evaluation",
    "",
    "| figure | value |",
    "|---|---|",
    *(f"| {key} | {value:.6g} |" for key, value in sorted(figures.items())),
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


def main() -> None:
  out = flags.FLAGS.out
  export(
    flags.FLAGS.workdir,
    out,
    dtype=flags.FLAGS.dtype,
    only_adapter=flags.FLAGS.adapter,
  )
  for path in files.tree(out):
    print(f"{files.size(path):>14,}  {path}")


if __name__ == "__main__":
  flags.DEFINE_string("workdir", None, "of the run", required=True)
  flags.DEFINE_string("out", None, "folder to write", required=True)
  flags.DEFINE_string("dtype", "", "of the weights; float32 if empty")
  flags.DEFINE_bool("adapter", False, "write the adapters alone")
  jax.config.update("jax_platforms", "cpu")  # no accelerator is needed
  command_line.run(main)
