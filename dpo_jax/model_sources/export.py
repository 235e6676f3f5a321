"""Writes a run's best policy as a Hugging Face folder."""

from collections.abc import Mapping
import dataclasses
import functools
import json
import logging
import re
from typing import Any

from etils import epath

from dpo_jax.data import tokenizer_files, tokenizers
from dpo_jax.model_sources.huggingface_model import HuggingFaceModel
from dpo_jax.model_sources.model_card import model_card
from dpo_jax.model_sources.parse import TrainedRun
from dpo_jax.models import huggingface
from dpo_jax.models.config import DTYPES
from dpo_jax.models.decoder import Policy
from dpo_jax.models.huggingface import peft
from dpo_jax.parallel import mesh

_LOG = logging.getLogger(__name__)


def export(
  workdir: epath.PathLike,
  out: epath.PathLike,
  *,
  dtype: str = "",
  only_adapter: bool = False,
  name: str = "",
  base: str = "",
) -> None:
  """Writes a run's best policy to a folder, with tokenizer and README.md.

  Adapters alone have no tokenizer. Their base, with one, is written to a folder
  base in `out` unless the run started from a Hugging Face model or `base` is
  given. A value head is left out, with a warning.

  Args:
    workdir: run directory.
    out: folder to write; it must not hold a model already.
    dtype: dtype of the weights; "" is float32, in which they were trained, and
      for the base of adapters that of the run.
    only_adapter: whether to write the adapters alone.
    name: ORG/NAME that the folder is uploaded to, or "".
    base: ORG/NAME of the Hub that has the base of the adapters, or "" for the
      model that the run started from.

  Raises:
    FileNotFoundError: no run, or one without a checkpoint.
    ValueError: a folder that holds a model, an unknown dtype, `only_adapter`
      of a run that has none, `base` without `only_adapter` or not ORG/NAME, or
      an upload of adapters whose base is not on the Hub.
  """
  run, out = TrainedRun.at(workdir), epath.Path(out)
  model = run.trained_model
  if dtype and dtype not in DTYPES:
    raise ValueError(f"dtype={dtype!r} must be one of {', '.join(DTYPES)}")
  if only_adapter and model.lora is None:
    raise ValueError(
      f"{run.workdir} trained no adapters (lora.rank is 0): leave --adapter out"
    )
  for file in ("config.json", "adapter_config.json"):
    if (out / file).exists():
      raise ValueError(f"{out} holds a model already: choose another folder")
  _check_base(run, base, name, only_adapter=only_adapter)
  if model.value_head:
    _LOG.warning("the value head is not exported: transformers has none")
  hub_base = base or run.start.hub_name
  card = functools.partial(
    model_card,
    run,
    folder=str(out),
    name=name,
    hub_base=hub_base,
    is_adapter=only_adapter,
  )
  card(base=base)  # a damaged record is refused before weights are written
  placement = mesh.make_mesh({"data": -1})
  if only_adapter:
    dtype = dtype or model.param_dtype
    base = _export_adapter(run, out, dtype, placement, base)
  else:
    dtype = dtype or "float32"
    policy = Policy(
      dataclasses.replace(model, lora=None, frozen="", param_dtype="float32")
    )
    params = run.load(policy, placement, seed=run.config["seed"])
    _write_model(out, run, policy, params, dtype)
    base = run.start.card_name
  (out / "README.md").write_text(card(base=base))


def _check_base(
  run: TrainedRun, base: str, name: str, *, only_adapter: bool
) -> None:
  if base and not only_adapter:
    raise ValueError(f"base={base!r} is that of adapters: add --adapter")
  if base and not re.fullmatch(r"[\w.-]+/[\w.-]+", base):
    raise ValueError(f"base={base!r} must be ORG/NAME")
  if name and only_adapter and not (base or run.start.hub_name):
    raise ValueError(
      f"push_to={name!r} uploads adapters, and their base"
      f" {run.start.card_name!r} is on this machine alone: upload that too, and"
      " name it with --base=ORG/NAME"
    )


def _write_model(
  out: epath.Path,
  run: TrainedRun,
  policy: Policy,
  params: Any,
  dtype: str,
) -> None:
  """Writes weights, config.json, tokenizer and generation_config.json."""
  if policy.config.value_head:
    params = {k: x for k, x in params.items() if k != "value_head"}
    policy = Policy(dataclasses.replace(policy.config, value_head=False))
  tokenizer = run.open_tokenizer()
  huggingface.save_params(
    out, policy, params, dtype=dtype, token_ids=_token_ids(tokenizer)
  )
  tokenizer_files.save_tokenizer(tokenizer, out)
  _write_generation_config(out, run.config, tokenizer)


def _export_adapter(
  run: TrainedRun, out: epath.Path, dtype: str, placement: Any, base: str
) -> str:
  """Writes the adapters, and their base where transformers cannot open it.

  Args:
    run: run that trained them.
    out: folder to write.
    dtype: dtype of the base.
    placement: mesh.
    base: ORG/NAME of the Hub that has the base, or "".

  Returns:
    Name of the base on the model card.
  """
  model = run.trained_model
  policy = Policy(model)
  params = run.load_trained(policy, placement)
  where, revision = base, None
  if isinstance(run.start, HuggingFaceModel) and not base:
    where, revision = run.start.name, run.start.revision
    base = where
  elif not base:
    weights = run.load_base(policy, placement)
    bare = dataclasses.replace(model, lora=None, frozen="", value_head=False)
    where, base = str(out / "base"), "base"
    _write_model(out / "base", run, Policy(bare), weights, dtype)
  peft.save_adapter(out, params, model, base=where, revision=revision)
  return base


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
