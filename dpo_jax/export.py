"""Exports a trained policy as a Hugging Face folder.

  python -m dpo_jax.export --workdir=runs/dpo --out=exported
  python -m dpo_jax.export --workdir=runs/dpo --out=adapter --adapter
  python -m dpo_jax.export --workdir=runs/dpo --out=exported --push_to=ORG/NAME

Writes config.json, safetensors, tokenizer files, generation_config.json and a
model card, which transformers and vLLM open. The best checkpoint is exported,
its adapters merged. `--adapter` writes the adapters of a run alone, as peft
does; where the run did not start from a model that transformers opens, that
start is written to OUT/base. `--push_to` uploads the folder to the Hugging Face
Hub too, in one commit to a private repository.
"""

from absl import flags
from etils import epath
import jax

from dpo_jax import command_line
from dpo_jax.model_sources.export import export
from dpo_jax.model_sources.push import check_push, push
from dpo_jax.system import files

_OF_PUSH = ("public", "revision", "commit_message")


def check_flags(given: flags.FlagValues) -> None:
  """Checks that no flag of an upload is given without `--push_to`.

  Raises:
    ValueError: one is given.
  """
  unread = [f"--{name}" for name in _OF_PUSH if given[name].present]
  if unread and not given.push_to:
    raise ValueError(
      f"{', '.join(unread)}: nothing is uploaded. Name a repository with"
      " --push_to=ORG/NAME"
    )


def main() -> None:
  given = flags.FLAGS
  check_flags(given)
  if given.push_to:
    check_push(given.push_to, given.out)
  export(
    given.workdir,
    given.out,
    dtype=given.dtype,
    only_adapter=given.adapter,
    name=given.push_to,
    base=given.base,
  )
  for path in files.tree(given.out):
    print(f"{files.size(path):>14,}  {path}")
  if given.push_to:
    url = push(
      given.out,
      given.push_to,
      is_public=given.public,
      revision=given.revision,
      message=given.commit_message
      or f"Export of {epath.Path(given.workdir).name}",
    )
    print(url)


if __name__ == "__main__":
  flags.DEFINE_string("workdir", None, "run directory", required=True)
  flags.DEFINE_string("out", None, "folder to write", required=True)
  flags.DEFINE_string("dtype", "", "dtype of the weights; float32 if empty")
  flags.DEFINE_bool("adapter", False, "write the adapters alone")
  flags.DEFINE_string("base", "", "ORG/NAME of the Hub: the adapters' base")
  flags.DEFINE_string("push_to", "", "ORG/NAME of the Hub to upload to")
  flags.DEFINE_bool("public", False, "upload to a public repository")
  flags.DEFINE_string("revision", "main", "branch to upload to")
  flags.DEFINE_string("commit_message", "", "message of the upload's commit")
  jax.config.update("jax_platforms", "cpu")  # no accelerator is needed
  command_line.run(main)
