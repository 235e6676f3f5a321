"""Damaged token stores: batches are those of the data, or nothing starts."""

import functools
import hashlib
import json
import pathlib
import shutil
import tempfile
from typing import NamedTuple

import jax
import numpy as np

from dpo_jax.data import sources
from dpo_jax.data.batch_plan import make_plan
from dpo_jax.data.loader import Loader
from dpo_jax.data.store import Limits, Store, build_store
from dpo_jax.data.tokenizers import ByteTokenizer
from tests.damage import files

_LIMITS = Limits(100, 50)
_GROUPS = 40
_BATCH_SIZE = 8


class Made(NamedTuple):
  """Two sound stores whose arrays have the same shapes.

  Attributes:
    spec: source of the one that is damaged.
    store: its folder.
    other: folder of the other.
    digest: digest of its batches.
  """

  spec: str
  store: pathlib.Path
  other: pathlib.Path
  digest: str


def _write_pairs(path: pathlib.Path, seed: int) -> str:
  """Writes pairs of random letters; lengths do not depend on the seed."""
  letters = np.random.default_rng(seed).choice(list("abcdefgh"), (_GROUPS, 90))
  rows = []
  for i, row in enumerate(map("".join, letters)):
    ends = 5 + i, 25 + i, 50 + i % 40
    parts = row[: ends[0]], row[ends[0] : ends[1]], row[ends[1] : ends[2]]
    names = ("prompt", "chosen", "rejected")
    rows.append(json.dumps(dict(zip(names, parts, strict=True))))
  path.write_text("\n".join(rows))
  return f"jsonl:{path}"


def _open(spec: str, cache: pathlib.Path) -> Store:
  source = sources.open_source(spec)
  return build_store(source, ByteTokenizer(), _LIMITS, str(cache))


def digest_of_batches(store: Store) -> str:
  """Returns the sha256 of all training batches of two epochs, and held out."""
  total = hashlib.sha256()
  for indices in store.split(0.2):
    plan = make_plan(
      store,
      indices,
      batch_size=_BATCH_SIZE,
      row_tokens=0,
      row_multiple=1,
      layout="shared",
    )
    loader = Loader(store, indices, plan, _BATCH_SIZE, seed=0)
    for step in range(2 * _GROUPS // _BATCH_SIZE):
      for leaf in jax.tree.leaves(loader.batch(step)):
        total.update(np.asarray(leaf).tobytes())
  return total.hexdigest()


@functools.cache
def made() -> Made:
  """Tokenizes both, once in a process."""
  folder = pathlib.Path(tempfile.mkdtemp())
  specs = [_write_pairs(folder / f"{i}.jsonl", i) for i in range(2)]
  one, other = (_open(spec, folder / "cache") for spec in specs)
  assert one.lengths.shape == other.lengths.shape
  paths = [folder / "cache" / store.digest for store in (one, other)]
  return Made(specs[0], *paths, digest_of_batches(one))


def _damage(
  rng: np.random.Generator, store: pathlib.Path, other: pathlib.Path
) -> str:
  """Damages one file, or replaces it or all of them by another store's."""
  path = files.pick(rng, files.all_files(store))
  chance = rng.random()
  if chance < 0.75:
    return files.damage(rng, path)
  if chance < 0.95:
    files.replace(path, other / path.name)
    return f"{path.name} is that of another store"
  files.replace(store, other)
  return "the folder is that of another store"


def store(rng: np.random.Generator, folder: pathlib.Path) -> tuple[str, str]:
  """Damages a store once, opens it, and compares its batches."""
  sound = made()
  damaged = folder / "cache" / sound.store.name
  shutil.copytree(sound.store, damaged)
  detail = _damage(rng, damaged, sound.other)
  try:
    found = digest_of_batches(_open(sound.spec, damaged.parent))
  except Exception as error:
    is_named = files.names(error, damaged)
    return (
      f"refused, {'named' if is_named else 'unnamed'}",
      f"{detail}: {error!r}",
    )
  if found != sound.digest:
    return "wrong, silent", detail
  is_rebuilt = damaged.with_name(f"{damaged.name}.damaged").exists()
  return ("built again, right" if is_rebuilt else "same"), detail
