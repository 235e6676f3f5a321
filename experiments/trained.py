"""Measures finished runs: parameters by step, samples, and metrics."""

from collections.abc import Iterator, Mapping, Sequence
import dataclasses
import json
from typing import Any

from etils import epath
import jax
import ml_collections
import numpy as np

from dpo_jax import judges
from dpo_jax.data import tokenizers
from dpo_jax.model_sources import TrainedRun
from dpo_jax.models import generate
from dpo_jax.models.decoder import Policy
from dpo_jax.models.partition_rules import param_shardings
from dpo_jax.parallel.mesh import make_mesh
from dpo_jax.parallel.placement import Placement
from dpo_jax.records.checkpoint import open_checkpoints
from dpo_jax.records.workdir import Workdir
from dpo_jax.training import reference
from dpo_jax.training.samples import Samples, sampled_kl


def data_mesh() -> Any:
  """Returns a mesh with all devices along `data`."""
  return make_mesh({"data": -1, "fsdp": 1, "tensor": 1})


def settings_of(workdir: str) -> Any:
  """Returns the resolved config of a run."""
  return ml_collections.ConfigDict(Workdir.of_run(workdir).read_config())


def open_tokenizer(workdir: str) -> tokenizers.Tokenizer:
  """Opens the tokenizer of a run."""
  return TrainedRun.at(workdir).open_tokenizer()


def mesh_of(params: Any) -> Any:
  """Returns the mesh that parameters are on."""
  return jax.tree.leaves(params)[0].sharding.mesh


def load(workdir: str) -> tuple[Policy, Any]:
  """Returns a run's policy and its last parameters; see `load_steps`."""
  [(_, policy, params)] = load_last(workdir)
  return policy, params


def load_last(workdir: str) -> Iterator[tuple[int, Policy, Any]]:
  """Yields (step, policy, parameters) of the last checkpoint alone."""
  return _load(workdir, slice(-1, None))


def load_steps(workdir: str) -> Iterator[tuple[int, Policy, Any]]:
  """Yields (step, policy, parameters) of every checkpoint, steps ascending.

  They are on the mesh of the run's config, and loaded one after the other.

  Raises:
    FileNotFoundError: the run has no finished checkpoint.
  """
  return _load(workdir, slice(None))


def _load(workdir: str, chosen: slice) -> Iterator[tuple[int, Policy, Any]]:
  settings = settings_of(workdir)
  run = TrainedRun.at(workdir)
  policy = run.policy(settings.policy)
  abstract = policy.abstract_params()
  targets = jax.tree.map(
    lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s),
    abstract,
    param_shardings(abstract, make_mesh(settings.mesh)),
  )
  checkpoints = open_checkpoints(run.workdir, settings, is_reader=True)
  try:
    if not checkpoints.steps:
      raise FileNotFoundError(f"{workdir} has no finished checkpoint")
    for step in checkpoints.steps[chosen]:
      yield step, policy, checkpoints.restore_params(targets, step=step)
  finally:
    checkpoints.close()


@dataclasses.dataclass(frozen=True)
class Bench:
  """Prompts, judge and reference that policies are compared with.

  Attributes:
    tokenizer: tokenizer of all policies.
    prompts: token ids of held-out prompts.
    gold: judge that rewards responses.
    ref_policy: decoder of the reference.
    ref_params: parameters of the reference.
    max_response_tokens: most tokens of a sample, EOS included.
  """

  tokenizer: tokenizers.Tokenizer
  prompts: list[list[int]]
  gold: judges.Judge
  ref_policy: Policy
  ref_params: Any
  max_response_tokens: int

  def sample(
    self, policy: Policy, params: Any, *, seed: int, count: int = 1
  ) -> Samples:
    """Draws `count` samples for every prompt, and judges them.

    Samples of one prompt are adjacent.
    """
    prompts = [p for p in self.prompts for _ in range(count)]
    responses = generate.sample(
      policy,
      params,
      prompts,
      generate.Sampling(self.max_response_tokens, 1.0, self.tokenizer.stop_ids),
      seed=seed,
    )
    return self.judge(prompts, responses)

  def judge(
    self, prompts: list[list[int]], responses: Sequence[Sequence[int]]
  ) -> Samples:
    """Decodes responses and asks the gold judge for their rewards."""
    prompt_texts = [self.tokenizer.decode(prompt) for prompt in prompts]
    texts = [self.tokenizer.decode(response) for response in responses]
    rewards = judges.ask(self.gold, prompt_texts, texts, key="the gold judge")
    return Samples(
      prompts, [list(r) for r in responses], prompt_texts, texts, rewards
    )

  def metrics(
    self, policy: Policy, params: Any, samples: Samples
  ) -> dict[str, float]:
    """Computes metrics of a policy from its samples at temperature 1.

    Returns:
      `reward_metrics`, and `kl` to the reference with `kl_error`, nats.
    """
    placement = Placement(data_mesh())
    # Log-probs do not read the value head, and the reference may have none.
    headless = {k: v for k, v in params.items() if k != "value_head"}
    bare = dataclasses.replace(policy.config, value_head=False)
    kl = sampled_kl(
      reference.make_logps_step(Policy(bare), placement, 128),
      headless,
      self.ref_params,
      samples,
      placement,
      batch_size=64,
    )
    return reward_metrics(samples.rewards) | kl


def reward_metrics(rewards: np.ndarray) -> dict[str, float]:
  """Averages rewards, [N].

  Returns:
    `reward`, their mean; `reward_error`, the standard error of that mean; and
    `p_positive`, the mean of their sigmoids.
  """
  return {
    "reward": float(rewards.mean()),
    "reward_error": float(rewards.std(ddof=1) / np.sqrt(len(rewards))),
    "p_positive": float((1.0 / (1.0 + np.exp(-rewards))).mean()),
  }


def write_samples(
  path: str, samples: Samples, num: int, labels: Mapping[str, Any]
) -> None:
  """Appends the first `num` samples to a file, as JSON lines.

  Each has the labels, "prompt", "response" and, if it was judged, "reward".
  """
  rows = [
    {**labels, "prompt": prompt, "response": text}
    for prompt, text in zip(samples.prompt_texts, samples.texts, strict=True)
  ]
  if samples.rewards is not None:
    for row, reward in zip(rows, samples.rewards, strict=True):
      row["reward"] = float(reward)
  with epath.Path(path).open("a") as file:
    file.writelines(json.dumps(row) + "\n" for row in rows[:num])
