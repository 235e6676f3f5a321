"""Hugging Face folders: config.json and safetensors -> policy."""

from collections.abc import Mapping
import contextlib
import dataclasses
import json
import logging
import re
from typing import Any

from etils import epath
import jax
import jax.numpy as jnp
import numpy as np
import safetensors

from dpo_jax.models.config import ModelConfig
from dpo_jax.models.decoder import Policy
from dpo_jax.models.huggingface import config_json
from dpo_jax.models.huggingface.tensor_map import Tensor, tensor_map
from dpo_jax.system import files

_LOG = logging.getLogger(__name__)


INDEX = "model.safetensors.index.json"


# Buffers that older exports store, and that say nothing.
_SPARE = re.compile(
  r"(rotary_emb\.inv_freq|attn\.(masked_)?bias|"
  r"attention\.(masked_)?bias)$"
)


# Rows of a tensor that are compared at once.
_ROWS = 8192


# tokenizer.model is not read, but tells that the model has a tokenizer.
_FETCHED = [
  "*.safetensors",
  "*.json",
  "*.jinja",
  "merges.txt",
  "tokenizer.model",
]


def load_config(folder: str, **overrides: Any) -> ModelConfig:
  """Reads config.json.

  Args:
    folder: a local Hugging Face model folder.
    **overrides: fields of ModelConfig that are ours to choose, such as dtypes.

  Returns:
    The model's shape.

  Raises:
    FileNotFoundError: no config.json there.
    ValueError: a field that we would have to honour and do not.
  """
  path = epath.Path(folder) / "config.json"
  if not path.exists():
    raise FileNotFoundError(
      f"{path} does not exist: a Hugging Face model folder holds config.json"
      " and *.safetensors"
    )
  fields = config_json.read_config(_read_json(path), str(path))
  config = ModelConfig(**fields, **overrides)
  if config.tie_embeddings and _has_own_head(epath.Path(folder), config):
    _LOG.warning(
      "%s: config.json ties the output projection to the embedding, and the"
      " checkpoint has another one: it is kept untied, as in transformers 5",
      folder,
    )
    config = dataclasses.replace(config, tie_embeddings=False)
  return config


def _has_own_head(root: epath.Path, config: ModelConfig) -> bool:
  """Returns whether a checkpoint's output projection is not its embedding."""
  untied = dataclasses.replace(config, tie_embeddings=False)
  by_key = {t.parts[0].key: t.name for t in tensor_map(untied)}
  with contextlib.ExitStack() as stack:
    try:
      where = _open_files(root, stack)
    except FileNotFoundError:
      return False  # only config.json is here, as for a plan
    head, embedding = (
      name if name in where else name.partition(".")[2]
      for name in (by_key["head"], by_key["embedding"])
    )
    if head not in where or embedding not in where:
      return False
    one, other = (where[name].get_slice(name) for name in (head, embedding))
    if one.get_shape() != other.get_shape():
      return True
    num_rows = one.get_shape()[0]
    parts = (
      slice(i, min(i + _ROWS, num_rows)) for i in range(0, num_rows, _ROWS)
    )
    return any(not np.array_equal(one[rows], other[rows]) for rows in parts)


def download(spec: str) -> str:
  """Fetches a model of the Hub: safetensors and json only, never code.

  Args:
    spec: "ORG/NAME@REVISION"; the revision pins what is fetched.

  Returns:
    The local folder. A token is read from the environment alone.

  Raises:
    ValueError: no revision.
  """
  name, _, revision = spec.partition("@")
  if not name or not revision:
    raise ValueError(
      f"hub:{spec} must be hub:ORG/NAME@REVISION: name the commit, so that the"
      " run can be repeated"
    )
  import huggingface_hub  # slow to import, and few runs need it

  return huggingface_hub.snapshot_download(
    name,
    revision=revision,
    allow_patterns=_FETCHED,
  )


def _read_json(path: epath.Path) -> Any:
  try:
    return json.loads(path.read_text())
  except ValueError as error:
    raise ValueError(f"{path} is not JSON: {error}") from error


def load_params(folder: str, policy: Policy, shardings: Any) -> Any:
  """Streams a checkpoint's tensors onto the devices.

  A device's slice of a tensor is read, converted and placed by itself, layer
  by layer, so that the host never holds more than one tensor.

  Args:
    folder: a local Hugging Face model folder.
    policy: the decoder, of the folder's shape; without adapters or a value
      head, which a checkpoint does not have.
    shardings: tree like the parameters, of Shardings.

  Returns:
    The parameters in `policy.config.param_dtype`.

  Raises:
    ValueError: files that are damaged; tensors missing, unexpected or
      misshapen, all listed at once; or one with a non-finite value.
  """
  tensors = tensor_map(policy.config)
  with contextlib.ExitStack() as stack:
    where = _open_files(epath.Path(folder), stack)
    names = _match_names(folder, where, tensors, policy.config)
    sources = {
      part.key: (tensor, i)
      for tensor in tensors
      for i, part in enumerate(tensor.parts)
    }

    def place(path, abstract, sharding):
      tensor, which = sources["/".join(str(part.key) for part in path)]

      def read(name, index):
        source = where[names[name]].get_slice(names[name])
        piece = tensor.read(source, which, index)
        if not np.isfinite(piece.astype(np.float32)).all():
          raise ValueError(f"{folder}: {name} holds a NaN or an infinity")
        return piece.astype(abstract.dtype)

      theirs = tensor.names(policy.config.num_layers)
      if not tensor.is_stacked:
        return jax.make_array_from_callback(
          abstract.shape, sharding, lambda index: read(theirs[0], index)
        )
      return _stack_on_devices(abstract, sharding, theirs, read)

    return jax.tree_util.tree_map_with_path(
      place, policy.abstract_params(), shardings
    )


@jax.jit(donate_argnums=0)
def _put_layer(stacked: jax.Array, layer: jax.Array, index: Any) -> jax.Array:
  return stacked.at[index].set(layer)


def _stack_on_devices(
  abstract: Any, sharding: Any, names: list[str], read: Any
) -> jax.Array:
  """Stacks layers where they will live: a host need not hold them all."""
  devices: dict[Any, list[Any]] = {}
  for device, index in sharding.addressable_devices_indices_map(
    abstract.shape
  ).items():
    bounds = tuple(
      part.indices(size)[:2]
      for part, size in zip(index, abstract.shape, strict=True)
    )
    devices.setdefault(bounds, []).append(device)
  shards = []
  for bounds, holders in devices.items():
    first, last = bounds[0]
    index = tuple(slice(*bound) for bound in bounds[1:])
    shape = (last - first, *(stop - start for start, stop in bounds[1:]))
    stacks = [jnp.zeros(shape, abstract.dtype, device=d) for d in holders]
    for i, name in enumerate(names[first:last]):
      piece = read(name, index)
      stacks = [
        _put_layer(s, jax.device_put(piece, d), i)
        for s, d in zip(stacks, holders, strict=True)
      ]
    shards += stacks
  return jax.make_array_from_single_device_arrays(
    abstract.shape, sharding, shards
  )


def _open_files(
  root: epath.Path, stack: contextlib.ExitStack
) -> dict[str, Any]:
  """Tensor names -> open files."""
  where: dict[str, Any] = {}
  for path in _weight_files(root):
    local = files.local(path)
    try:
      file = safetensors.safe_open(local, framework="numpy")
    except (safetensors.SafetensorError, OSError) as error:
      raise ValueError(
        f"{path} is cut short or damaged ({error}): fetch it again"
      ) from error
    stack.enter_context(file)
    twice = sorted(where.keys() & set(file.keys()))
    if twice:
      raise ValueError(f"{path} holds {twice[0]}, which another file holds too")
    where |= dict.fromkeys(file.keys(), file)
  return where


def _weight_files(root: epath.Path) -> list[epath.Path]:
  index = root / INDEX
  if not index.exists():
    whole = root / "model.safetensors"
    paths = [whole] if whole.exists() else sorted(root.glob("*.safetensors"))
    if not paths:
      raise FileNotFoundError(
        f"{root} holds no *.safetensors; pickled weights are not read: convert"
        " them with save_pretrained(safe_serialization=True)"
      )
    return paths
  names = sorted(set(_read_json(index).get("weight_map", {}).values()))
  outside = [n for n in names if n != epath.Path(n).name or n.startswith(".")]
  if outside or not names:
    raise ValueError(
      f"{index} must name files in its own folder, and names {outside[0]!r}"
      if outside
      else f"{index} names no files"
    )
  absent = [n for n in names if not (root / n).exists()]
  if absent:
    raise FileNotFoundError(f"{index} names {absent}, which are not there")
  return [root / name for name in names]


def _match_names(
  folder: str,
  where: Mapping[str, Any],
  tensors: list[Tensor],
  config: ModelConfig,
) -> dict[str, str]:
  """Names that we expect -> names in the files.

  Raises:
    ValueError: what is missing, unexpected or misshapen, all at once.
  """
  wanted = {
    name: tensor.shape
    for tensor in tensors
    for name in tensor.names(config.num_layers)
  }
  # Some exports leave out the prefix of the base model (GPT-2's own does).
  names = {}
  for name in wanted:
    short = name.partition(".")[2]
    names[name] = name if name in where or short not in where else short
  faults = [f"missing {n}" for n in wanted if names[n] not in where]
  # Some repeat the tied projection.
  spare = {"lm_head.weight", "embed_out.weight"}
  spare = spare if config.tie_embeddings else set()
  faults += [
    f"unexpected {name}"
    for name in sorted(where.keys() - set(names.values()) - spare)
    if not _SPARE.search(name) or name in wanted
  ]
  for name, shape in wanted.items():
    if names[name] in where:
      found = where[names[name]].get_slice(names[name]).get_shape()
      if tuple(found) != shape:
        faults.append(f"{name} is {list(found)}, wanted {list(shape)}")
  if faults:
    shown = "\n  ".join(faults[:20])
    more = f"\n  and {len(faults) - 20} more" if len(faults) > 20 else ""
    raise ValueError(
      f"{folder} does not hold the model that its config.json describes"
      f" ({len(faults)} faults):\n  {shown}{more}"
    )
  return names
