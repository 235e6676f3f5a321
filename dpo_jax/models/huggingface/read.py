"""Reads a Hugging Face folder: config.json and safetensors."""

from collections.abc import Mapping
import contextlib
import dataclasses
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
from dpo_jax.system import downloads, files, inputs
from dpo_jax.trees import Params

_LOG = logging.getLogger(__name__)

INDEX = "model.safetensors.index.json"
# Buffers of older exports, which are not parameters.
_SPARE = re.compile(
  r"(rotary_emb\.inv_freq|attn\.(masked_)?bias|"
  r"attention\.(masked_)?bias)$"
)
# Dtypes of weights, as safetensors spells them.
_DTYPES = ("F64", "F32", "F16", "BF16")
# Rows of a tensor that are compared at once.
_ROWS = 8192
# tokenizer.model is not read; it shows that the model has a tokenizer.
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
    **overrides: fields of ModelConfig that config.json does not decide, such as
      dtypes.

  Returns:
    Shape of the model. It is untied, with a warning, where the weights have an
    output projection that differs from the embedding.

  Raises:
    FileNotFoundError: a folder without config.json.
    ValueError: a key whose value this decoder does not support, or a damaged
      file of weights.
  """
  path = epath.Path(folder) / "config.json"
  if not inputs.is_there(path):
    raise FileNotFoundError(
      f"{path} does not exist: a Hugging Face model folder holds config.json"
      " and *.safetensors"
    )
  fields = config_json.read_config(files.read_json(path), str(path))
  try:
    config = ModelConfig(**fields)
  except ValueError as error:
    raise ValueError(f"{path}: {error}") from error
  config = dataclasses.replace(config, **overrides)
  if config.tie_embeddings and _has_own_head(epath.Path(folder), config):
    _LOG.warning(
      "%s: config.json ties the output projection to the embedding, but the"
      " checkpoint has a different one: kept untied, as in transformers 5",
      folder,
    )
    config = dataclasses.replace(config, tie_embeddings=False)
  return config


def _has_own_head(root: epath.Path, config: ModelConfig) -> bool:
  """Returns whether a checkpoint has a head that differs from its embedding.

  It compares all values. A folder without weights, or without one of the two,
  has none.
  """
  untied = dataclasses.replace(config, tie_embeddings=False)
  by_key = {t.parts[0].key: t.name for t in tensor_map(untied)}
  with contextlib.ExitStack() as stack:
    try:
      where = _open_files(root, stack)
    except FileNotFoundError:
      return False  # a folder with config.json alone, as for a plan
    head, embedding = (
      name if name in where else name.partition(".")[2]
      for name in (by_key["head"], by_key["embedding"])
    )
    if head not in where or embedding not in where:
      return False
    one, other = (where[name].open() for name in (head, embedding))
    if one.get_shape() != other.get_shape():
      return True
    num_rows = one.get_shape()[0]
    parts = (
      slice(i, min(i + _ROWS, num_rows)) for i in range(0, num_rows, _ROWS)
    )
    return any(not np.array_equal(one[rows], other[rows]) for rows in parts)


def download(spec: str) -> str:
  """Fetches a model from the Hub: weights, json and templates, never code.

  Args:
    spec: "ORG/NAME@REVISION".

  Returns:
    The local folder. The login, if any, is that of huggingface_hub, and so are
    errors of the Hub.

  Raises:
    ValueError: a spec without a revision.
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


def load_params(folder: str, policy: Policy, shardings: Params) -> Params:
  """Streams a checkpoint's tensors onto the devices.

  Each device's slice of a tensor is read, converted and placed separately,
  layer by layer, so the host never holds more than one tensor.

  Args:
    folder: a local Hugging Face model folder.
    policy: decoder of the folder's shape, without adapters or a value head,
      which a checkpoint does not have.
    shardings: tree of Shardings, like the parameters.

  Returns:
    The parameters in the dtypes of `policy.abstract_params`.

  Raises:
    FileNotFoundError: no files of weights, or one of the index is missing.
    ValueError: damaged files; missing, unexpected or misshapen tensors, or
      tensors of integers, all listed at once; or a tensor with a non-finite
      value.
  """
  tensors = tensor_map(policy.config)
  downloads.verify(_weight_files(epath.Path(folder)))
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
        stored = where[names[name]]
        piece = tensor.read(stored.open(), which, index)
        if not np.isfinite(piece.astype(np.float32)).all():
          raise ValueError(f"{stored.path}: {name} holds a NaN or an infinity")
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
  """Stacks layers on their devices, so that the host holds one at a time.

  Args:
    abstract: shape and dtype of the stacked parameter, layers first.
    sharding: its sharding.
    names: name of each layer's tensor.
    read: function (name, index) -> numpy slice of a layer's tensor.
  """
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


@dataclasses.dataclass(frozen=True)
class _Stored:
  """A tensor in a file.

  Attributes:
    path: the file.
    file: the same, open.
    name: name of the tensor.
  """

  path: epath.Path
  file: Any
  name: str

  def open(self) -> Any:
    """Returns the tensor, which is read by slices."""
    return self.file.get_slice(self.name)


def _open_files(
  root: epath.Path, stack: contextlib.ExitStack
) -> dict[str, _Stored]:
  """Opens all files of weights in a folder; returns their tensors by name.

  Args:
    root: folder.
    stack: closes the files.

  Raises:
    ValueError: a damaged file, or a tensor that two files hold.
    FileNotFoundError: no files, or one that the index names is missing.
  """
  where: dict[str, _Stored] = {}
  for path in _weight_files(root):
    local = files.local(path)
    try:
      file = safetensors.safe_open(local, framework="numpy")
    except (safetensors.SafetensorError, OSError) as error:
      raise ValueError(
        f"{path} is cut short or damaged ({error}): fetch it again"
      ) from error
    stack.enter_context(file)
    names = set(file.keys())
    twice = sorted(where.keys() & names)
    if twice:
      raise ValueError(f"{path} holds {twice[0]}, which another file holds too")
    where |= {name: _Stored(path, file, name) for name in names}
  return where


def _weight_files(root: epath.Path) -> list[epath.Path]:
  index = root / INDEX
  if not inputs.is_there(index):
    whole = root / "model.safetensors"
    paths = (
      [whole] if inputs.is_there(whole) else sorted(root.glob("*.safetensors"))
    )
    if not paths:
      raise FileNotFoundError(
        f"{root} holds no *.safetensors, such as {whole.name}; pickled weights"
        " are not read: convert them with"
        " save_pretrained(safe_serialization=True)"
      )
    return [inputs.existing(path) for path in paths]
  weight_map = files.read_json(index).get("weight_map", {})
  if not isinstance(weight_map, dict) or not all(
    isinstance(name, str) for name in weight_map.values()
  ):
    raise ValueError(
      f"{index}: weight_map must map names of tensors to names of files"
    )
  names = sorted(set(weight_map.values()))
  outside = [n for n in names if n != epath.Path(n).name or n[:1] in ("", ".")]
  if outside or not names:
    raise ValueError(
      f"{index} must name files in its own folder, and names {outside[0]!r}"
      if outside
      else f"{index} names no files"
    )
  absent = [n for n in names if not inputs.is_there(root / n)]
  if absent:
    raise FileNotFoundError(f"{index} names {absent}, which are not there")
  return [inputs.existing(root / name) for name in names]


def _match_names(
  folder: str,
  where: Mapping[str, _Stored],
  tensors: list[Tensor],
  config: ModelConfig,
) -> dict[str, str]:
  """Maps expected names of tensors to names in the files.

  Raises:
    ValueError: missing, unexpected or misshapen tensors, or tensors of another
      dtype, all at once.
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
  # Some exports repeat the tied output projection.
  spare = {"lm_head.weight", "embed_out.weight"}
  spare = spare if config.tie_embeddings else set()
  faults += [
    f"unexpected {name}"
    for name in sorted(where.keys() - set(names.values()) - spare)
    if not _SPARE.search(name) or name in wanted
  ]
  for name, shape in wanted.items():
    if names[name] in where:
      stored = where[names[name]]
      found, dtype = stored.open().get_shape(), stored.open().get_dtype()
      if tuple(found) != shape:
        faults.append(f"{name} is {list(found)}, expected {list(shape)}")
      if dtype not in _DTYPES:
        faults.append(
          f"{name} has the dtype {dtype} in {stored.path.name}; weights are one"
          f" of {', '.join(_DTYPES)}"
        )
  if faults:
    shown = "\n  ".join(faults[:20])
    more = f"\n  and {len(faults) - 20} more" if len(faults) > 20 else ""
    raise ValueError(
      f"{folder} does not hold the model that its config.json describes"
      f" ({len(faults)} faults):\n  {shown}{more}"
    )
  return names
