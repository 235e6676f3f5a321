"""Data sets of the Hugging Face Hub: the files of a split, pinned to a commit.

hub:ORG/NAME[/CONFIG]@REVISION[:SPLIT], spelled like tfds:NAME/CONFIG:SPLIT. The
files are those that the Hub itself finds: by `configs` in the header of
README.md, or by the names of files and folders. CONFIG may also be a folder.
"""

from collections.abc import Iterable, Mapping, Sequence
import contextlib
import dataclasses
import glob
import hashlib
import json
import logging
import os
import re
from typing import Any, cast

from etils import epath

from dpo_jax.system import downloads, files
from dpo_jax.system.files import write_atomically

_LOG = logging.getLogger(__name__)

# Where the Hub keeps what it has itself converted to Parquet.
CONVERTED = "refs/convert/parquet"
_SPELLING = "hub:ORG/NAME[/CONFIG]@REVISION[:SPLIT]"
_SPEC = re.compile(
  r"([\w.-]+/[\w.-]+)(?:/([^@:]+))?(?:@([^@:]+))?(?::([\w.-]+))?"
)
_READABLE = re.compile(r"\.(parquet|jsonl?(\.gz|\.zst)?)$")
_SHARD = re.compile(r"(?:.*/)?([^/]+)-\d{5}-of-\d{5}[^/]*")
# CONFIG/SPLIT/0000.parquet, as the Hub converts, and CONFIG/SPLIT-00000-of-...
_IN_CONFIGS = (
  re.compile(r"([^/]+)/([^/]+)/\d{4}\.parquet"),
  re.compile(r"([^/]+)/([^/]+)-\d{5}-of-\d{5}[^/]*"),
)
_NO_DATA = re.compile(
  r"(^|/)(\.|__|(README\.md|(config|dataset_(infos?|dict))\.json)$)"
)
_CONFIG_KEYS = ("config_name", "data_files", "data_dir", "default")
_KEYWORDS = {
  split: re.compile(rf"(^|[-._ 0-9])({words})([-._ 0-9]|$)")
  for split, words in (
    ("train", "train|training"),
    ("validation", "validation|valid|dev|val"),
    ("test", "test|testing|eval|evaluation"),
  )
}
# Splits of a config, and the files of each.
Splits = dict[str, list[str]]


@dataclasses.dataclass(frozen=True)
class Split:
  """Split of a data set.

  Attributes:
    spec: ORG/NAME/CONFIG@COMMIT:SPLIT.
    name: ORG/NAME.
    commit: 40 hexadecimal digits.
    paths: files in the repository, in the order in which they are read.
    digest: digest of the content of the files.
  """

  spec: str
  name: str
  commit: str
  paths: tuple[str, ...]
  digest: str

  def download(self) -> list[tuple[str, str]]:
    """Fetches the files that are not cached.

    Returns:
      Name and local path of each file.

    Raises:
      FileNotFoundError: a file is not cached, and the Hub not reachable.
      ValueError: a file whose content is not what was downloaded.
    """
    import huggingface_hub  # slow to import, and few runs need it

    folder = huggingface_hub.snapshot_download(
      self.name,
      repo_type="dataset",
      revision=self.commit,
      allow_patterns=[glob.escape(path) for path in self.paths],
    )
    found = [
      (f"{self.name}/{path}", os.path.join(folder, path)) for path in self.paths
    ]
    absent = [shown for shown, path in found if not os.path.exists(path)]
    if absent:
      raise FileNotFoundError(
        f"hub:{self.spec}: not cached, and the Hub was not reached: {absent}"
      )
    downloads.verify([path for _, path in found])
    return found


def open_split(what: str) -> Split:
  """Finds the files of a split; fetches none of them.

  Args:
    what: ORG/NAME[/CONFIG]@REVISION[:SPLIT]; SPLIT is `train` unless told.

  Returns:
    The split.

  Raises:
    ValueError: another spelling; a config or split that is not there, or none
      named where there are several; files of a format that is not read.
    FileNotFoundError: no such data set or revision.
    ConnectionError: the Hub does not answer.
  """
  match = _SPEC.fullmatch(what)
  if not match:
    raise ValueError(f"hub:{what} must be {_SPELLING}")
  name, config, revision, split = match.groups()
  if not revision:
    raise ValueError(
      f"hub:{what} must be {_SPELLING}: name the commit, or a branch such as"
      " main, so that the run can be repeated"
    )
  repository = _Repository.open(name, revision)
  if not repository.has_data and revision == "main":
    with contextlib.suppress(FileNotFoundError):
      repository = _Repository.open(name, CONVERTED)
  if not repository.has_data:
    raise ValueError(
      f"hub:{what} holds no .parquet, .jsonl or .json files. {_advice(name)}"
    )
  config, splits = repository.find_config(config, what)
  split = split or "train"
  if split not in splits:
    raise ValueError(
      f"hub:{what}: the config {config!r} has no split {split!r}; it has"
      f" {', '.join(splits) or 'none'}"
    )
  paths = tuple(splits[split])
  if not paths:
    raise ValueError(
      f"hub:{what}: README.md names files of the split {split!r} that are not"
      " in the repository"
    )
  for path in paths:
    if not _READABLE.search(path):
      raise ValueError(
        f"hub:{what}: {path} is neither Parquet nor JSON. {_advice(name)}"
      )
  digest = hashlib.sha256()
  for path in paths:
    digest.update(f"{repository.files[path]}\0".encode())
  pinned = f"{name}/{config}@{repository.commit}:{split}"
  _LOG.info("hub:%s is %d files: %s ...", pinned, len(paths), paths[0])
  return Split(pinned, name, repository.commit, paths, digest.hexdigest())


def _advice(name: str) -> str:
  return (
    f"If the Hub has converted it: hub:{name}@{CONVERTED}. Otherwise convert"
    " it, and name the files with parquet:PATH or jsonl:PATH"
  )


@dataclasses.dataclass(frozen=True)
class _Repository:
  """Commit of a data set.

  Attributes:
    commit: 40 hexadecimal digits.
    files: paths, and a digest of the content of each.
    declared: `configs` of the header of README.md.
  """

  commit: str
  files: Mapping[str, str]
  declared: Sequence[Mapping[str, Any]]

  @classmethod
  def open(cls, name: str, revision: str) -> "_Repository":
    """Reads what a commit holds, from the Hub or as it was read before.

    Args:
      name: ORG/NAME.
      revision: commit, branch or tag.

    Raises:
      FileNotFoundError: no such data set or revision.
      ConnectionError: the Hub does not answer.
    """
    import huggingface_hub
    from huggingface_hub import errors

    api = huggingface_hub.HfApi()
    # The base class of the library's HTTP error is httpx's.
    http_error = cast(type[Exception], errors.HfHubHTTPError.__mro__[1])
    try:
      commit: str | None = revision
      if not re.fullmatch("[0-9a-f]{40}", revision):
        commit = api.dataset_info(name, revision=revision).sha
      assert commit is not None  # asked for without an expansion
      return cls(commit, **_describe(api, name, commit))
    except errors.RevisionNotFoundError as error:
      raise FileNotFoundError(
        f"the data set {name} of the Hub has no revision {revision!r}"
      ) from error
    except errors.RepositoryNotFoundError as error:
      raise FileNotFoundError(
        f"the Hub has no data set {name!r}, or keeps it from you: for a private"
        " or gated one, accept its terms and set HF_TOKEN"
      ) from error
    except errors.OfflineModeIsEnabled as error:
      raise FileNotFoundError(
        f"hub:{name}@{revision} was not read before, and HF_HUB_OFFLINE is set:"
        " name a commit that was"
      ) from error
    except http_error as error:
      raise ConnectionError(
        f"the Hub did not answer for hub:{name}@{revision}: {error}. A commit"
        " that was read before needs no Hub"
      ) from error

  @property
  def has_data(self) -> bool:
    return any(map(_READABLE.search, _data_files(self.files)))

  def find_config(self, config: str | None, what: str) -> tuple[str, Splits]:
    """Finds a config by its name, or the default one.

    Args:
      config: name, or a folder with the files; None for the default config, or
        the only one.
      what: spelling of the data set, for errors.

    Returns:
      Name of the config, and split -> files.

    Raises:
      ValueError: no such config, or several where none is named.
    """
    configs = find_configs(self.files, self.declared)
    if config in configs:
      return config, configs[config]
    if config:
      below = [p for p in self.files if p.startswith(f"{config.strip('/')}/")]
      if splits := guess_splits(below):
        return config, splits
      raise ValueError(
        f"hub:{what} has no config and no folder {config!r}; it has the configs"
        f" {', '.join(configs)}"
      )
    marked = [e["config_name"] for e in self.declared if e.get("default")]
    default = [*marked, "default"][0]
    if default in configs:
      return default, configs[default]
    if len(configs) > 1:
      raise ValueError(
        f"hub:{what} must name one of its configs, as"
        f" {_SPELLING}: {', '.join(configs)}"
      )
    return next(iter(configs.items()))


def _describe(api: Any, name: str, commit: str) -> dict[str, Any]:
  """Lists the files and declared configs of a commit, from a cache if there.

  A commit never changes, so the result is written to the cache folder.

  Args:
    api: `huggingface_hub.HfApi`.
    name: ORG/NAME.
    commit: 40 hexadecimal digits.

  Returns:
    {"files": path -> digest, "declared": `configs` of README.md's header}.
  """
  import huggingface_hub
  from huggingface_hub import hf_api

  folder = os.path.join(files.cache_dir(), "hub", name.replace("/", "--"))
  cached = os.path.join(folder, f"{commit}.json")
  if os.path.exists(cached):
    return files.read_json(epath.Path(cached))
  tree = api.list_repo_tree(
    name, repo_type="dataset", revision=commit, recursive=True
  )
  found = {
    entry.path: entry.lfs.sha256 if entry.lfs else entry.blob_id
    for entry in tree
    if isinstance(entry, hf_api.RepoFile)
  }
  header: dict[str, Any] = {}
  if "README.md" in found:
    readme = api.hf_hub_download(
      name, "README.md", repo_type="dataset", revision=commit
    )
    header = huggingface_hub.metadata_load(readme) or {}
  declared = [
    {key: entry[key] for key in _CONFIG_KEYS if key in entry}
    | {"config_name": str(entry.get("config_name", "default"))}
    for entry in header.get("configs") or []
  ]
  described = {"files": found, "declared": declared}
  write_atomically(cached, json.dumps(described))
  return described


def find_configs(
  paths: Iterable[str], declared: Sequence[Mapping[str, Any]]
) -> dict[str, Splits]:
  """Sorts the files of a data set by config and split, as the Hub does.

  Args:
    paths: files of the repository.
    declared: `configs` of the header of README.md.

  Returns:
    Config -> split -> files.
  """
  paths = sorted(paths)
  if declared:
    return {
      entry["config_name"]: _declared_splits(entry, paths) for entry in declared
    }
  configs: dict[str, Splits] = {}
  parquet = [p for p in _data_files(paths) if p.endswith(".parquet")]
  for layout in _IN_CONFIGS:
    matches = [match for p in parquet if (match := layout.fullmatch(p))]
    if matches and len(matches) == len(parquet):
      for path, config, split in (m.group(0, 1, 2) for m in matches):
        configs.setdefault(config, {}).setdefault(split, []).append(path)
      return configs
  return {"default": guess_splits(paths)}


def _data_files(paths: Iterable[str]) -> list[str]:
  """Returns the paths but those of hidden files and of descriptions."""
  return [path for path in paths if not _NO_DATA.search(path)]


def _declared_splits(entry: Mapping[str, Any], paths: list[str]) -> Splits:
  """Finds the files of each split of a config that README.md declares.

  Args:
    entry: an entry of `configs`. Its `data_files` is a pattern or a list of
      them, for `train`; split -> patterns; or a list of {"split", "path"}.
      Without it the names of the files in `data_dir` tell the split.
    paths: files of the repository.
  """
  import fsspec.utils  # huggingface_hub needs it too

  folder = entry.get("data_dir")
  given = entry.get("data_files")
  if not given:
    below = f"{folder.strip('/')}/" if folder else ""
    return guess_splits([p for p in paths if p.startswith(below)])
  if isinstance(given, list) and isinstance(given[0], Mapping):
    given = {part["split"]: part["path"] for part in given}
  elif not isinstance(given, Mapping):
    given = {"train": given}
  splits: Splits = {}
  for split, patterns in given.items():
    patterns = [patterns] if isinstance(patterns, str) else patterns
    for pattern in patterns:
      pattern = "/".join(filter(None, (folder, pattern.removeprefix("./"))))
      matches = re.compile(fsspec.utils.glob_translate(pattern)).match
      splits.setdefault(split, []).extend(filter(matches, paths))
  return {split: list(dict.fromkeys(found)) for split, found in splits.items()}


def guess_splits(paths: Iterable[str]) -> Splits:
  """Sorts files by the split that their names, or their folders', tell.

  Args:
    paths: files; Parquet is preferred to JSON.

  Returns:
    Split -> files; all are of `train` where no name tells a split. Where some
    do, other files are left out. {} without a file that can be read.
  """
  readable = list(filter(_READABLE.search, _data_files(paths)))
  parquet = [path for path in readable if path.endswith(".parquet")]
  paths = parquet or readable
  shards = [match for match in map(_SHARD.fullmatch, paths) if match]
  if shards and len({os.path.dirname(match[0]) for match in shards}) == 1:
    splits: Splits = {}
    for match in shards:
      splits.setdefault(match[1], []).append(match[0])
    return splits
  for parts in (slice(0, -1), slice(-1, None)):  # folders first, then names
    splits = {
      split: [p for p in paths if any(map(words.search, p.split("/")[parts]))]
      for split, words in _KEYWORDS.items()
    }
    if any(splits.values()):
      return {split: found for split, found in splits.items() if found}
  return {"train": paths} if paths else {}
