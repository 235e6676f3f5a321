"""Base class of the model sources."""

import abc
from collections.abc import Mapping
import dataclasses
import logging
from typing import Any

import jax
import jax.numpy as jnp

from dpo_jax.data import tokenizers
from dpo_jax.models import huggingface
from dpo_jax.models.config import Lora, ModelConfig
from dpo_jax.models.decoder import Policy
from dpo_jax.models.partition_rules import param_shardings
from dpo_jax.models.trainable import split_params
from dpo_jax.trees import join_trees

_LOG = logging.getLogger(__name__)

# Keys of `config.data` that name a tokenizer. An empty value stands for the
# model's own.
TOKENIZER_KEYS = ("tokenizer", "chat_template", "eos_token", "template_date")


@dataclasses.dataclass(frozen=True)
class ModelSource(abc.ABC):
  """Source of a model: its shape, its tokenizer and its weights.

  Attributes:
    init: spelling in a config; a model of the Hub has its commit.
  """

  init: str

  @property
  def card_name(self) -> str:
    """Name of the model on a model card."""
    return self.init

  @property
  def hub_name(self) -> str:
    """ORG/NAME of the Hub, or ""."""
    return ""

  @property
  @abc.abstractmethod
  def has_value_head(self) -> bool:
    """Whether the weights have a value head."""

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
    """Returns TOKENIZER_KEYS -> values, of the model's own tokenizer.

    `tokenizer` is "" if the model has none.
    """

  @abc.abstractmethod
  def _load(self, policy: Policy, mesh: Any, seed: int) -> Any:
    """Loads the weights of a policy without adapters; see `load`."""

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
      value_head: whether the loss reads values. The value head of a run that
        is the source stays in any case.
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
      mesh: mesh for the parameters.
      seed: seed of random weights and of adapters.

    Returns:
      Nested dict of arrays, sharded by the partition rules. Adapters, and a
      value head that the source lacks, have no effect yet.

    Raises:
      FileNotFoundError: a run without a checkpoint, or weights that are gone.
      ValueError: weights of another shape, or adapters whose base has changed.
    """
    if policy.config.lora is not None:
      base = self.load(policy.without_adapters, mesh, seed=seed)
      whole = join_trees(_fresh_adapters(policy, mesh, seed), base)
      return with_dtypes(whole, policy)
    if policy.config.value_head and not self.has_value_head:
      headless = Policy(dataclasses.replace(policy.config, value_head=False))
      params = self.load(headless, mesh, seed=seed)
      abstract = policy.abstract_params()["value_head"]
      sharding = param_shardings({"value_head": abstract}, mesh)["value_head"]
      zeros = jnp.zeros(abstract.shape, abstract.dtype, device=sharding)
      return {**params, "value_head": zeros}
    return self._load(policy, mesh, seed)

  def tokenizer_settings(self, data: Mapping[str, Any]) -> dict[str, str]:
    """Returns the settings of the tokenizer of a run.

    Args:
      data: `config.data`, or that part of a config.json; absent keys count as
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
    """Checks that a tokenizer gives ids that the model was trained on.

    Args:
      given: `data.tokenizer`; "" for the model's own.
      own: spelling of the model's own tokenizer, or "".

    Raises:
      ValueError: the two differ, and at least one is bytes or letters.
    """
    if not given or not own or given == own:
      return
    if is_plain(given) or is_plain(own):
      raise ValueError(
        f"data.tokenizer={given!r} gives ids that policy.init={self.init!r} was"
        f" not trained on; its own tokenizer is {own!r}: leave data.tokenizer"
        " empty"
      )

  def warn_of_other_ids(
    self, settings: Mapping[str, str], tokenizer: tokenizers.Tokenizer
  ) -> None:
    """Logs a warning where a tokenizer gives other ids than the model's own.

    A tokenizer of bytes or letters is not compared.

    Args:
      settings: settings from `tokenizer_settings`.
      tokenizer: tokenizer that they open.
    """
    own_settings = self.own_tokenizer()
    if own_settings["tokenizer"] in ("", settings["tokenizer"]):
      return
    if is_plain(settings["tokenizer"]):
      return
    own = open_tokenizer(own_settings).vocab
    other = [t for t, i in own.items() if tokenizer.vocab.get(t) != i]
    if other:
      _LOG.warning(
        "data.tokenizer=%r gives %d of the %d tokens of policy.init=%r another"
        " id, or none (%r is the first): the model would read other words than"
        " the text has. Leave data.tokenizer empty for the model's own",
        settings["tokenizer"],
        len(other),
        len(own),
        self.init,
        min(other, key=own.get),
      )


def is_plain(tokenizer: str) -> bool:
  """Returns whether a tokenizer is "bytes" or "letters:N", without a file."""
  return tokenizer == "bytes" or tokenizer.startswith("letters:")


def open_tokenizer(settings: Mapping[str, str]) -> tokenizers.Tokenizer:
  """Opens the tokenizer that `ModelSource.tokenizer_settings` names.

  One of the Hub is downloaded.
  """
  spec = settings["tokenizer"]
  kind, _, where = spec.partition(":")
  return tokenizers.load_tokenizer(
    huggingface.download(where) if kind == "hub" else spec,
    chat_template=settings["chat_template"],
    eos_token=settings["eos_token"],
    template_date=settings["template_date"] or tokenizers.DEFAULT_DATE,
  )


def with_dtypes(params: Any, policy: Policy) -> Any:
  """Casts parameters to the dtypes of the policy."""
  return jax.tree.map(
    lambda x, wanted: x.astype(wanted.dtype), params, policy.abstract_params()
  )


def _fresh_adapters(policy: Policy, mesh: Any, seed: int) -> Any:
  """Returns new LoRA adapters {"layers": ...}, sharded on a mesh.

  They change nothing yet, as their second matrix is 0. The base's parameters
  are not made.

  Args:
    policy: the decoder, with adapters.
    mesh: mesh for the parameters.
    seed: seed of the first matrices.
  """

  def adapters(tree: Any) -> Any:
    return split_params({"layers": tree["layers"]}, "")[0]

  shardings = param_shardings(adapters(policy.abstract_params()), mesh)
  make = jax.jit(
    lambda key: adapters(policy.init(key)), out_shardings=shardings
  )
  return make(jax.random.key(seed))
