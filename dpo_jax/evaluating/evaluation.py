"""Evaluates a checkpoint of a run: other losses, data, samples and judges."""

from collections.abc import Mapping, Sequence
import logging
from typing import Any

from etils import epath

from dpo_jax.evaluating import opening, results, settings
from dpo_jax.judges import Wins
from dpo_jax.records.workdir import Workdir
from dpo_jax.system.cache import use_compilation_cache
from dpo_jax.system.version import code_version
from dpo_jax.training import known_reference, samples
from dpo_jax.training.evaluator import Evaluator
from dpo_jax.training.samples import Samples
from dpo_jax.training.setup import EvalRun
from dpo_jax.types import TrainState

_LOG = logging.getLogger(__name__)
AGAINST = ("reference", "chosen")


def evaluate(
  workdir: epath.PathLike,
  given: Mapping[str, Any],
  *,
  step: str = "best",
  against: str = "reference",
  name: str = "",
  overwrite: bool = False,
) -> results.Results:
  """Evaluates a checkpoint of a run, and writes WORKDIR/evaluations/NAME.jsonl.

  It takes no lock and changes nothing that the run reads or writes, so the run
  may be trained meanwhile.

  Args:
    workdir: run directory.
    given: values of config keys, such as {"eval.num_samples": 64}.
    step: "best", as `checkpoint.best_metric` says, "latest" or a number.
    against: responses that the policy's samples are compared with: samples of
      the "reference", or the "chosen" responses of the first held-out set.
    name: name of the file; "" for one made of step and settings.
    overwrite: whether the file may exist.

  Returns:
    The results that were written.

  Raises:
    FileNotFoundError: no run, or one without a checkpoint yet.
    ValueError: keys that an evaluation does not take or nothing reads, a step
      that does not exist, a file that does, or nothing to measure.
    JudgeError: the judge does not answer.
  """
  if against not in AGAINST:
    raise ValueError(f"against={against!r} must be one of {', '.join(AGAINST)}")
  workdir = Workdir.of_run(workdir)
  recorded = settings.recorded_config(workdir)
  config = settings.evaluation_config(recorded, given)
  settings.check_samples_are_drawn(config, given, against)
  use_compilation_cache(config.compilation_cache_dir)
  run, trained = opening.open_run(recorded, config, workdir)
  number, state = opening.load_state(run, trained, recorded, step)
  path = results.result_path(
    workdir, name, number, {"against": against, **given}, overwrite=overwrite
  )
  _LOG.info("%-11s step %d of %s, %s", "evaluation", number, workdir, step)
  found = _measure(run, state, number, against)
  header = {
    "step": number,
    "chosen_as": step,
    "workdir": str(workdir),
    "code": code_version(),
    "changes": settings.differences(recorded, run.config),
    "data": run.data.identity(),
    "judge": run.config.eval.judge,
    "against": against if found.samples else "",
  }
  made = results.Results(path, header, found.metrics, found.samples)
  made.write()
  return made


def _measure(
  run: EvalRun, state: TrainState, step: int, against: str
) -> "_Collector":
  label = "reference" if run.config.log.progress else ""
  measured = [n for n in run.data.eval if n in run.data.measured]
  loaders = known_reference.read(
    run, state, [run.data.eval[name] for name in measured], label=label
  )
  found = _Collector(run, dict(zip(measured, loaders, strict=True)))
  if against == "chosen":
    found.take_chosen()
  else:
    found.sample_reference(state)
  found.evaluate(step, state, with_samples=True)
  if not found.metrics:
    raise ValueError(
      "nothing was measured: the loss reads samples of the policy, and"
      " eval.num_samples=0"
    )
  return found


class _Collector(Evaluator):
  """An evaluator that keeps what it finds.

  Attributes:
    metrics: metrics by split.
    samples: a JSON object for each sample.
  """

  _needs_judge = True

  def __init__(self, run: EvalRun, loaders: Mapping[str, Any]):
    label = "sampling" if run.config.log.progress else ""
    super().__init__(run, loaders, self._add, _ignore, label=label)
    self.metrics: dict[str, Mapping[str, Any]] = {}
    self.samples: list[dict[str, Any]] = []

  def take_chosen(self) -> None:
    """Prepares to compare samples with chosen responses.

    They are those of the first held-out set, one for each prompt, and take the
    place of the reference's samples. A judge that gives rewards is asked for
    theirs now.

    Raises:
      ValueError: a prompt without a chosen response.
    """
    run = self._run
    loader = run.data.first_eval
    self._others = samples.take_chosen(
      loader.store,
      loader.indices,
      self._prompts,
      run.data.tokenizer,
      run.judge,
      is_labelled=run.program.objective.group == "single",
    )

  def _add(self, step: int, split: str, metrics: Mapping[str, Any]) -> None:
    del step
    self.metrics[split] = metrics

  def _keep_samples(self, step: int, drawn: Samples, wins: Wins | None) -> None:
    del step
    self.samples = results.sample_rows(drawn, self._others, wins)


def _ignore(step: int, rows: Sequence[Mapping[str, Any]]) -> None:
  """Records no samples: `_Collector` keeps more of them."""
  del step, rows
