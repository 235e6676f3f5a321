"""Where parameters and their tokenizer come from.

Random weights, a Hugging Face folder, or another run.
"""

from collections.abc import Mapping
import dataclasses
import json
import logging
from typing import Any

from etils import epath
import jax
import jax.numpy as jnp

from dpo_jax.checkpoint import Checkpoints
from dpo_jax.data import tokenizers
from dpo_jax.mesh import param_shardings
from dpo_jax.models import hf, lora
from dpo_jax.models.config import Lora, ModelConfig
from dpo_jax.models.decoder import Policy
from dpo_jax.models.presets import PRESETS
from dpo_jax.optimizer import split_params
from dpo_jax.reference import params_digest
from dpo_jax.types import join_trees

_LOG = logging.getLogger(__name__)

# File of a workdir with the digest of the parameters that are not trained.
FROZEN_DIGEST = "frozen.txt"
KINDS = ("random", "hf:FOLDER", "hub:ORG/NAME@REVISION", "run:WORKDIR")


def split_init(init: str) -> tuple[str, str]:
  """Splits `policy.init` into its kind and where that is.

  Raises:
    ValueError: an unknown kind.
    FileNotFoundError: a folder, or a run, that is not there.
  """
  kind, _, where = init.partition(":")
  is_known = where if kind in ("hf", "hub", "run") else init == "random"
  if not is_known:
    raise ValueError(f"policy.init={init!r} must be one of {', '.join(KINDS)}")
  if kind == "hf" and not epath.Path(where).exists():
    raise FileNotFoundError(
      f"policy.init={init!r}: the folder {where} does not exist"
    )
  if kind == "run":
    _find_in_run(where, "config.json")
  return kind, where


def _find_in_run(workdir: epath.PathLike, name: str) -> epath.Path:
  path = epath.Path(workdir) / name
  if not path.exists():
    raise FileNotFoundError(
      f"{path} does not exist: {workdir} is no workdir of a run"
    )
  return path


def load_policy(
  config: Any,
  *,
  vocab_size: int,
  value_head: bool = False,
  adapters: Any = None,
) -> Policy:
  """The decoder that `config.policy` describes.

  Args:
    config: `config.policy`.
    vocab_size: ids that the tokenizer may give; the embedding of random
      weights is that large, rounded up to a multiple of 128 (of 8, up to 64).
    value_head: whether the loss reads values.
    adapters: `config.lora`; rank 0, or None, for none.

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
  kind, where = split_init(config.init)
  if kind == "random":
    if config.preset not in PRESETS:
      raise ValueError(
        f"policy.preset={config.preset!r} must be one of {', '.join(PRESETS)}"
      )
    # So that a mesh divides it; a toy alphabet stays as small as it is.
    multiple = 128 if vocab_size > 64 else 8
    rounded = -(-vocab_size // multiple) * multiple
    return Policy(
      ModelConfig(**{**PRESETS[config.preset], "vocab_size": rounded, **ours})
    )
  if kind in ("hf", "hub"):
    return Policy(hf.load_config(model_folder(config.init), **ours))
  recorded = json.loads(_find_in_run(where, "model.json").read_text())
  ours["value_head"] |= recorded.get("value_head", False)
  return Policy(ModelConfig.from_dict({**recorded, **ours}))


# What names a tokenizer, in `config.data`, with the value of each that means
# "as the model has it".
TOKENIZER_KEYS = ("tokenizer", "chat_template", "eos_token", "template_date")


def tokenizer_settings(init: str, data: Mapping[str, Any]) -> dict[str, str]:
  """Fills in which tokenizer a run reads and writes with.

  An empty key stands for the model's own: the tokenizer of a Hugging Face
  folder; for "run:WORKDIR" what that run was trained with; bytes for random
  weights.

  Args:
    init: `policy.init`.
    data: `config.data`, or the part of a config.json; keys that it lacks are
      empty.

  Returns:
    TOKENIZER_KEYS with their values. `tokenizer` is "bytes", "letters:N", a
    folder, or "hub:ORG/NAME@REVISION".

  Raises:
    FileNotFoundError: no run there.
    ValueError: a folder without a tokenizer and none named; or ids of bytes
      for a model that has a tokenizer.
  """
  kind, where = split_init(init)
  given = {key: data.get(key) or "" for key in TOKENIZER_KEYS}
  own = dict.fromkeys(TOKENIZER_KEYS, "")
  if kind == "random":
    own["tokenizer"] = "bytes"
  elif kind == "run":
    before = read_config(where)
    own = tokenizer_settings(before["policy"]["init"], before["data"])
  elif kind in ("hf", "hub"):
    folder = model_folder(init)
    unread = tokenizers.unread_file(folder)
    if tokenizers.has_tokenizer(folder):
      own["tokenizer"] = init if kind == "hub" else where
    elif not given["tokenizer"] or (unread and _is_plain(given["tokenizer"])):
      raise ValueError(
        f"policy.init={init!r} has no tokenizer.json"
        + (f" ({unread} is not read)" if unread else "")
        + f", and data.tokenizer={given['tokenizer']!r}: name the folder of a"
        " tokenizer.json"
        + (", as transformers saves it" if unread else ", or 'bytes'")
      )
  _check_same_kind(given["tokenizer"], own["tokenizer"], init)
  named = given["tokenizer"] not in ("", own["tokenizer"])
  # Another tokenizer has its own template and end of a response.
  inherited = {"template_date": own["template_date"]} if named else own
  settings = {k: given[k] or inherited.get(k, "") for k in TOKENIZER_KEYS}
  settings["template_date"] = (
    settings["template_date"] or tokenizers.DEFAULT_DATE
  )
  return settings


def _is_plain(tokenizer: str) -> bool:
  """Whether ids are bytes or letters, and not those of a vocabulary."""
  return tokenizer == "bytes" or tokenizer.startswith("letters:")


def _check_same_kind(given: str, own: str, init: str) -> None:
  """Refuses ids that the model has never seen."""
  if not given or not own or given == own or init == "random":
    return
  if _is_plain(given) or _is_plain(own):
    raise ValueError(
      f"data.tokenizer={given!r} gives ids that policy.init={init!r} was not"
      f" trained on; its own tokenizer is {own!r}: leave data.tokenizer empty"
    )


def open_tokenizer(settings: Mapping[str, str]) -> tokenizers.Tokenizer:
  """Opens the tokenizer that `tokenizer_settings` names."""
  spec = settings["tokenizer"]
  return tokenizers.load_tokenizer(
    model_folder(spec) if spec.startswith("hub:") else spec,
    chat_template=settings["chat_template"],
    eos_token=settings["eos_token"],
    template_date=settings["template_date"],
  )


def warn_of_other_ids(
  init: str, settings: Mapping[str, str], tokenizer: tokenizers.Tokenizer
) -> None:
  """Warns where a tokenizer gives other ids than the model's own.

  Args:
    init: `policy.init`.
    settings: from `tokenizer_settings`.
    tokenizer: what they open.
  """
  if init == "random" or _is_plain(settings["tokenizer"]):
    return
  try:
    own_settings = tokenizer_settings(init, {})
  except ValueError:
    return  # the model has none of its own
  if own_settings["tokenizer"] == settings["tokenizer"]:
    return
  own = open_tokenizer(own_settings).vocab
  other = [token for token, i in own.items() if tokenizer.vocab.get(token) != i]
  if other:
    _LOG.warning(
      "data.tokenizer=%r gives %d of the %d tokens of policy.init=%r another"
      " id, or none (%r is the first): the model reads other words than the"
      " text has. Leave data.tokenizer empty for the model's own",
      settings["tokenizer"],
      len(other),
      len(own),
      init,
      min(other, key=own.get),
    )


def tokenizer_of_run(workdir: epath.PathLike) -> tokenizers.Tokenizer:
  """Opens the tokenizer that a run was trained with."""
  config = read_config(workdir)
  return open_tokenizer(
    tokenizer_settings(config["policy"]["init"], config["data"])
  )


def read_config(workdir: epath.PathLike) -> dict[str, Any]:
  """Reads the resolved config of a run.

  Raises:
    FileNotFoundError: the folder is not the workdir of a run.
  """
  return json.loads(_find_in_run(workdir, "config.json").read_text())


def write_model(policy: Policy, workdir: epath.Path) -> None:
  """Records the model's shape, so that other runs can start from this one."""
  text = json.dumps(dataclasses.asdict(policy.config), indent=2)
  (workdir / "model.json").write_text(text + "\n")


def model_folder(init: str) -> str:
  """The local folder of "hf:FOLDER" or "hub:ORG/NAME@REVISION"."""
  kind, _, where = init.partition(":")
  return hf.download(where) if kind == "hub" else where


def load_params(init: str, policy: Policy, mesh: Any, *, seed: int) -> Any:
  """Parameters on the mesh.

  Args:
    init: "random", "hf:FOLDER", "hub:ORG/NAME@REVISION" or "run:WORKDIR",
      which takes that run's best checkpoint, its adapters merged.
    policy: the decoder, of that shape.
    mesh: where they go.
    seed: of random weights, adapters among them.

  Returns:
    Nested dict of arrays, sharded by the partition rules.

  Raises:
    FileNotFoundError: a run without a checkpoint.
    ValueError: weights of another shape, or adapters whose base has changed.
  """
  if policy.config.lora is not None:
    base = load_params(init, policy.without_adapters, mesh, seed=seed)
    whole = join_trees(_fresh_adapters(policy, mesh, seed), base)
    return _with_dtypes(whole, policy)
  kind, _, where = init.partition(":")
  if policy.config.value_head and not _has_value_head(kind, where):
    # What it starts from has none: it begins at zero, as a random one does.
    headless = dataclasses.replace(policy.config, value_head=False)
    params = load_params(init, Policy(headless), mesh, seed=seed)
    abstract = policy.abstract_params()["value_head"]
    sharding = param_shardings({"value_head": abstract}, mesh)["value_head"]
    zeros = jnp.zeros(abstract.shape, abstract.dtype, device=sharding)
    return {**params, "value_head": zeros}
  shardings = param_shardings(policy.abstract_params(), mesh)
  if kind == "random":
    make = jax.jit(policy.init, out_shardings=shardings)
    return make(jax.random.key(seed))
  if kind in ("hf", "hub"):
    return hf.load_params(model_folder(init), policy, shardings)
  return _load_run(epath.Path(where), policy, mesh)


def _with_dtypes(params: Any, policy: Policy) -> Any:
  """Casts parameters to the dtypes that the policy has them in."""
  return jax.tree.map(
    lambda x, wanted: x.astype(wanted.dtype), params, policy.abstract_params()
  )


def _fresh_adapters(policy: Policy, mesh: Any, seed: int) -> Any:
  """Adapters that do nothing yet; the base is not made."""

  def adapters(tree: Any) -> Any:
    return split_params({"layers": tree["layers"]}, "")[0]

  shardings = param_shardings(adapters(policy.abstract_params()), mesh)
  make = jax.jit(
    lambda key: adapters(policy.init(key)), out_shardings=shardings
  )
  return make(jax.random.key(seed))


def base_name(init: str) -> str:
  """What a card calls the model that a run started from."""
  kind, _, where = init.partition(":")
  return where.partition("@")[0] if where else f"{kind} weights"


def load_trained(workdir: epath.PathLike, policy: Policy, mesh: Any) -> Any:
  """What a run trained, of its best checkpoint, and nothing else.

  Args:
    workdir: of the run.
    policy: its decoder, with its adapters.
    mesh: where the parameters go.

  Returns:
    Nested dict of arrays.

  Raises:
    FileNotFoundError: no finished checkpoint.
    ValueError: weights of another shape.
  """
  workdir = epath.Path(workdir)
  config = json.loads((workdir / "config.json").read_text())
  trained, _ = split_params(
    policy.abstract_params(), config["policy"].get("frozen", "")
  )
  targets = jax.tree.map(
    lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s),
    trained,
    param_shardings(trained, mesh),
  )
  checkpoints = open_checkpoints(workdir, config, is_reader=True)
  try:
    step = checkpoints.best_step
    if step is None:
      raise FileNotFoundError(
        f"{workdir} has no finished checkpoint to start from"
      )
    return checkpoints.restore_params(targets, step=step)
  finally:
    checkpoints.close()


def _load_run(workdir: epath.Path, policy: Policy, mesh: Any) -> Any:
  """The best checkpoint of a run, joined with what that run did not train."""
  config = read_config(workdir)
  recorded = ModelConfig.from_dict(
    json.loads(_find_in_run(workdir, "model.json").read_text())
  )
  # In its own dtypes, which the digest of what it did not train covers.
  theirs = Policy(
    dataclasses.replace(
      policy.config,
      param_dtype=recorded.param_dtype,
      lora=recorded.lora,
      frozen=recorded.frozen or config["policy"].get("frozen", ""),
    )
  )
  params = load_trained(workdir, theirs, mesh)
  untrained = split_params(theirs.abstract_params(), theirs.config.frozen)[1]
  if untrained is not None:
    params = join_trees(params, load_base(workdir, theirs, mesh))
  if theirs.config.lora is not None:
    # In float32: an adapter's part of a weight is lost in bfloat16.
    wide = jax.tree.map(lambda x: x.astype(jnp.float32), params)
    params = jax.jit(
      lambda params: lora.merge_adapters(params, theirs.config),
      out_shardings=param_shardings(policy.abstract_params(), mesh),
    )(wide)
  return _with_dtypes(params, policy)


def load_base(workdir: epath.PathLike, policy: Policy, mesh: Any) -> Any:
  """Loads what a run did not train: the base under adapters, or a part.

  Args:
    workdir: run directory.
    policy: its decoder, with its adapters.
    mesh: where the parameters go.

  Returns:
    Nested dict of arrays, read from where the run read them.

  Raises:
    ValueError: they have changed since.
  """
  config = read_config(workdir)
  init = config["policy"]["init"]
  whole = load_params(init, policy, mesh, seed=config["seed"])
  base = split_params(whole, config["policy"].get("frozen", ""))[1]
  check_frozen(base, epath.Path(workdir), init)
  return base


def check_frozen(frozen: Any, workdir: epath.Path, init: str) -> None:
  """Whether parameters that a run does not save are those it began with.

  Args:
    frozen: as they are read now.
    workdir: of the run.
    init: where they are read from.

  Raises:
    ValueError: they are others.
  """
  path = workdir / FROZEN_DIGEST
  digest = params_digest(frozen)
  if path.exists() and path.read_text().strip() != digest:
    raise ValueError(
      f"{workdir} trained parts of another model: {path} says"
      f" {path.read_text().strip()[:12]}, and {init} is {digest[:12]} now."
      " Adapters mean nothing on another base: bring the old weights back"
    )


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
