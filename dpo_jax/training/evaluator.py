"""Evaluations of a run: held-out sets, samples, and their records."""

from collections.abc import Callable, Collection, Mapping, Sequence
import functools
import logging
from typing import Any

from dpo_jax import config as config_lib
from dpo_jax.data.loader import Loader
from dpo_jax.judges import JudgeError, Wins
from dpo_jax.records import eval_logps
from dpo_jax.records.metrics import read_metrics
from dpo_jax.training import evaluation, initial_state, samples
from dpo_jax.training.samples import Samples
from dpo_jax.training.setup import EvalRun
from dpo_jax.types import TrainState

_LOG = logging.getLogger(__name__)


class Evaluator:
  """Measures the policy of a run on its held-out sets and by its samples."""

  _needs_judge = False  # whether it stops where the judge does not answer

  def __init__(
    self,
    run: EvalRun,
    loaders: Mapping[str, Loader],
    record: Callable[[int, str, Mapping[str, Any]], None],
    record_samples: Callable[[int, Sequence[Mapping[str, Any]]], None],
    *,
    label: str,
  ):
    """Prepares the evaluations; measures nothing yet.

    Args:
      run: run to evaluate.
      loaders: held-out sets that the loss is measured on, by name.
      record: receives (step, split, metrics) of each set.
      record_samples: receives (step, rows of samples.jsonl).
      label: name of the sampling for `progress.track`; "" shows nothing.
    """
    self._run, self._loaders, self._record = run, loaders, record
    self._record_samples, self._label = record_samples, label
    # Responses that the policy's samples are compared with.
    self._others: Samples | None = None

  def sample_reference(self, state: TrainState) -> None:
    """Samples from the reference, to compare the policy's samples with.

    Does nothing without held-out sets, or if `eval.num_samples` is 0.
    """
    if self._run.data.eval and self._run.config.eval.num_samples:
      params = initial_state.reference_params(self._run, state)
      self._others = self._sample(params)

  def evaluate(
    self,
    step: int,
    state: TrainState,
    *,
    with_samples: bool,
    skip: Collection[str] = (),
  ) -> dict[str, float]:
    """Measures the held-out sets and, if asked, samples; records the metrics.

    `record` receives each set's metrics; those of the samples are the first
    set's. With `eval.save_logps`, process 0 writes the log-probs too.

    Args:
      step: optimizer steps taken.
      state: state on the mesh.
      with_samples: whether to sample too; ignored without other responses to
        compare with, see `sample_reference`.
      skip: names of held-out sets to leave out.

    Returns:
      Metrics named as `checkpoint.best_metric` names them.
    """
    found: dict[str, dict[str, float]] = {}
    for name, loader in self._loaders.items():
      if name in skip:
        continue
      found[name], records = evaluation.evaluate(
        self._run.program,
        state.policy_params,
        state.reference_params,
        state.loss_state,
        loader,
      )
      if self._run.config.eval.save_logps and self._run.is_writer:
        eval_logps.write_records(self._run.workdir, step, records, name)
    if with_samples and self._others is not None:
      first = next(iter(self._run.data.eval))
      found[first] = found.get(first, {}) | self._measure_samples(step, state)
    metrics = {}
    for name, its_metrics in found.items():
      self._record(step, config_lib.split_name(name), its_metrics)
      prefix = config_lib.metric_prefix(name)
      metrics |= {f"{prefix}{k}": v for k, v in its_metrics.items()}
    return metrics

  def samples_due(self, step: int) -> bool:
    """Returns whether the evaluation after so many steps samples too.

    It does at step 0, at the last, and every `eval.samples_every_steps`, if
    that is not 0.
    """
    every = self._run.config.eval.samples_every_steps
    is_edge = step in (0, self._run.config.total_steps)
    return is_edge or (every > 0 and step % every == 0)

  def make_up(self, step: int, state: TrainState) -> dict[str, float]:
    """Evaluates the held-out sets that have no metrics of this step yet.

    SIGTERM left no time for them. Samples are drawn too, if they are due and
    the first set has no metrics yet. Returns what `evaluate` does.
    """
    done = {
      name
      for name in self._loaders
      for row in read_metrics(self._run.workdir, config_lib.split_name(name))
      if row["step"] == step
    }
    is_sampled = next(iter(self._run.data.eval), None) in done
    with_samples = self.samples_due(step) and not is_sampled
    return self.evaluate(step, state, with_samples=with_samples, skip=done)

  def _measure_samples(self, step: int, state: TrainState) -> dict[str, float]:
    """Samples from the policy, compares with the other responses, and records.

    Returns:
      `samples.sample_metrics`; and `samples.sampled_kl`, if samples are drawn
      at temperature 1 without top_k and top_p.
    """
    drawn = self._sample(state.policy_params)
    wins = self._compare(step, drawn)
    metrics = samples.sample_metrics(drawn, wins)
    settings = self._run.config.eval
    if (settings.temperature, settings.top_k, settings.top_p) == (1, 0, 1):
      metrics |= samples.sampled_kl(
        self._run.program.logps_step,
        state.policy_params,
        initial_state.reference_params(self._run, state),
        drawn,
        self._run.program.placement,
        batch_size=settings.batch_size,
      )
    self._keep_samples(step, drawn, wins)
    return metrics

  def _compare(self, step: int, drawn: Samples) -> Wins | None:
    """Compares samples with the others; None without a judge, or its answer.

    A server that fails must not stop a run, whose state is not saved yet.

    Raises:
      JudgeError: no answer, in an evaluation that has no run to lose.
    """
    try:
      return samples.wins_over(drawn, self._others, self._run.judge)
    except JudgeError as error:
      if self._needs_judge:
        raise
      _LOG.warning("the samples of step %d are not judged: %s", step, error)
      return None

  def _sample(self, params: Any) -> Samples:
    """Samples a response to each of the first held-out prompts."""
    run, settings = self._run, self._run.config.eval
    return samples.draw_samples(
      run.program.policy,
      params,
      self._prompts,
      run.data.tokenizer,
      run.judge,
      seed=run.config.seed,
      config=settings,
      placement=run.program.placement,
      label=self._label,
    )

  @functools.cached_property
  def _prompts(self) -> list[list[int]]:
    """Returns the first held-out prompts."""
    run, settings = self._run, self._run.config.eval
    loader = run.data.first_eval
    return samples.held_out_prompts(
      loader.store,
      loader.indices,
      settings.num_samples,
      max_tokens=run.program.policy.config.max_positions
      - settings.max_response_tokens,
    )

  def _keep_samples(self, step: int, drawn: Samples, wins: Wins | None) -> None:
    """Records samples.

    Args:
      step: optimizer steps taken.
      drawn: samples of the policy.
      wins: their results against the other responses.
    """
    del wins
    self._record_samples(step, _rows(drawn))


def _rows(drawn: Samples) -> list[dict[str, Any]]:
  """Returns rows of samples.jsonl: "prompt", "response" and any "reward"."""
  rows: list[dict[str, Any]] = [
    {"prompt": prompt, "response": text}
    for prompt, text in zip(drawn.prompt_texts, drawn.texts, strict=True)
  ]
  if drawn.rewards is not None:
    for row, reward in zip(rows, drawn.rewards, strict=True):
      row["reward"] = float(reward)
  return rows
