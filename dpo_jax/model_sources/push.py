"""Uploads an export to the Hugging Face Hub, in one commit.

The login is that of huggingface_hub: `hf auth login`, or HF_TOKEN.
"""

from collections.abc import Iterator
import contextlib
import re

from etils import epath

from dpo_jax.system import files, inputs

_WEIGHTS = (".safetensors", ".safetensors.index.json")


def check_push(name: str, folder: epath.PathLike) -> None:
  """Checks what can be checked before a model is exported.

  Args:
    name: ORG/NAME.
    folder: folder of the export.

  Raises:
    ValueError: another spelling, a remote folder or one with files, which
      would be uploaded too, or no login.
  """
  import huggingface_hub  # slow to import, and few exports need it

  if not re.fullmatch(r"[\w.-]+/[\w.-]+", name):
    raise ValueError(f"push_to={name!r} must be ORG/NAME")
  if inputs.is_remote(folder):
    raise ValueError(
      f"push_to={name!r} uploads files of this machine: out={str(folder)!r}"
      " must be a local folder"
    )
  others = files.tree(folder) if epath.Path(folder).exists() else []
  if others:
    raise ValueError(
      f"push_to={name!r} uploads all files of out={str(folder)!r}, and"
      f" {others[0]} is there already: choose an empty or a new folder"
    )
  if huggingface_hub.get_token() is None:
    raise ValueError(
      f"push_to={name!r} requires a login of the Hub: run `hf auth login`, or"
      " set HF_TOKEN"
    )


def push(
  folder: epath.PathLike,
  name: str,
  *,
  is_public: bool,
  revision: str,
  message: str,
) -> str:
  """Uploads an export; its files appear on the Hub all at once.

  Weights that are there, and not in the export, are deleted in the same commit,
  since a reader would mix the shards of two models.

  Args:
    folder: export on this machine.
    name: ORG/NAME; created unless it exists.
    is_public: whether a new repository is public, and an old one may be.
    revision: branch, created unless it exists.
    message: message of the commit.

  Returns:
    Address of the commit.

  Raises:
    ValueError: a public repository, and `is_public` is False.
    OSError: the Hub refuses, or cannot be reached.
  """
  # `upload_folder` makes several commits of a large folder.
  import huggingface_hub

  api = huggingface_hub.HfApi()
  with _explaining(folder, name, revision):
    is_new = not api.repo_exists(name)
    if not (is_public or is_new or api.model_info(name).private):
      raise ValueError(
        f"push_to={name!r} is a public repository: --public allows that"
      )
    api.create_repo(name, private=not is_public, exist_ok=True)
    if revision != "main":
      api.create_branch(name, branch=revision, exist_ok=True)
    added = {
      str(path.relative_to(folder)): str(path) for path in files.tree(folder)
    }
    stale = [
      path
      for path in api.list_repo_files(name, revision=revision)
      if path.endswith(_WEIGHTS) and path not in added
    ]
    commit = api.create_commit(
      name,
      [
        *map(huggingface_hub.CommitOperationDelete, stale),
        *(
          huggingface_hub.CommitOperationAdd(path_in_repo, path)
          for path_in_repo, path in added.items()
        ),
      ],
      commit_message=message,
      revision=revision,
    )
  return str(commit.commit_url)


@contextlib.contextmanager
def _explaining(
  folder: epath.PathLike, name: str, revision: str
) -> Iterator[None]:
  """Turns an error of the Hub in its block into an OSError.

  It says that no file was changed there, and how to push the export again.
  """
  from huggingface_hub import errors

  # The base class of the library's HTTP error is httpx's. Errors of a large
  # file come as a RuntimeError.
  http_error = errors.HfHubHTTPError.__mro__[1]
  try:
    yield
  except (http_error, OSError, RuntimeError) as error:
    cause = f" {error.__cause__}" if isinstance(error, RuntimeError) else ""
    raise OSError(
      f"push_to={name!r} failed, and changed no file there: {error}{cause}\nThe"
      f" export is complete in {folder}: `hf upload {name} {folder} ."
      f" --revision={revision}` uploads it, to a private repository with"
      " --private"
    ) from error
