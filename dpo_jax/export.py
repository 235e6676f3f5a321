"""Exports a trained policy as a Hugging Face folder.

  python -m dpo_jax.export --workdir=runs/dpo --out=exported
  python -m dpo_jax.export --workdir=runs/dpo --out=adapter --adapter

Writes config.json, safetensors, tokenizer files, generation_config.json and a
model card, which transformers and vLLM open. The best checkpoint is exported,
its adapters merged. `--adapter` writes the adapters of a run alone, as peft
does; where the run did not start from a model that transformers opens, that
start is written to OUT/base.
"""

from absl import flags
import jax

from dpo_jax import command_line
from dpo_jax.model_sources.export import export
from dpo_jax.system import files


def main() -> None:
  out = flags.FLAGS.out
  export(
    flags.FLAGS.workdir,
    out,
    dtype=flags.FLAGS.dtype,
    only_adapter=flags.FLAGS.adapter,
  )
  for path in files.tree(out):
    print(f"{files.size(path):>14,}  {path}")


if __name__ == "__main__":
  flags.DEFINE_string("workdir", None, "run directory", required=True)
  flags.DEFINE_string("out", None, "folder to write", required=True)
  flags.DEFINE_string("dtype", "", "dtype of the weights; float32 if empty")
  flags.DEFINE_bool("adapter", False, "write the adapters alone")
  jax.config.update("jax_platforms", "cpu")  # no accelerator is needed
  command_line.run(main)
