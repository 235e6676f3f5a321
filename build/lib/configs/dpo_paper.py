"""The DPO paper's dialogue and summaries (Rafailov et al. 2023), and SHP.

  python -m dpo_jax.train --config=configs/dpo_paper.py:hh-sft \
      --workdir=gs://BUCKET/hh_sft
  python -m dpo_jax.train --config=configs/dpo_paper.py:hh-dpo \
      --workdir=gs://BUCKET/hh_dpo --config.policy.init=run:gs://BUCKET/hh_sft

A variant is TASK-STAGE, or TASK-STAGE-repository for the settings of
eric-mitchell/direct-preference-optimization. Stages are `sft` and `dpo`.

| TASK | policy | data | beta |
|---|---|---|---|
| hh | Pythia-2.8B | Anthropic's HH, all four parts | 0.1 |
| hh_shp | Pythia-2.8B | HH and SHP in equal shares | 0.1 |
| tldr | GPT-J 6B | TL;DR posts and comparisons | 0.5 |

The paper and its repository differ in the learning rate: 1e-6 (app. B) and 5e-7
(config/config.yaml). hh_shp is the repository's example and not in the paper.

Hardware of the repository's README, for hh: 4 A100-80G, SFT 1 h 30, DPO 2 h 45.
Expected, by the paper, with GPT-4 as judge:

* hh-dpo wins 62.9 % against the chosen response at temperature 1 (fig. 3);
* tldr-dpo wins 61.7 % against the human summary at temperature 0 (fig. 2).

Different from the sources: SHP keeps pairs whose scores differ by less than a
factor of two, and its posts begin without a "Human:" turn. The paper's SFT of
TL;DR is a published GPT-J; here it is a stage, on the copies of posts and
comparisons in trl-lib. GPT-J's weights must be safetensors. IMDb with
gpt2-large needs samples of the policy: `experiments/imdb_sentiment.py`. Not run
and not planned here; docs/tpu.md has a plan of pythia-2.8b on v5e-16.
"""

from configs import hh

_HH = "hub:Anthropic/hh-rlhf@main"
_SHP = "hub:stanfordnlp/SHP@main"
_POLICIES = {
  "hh": "hub:EleutherAI/pythia-2.8b@main",
  "hh_shp": "hub:EleutherAI/pythia-2.8b@main",
  "tldr": "hub:EleutherAI/gpt-j-6b@main",
}
VARIANTS = (
  *("hh-sft", "hh-dpo", "hh-sft-repository", "hh-dpo-repository"),
  *("hh_shp-sft-repository", "hh_shp-dpo-repository"),
  *("tldr-sft", "tldr-dpo"),
)


def get_config(variant: str = "hh-dpo"):
  """Returns the config of one of VARIANTS."""
  if variant not in VARIANTS:
    raise ValueError(
      f"dpo_paper.py:{variant} must be one of {', '.join(VARIANTS)}"
    )
  task, stage, *source = variant.split("-")
  config = hh.get_config(stage)
  config.policy.init = _POLICIES[task]
  config.policy.compute_dtype = "bfloat16"
  config.mesh = {"data": 1, "fsdp": -1, "tensor": 1, "context": 1}
  config.total_steps = 0
  config.epochs = 1.0
  config.eval.max_groups = 256
  if source:
    config.optimizer.learning_rate = 5e-7
  if task == "tldr":
    name = "tldr" if stage == "sft" else "tldr-preference"
    config.data.source = f"hub:trl-lib/{name}@main:train"
    config.data.eval_source = f"hub:trl-lib/{name}@main:validation"
  else:
    config.data.source = f"{_HH}:train"
    config.data.eval_source = f"{_HH}:test"
  if task == "hh_shp":
    config.data.source = None
    config.data.sources = (
      {"source": f"{_HH}:train", "weight": 1.0},
      {"source": f"{_SHP}:train", "weight": 1.0},
    )
    config.data.eval_source = ""
    config.data.eval_sources = f"hh={_HH}:test,shp={_SHP}:validation"
  if stage == "dpo":
    config.loss.beta = 0.5 if task == "tldr" else 0.1
  return config
