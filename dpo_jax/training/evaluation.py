"""Held-out figures of a policy, and what its samples are worth."""

from collections.abc import Callable, Sequence
import dataclasses
import functools
import io
import math
from typing import Any

from etils import epath
import jax
import numpy as np

from dpo_jax import config as config_lib
from dpo_jax import judges
from dpo_jax.data import batch_plan
from dpo_jax.data.loader import Loader
from dpo_jax.data.scoring import score_all
from dpo_jax.data.store import Store
from dpo_jax.data.tokenizers import Tokenizer
from dpo_jax.losses import Objective, WeightedSum
from dpo_jax.models import generate
from dpo_jax.models.decoder import Policy
from dpo_jax.names import did_you_mean
from dpo_jax.parallel.hosts import to_host
from dpo_jax.parallel.placement import Placement
from dpo_jax.records.workdir import Workdir
from dpo_jax.system.files import write_atomically
from dpo_jax.training.program import Program
from dpo_jax.training.reference import compute_logps
from dpo_jax.training.step import make_measure
from dpo_jax.types import Sequences, fields_of

# Fields of Sequences, [N, K] or [N], and the groups' ids.
Records = dict[str, np.ndarray]

_Z95 = 1.959963984540054

# Metrics of `compare_samples` and `sampled_kl`, with a judge and a reference.
SAMPLE_METRICS = (
  "sample/tokens",
  "sample/reward",
  "sample/reward_error",
  "sample/win_rate",
  "sample/win_rate_low",
  "sample/win_rate_high",
  "kl",
  "kl_error",
)


def wilson_interval(fraction: float, count: int) -> tuple[float, float]:
  """95 % interval of a fraction: Wilson 1927.

  Args:
    fraction: observed, ties counted a half, in [0, 1].
    count: observations.

  Returns:
    Lower and upper bound; (0, 1) without observations.
  """
  if not count:
    return 0.0, 1.0
  z2 = _Z95**2
  centre = (fraction + z2 / (2 * count)) / (1 + z2 / count)
  spread = fraction * (1 - fraction) / count + z2 / (4 * count**2)
  half = _Z95 * math.sqrt(spread) / (1 + z2 / count)
  return max(0.0, centre - half), min(1.0, centre + half)


def evaluate(
  program: Program,
  params: Any,
  ref_params: Any,
  loss_state: Any,
  loader: Loader,
  *,
  label: str = "",
) -> tuple[dict[str, float], Records]:
  """Means over every held-out group, each counted once.

  Losses are measured on the whole set at once: one that depends on the batch,
  such as `kto` or `aot`, does not depend on `eval.batch_size`.

  Args:
    program: policy, and the losses to measure.
    params: the policy's.
    ref_params: the reference's, or None where it is cached or absent.
    loss_state: of the objective.
    loader: the held-out groups.
    label: name of the work for `progress.track`; "" shows nothing.

  Returns:
    The metrics: `loss`, the objective's own, `displacement`'s, and the bounds
    of the accuracy's 95 % interval (`reward/accuracy_low`,
    `reward/accuracy_high`) where it has one. And what every group gave, for
    `write_records`.
  """
  read = functools.partial(program.eval_step, params, ref_params)
  ids, sequences = score_all(read, loader, program.placement, label=label)
  per_group, metrics, is_valid = jax.tree.map(
    np.asarray, program.measure(sequences, jax.tree.map(to_host, loss_state))
  )
  records = {"example_ids": ids} | {
    field.name: getattr(sequences, field.name)
    for field in dataclasses.fields(sequences)
    if getattr(sequences, field.name) is not None
  }
  columns = {name: x.astype(np.float64) for name, x in metrics.items()}
  means = _means(
    columns,
    per_group.astype(np.float64),
    records["num_tokens"],
    int(is_valid.sum()),
  )
  return means, records


def _means(
  columns: dict[str, np.ndarray],
  per_group: np.ndarray,
  num_tokens: np.ndarray,
  count: int,
) -> dict[str, float]:
  """Computes the metrics of a held-out set from those of its groups.

  Args:
    columns: f64 [N] by name, NaN where a group has no value.
    per_group: f64 [N], losses.
    num_tokens: f32 [N, K].
    count: groups that the loss can read.
  """
  figures = {
    # NaN where no group has the metric.
    name: float(np.nansum(x) / ((~np.isnan(x)).sum() or math.nan))
    for name, x in columns.items()
  }
  # Groups that the loss cannot read have a loss of 0, and do not count.
  figures["loss"] = float(per_group.sum() / max(count, 1))
  if "reward/accuracy" in figures:
    num = int((~np.isnan(columns["reward/accuracy"])).sum())
    low, high = wilson_interval(figures["reward/accuracy"], num)
    figures |= {"reward/accuracy_low": low, "reward/accuracy_high": high}
  if "reward/margin" in columns:
    figures |= displacement(columns["reward/margin"], num_tokens)
  return figures | {"num_groups": count}


def metric_names(
  objective: Objective | WeightedSum, others: tuple[Objective, ...] = ()
) -> list[str]:
  """Names the metrics that `evaluate` gives, without data.

  Args:
    objective: loss that is trained.
    others: losses that are measured too.

  Returns:
    Sorted names; none for a loss that learns from samples, which held-out
    groups do not have.
  """
  if objective.group == "samples":
    return []
  num_slots = objective.num_slots or 2
  needs = objective.needs.union(*(other.needs for other in others))

  def figure(*shape: int, dtype: Any = np.float32) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct((1, *shape), dtype)

  names = ("logps", "num_tokens", "score", *needs)
  fields = {name: figure(num_slots) for name in names}
  fields |= {name: figure() for name in needs & fields_of("mismatched")}
  sequences = Sequences(**fields, valid=figure(num_slots, dtype=bool))
  measure = make_measure(objective, others)
  _, metrics, _ = jax.eval_shape(measure, sequences, objective.init())
  columns = {name: np.zeros(1) for name in metrics}
  return sorted(_means(columns, np.zeros(1), np.ones((1, num_slots)), 1))


def check_metric(
  config: Any,
  objective: Objective | WeightedSum,
  others: tuple[Objective, ...],
) -> None:
  """Raises ValueError unless `checkpoint.best_metric` will be measured."""
  wanted = config.checkpoint.best_metric
  prefixes = [
    config_lib.metric_prefix(n) for n in config_lib.eval_sets(config.data)
  ]
  names = metric_names(objective, others)
  known = [f"{prefix}{name}" for prefix in prefixes for name in names]
  if config.eval.num_samples:
    # The first set's prompts are sampled from.
    known += [f"{prefixes[0]}{name}" for name in SAMPLE_METRICS]
  if wanted and wanted not in known:
    raise ValueError(
      f"checkpoint.best_metric={wanted!r} is not measured."
      f"{did_you_mean(wanted, known)} Measured: {', '.join(known)}"
    )


def displacement(
  margins: np.ndarray, num_tokens: np.ndarray
) -> dict[str, float]:
  """Where the pull of the loss goes: why chosen log-probs may fall.

  Args:
    margins: f64 [N], beta D, the margin of rewards; NaN where there is none.
    num_tokens: f32 [N, K], slot 0 chosen.

  Returns:
    `pull/0.0` to `pull/1.0`: the fraction of groups whose weight in DPO's
    gradient, sigmoid(-beta D), rounds to that; a policy that equals its
    reference has all in the middle of `pull/0.5`. And
    `length_margin_correlation`, of chosen minus rejected length with the
    margin, 0 where either does not vary.
  """
  is_counted = ~np.isnan(margins)
  margins = margins[is_counted]
  others = num_tokens[is_counted, 1:]
  present = np.maximum((others > 0).sum(1), 1)
  gaps = num_tokens[is_counted, 0] - others.sum(1) / present
  pulls = 0.5 * (1.0 - np.tanh(0.5 * margins))
  counts = np.bincount(np.rint(10 * pulls).astype(int), minlength=11)
  figures = {
    f"pull/{tenth / 10:.1f}": float(n / max(len(margins), 1))
    for tenth, n in enumerate(counts)
  }
  # Margins of a policy at its reference differ by rounding alone.
  varies = len(margins) > 1 and margins.std() > 1e-4 and gaps.std() > 0
  correlation = np.corrcoef(gaps, margins)[0, 1] if varies else 0.0
  return figures | {"length_margin_correlation": float(correlation)}


def write_records(
  workdir: Workdir, step: int, records: Records, name: str = ""
) -> None:
  """Writes WORKDIR/eval_logps/[NAME/]STEP.npz, for `experiments.replay`.

  Args:
    workdir: run directory.
    step: optimizer steps taken.
    records: from `evaluate`.
    name: name of the held-out set.
  """
  buffer = io.BytesIO()
  np.savez(buffer, **records)
  path = workdir.eval_logps / name / f"{step}.npz"
  write_atomically(path, buffer.getvalue())


def read_records(workdir: epath.PathLike, name: str = "") -> dict[int, Records]:
  """Reads what `write_records` wrote, by step.

  Args:
    workdir: run directory.
    name: name of the held-out set.

  Raises:
    FileNotFoundError: nothing there.
  """
  folder = Workdir.at(workdir).eval_logps / name
  paths = sorted(folder.glob("*.npz")) if folder.exists() else []
  if not paths:
    raise FileNotFoundError(
      f"{folder} holds no log-probs: train with eval.save_logps=True and held-"
      "out data"
    )
  out = {}
  for path in sorted(paths, key=lambda path: int(path.stem)):
    with np.load(io.BytesIO(path.read_bytes())) as file:
      out[int(path.stem)] = dict(file)
  return out


@dataclasses.dataclass(frozen=True)
class Samples:
  """Responses of a policy to held-out prompts.

  Attributes:
    prompts: token ids.
    responses: token ids.
    prompt_texts: decoded.
    texts: responses, decoded.
    rewards: f64 [n] from the judge, or None without one.
  """

  prompts: list[list[int]]
  responses: list[list[int]]
  prompt_texts: list[str]
  texts: list[str]
  rewards: np.ndarray | None


def held_out_prompts(
  store: Store, indices: np.ndarray, num: int, *, max_tokens: int
) -> list[list[int]]:
  """The first distinct prompts; repeated where there are fewer than `num`.

  Args:
    store: groups.
    indices: held-out ones.
    num: prompts wanted.
    max_tokens: longer prompts leave a response no room, and are passed over.

  Returns:
    Token ids of `num` prompts.

  Raises:
    ValueError: every prompt is longer.
  """
  distinct: dict[tuple[int, ...], None] = {}
  for index in indices:
    if store.lengths[index, 0] <= max_tokens:
      distinct[tuple(store.group(index)[0].tolist())] = None
    if len(distinct) == num:
      break
  if not distinct:
    raise ValueError(
      f"no held-out prompt has at most {max_tokens} tokens, so none leaves room"
      " for a sample: lower eval.max_response_tokens"
    )
  prompts = [list(prompt) for prompt in distinct]
  return [prompts[i % len(prompts)] for i in range(num)]


def draw_samples(
  policy: Policy,
  params: Any,
  prompts: Sequence[Sequence[int]],
  tokenizer: Tokenizer,
  judge: judges.Judge | None,
  *,
  seed: int,
  config: Any,
  placement: Placement,
  label: str = "",
) -> Samples:
  """Samples a response to each prompt and has it judged.

  Args:
    policy: the decoder.
    params: its parameters.
    prompts: token ids.
    tokenizer: to read responses with.
    judge: who rewards them, or None.
    seed: of the samples.
    config: `config.eval`.
    placement: mesh that the prompts are split over.
    label: name of the work for `progress.track`; "" shows nothing.

  Returns:
    The samples.

  Raises:
    ValueError: a judge that does not give a finite number for each.
  """
  responses = generate.sample(
    policy,
    params,
    prompts,
    seed=seed,
    max_response_tokens=config.max_response_tokens,
    temperature=config.temperature,
    stop_ids=tokenizer.stop_ids,
    top_k=config.top_k,
    top_p=config.top_p,
    rows=placement.row_sharding,
    label=label,
  )
  prompt_texts = [tokenizer.decode(prompt) for prompt in prompts]
  texts = [tokenizer.decode(response) for response in responses]
  rewards = None
  if judge is not None:
    rewards = judges.ask(judge, prompt_texts, texts)
  return Samples(
    [list(p) for p in prompts], responses, prompt_texts, texts, rewards
  )


def compare_samples(
  samples: Samples, reference: Samples | None
) -> dict[str, float]:
  """Reward of samples, and how often they win against the reference's.

  Args:
    samples: the policy's.
    reference: the reference's on the same prompts, or None.

  Returns:
    `sample/tokens`; with a judge `sample/reward` and its standard error; with
    a reference too `sample/win_rate` and its 95 % interval, ties a half.
  """
  figures = {
    "sample/tokens": float(np.mean([len(r) for r in samples.responses]))
  }
  if samples.rewards is None:
    return figures
  count = len(samples.rewards)
  figures["sample/reward"] = float(samples.rewards.mean())
  figures["sample/reward_error"] = _standard_error(samples.rewards)
  if reference is not None:
    wins = 0.5 * (np.sign(samples.rewards - reference.rewards) + 1.0)
    rate = float(wins.mean())
    low, high = wilson_interval(rate, count)
    figures |= {
      "sample/win_rate": rate,
      "sample/win_rate_low": low,
      "sample/win_rate_high": high,
    }
  return figures


def sampled_kl(
  logps_step: Callable[..., Any],
  params: Any,
  ref_params: Any,
  samples: Samples,
  placement: Placement,
  *,
  batch_size: int,
) -> dict[str, float]:
  """KL(pi || pi_ref) per response, from the policy's own samples.

  The mean of log pi(y|x) - log pi_ref(y|x) over y ~ pi: unbiased where the
  samples were drawn at temperature 1 from the whole vocabulary.

  Args:
    logps_step: compiled `reference.make_logps_step`.
    params: the policy's.
    ref_params: the reference's.
    samples: drawn from the policy.
    placement: mesh.
    batch_size: groups at once.

  Returns:
    `kl`, nats a response, and `kl_error`, its standard error.
  """
  groups = list(zip(samples.prompts, samples.responses, strict=True))
  store = Store.from_groups(groups, np.ones((len(groups), 1)))
  indices = np.arange(len(store))
  plan = batch_plan.make_plan(
    store,
    indices,
    batch_size=min(batch_size, len(store)),
    row_tokens=0,
    row_multiple=placement.num_row_shards,
    layout="shared",
  )
  loader = Loader(store, indices, plan, min(batch_size, len(store)), seed=0)
  policy_logps, ref_logps = (
    compute_logps(logps_step, p, loader, placement)
    for p in (params, ref_params)
  )
  log_ratios = (policy_logps - ref_logps)[:, 0].astype(np.float64)
  return {
    "kl": float(log_ratios.mean()),
    "kl_error": _standard_error(log_ratios),
  }


def _standard_error(values: np.ndarray) -> float:
  if len(values) < 2:
    return math.nan
  return float(values.std(ddof=1) / math.sqrt(len(values)))
