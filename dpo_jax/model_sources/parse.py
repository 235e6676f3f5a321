"""Parses the spelling of a model source in a config.

random                 random weights, of the shape `policy.preset`
hf:FOLDER              a Hugging Face folder
hub:ORG/NAME@REVISION  the same from the Hub, pinned to a commit
run:WORKDIR            the best checkpoint of a run, its adapters merged

A run started from one of these itself, so its class is in this module too.
"""

import dataclasses
import functools
import os
import re
from typing import Any

from etils import epath
import jax
import jax.numpy as jnp

from dpo_jax.data import tokenizers
from dpo_jax.model_sources.base import ModelSource, open_tokenizer, with_dtypes
from dpo_jax.model_sources.huggingface_model import HuggingFaceModel
from dpo_jax.model_sources.moved import MovedSource
from dpo_jax.model_sources.random_weights import RandomWeights
from dpo_jax.models import huggingface, lora
from dpo_jax.models.config import ModelConfig
from dpo_jax.models.decoder import Policy
from dpo_jax.models.partition_rules import param_shardings
from dpo_jax.models.trainable import split_params
from dpo_jax.parallel.sharding import with_shardings
from dpo_jax.records.checkpoint import open_checkpoints
from dpo_jax.records.workdir import Workdir
from dpo_jax.system.files import read_json
from dpo_jax.system.inputs import is_there
from dpo_jax.trees import join_trees, params_digest

KINDS = ("random", "hf:FOLDER", "hub:ORG/NAME@REVISION", "run:WORKDIR")


def parse(init: str, key: str = "policy.init") -> "ModelSource":
  """Parses the spelling of a model source.

  Args:
    init: one of KINDS.
    key: config key, for errors.

  Returns:
    The source. A model of the Hub is downloaded, and its branch or tag resolved
    to a commit.

  Raises:
    ValueError: an unknown spelling, a model of the Hub without a revision,
      adapters without their model, or a workdir of another format.
    FileNotFoundError: a folder, or a run, that does not exist.
  """
  kind, _, where = init.partition(":")
  if init == "random":
    return RandomWeights(init)
  if kind == "run" and where:
    return TrainedRun(init, Workdir.of_run(where))
  if kind == "hub" and where:
    folder = huggingface.download(where)
    name, _, revision = where.partition("@")
    commit = os.path.basename(folder)
    if re.fullmatch("[0-9a-f]{40}", commit):
      revision = commit
    pinned = f"hub:{name}@{revision}"
    _check_whole(folder, init, key)
    return HuggingFaceModel(pinned, folder, pinned, name, revision)
  if kind == "hf" and epath.Path(where).exists() and where:
    _check_whole(where, init, key)
    return HuggingFaceModel(init, where, where, where, None)
  name = where if kind == "hf" else init
  hint = ""
  if (epath.Path(name) / "model.json").exists():
    hint = f". It is a run: {key}='run:{name}'"
  elif re.fullmatch(r"[\w.-]+/[\w.-]+(@[\w.-]+)?", name):
    name, _, revision = name.partition("@")
    hint = f". On the Hub: {key}='hub:{name}@{revision or 'REVISION'}'"
  if kind == "hf" and where:
    raise FileNotFoundError(
      f"{key}={init!r}: the folder {where} does not exist{hint}"
    )
  raise ValueError(f"{key}={init!r} must be one of {', '.join(KINDS)}{hint}")


def _check_whole(folder: str, init: str, key: str) -> None:
  """Raises ValueError for a folder of adapters without their model."""
  names = ("adapter_config.json", "config.json")
  has_adapters, has_model = (is_there(f"{folder}/{name}") for name in names)
  if has_adapters and not has_model:
    raise ValueError(
      f"{key}={init!r} holds adapters of peft (adapter_config.json), and a"
      " whole model is wanted: merge them into their base with peft's"
      " merge_and_unload(), and name the folder to which save_pretrained()"
      " writes it"
    )


@dataclasses.dataclass(frozen=True)
class TrainedRun(ModelSource):
  """The best checkpoint of a run.

  Attributes:
    workdir: run directory.
  """

  workdir: Workdir

  @classmethod
  def at(cls, workdir: epath.PathLike | Workdir) -> "TrainedRun":
    """Opens the run of a workdir.

    Raises:
      FileNotFoundError: no run there.
      ValueError: a workdir of another format.
    """
    return cls(f"run:{workdir}", Workdir.of_run(workdir))

  @property
  def card_name(self) -> str:
    return str(self.workdir)

  @functools.cached_property
  def config(self) -> dict[str, Any]:
    """The run's resolved config; a damaged one raises ValueError."""
    config = self.workdir.read_config()
    for key in ("policy", "data"):
      if not isinstance(config.get(key), dict):
        raise ValueError(
          f"{self.workdir.config} is damaged: {key} is missing. Restore it from"
          " a copy"
        )
    return config

  @functools.cached_property
  def trained_model(self) -> ModelConfig:
    """The shape of what the run trained, adapters included.

    Raises:
      ValueError: a damaged model.json or config.json.
    """
    path = self.workdir.model
    fields = read_json(path)
    try:
      recorded = ModelConfig.from_dict(fields)
    except (TypeError, ValueError) as error:
      raise ValueError(
        f"{path} is damaged: {error}. Restore it from a copy"
      ) from error
    # Runs once recorded what is frozen in their config alone.
    frozen = recorded.frozen or self.config["policy"].get("frozen", "")
    return dataclasses.replace(recorded, frozen=frozen)

  @property
  def best_step(self) -> int:
    """Step of the best checkpoint.

    Raises:
      FileNotFoundError: no finished checkpoint.
    """
    checkpoints = open_checkpoints(self.workdir, self.config, is_reader=True)
    try:
      step = checkpoints.best_step
    finally:
      checkpoints.close()
    if step is None:
      raise FileNotFoundError(
        f"{self.workdir} has no finished checkpoint to start from"
      )
    return step

  @functools.cached_property
  def start(self) -> ModelSource:
    """Source that the run itself started from; a MovedSource if it is gone."""
    init = self.config["policy"]["init"]
    try:
      return parse(init)
    except FileNotFoundError as error:
      return MovedSource(init, self.workdir, str(error))

  @property
  def has_value_head(self) -> bool:
    return self.trained_model.value_head

  def model_config(
    self, preset: str, vocab_size: int, **ours: Any
  ) -> ModelConfig:
    ours["value_head"] = ours.get("value_head", False) or self.has_value_head
    return dataclasses.replace(self.trained_model, **ours)

  def own_tokenizer(self) -> dict[str, str]:
    return self.start.tokenizer_settings(self.config["data"])

  def open_tokenizer(self) -> tokenizers.Tokenizer:
    """Opens the tokenizer that the run was trained with."""
    return open_tokenizer(self.own_tokenizer())

  def load_trained(self, policy: Policy, mesh: Any) -> Any:
    """Loads the parameters that the run trained.

    Args:
      policy: decoder of the run, with its adapters.
      mesh: mesh for the parameters.

    Returns:
      Nested dict of arrays from the best checkpoint.

    Raises:
      FileNotFoundError: no finished checkpoint.
      ValueError: weights of another shape.
    """
    trained, _ = split_params(
      policy.abstract_params(), self.trained_model.frozen
    )
    targets = with_shardings(trained, param_shardings(trained, mesh))
    step = self.best_step
    checkpoints = open_checkpoints(self.workdir, self.config, is_reader=True)
    try:
      return checkpoints.restore_params(targets, step=step)
    finally:
      checkpoints.close()

  def load_base(self, policy: Policy, mesh: Any) -> Any:
    """Loads the parameters that the run did not train, such as a LoRA base.

    Args:
      policy: decoder of the run, with its adapters.
      mesh: mesh for the parameters.

    Returns:
      Nested dict of arrays, from the same source as the run's; None if the run
      trained all parameters.

    Raises:
      FileNotFoundError: the source is gone.
      ValueError: the source has changed since.
    """
    whole = self.start.load(policy, mesh, seed=self.config["seed"])
    base = split_params(whole, self.trained_model.frozen)[1]
    check_frozen(base, self.workdir, self.start.init)
    return base

  def _load(self, policy: Policy, mesh: Any, seed: int) -> Any:
    # In the run's dtypes: the digest of its frozen parameters covers them.
    theirs = Policy(
      dataclasses.replace(
        policy.config,
        param_dtype=self.trained_model.param_dtype,
        lora=self.trained_model.lora,
        frozen=self.trained_model.frozen,
      )
    )
    params = self.load_trained(theirs, mesh)
    untrained = split_params(theirs.abstract_params(), theirs.config.frozen)[1]
    if untrained is not None:
      params = join_trees(params, self.load_base(theirs, mesh))
    if theirs.config.lora is not None:
      # In float32: in bfloat16 the adapter's share of a weight is lost.
      wide = jax.tree.map(lambda x: x.astype(jnp.float32), params)
      params = jax.jit(
        lambda params: lora.merge_adapters(params, theirs.config),
        out_shardings=param_shardings(policy.abstract_params(), mesh),
      )(wide)
    return with_dtypes(params, policy)


def check_frozen(frozen: Any, workdir: Workdir, init: str) -> None:
  """Checks that the frozen parameters of a run are those it began with.

  Args:
    frozen: frozen parameters, as they are now.
    workdir: run directory.
    init: model source that they were read from.

  Raises:
    ValueError: they have changed, or nothing tells whether they have.
  """
  before = workdir.read_digest(workdir.frozen_digest)
  digest = params_digest(frozen)
  if not before:
    raise ValueError(
      f"{workdir.frozen_digest} is missing, so nothing tells whether {init}"
      " still holds the parameters that this run left as they were. Restore the"
      " file; or, if you know that they have not changed, write"
      f" {digest} into it"
    )
  if before != digest:
    raise ValueError(
      f"{workdir} trained parts of another model: {workdir.frozen_digest} says"
      f" {before[:12]}, and {init} is {digest[:12]} now. Adapters fit"
      " their own base only: restore the old weights"
    )
