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
import pathlib
from typing import Any

from absl import app, flags
from etils import epath
import jax

from dpo_jax import config as config_lib
from dpo_jax import initialize, mesh
from dpo_jax.data import tokenizer_files, tokenizers
from dpo_jax.metrics import read_metrics
from dpo_jax.models import hf, peft
from dpo_jax.models.config import DTYPES, ModelConfig
from dpo_jax.models.decoder import Policy

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
  workdir, out = epath.Path(workdir), epath.Path(out)
  config, model = _read(workdir)
  if dtype and dtype not in DTYPES:
    raise ValueError(f"dtype={dtype!r} must be one of {', '.join(DTYPES)}")
  if only_adapter and model.lora is None:
    raise ValueError(
      f"{workdir} trained no adapters (lora.rank is 0): leave --adapter out"
    )
  for name in ("config.json", "adapter_config.json"):
    if (out / name).exists():
      raise ValueError(f"{out} holds a model already: choose another folder")
  placement = mesh.make_mesh({"data": -1})
  if only_adapter:
    dtype = dtype or model.param_dtype
    base = _export_adapter(workdir, out, config, model, dtype, placement)
  else:
    dtype = dtype or "float32"
    policy = Policy(
      dataclasses.replace(model, lora=None, frozen="", param_dtype="float32")
    )
    params = initialize.load_params(
      f"run:{workdir}", policy, placement, seed=config["seed"]
    )
    _write_model(out, workdir, config, policy, params, dtype)
    base = initialize.base_name(config["policy"]["init"])
  card = model_card(workdir, config, base=base, is_adapter=only_adapter)
  (out / "README.md").write_text(card)


def _write_model(
  out: epath.Path,
  workdir: epath.Path,
  config: Mapping[str, Any],
  policy: Policy,
  params: Any,
  dtype: str,
) -> None:
  """Writes weights, config and tokenizer."""
  if policy.config.value_head:
    _LOG.warning("the value head is not exported: transformers has none")
    params = {k: x for k, x in params.items() if k != "value_head"}
    policy = Policy(dataclasses.replace(policy.config, value_head=False))
  tokenizer = initialize.tokenizer_of_run(workdir)
  hf.save_params(
    out, policy, params, dtype=dtype, token_ids=_token_ids(tokenizer)
  )
  tokenizer_files.save_tokenizer(tokenizer, out)
  _write_generation_config(out, config, tokenizer)


def _export_adapter(
  workdir: epath.Path,
  out: epath.Path,
  config: Mapping[str, Any],
  model: ModelConfig,
  dtype: str,
  placement: Any,
) -> str:
  """Writes the adapters, and their base where transformers cannot open it.

  Returns:
    What the card calls the base.
  """
  policy, init = Policy(model), config["policy"]["init"]
  params = initialize.load_trained(workdir, policy, placement)
  kind, _, where = init.partition(":")
  if kind == "hf":
    base, revision, name = where, None, where
  elif kind == "hub":
    base, _, revision = where.partition("@")
    name = where
  else:
    weights = initialize.load_base(workdir, policy, placement)
    bare = dataclasses.replace(model, lora=None, frozen="", value_head=False)
    base, revision, name = str(out / "base"), None, "base"
    _write_model(out / "base", workdir, config, Policy(bare), weights, dtype)
  peft.save_adapter(out, params, model, base=base, revision=revision)
  return name


def _read(workdir: epath.Path) -> tuple[dict[str, Any], ModelConfig]:
  for name in ("config.json", "model.json"):
    if not (workdir / name).exists():
      raise FileNotFoundError(
        f"{workdir / name} does not exist: {workdir} is no workdir of a run"
      )
  config = json.loads((workdir / "config.json").read_text())
  model = json.loads((workdir / "model.json").read_text())
  return config, ModelConfig.from_dict(model)


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


def model_card(
  workdir: epath.Path, config: Mapping[str, Any], *, base: str, is_adapter: bool
) -> str:
  """README.md of an export: what was trained, on what, with which metrics.

  Args:
    workdir: run directory.
    config: the run's resolved config.
    base: what the run started from.
    is_adapter: whether the export holds adapters alone.
  """
  loss = config["loss"]
  name = (
    loss["name"]
    if isinstance(loss, Mapping)
    else "+".join(term["name"] for term in loss)
  )
  rows = read_metrics(workdir, "eval")
  figures = {
    key: value
    for key, value in (rows[-1] if rows else {}).items()
    if key not in ("step", "split") and isinstance(value, float)
  }
  git = workdir / "git.txt"
  revision = git.read_text().strip() if git.exists() else "unknown"
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
    f"Trained from `{base}` on `{config['data']['source']}` for"
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


def _data_digest(workdir: epath.Path) -> str:
  path = workdir / "data.json"
  if not path.exists():
    return "unknown"
  identity = config_lib.flatten(json.loads(path.read_text()))
  return "; ".join(f"{name}: {value}" for name, value in identity)


def main(argv: list[str]) -> None:
  if len(argv) > 1:
    raise app.UsageError(f"arguments that are no flags: {argv[1:]}")
  out = flags.FLAGS.out
  export(
    flags.FLAGS.workdir,
    out,
    dtype=flags.FLAGS.dtype,
    only_adapter=flags.FLAGS.adapter,
  )
  for path in sorted(pathlib.Path(out).rglob("*")):
    if path.is_file():
      print(f"{path.stat().st_size:>14,}  {path}")


if __name__ == "__main__":
  flags.DEFINE_string("workdir", None, "of the run", required=True)
  flags.DEFINE_string("out", None, "folder to write", required=True)
  flags.DEFINE_string("dtype", "", "of the weights; float32 if empty")
  flags.DEFINE_bool("adapter", False, "write the adapters alone")
  jax.config.update("jax_platforms", "cpu")  # no accelerator is needed
  app.run(main)
