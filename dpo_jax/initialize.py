"""Where parameters come from: random, a Hugging Face folder, another run."""

import dataclasses
import json
from typing import Any

from etils import epath
import jax
import jax.numpy as jnp

from dpo_jax.checkpoint import Checkpoints
from dpo_jax.mesh import param_shardings
from dpo_jax.models import hf
from dpo_jax.models.config import PRESETS, ModelConfig
from dpo_jax.models.decoder import Policy

KINDS = ("random", "hf:FOLDER", "run:WORKDIR")


def load_policy(
  config: Any, *, vocab_size: int, value_head: bool = False
) -> Policy:
  """The decoder that `config.policy` describes.

  Args:
    config: `config.policy`.
    vocab_size: ids that the tokenizer may give; the embedding of random
      weights is that large, rounded up to a multiple of 128.
    value_head: whether the loss reads values.

  Returns:
    The decoder, without parameters.

  Raises:
    ValueError: an unknown kind of start, or an unknown preset.
    FileNotFoundError: no model there.
  """
  ours = {
    "param_dtype": config.param_dtype,
    "compute_dtype": config.compute_dtype,
    "remat": config.remat,
    "attention": config.attention,
    "value_head": value_head,
  }
  kind, _, where = config.init.partition(":")
  if kind == "random" and not where:
    if config.preset not in PRESETS:
      raise ValueError(
        f"policy.preset={config.preset!r} must be one of {', '.join(PRESETS)}"
      )
    rounded = -(-vocab_size // 128) * 128
    return Policy(
      ModelConfig(vocab_size=rounded, **PRESETS[config.preset], **ours)
    )
  if kind == "hf" and where:
    return Policy(hf.load_config(where, **ours))
  if kind == "run" and where:
    path = epath.Path(where) / "model.json"
    if not path.exists():
      raise FileNotFoundError(f"{path} does not exist: {where} is no workdir")
    recorded = json.loads(path.read_text())
    ours["value_head"] |= recorded.get("value_head", False)
    return Policy(ModelConfig(**{**recorded, **ours}))
  raise ValueError(
    f"policy.init={config.init!r} must be one of {', '.join(KINDS)}"
  )


def write_model(policy: Policy, workdir: epath.Path) -> None:
  """Records the model's shape, so that other runs can start from this one."""
  text = json.dumps(dataclasses.asdict(policy.config), indent=2)
  (workdir / "model.json").write_text(text + "\n")


def load_params(init: str, policy: Policy, mesh: Any, *, seed: int) -> Any:
  """Parameters on the mesh.

  Args:
    init: "random", "hf:FOLDER" or "run:WORKDIR", which takes that run's best
      checkpoint.
    policy: the decoder, of that shape.
    mesh: where they go.
    seed: of random weights.

  Returns:
    Nested dict of arrays, sharded by the partition rules.

  Raises:
    FileNotFoundError: a run without a checkpoint.
    ValueError: weights of another shape.
  """
  kind, _, where = init.partition(":")
  if policy.config.value_head and not _has_value_head(kind, where):
    # What it starts from has none: it begins at zero, as a random one does.
    headless = dataclasses.replace(policy.config, value_head=False)
    params = load_params(init, Policy(headless), mesh, seed=seed)
    abstract = policy.abstract_params()["value_head"]
    sharding = param_shardings({"value_head": abstract}, mesh)["value_head"]
    zeros = jnp.zeros(abstract.shape, abstract.dtype, device=sharding)
    return {**params, "value_head": zeros}
  abstract = policy.abstract_params()
  shardings = param_shardings(abstract, mesh)
  if kind == "random":
    make = jax.jit(policy.init, out_shardings=shardings)
    return make(jax.random.key(seed))
  if kind == "hf":
    return hf.load_params(where, policy, shardings)
  targets = jax.tree.map(
    lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s),
    abstract,
    shardings,
  )
  checkpoints = open_checkpoints(
    where,
    json.loads((epath.Path(where) / "config.json").read_text()),
    is_reader=True,
  )
  try:
    step = checkpoints.best_step
    if step is None:
      raise FileNotFoundError(
        f"{where} has no finished checkpoint to start from"
      )
    return checkpoints.restore_params(targets, step=step)
  finally:
    checkpoints.close()


def _has_value_head(kind: str, where: str) -> bool:
  if kind == "run":
    recorded = json.loads((epath.Path(where) / "model.json").read_text())
    return recorded.get("value_head", False)
  return kind == "random"


def open_checkpoints(
  workdir: epath.PathLike, config: Any, *, is_reader: bool = False
) -> Checkpoints:
  """The checkpoints of a run with that config (a mapping).

  A reader leaves the folder as it is: the run may be another's.
  """
  settings = config["checkpoint"]
  return Checkpoints(
    workdir,
    keep=settings["keep"],
    best_metric=settings["best_metric"],
    best_is_lower=settings["best_is_lower"],
    is_reader=is_reader,
  )
