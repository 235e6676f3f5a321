"""Evaluates a finished or a running run: other losses, data, samples, judges.

  python -m dpo_jax.evaluate --workdir=runs/dpo --config.eval.num_samples=256 \\
      --config.eval.judge=reward:runs/reward_model

The config is that of the run; `--config.KEY` sets what an evaluation may set:
eval.*, loss.*, data.eval_source and how it is computed. The best checkpoint is
evaluated, unless `--step` names another. Nothing of the run changes; the
results are printed, and written to WORKDIR/evaluations/NAME.jsonl.
"""

from absl import flags
from ml_collections import config_flags

from dpo_jax import command_line
from dpo_jax.config import default_config
from dpo_jax.evaluating.evaluation import AGAINST, evaluate


def main() -> None:
  values = flags.FLAGS
  found = evaluate(
    values.workdir,
    config_flags.get_override_values(values["config"]),
    step=values.step,
    against=values.against,
    name=values.name,
    overwrite=values.overwrite,
  )
  print(found.table())
  print(f"\n{found.path}")


def define_flags() -> None:
  config_flags.DEFINE_config_dict(
    "config", default_config(), "keys that differ from the run's config"
  )
  flags.DEFINE_string("workdir", None, "run directory", required=True)
  flags.DEFINE_string("step", "best", "best, latest or the number of a step")
  flags.DEFINE_enum(
    "against", AGAINST[0], AGAINST, "what samples are compared with"
  )
  flags.DEFINE_string("name", "", "name of the file; '': step and digest")
  flags.DEFINE_bool("overwrite", False, "replace results of that name")


if __name__ == "__main__":
  command_line.run(main, define_flags)
