"""Damages files from outside: data, tokenizers, models, a run's JSON files.

A trial writes a small input, damages one file of it once, and reads it as a run
would. The error must name the file, unless what is read is the same.
"""

from collections.abc import Callable
import dataclasses
import gzip
import hashlib
import json
import os
import pathlib
from typing import Any

import jax
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from dpo_jax.data import groups, sources
from dpo_jax.data.alphabets import ByteTokenizer
from dpo_jax.data.reading import Reading
from dpo_jax.data.tokenizers import HFTokenizer
from dpo_jax.model_sources.parse import TrainedRun
from dpo_jax.models import huggingface
from dpo_jax.models.decoder import Policy
from dpo_jax.records.workdir import Workdir
from tests import tiny
from tests.data import folders

# Values that no key of a JSON file has.
_ODD = (
  *(None, True, -1, 0, 3, 1e400, float("nan"), 10**9, 10**300, 1.5),
  *("", "no", "384", "\ud800", [], [3], [None], {}, {"a": 1}),
)
Read = Callable[[pathlib.Path], Any]


def outside(rng: np.random.Generator, folder: pathlib.Path) -> tuple[str, str]:
  """Damages a fresh input once and reads it.

  Args:
    rng: decides the input and its damage.
    folder: empty folder for the input.

  Returns:
    Outcome and detail. The outcome is "same content"; "named", an error of the
    user's kind with the file's name; "other content", read without an error
    from a file that no digest covers; or "wrong, " and why.
  """
  kind = str(rng.choice(list(_INPUTS)))
  write, read = _INPUTS[kind]
  write(rng, folder)
  before = read(folder)
  path = _choose_file(rng, folder)
  how = _damage(rng, path)
  detail = f"{kind}: {how} of {path.name}"
  try:
    after = read(folder)
  except TimeoutError:  # the limit of a trial
    return "wrong, hang", detail
  except Exception as error:
    is_ours = isinstance(error, ValueError | OSError)
    is_named = is_ours and path.name in str(error)
    shown = f"{detail}: {type(error).__name__}: {str(error)[:300]}"
    return "named" if is_named else "wrong, unnamed", shown
  if repr(after) == repr(before):
    return "same content", detail
  # A file that may be missing has no digest where it is missing.
  is_covered = kind in _COVERED and how != "deletion"
  return "wrong, " * is_covered + "other content", detail


def _choose_file(
  rng: np.random.Generator, folder: pathlib.Path
) -> pathlib.Path:
  paths = sorted(
    path
    for path in folder.rglob("*")
    if path.is_file() and "blobs" not in path.parts
  )
  return paths[rng.integers(len(paths))]


# Damage.


def _damage(rng: np.random.Generator, path: pathlib.Path) -> str:
  """Damages a file; returns the name of the damage."""
  is_json = path.suffix == ".json" and rng.random() < 0.6
  names = list(OF_JSON if is_json else _OF_BYTES)
  name = str(rng.choice(names))
  if name == "deletion":
    path.unlink()
  elif is_json:
    value = json.loads(path.read_text())
    path.write_text(OF_JSON[name](rng, value))
  else:
    path.write_bytes(_OF_BYTES[name](rng, path.read_bytes()))
  return name


def _flip(rng: np.random.Generator, content: bytes) -> bytes:
  changed = bytearray(content)
  changed[rng.integers(len(changed))] ^= 1 << int(rng.integers(8))
  return bytes(changed)


def _truncate(rng: np.random.Generator, content: bytes) -> bytes:
  return content[: rng.integers(len(content))]


def _zero(rng: np.random.Generator, content: bytes) -> bytes:
  start = int(rng.integers(len(content)))
  size = min(64, len(content) - start)
  return content[:start] + bytes(size) + content[start + size :]


def _lengthen(rng: np.random.Generator, content: bytes) -> bytes:
  return content + rng.bytes(20)


def _nest(rng: np.random.Generator, content: bytes) -> bytes:
  del rng
  return b"[" * 100_000 + content


def _spots(value: Any) -> list[tuple[Any, Any]]:
  """Returns every container of a JSON value with each of its keys."""
  found = []
  members = value.items() if isinstance(value, dict) else list(enumerate(value))
  for key, member in members:
    found.append((value, key))
    if isinstance(member, dict | list):
      found += _spots(member)
  return found


def _spot(rng: np.random.Generator, value: Any) -> tuple[Any, Any]:
  spots = _spots(value)
  # The keys of a file as often as the many members of a vocabulary.
  if rng.random() < 0.5:
    spots = [spot for spot in spots if spot[0] is value]
  return spots[rng.integers(len(spots))]


def _swap(rng: np.random.Generator, value: Any) -> str:
  holder, key = _spot(rng, value)
  holder[key] = _ODD[rng.integers(len(_ODD))]
  return json.dumps(value)


def _drop(rng: np.random.Generator, value: Any) -> str:
  holder, key = _spot(rng, value)
  del holder[key]
  return json.dumps(value)


def _digits(rng: np.random.Generator, value: Any) -> str:
  holder, key = _spot(rng, value)
  holder[key] = "DIGITS"
  return json.dumps(value).replace('"DIGITS"', "9" * 5000)


def _duplicate(rng: np.random.Generator, value: Any) -> str:
  text = json.dumps(value)
  if not isinstance(value, dict):
    return text
  key = str(rng.choice(list(value)))
  again = json.dumps(_ODD[rng.integers(len(_ODD))])
  return f"{text[:-1]}, {json.dumps(key)}: {again}}}"


_OF_BYTES: dict[str, Any] = {
  "flipped bit": _flip,
  "truncation": _truncate,
  "zeroed block": _zero,
  "lengthening": _lengthen,
  "nesting": _nest,
  "deletion": None,
}
OF_JSON: dict[str, Any] = {
  "odd value": _swap,
  "dropped key": _drop,
  "number of 5,000 digits": _digits,
  "duplicate key": _duplicate,
}


# Inputs.


def _pairs(rng: np.random.Generator) -> list[dict[str, str]]:
  words = ["cat", "dog", "the", "answer", "is", "\u00e9t\u00e9", "no"]
  return [
    {
      key: " ".join(rng.choice(words, 5)) + f" {key}{i}"
      for key in ("prompt", "chosen", "rejected")
    }
    for i in range(20)
  ]


def _write_lines(suffix: str) -> Callable[..., None]:
  def write(rng: np.random.Generator, folder: pathlib.Path) -> None:
    text = "".join(json.dumps(record) + "\n" for record in _pairs(rng))
    content = text.encode()
    if suffix == ".jsonl.gz":
      content = gzip.compress(content)
    elif suffix == ".jsonl.zst":
      content = pa.Codec("zstd").compress(content, asbytes=True)
    (folder / f"data{suffix}").write_bytes(content)

  return write


def _write_array(rng: np.random.Generator, folder: pathlib.Path) -> None:
  (folder / "data.json").write_text(json.dumps(_pairs(rng)))


def _write_parquet(has_checksums: bool) -> Callable[..., None]:
  def write(rng: np.random.Generator, folder: pathlib.Path) -> None:
    pq.write_table(
      pa.Table.from_pylist(_pairs(rng)),
      folder / "data.parquet",
      row_group_size=7,
      compression=str(rng.choice(["none", "snappy", "zstd"])),
      use_dictionary=bool(rng.random() < 0.5),
      write_page_checksum=has_checksums,
    )

  return write


def _read_data(spec: str) -> Read:
  kind, name = spec.split(":")

  def read(folder: pathlib.Path) -> Any:
    found = groups.tokenize(
      sources.open_source(f"{kind}:{folder / name}"),
      ByteTokenizer(),
      groups.Limits(400, 200),
      Reading(),
    )
    return found.tokens.tobytes(), found.lengths, found.scores, found.hashes

  return read


def _write_tokenizer(rng: np.random.Generator, folder: pathlib.Path) -> None:
  del rng
  folders.write_folder(
    folder,
    added_tokens_decoder={"0": {"content": folders.BOS, "special": True}},
  )
  special = {"eos_token": folders.EOS, "unk_token": {"content": folders.EOS}}
  for name, value in (
    ("special_tokens_map", special),
    ("generation_config", {"eos_token_id": [1, 3]}),
    ("added_tokens", {folders.BOS: 0}),
  ):
    (folder / f"{name}.json").write_text(json.dumps(value))


def _write_vocabulary(rng: np.random.Generator, folder: pathlib.Path) -> None:
  _write_tokenizer(rng, folder)
  whole = json.loads((folder / "tokenizer.json").read_text())
  (folder / "tokenizer.json").unlink()
  (folder / "vocab.json").write_text(json.dumps(whole["model"]["vocab"]))
  merges = "\n".join(" ".join(pair) for pair in whole["model"]["merges"])
  (folder / "merges.txt").write_text(f"#version: 0.2\n{merges}\n")


def _read_tokenizer(folder: pathlib.Path) -> Any:
  tokenizer = HFTokenizer(str(folder))
  ids = tokenizer.encode(
    ["the cat sat", "<s> what \u65e5"], is_rendered=True, is_continuation=True
  )
  return tokenizer.digest, ids, tokenizer.vocab_size, tokenizer.pad_id


def _write_model(rng: np.random.Generator, folder: pathlib.Path) -> None:
  policy = tiny.make_policy(num_layers=2, rope_theta=1e5)
  values = policy.abstract_params()
  params = jax.tree.map(
    lambda x: rng.normal(size=x.shape).astype(np.float32), values
  )
  huggingface.save_params(
    folder,
    policy,
    params,
    dtype="float32",
    max_shard_bytes=int(rng.choice([10**5, 10**9])),
  )


def _read_model(folder: pathlib.Path) -> Any:
  config = huggingface.load_config(str(folder))
  policy = Policy(config)
  device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
  shardings = jax.tree.map(lambda _: device, policy.abstract_params())
  params = huggingface.load_params(str(folder), policy, shardings)
  digest = hashlib.sha256()
  for leaf in jax.tree.leaves(params):
    digest.update(np.asarray(leaf).tobytes())
  return config, digest.hexdigest()


def _as_downloaded(write: Callable[..., None]) -> Callable[..., None]:
  """Moves files to where the Hub's client keeps those that it downloads."""

  def write_links(rng: np.random.Generator, folder: pathlib.Path) -> None:
    write(rng, folder)
    blobs = folder / "blobs"
    blobs.mkdir()
    for path in [p for p in folder.iterdir() if p.is_file()]:
      content = path.read_bytes()
      digest = hashlib.sha256(content).hexdigest()
      if path.suffix == ".json":
        start = b"blob %d\0" % len(content)
        digest = hashlib.sha1(start + content).hexdigest()
      path.rename(blobs / digest)
      path.symlink_to(os.path.join("blobs", digest))

  return write_links


def _write_run(rng: np.random.Generator, folder: pathlib.Path) -> None:
  del rng
  workdir = Workdir.at(folder)
  workdir.write_config(tiny.make_config().to_dict())
  shape = dataclasses.asdict(tiny.make_policy().config)
  workdir.model.write_text(json.dumps(shape))


def _read_run(folder: pathlib.Path) -> Any:
  run = TrainedRun.at(folder)
  return run.config, run.trained_model


_INPUTS: dict[str, tuple[Callable[..., None], Read]] = {
  "JSONL": (_write_lines(".jsonl"), _read_data("jsonl:data.jsonl")),
  "JSONL, gzip": (_write_lines(".jsonl.gz"), _read_data("jsonl:data.jsonl.gz")),
  "JSONL, zstd": (
    _write_lines(".jsonl.zst"),
    _read_data("jsonl:data.jsonl.zst"),
  ),
  "JSON array": (_write_array, _read_data("jsonl:data.json")),
  "Parquet": (_write_parquet(False), _read_data("parquet:data.parquet")),
  "Parquet, checksums": (
    _write_parquet(True),
    _read_data("parquet:data.parquet"),
  ),
  "tokenizer": (_write_tokenizer, _read_tokenizer),
  "tokenizer, downloaded": (_as_downloaded(_write_tokenizer), _read_tokenizer),
  "vocabulary": (_write_vocabulary, _read_tokenizer),
  "model": (_write_model, _read_model),
  "model, downloaded": (_as_downloaded(_write_model), _read_model),
  "run": (_write_run, _read_run),
}
# Those whose files carry a checksum or have a digest.
_COVERED = (
  "JSONL, gzip",
  "Parquet, checksums",
  "tokenizer, downloaded",
  "model, downloaded",
)
