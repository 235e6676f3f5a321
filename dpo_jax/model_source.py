"""Model sources: the shape, tokenizer and weights that a run starts from.

random                 random weights, of the shape `policy.preset`
hf:FOLDER              a Hugging Face folder
hub:ORG/NAME@REVISION  the same from the Hub, pinned to a commit
run:WORKDIR            the best checkpoint of a run, its adapters merged
"""

import abc
from collections.abc import Mapping
import dataclasses
import functools
import logging
import os
import re
from typing import Any

from etils import epath
import jax
import jax.numpy as jnp

from dpo_jax.checkpoint import open_checkpoints
from dpo_jax.data import tokenizers
from dpo_jax.mesh import param_shardings, with_shardings
from dpo_jax.models import hf, lora
from dpo_jax.models.config import Lora, ModelConfig
from dpo_jax.models.decoder import Policy
from dpo_jax.models.presets import PRESETS
from dpo_jax.optimizer import split_params
from dpo_jax.reference import params_digest
from dpo_jax.types import join_trees
from dpo_jax.workdir import Workdir, read_json

_LOG = logging.getLogger(__name__)

KINDS = ("random", "hf:FOLDER", "hub:ORG/NAME@REVISION", "run:WORKDIR")
# What names a tokenizer, in `config.data`. An empty value stands for the
# model's own.
TOKENIZER_KEYS = ("tokenizer", "chat_template", "eos_token", "template_date")


def parse(init: str, key: str = "policy.init") -> "ModelSource":
  """Reads where a model comes from.

  Args:
    init: one of KINDS.
    key: of the config, for errors.

  Returns:
    The source. A branch or tag of the Hub is resolved to its commit.

  Raises:
    ValueError: another spelling, or a workdir of another format.
    FileNotFoundError: a folder, or a run, that does not exist.
  """
  kind, _, where = init.partition(":")
  if init == "random":
    return RandomWeights(init)
  if kind == "run" and where:
    return TrainedRun(init, Workdir.of_run(where))
  if kind == "hub" and where:
    folder = hf.download(where)
    name, _, revision = where.partition("@")
    commit = os.path.basename(folder)
    if re.fullmatch("[0-9a-f]{40}", commit):
      revision = commit
    pinned = f"hub:{name}@{revision}"
    return HuggingFaceModel(pinned, folder, pinned, name, revision)
  if kind == "hf" and epath.Path(where).exists() and where:
    return HuggingFaceModel(init, where, where, where, None)
  name = where if kind == "hf" else init
  hint = ""
  if re.fullmatch(r"[\w.-]+/[\w.-]+(@[\w.-]+)?", name):
    name, _, revision = name.partition("@")
    hint = f". On the Hub: {key}='hub:{name}@{revision or 'REVISION'}'"
  if kind == "hf" and where:
    raise FileNotFoundError(
      f"{key}={init!r}: the folder {where} does not exist{hint}"
    )
  raise ValueError(f"{key}={init!r} must be one of {', '.join(KINDS)}{hint}")


@dataclasses.dataclass(frozen=True)
class ModelSource(abc.ABC):
  """Source of a model: its shape, its tokenizer and its weights.

  Attributes:
    init: how a config spells it; of the Hub with the commit.
  """

  init: str

  @property
  def card_name(self) -> str:
    """Name of the model on a model card."""
    return self.init

  @property
  @abc.abstractmethod
  def has_value_head(self) -> bool:
    """Whether its weights have a value head."""

  @abc.abstractmethod
  def model_config(
    self, preset: str, vocab_size: int, **ours: Any
  ) -> ModelConfig:
    """Returns the model's shape.

    Args:
      preset: `policy.preset`, of random weights.
      vocab_size: ids that the tokenizer may give, for random weights.
      **ours: fields of ModelConfig that a run decides.
    """

  @abc.abstractmethod
  def own_tokenizer(self) -> dict[str, str]:
    """Returns TOKENIZER_KEYS as the model has them; `tokenizer` "" if none."""

  @abc.abstractmethod
  def _load(self, policy: Policy, mesh: Any, seed: int) -> Any:
    """Loads the weights of a policy without adapters."""

  def policy(
    self,
    config: Any,
    *,
    vocab_size: int = 1,
    value_head: bool = False,
    adapters: Any = None,
  ) -> Policy:
    """Returns the decoder, without parameters.

    Args:
      config: `config.policy`.
      vocab_size: ids that the tokenizer may give. Random weights get an
        embedding that large, rounded up to a multiple of 128 (of 8, up to 64);
        the others have their own.
      value_head: whether the loss reads values.
      adapters: `config.lora`; rank 0, or None, for none.

    Raises:
      ValueError: an unknown preset, or a model that the decoder does not
        compute.
    """
    ours = {
      "param_dtype": config.param_dtype,
      "compute_dtype": config.compute_dtype,
      "remat": config.remat,
      "attention": config.attention,
      "value_head": value_head,
      "lora": None,
      "frozen": config.frozen,
    }
    if adapters is not None and adapters.rank:
      ours["lora"] = Lora(
        adapters.rank,
        adapters.alpha,
        adapters.targets,
        adapters.rank_stabilized,
      )
    return Policy(self.model_config(config.preset, vocab_size, **ours))

  def load(self, policy: Policy, mesh: Any, *, seed: int) -> Any:
    """Loads parameters onto the mesh.

    Args:
      policy: the decoder, of the source's shape.
      mesh: where they go.
      seed: of random weights, adapters among them.

    Returns:
      Nested dict of arrays, sharded by the partition rules. Adapters, and a
      value head that the source lacks, have no effect yet.

    Raises:
      FileNotFoundError: a run without a checkpoint.
      ValueError: weights of another shape, or adapters whose base has changed.
    """
    if policy.config.lora is not None:
      base = self.load(policy.without_adapters, mesh, seed=seed)
      whole = join_trees(_fresh_adapters(policy, mesh, seed), base)
      return _with_dtypes(whole, policy)
    if policy.config.value_head and not self.has_value_head:
      headless = Policy(dataclasses.replace(policy.config, value_head=False))
      params = self.load(headless, mesh, seed=seed)
      abstract = policy.abstract_params()["value_head"]
      sharding = param_shardings({"value_head": abstract}, mesh)["value_head"]
      zeros = jnp.zeros(abstract.shape, abstract.dtype, device=sharding)
      return {**params, "value_head": zeros}
    return self._load(policy, mesh, seed)

  def tokenizer_settings(self, data: Mapping[str, Any]) -> dict[str, str]:
    """Fills in which tokenizer a run reads and writes with.

    Args:
      data: `config.data`, or the part of a config.json; keys that it lacks are
        empty.

    Returns:
      TOKENIZER_KEYS with their values. `tokenizer` is "bytes", "letters:N", a
      folder, or "hub:ORG/NAME@REVISION".

    Raises:
      ValueError: a folder without a tokenizer and none named; or ids of bytes
        for a model that has a tokenizer.
    """
    given = {key: data.get(key) or "" for key in TOKENIZER_KEYS}
    own = self.own_tokenizer()
    self._check_tokenizer(given["tokenizer"], own["tokenizer"])
    named = given["tokenizer"] not in ("", own["tokenizer"])
    # Another tokenizer has its own template and end of a response.
    inherited = {"template_date": own["template_date"]} if named else own
    settings = {k: given[k] or inherited.get(k, "") for k in TOKENIZER_KEYS}
    settings["template_date"] = (
      settings["template_date"] or tokenizers.DEFAULT_DATE
    )
    return settings

  def _check_tokenizer(self, given: str, own: str) -> None:
    """Refuses ids that the model has never seen."""
    if not given or not own or given == own:
      return
    if _is_plain(given) or _is_plain(own):
      raise ValueError(
        f"data.tokenizer={given!r} gives ids that policy.init={self.init!r} was"
        f" not trained on; its own tokenizer is {own!r}: leave data.tokenizer"
        " empty"
      )

  def warn_of_other_ids(
    self, settings: Mapping[str, str], tokenizer: tokenizers.Tokenizer
  ) -> None:
    """Warns where a tokenizer gives other ids than the model's own.

    Args:
      settings: from `tokenizer_settings`.
      tokenizer: what they open.
    """
    own_settings = self.own_tokenizer()
    if own_settings["tokenizer"] in ("", settings["tokenizer"]):
      return
    if _is_plain(settings["tokenizer"]):
      return
    own = open_tokenizer(own_settings).vocab
    other = [t for t, i in own.items() if tokenizer.vocab.get(t) != i]
    if other:
      _LOG.warning(
        "data.tokenizer=%r gives %d of the %d tokens of policy.init=%r another"
        " id, or none (%r is the first): the model reads other words than the"
        " text has. Leave data.tokenizer empty for the model's own",
        settings["tokenizer"],
        len(other),
        len(own),
        self.init,
        min(other, key=own.get),
      )


def _is_plain(tokenizer: str) -> bool:
  """Whether ids are bytes or letters, and not those of a vocabulary."""
  return tokenizer == "bytes" or tokenizer.startswith("letters:")


def open_tokenizer(settings: Mapping[str, str]) -> tokenizers.Tokenizer:
  """Opens the tokenizer that `ModelSource.tokenizer_settings` names."""
  spec = settings["tokenizer"]
  kind, _, where = spec.partition(":")
  return tokenizers.load_tokenizer(
    hf.download(where) if kind == "hub" else spec,
    chat_template=settings["chat_template"],
    eos_token=settings["eos_token"],
    template_date=settings["template_date"] or tokenizers.DEFAULT_DATE,
  )


@dataclasses.dataclass(frozen=True)
class RandomWeights(ModelSource):
  """Random weights of the shape of a preset."""

  @property
  def card_name(self) -> str:
    return "random weights"

  @property
  def has_value_head(self) -> bool:
    return True

  def model_config(
    self, preset: str, vocab_size: int, **ours: Any
  ) -> ModelConfig:
    if preset not in PRESETS:
      raise ValueError(
        f"policy.preset={preset!r} must be one of {', '.join(PRESETS)}"
      )
    # So that a mesh divides it; a toy alphabet stays as small as it is.
    multiple = 128 if vocab_size > 64 else 8
    rounded = -(-vocab_size // multiple) * multiple
    return ModelConfig(**{**PRESETS[preset], "vocab_size": rounded, **ours})

  def own_tokenizer(self) -> dict[str, str]:
    return dict.fromkeys(TOKENIZER_KEYS, "") | {"tokenizer": "bytes"}

  def _check_tokenizer(self, given: str, own: str) -> None:
    """Any: random weights have seen no ids yet."""

  def warn_of_other_ids(
    self, settings: Mapping[str, str], tokenizer: tokenizers.Tokenizer
  ) -> None:
    """Nothing to warn of."""

  def _load(self, policy: Policy, mesh: Any, seed: int) -> Any:
    return _jitted_init(policy, mesh)(jax.random.key(seed))


@functools.lru_cache(maxsize=1)
def _jitted_init(policy: Policy, mesh: Any) -> Any:
  """Returns jitted `policy.init`; a run calls it for policy and reference."""
  shardings = param_shardings(policy.abstract_params(), mesh)
  return jax.jit(policy.init, out_shardings=shardings)


@dataclasses.dataclass(frozen=True)
class HuggingFaceModel(ModelSource):
  """A Hugging Face folder, on this machine or from the Hub.

  Attributes:
    folder: on this machine.
    tokenizer: how `data.tokenizer` spells it.
    name: of the model: its folder, or ORG/NAME.
    revision: commit of the Hub, or None.
  """

  folder: str
  tokenizer: str
  name: str
  revision: str | None

  @property
  def card_name(self) -> str:
    return self.name

  @property
  def has_value_head(self) -> bool:
    return False

  def model_config(
    self, preset: str, vocab_size: int, **ours: Any
  ) -> ModelConfig:
    return hf.load_config(self.folder, **ours)

  def own_tokenizer(self) -> dict[str, str]:
    own = dict.fromkeys(TOKENIZER_KEYS, "")
    if tokenizers.has_tokenizer(self.folder):
      own["tokenizer"] = self.tokenizer
    return own

  def _check_tokenizer(self, given: str, own: str) -> None:
    super()._check_tokenizer(given, own)
    unread = tokenizers.unread_file(self.folder)
    if not own and (not given or (unread and _is_plain(given))):
      raise ValueError(
        f"policy.init={self.init!r} has no tokenizer.json"
        + (f" ({unread} is not read)" if unread else "")
        + f", and data.tokenizer={given!r}: name the folder of a tokenizer.json"
        + (", as transformers saves it" if unread else ", or 'bytes'")
      )

  def _load(self, policy: Policy, mesh: Any, seed: int) -> Any:
    shardings = param_shardings(policy.abstract_params(), mesh)
    return hf.load_params(self.folder, policy, shardings)


@dataclasses.dataclass(frozen=True)
class TrainedRun(ModelSource):
  """The best checkpoint of a run.

  Attributes:
    workdir: of the run.
  """

  workdir: Workdir

  @classmethod
  def at(cls, workdir: epath.PathLike | Workdir) -> "TrainedRun":
    """Opens the run of a workdir."""
    return cls(f"run:{workdir}", Workdir.of_run(workdir))

  @property
  def card_name(self) -> str:
    return str(self.workdir)

  @functools.cached_property
  def config(self) -> dict[str, Any]:
    """The run's resolved config."""
    return self.workdir.read_config()

  @functools.cached_property
  def trained_model(self) -> ModelConfig:
    """The shape of what the run trained, adapters included."""
    recorded = ModelConfig.from_dict(read_json(self.workdir.model))
    # Runs once recorded what is frozen in their config alone.
    frozen = recorded.frozen or self.config["policy"].get("frozen", "")
    return dataclasses.replace(recorded, frozen=frozen)

  @functools.cached_property
  def start(self) -> ModelSource:
    """Source that the run itself started from."""
    return parse(self.config["policy"]["init"])

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
    """Loads what the run trained, and nothing else.

    Args:
      policy: its decoder, with its adapters.
      mesh: where the parameters go.

    Returns:
      Nested dict of arrays, of the best checkpoint.

    Raises:
      FileNotFoundError: no finished checkpoint.
      ValueError: weights of another shape.
    """
    trained, _ = split_params(
      policy.abstract_params(), self.trained_model.frozen
    )
    targets = with_shardings(trained, param_shardings(trained, mesh))
    checkpoints = open_checkpoints(self.workdir, self.config, is_reader=True)
    try:
      step = checkpoints.best_step
      if step is None:
        raise FileNotFoundError(
          f"{self.workdir} has no finished checkpoint to start from"
        )
      return checkpoints.restore_params(targets, step=step)
    finally:
      checkpoints.close()

  def load_base(self, policy: Policy, mesh: Any) -> Any:
    """Loads what the run did not train: the base under adapters, or a part.

    Args:
      policy: its decoder, with its adapters.
      mesh: where the parameters go.

    Returns:
      Nested dict of arrays, read from where the run read them.

    Raises:
      ValueError: they have changed since.
    """
    whole = self.start.load(policy, mesh, seed=self.config["seed"])
    base = split_params(whole, self.trained_model.frozen)[1]
    check_frozen(base, self.workdir, self.start.init)
    return base

  def _load(self, policy: Policy, mesh: Any, seed: int) -> Any:
    # In its own dtypes, which the digest of what it did not train covers.
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
      # In float32: an adapter's part of a weight is lost in bfloat16.
      wide = jax.tree.map(lambda x: x.astype(jnp.float32), params)
      params = jax.jit(
        lambda params: lora.merge_adapters(params, theirs.config),
        out_shardings=param_shardings(policy.abstract_params(), mesh),
      )(wide)
    return _with_dtypes(params, policy)


def _with_dtypes(params: Any, policy: Policy) -> Any:
  """Casts parameters to the dtypes that the policy has them in."""
  return jax.tree.map(
    lambda x, wanted: x.astype(wanted.dtype), params, policy.abstract_params()
  )


def _fresh_adapters(policy: Policy, mesh: Any, seed: int) -> Any:
  """Makes adapters that have no effect yet, without making the base."""

  def adapters(tree: Any) -> Any:
    return split_params({"layers": tree["layers"]}, "")[0]

  shardings = param_shardings(adapters(policy.abstract_params()), mesh)
  make = jax.jit(
    lambda key: adapters(policy.init(key)), out_shardings=shardings
  )
  return make(jax.random.key(seed))


def check_frozen(frozen: Any, workdir: Workdir, init: str) -> None:
  """Compares parameters that a run does not save with those it began with.

  Args:
    frozen: as they are read now.
    workdir: of the run.
    init: where they are read from.

  Raises:
    ValueError: they are others.
  """
  before = workdir.read_digest(workdir.frozen_digest)
  digest = params_digest(frozen)
  if before and before != digest:
    raise ValueError(
      f"{workdir} trained parts of another model: {workdir.frozen_digest} says"
      f" {before[:12]}, and {init} is {digest[:12]} now. Adapters mean nothing"
      " on another base: bring the old weights back"
    )
