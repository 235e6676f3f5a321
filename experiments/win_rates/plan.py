"""Sizes, configs and paths of the experiments that measure win rates."""

import dataclasses
from typing import Any

from configs import dpo_paper, tldr_rlhf
from dpo_jax import judges
from dpo_jax.config import default_config, loss_config
from experiments.sweep import Settings
from experiments.win_rates.tasks import TASKS

# Sizes by scale. Those of "paper" are the paper's, secs. 6.2 to 6.4.
SIZES: dict[str, dict[str, Any]] = {
  "tiny": dict(
    seeds=3,
    demonstrations=12_000,
    pairs=4_000,
    prompts=256,
    best_of=16,
    most_samples=32,
    sample_batch=512,
  ),
  "paper": dict(
    seeds=1, prompts=256, best_of=128, most_samples=128, sample_batch=64
  ),
}
# Names in tables.
METHODS = {
  "sft": "SFT",
  "preferred_ft": "Preferred-FT",
  "dpo": "DPO",
  "ppo": "PPO",
  "reward_model": "reward model",
}
# What each policy starts from, and what Best-of-N samples. In the paper the
# reference of dialogue is Preferred-FT, and summaries have an SFT.
_STARTS = {
  "posts": {
    "preferred_ft": "sft",
    "dpo": "sft",
    "ppo": "sft",
    "reward_model": "sft",
  },
  "questions": {
    "preferred_ft": "sft",
    "dpo": "preferred_ft",
    "reward_model": "preferred_ft",
  },
}
REFERENCES = {"posts": "sft", "questions": "preferred_ft"}
_BETAS = {"posts": 0.5, "questions": 0.1}  # 2305.18290, app. B
TINY_STEPS = {
  "sft": 400,
  "preferred_ft": 60,
  "dpo": 90,
  "reward_model": 160,
  "ppo": 80,
}
# Names in configs/dpo_paper.py, parameters of the policies, and optimizer steps
# of an epoch: 116,722 posts, 92,858 comparisons and 160,800 dialogues.
_PAPER_TASKS = {"posts": "tldr", "questions": "hh"}
_PAPER_PARAMS = {"posts": 6_050_000_000, "questions": 2_780_000_000}
_PAPER_STEPS = {"posts": 92_858 // 64, "questions": 160_800 // 64}
_PAPER_POSTS = 116_722 // 64
_TEMPLATE_TOKENS = 120  # of a question to the judge, its template alone


@dataclasses.dataclass(frozen=True)
class Plan:
  """Names and configs of one task's policies.

  Attributes:
    settings: choices of the command line.
    task: "posts" or "questions".
  """

  settings: Settings
  task: str

  @property
  def size(self) -> dict[str, Any]:
    return SIZES[self.settings.scale]

  @property
  def is_tiny(self) -> bool:
    return self.settings.scale == "tiny"

  @property
  def data_run(self) -> str:
    """Name of the run that writes the data of the tiny scale."""
    return f"{self.task}_data"

  def start(self, method: str) -> str:
    """Returns the method that a policy starts from, or ""."""
    # HH has no demonstrations: its Preferred-FT starts from the base model.
    if not self.is_tiny and self.task == "questions" and method != "dpo":
      return "" if method == "preferred_ft" else "preferred_ft"
    return _STARTS[self.task].get(method, "")

  def run_name(self, method: str, seed: int) -> str:
    """Returns the name of a policy's run; all seeds share the SFT."""
    return f"{self.task}_{method}" + ("" if method == "sft" else f"_s{seed}")

  def folder(self, method: str, seed: int) -> str:
    return f"{self.settings.workdir}/{self.run_name(method, seed)}"

  @property
  def num_params(self) -> int:
    """Parameters of the policy, for the estimate of the cost."""
    return 92_000 if self.is_tiny else _PAPER_PARAMS[self.task]

  @property
  def tokens_per_group(self) -> float:
    """Tokens of a pair and its prompt, for the estimate."""
    return 35.0 if self.is_tiny else 450.0

  def config(self, method: str, seed: int) -> Any:
    """Returns the config that trains a policy or a reward model."""
    make = self._tiny_config if self.is_tiny else self._paper_config
    config = make(method, seed)
    config.seed = seed
    if start := self.start(method):
      config.policy.init = f"run:{self.folder(start, seed)}"
    if method == "ppo":
      config.online.judge = f"reward:{self.folder('reward_model', seed)}"
    # Runs on the same pairs share the reference's log-probs.
    config.reference.cache_dir = f"{self.settings.workdir}/reference_logps"
    return config

  def _tiny_config(self, method: str, seed: int) -> Any:
    config = default_config()
    data = f"{self.settings.workdir}/{self.data_run}"
    kind = "demonstrations" if method == "sft" else f"pairs_s{seed}"
    config.policy.preset = "tiny"
    config.policy.remat = "none"
    config.data.tokenizer = f"{data}/tokenizer"
    config.data.source = f"jsonl:{data}/{kind}.jsonl"
    config.data.max_tokens = 48
    config.data.max_prompt_tokens = 24
    # Short rows use dense attention, which is faster here.
    config.data.row_tokens = 160
    config.data.eval_fraction = 0.0
    config.data.cache_dir = f"{self.settings.workdir}/cache"
    config.loss = loss_config(method)
    config.batch_size = 64
    config.total_steps = TINY_STEPS[method]
    config.optimizer.name = "adamw"
    config.optimizer.b2 = 0.99
    config.optimizer.learning_rate = 2e-3 if method == "reward_model" else 5e-4
    config.optimizer.schedule = "linear"
    config.optimizer.warmup_steps = 20
    config.optimizer.max_grad_norm = 1.0
    config.eval.every_steps = 0
    config.checkpoint.every_steps = 0
    config.log.every_steps = 20
    config.log.progress = False
    if method == "sft":
      # From random weights it learns to copy facts in a tenth of the steps.
      config.optimizer.name = "muon"
      config.optimizer.learning_rate = 1e-2
    if method == "dpo":
      config.loss.beta = _BETAS[self.task]
      config.checkpoint.every_steps = config.total_steps // 6
      config.checkpoint.keep = 7
    if method == "ppo":
      config.loss.value_weight = 0.1
      config.online.kind = "rollouts"
      config.online.every_steps = 4
      config.online.epochs = 2
      config.online.num_samples = 1
      config.online.max_response_tokens = self.max_response_tokens
    return config

  def _paper_config(self, method: str, seed: int = 0) -> Any:
    del seed  # public data are the same for all seeds
    stage = "sft" if method in ("sft", "preferred_ft") else "dpo"
    config = dpo_paper.get_config(f"{_PAPER_TASKS[self.task]}-{stage}")
    config.eval.num_samples = 0
    config.epochs = 0.0
    config.total_steps = _PAPER_STEPS[self.task]
    if method == "sft":
      config.total_steps = _PAPER_POSTS
    elif method == "ppo":
      config = tldr_rlhf.get_config("ppo")
      config.mesh = {"data": 1, "fsdp": -1, "tensor": 1, "context": 1}
      config.checkpoint.best_metric = ""
    elif method == "preferred_ft" and self.task == "posts":
      pairs = dpo_paper.get_config("tldr-dpo").data
      config.data.source = pairs.source
      config.data.eval_source = pairs.eval_source
      config.loss = loss_config("preferred_ft")
    elif method == "reward_model":
      config.loss = loss_config("reward_model")
    if method == "dpo" and self.task == "questions":
      config.checkpoint.keep = 1 + config.total_steps // 300
    return config

  @property
  def max_response_tokens(self) -> int:
    if self.is_tiny:
      return 24
    return {"posts": 64, "questions": 256}[self.task]

  def eval_config(self, temperature: float = 1.0) -> Any:
    """Returns `config.eval` of the measurements."""
    config = default_config()
    config.update_from_flattened_dict(dict(self.settings.evaluation))
    config.eval.temperature = temperature
    config.eval.max_response_tokens = self.max_response_tokens
    return config.eval

  def load_judge(self, domain: str) -> judges.Judge | judges.Comparer:
    """Returns the truth at `tiny`, and the judge on a server at `paper`."""
    if self.is_tiny:
      return TASKS[domain].judge
    judge = judges.get_eval_judge(self.eval_config())
    assert judge is not None, "checked by `check_settings`"
    return judge

  def eval_source(self, domain: str) -> str:
    """Returns the source of prompts and of the responses to beat."""
    if self.is_tiny or domain == "news":
      return f"jsonl:{self.settings.workdir}/{domain}_data/eval.jsonl"
    # The paper's summaries are compared with those that people wrote.
    stage = "sft" if domain == "posts" else "dpo"
    config = dpo_paper.get_config(f"{_PAPER_TASKS[domain]}-{stage}")
    return config.data.eval_source

  def judge_cost(self, num_pairs: int) -> tuple[int, float]:
    """Estimates what a judge on a server is asked.

    Args:
      num_pairs: pairs of responses to compare, each in both orders.

    Returns:
      Questions, and dollars at the prices of `eval.api`; 0 for the truth.
    """
    if self.is_tiny:
      return 0, 0.0
    api = self.eval_config().api
    data = self._paper_config("dpo").data
    tokens_in = data.max_prompt_tokens + 2 * self.max_response_tokens
    each = (tokens_in + _TEMPLATE_TOKENS) * api.price_in
    each += api.max_tokens * api.price_out
    return 2 * num_pairs, 2 * num_pairs * each / 1e6


def check_settings(settings: Settings) -> None:
  """Checks that a judge is named where one is asked, and only there.

  Raises:
    ValueError: the paper's scale without a judge on a server, a judge at the
      tiny scale, or keys that are not of the judge.
  """
  given = settings.evaluation
  wrong = [key for key in given if not key.startswith("eval.")]
  if wrong:
    raise ValueError(
      f"{', '.join(wrong)}: only --config.eval.judge, eval.judge_prompt and"
      " eval.api.* may be set here"
    )
  if settings.scale == "tiny" and given:
    raise ValueError(
      f"{', '.join(given)}: at --scale=tiny the judge is the truth. Leave them"
      " out, or use --scale=paper"
    )
  judge = given.get("eval.judge", "")
  if settings.scale == "paper" and not judge.startswith("api:"):
    raise ValueError(
      f"--scale=paper takes --config.eval.judge=api:MODEL, and has {judge!r};"
      " --config.eval.api.url, price_in and price_out are of its server"
    )
