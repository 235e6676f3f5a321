"""Builds the runs of the sentiment experiment."""

from collections.abc import Callable
import functools
from typing import Any

from dpo_jax.config import loss_config
from experiments.sentiment import measurements, pairs, reviews
from experiments.sentiment.plan import Plan
from experiments.sweep import Row, Run, Settings

_GPT2_LARGE_PARAMS = 774_000_000


def runs(settings: Settings) -> list[Run]:
  """Returns classifiers, reference, pairs, and every method over its sweep.

  Raises:
    ValueError: the paper's scale without a policy and reviews.
  """
  if settings.scale == "paper" and not (settings.policy and settings.reviews):
    raise ValueError(
      "--scale=paper takes --policy=FOLDER of gpt2-large and --reviews=tfds, or"
      " a JSONL file of reviews"
    )
  builder = _Builder(Plan(settings))
  builder.add_preparation()
  builder.add_baselines()
  builder.add_offline()
  builder.add_ppo()
  return builder.runs


def _no_rows(folder: str) -> list[Row]:
  return []


class _Builder:
  """Builds runs in order; `before` names those that the next ones need."""

  def __init__(self, plan: Plan):
    self.plan = plan
    self.runs: list[Run] = []
    self.before: tuple[str, ...] = ()

  def _add(
    self, name: str, method: str, knob: str = "", seed: int = 0, **fields: Any
  ) -> None:
    settings = self.plan.settings
    fields.setdefault("after", self.before)
    self.runs.append(
      Run(
        name,
        {"method": method, "knob": knob, "seed": seed},
        inputs={
          "policy": settings.policy,
          "reviews": settings.reviews,
          "scale": settings.scale,
        },
        num_params=_GPT2_LARGE_PARAMS if settings.scale == "paper" else 0,
        **fields,
      )
    )

  def _with_plan(self, function: Callable, **others: Any) -> Callable:
    return functools.partial(function, plan=self.plan, **others)

  def add_preparation(self) -> None:
    """Adds the classifiers and the reference where they are needed, and pairs.

    All later runs start from these.
    """
    if self.plan.settings.reviews:
      self._add(
        "classifiers",
        "classifiers",
        work=self._with_plan(reviews.fit_classifiers),
        measure=self._with_plan(reviews.measure_classifiers),
      )
      self.before += ("classifiers",)
    if self.plan.is_tuned:
      self._add(
        "reference",
        "tuning",
        config=self._reference_config(),
        work=self._with_plan(reviews.write_demonstrations),
        measure=_no_rows,
      )
      self.before += ("reference",)
    self._add(
      "pairs",
      "pairs",
      work=self._with_plan(pairs.write_pairs),
      measure=_no_rows,
    )
    self.before += ("pairs",)

  def _reference_config(self) -> Any:
    settings = self.plan.settings
    config = self.plan.base_config(400 if settings.scale == "tiny" else 390)
    config.policy.init = (
      f"hf:{settings.policy}" if settings.policy else "random"
    )
    config.data.source = f"jsonl:{self.plan.root}/reference/texts.jsonl"
    config.loss = loss_config("sft")
    config.checkpoint.keep = 2
    config.checkpoint.every_steps = 0
    if not settings.policy:
      config.batch_size = 16
      config.optimizer.name = "adamw"
      config.optimizer.learning_rate = 2e-3
      config.optimizer.schedule = "cosine"
      config.optimizer.max_grad_norm = 1.0
    else:
      config.optimizer.learning_rate = 1e-5
    return config

  def add_baselines(self) -> None:
    """Adds the reference itself, and Best-of-N, which train nothing."""
    self._add(
      "sft",
      "reference",
      measure=self._with_plan(measurements.measure_reference),
    )
    for num in self.plan.size["best_of"]:
      self._add(
        f"best_of_{num}",
        "Best-of-N",
        f"N={num}",
        measure=self._with_plan(measurements.measure_best_of, num=num),
      )

  def _config(self, loss: dict[str, Any], seed: int = 0) -> Any:
    config = self.plan.base_config(self.plan.size["steps"])
    config.seed = seed
    config.data.source = f"jsonl:{self.plan.root}/pairs/pairs.jsonl"
    config.loss = loss_config(loss["name"])
    config.loss.update(loss)
    return config

  def _add_trained(
    self, name: str, method: str, knob: str, config: Any, *others: str
  ) -> None:
    """Adds a trained run; `others` are further runs that it starts from."""
    self._add(
      name,
      method,
      knob,
      config.seed,
      config=config,
      after=(*self.before, *others),
      measure=self._with_plan(measurements.measure_steps),
    )

  def add_offline(self) -> None:
    """Adds DPO, Unlikelihood and Preferred-FT on the pairs."""
    size = self.plan.size
    for beta in size["dpo"]:
      config = self._config(dict(name="dpo", beta=beta))
      self._add_trained(f"dpo_{beta:g}", "DPO", f"beta={beta:g}", config)
    for alpha in size["unlikelihood"]:
      config = self._config(dict(name="unlikelihood", alpha=alpha))
      self._add_trained(
        f"unlikelihood_{alpha:g}", "Unlikelihood", f"alpha={alpha:g}", config
      )
    for seed in range(size["seeds"]):
      config = self._config(dict(name="preferred_ft"), seed)
      self._add_trained(f"preferred_ft_s{seed}", "Preferred-FT", "", config)

  def add_ppo(self) -> None:
    """Adds a reward model, and PPO on it and on the labeller."""
    config = self._config(dict(name="reward_model"))
    config.checkpoint.keep, config.checkpoint.every_steps = 2, 0
    self._add("reward_model", "reward model", config=config, measure=_no_rows)
    learned = f"reward:{self.plan.root}/reward_model"
    for target in self.plan.size["kl_targets"]:
      for method, judge, needed in (
        ("PPO", learned, ("reward_model",)),
        ("PPO on the labeller", self.plan.labeller, ()),
      ):
        config = self._config(dict(name="ppo", value_weight=0.1))
        config.online.update(
          dict(
            kind="rollouts",
            judge=judge,
            every_steps=4,
            epochs=2,
            num_samples=1,
            max_response_tokens=self.plan.response_tokens,
            kl_target=target,
          )
        )
        name = f"{method.lower().replace(' ', '_')}_kl{target:g}"
        self._add_trained(name, method, f"target={target:g}", config, *needed)
