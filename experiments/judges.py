"""Objectives by number of responses, source of the data, and judge.

  python -m experiments.judges --workdir=runs/judges

On the exact task. K responses to a prompt are drawn from the reference
(offline) or from the policy (online), and a judge scores them. DPO, ODPO and
reward-aware losses learn from the best and the worst, the last two from their
scores too; RLOO learns from all K, online. A judge is the truth, or agrees with
it in part: its scores have the stated correlation with the true reward under
the reference, and what is wrong in them is of the same kind, so that it can be
learnt. The axes are those of Sun et al. 2025 (arXiv:2502.00203). All have the
same number of judged responses a step. Hardware: two CPU cores.
"""

import functools
import sys
from typing import Any

import matplotlib.pyplot as plt
import numpy as np

from experiments import exact_sweep, sweep
from experiments.exact_rewards import raw_rewards
from experiments.exact_sweep import Builder
from experiments.exact_task import Task, write_lines
from experiments.sweep import Row, Run, Settings

BETA = 0.5
# Correlation of a judge's scores with the true reward; 1 is the truth.
AGREEMENTS = {"tiny": (1.0, 0.8, 0.5), "paper": (1.0, 0.9, 0.8, 0.65, 0.5)}
NUM_SAMPLES = {"tiny": (2, 4), "paper": (2, 4, 8)}
_STEPS = {"tiny": 150, "paper": 2500}
# Responses that are judged a step.
_JUDGED = 128
_LEARNING_RATE = 2e-3
_ROUNDS = 10
LOSSES = {
  "DPO": dict(name="dpo", beta=BETA),
  "ODPO": dict(name="odpo", beta=BETA, alpha=1.0),
  # At its default, a score_scale of 1, the loss is 0 where beta D is the gap in
  # score: at the optimum of the judge's rewards.
  "reward-aware KL": dict(name="reward_aware", beta=BETA),
  "reward-aware squared": dict(
    name="reward_aware", beta=BETA, distance="squared"
  ),
}
METRICS = ("reward", "kl", "share", "judged")


def judge_rewards(task: Task, agreement: float) -> np.ndarray:
  """Returns a judge's scores: f64 [P, N].

  The true reward, plus an independent one of the same form. Under the reference
  the scores have the mean and the deviation of the true reward, and the
  correlation `agreement` with it.

  Args:
    task: reference and rewards.
    agreement: in [0, 1].
  """
  ref = np.exp(task.ref_logps)
  ref /= ref.sum(-1, keepdims=True)

  def mean(values: np.ndarray) -> np.ndarray:
    return (ref * values).sum(-1, keepdims=True)

  truth = task.rewards - mean(task.rewards)
  wrong = raw_rewards(exact_sweep.TASK_SEED + 1, task.space)
  wrong -= mean(wrong)
  wrong -= truth * mean(truth * wrong) / mean(truth**2)
  wrong *= np.sqrt(mean(truth**2) / mean(wrong**2))
  return agreement * truth + np.sqrt(1.0 - agreement**2) * wrong


def write_best_and_worst(
  task: Task,
  scores: np.ndarray,
  path: str,
  num: int,
  *,
  num_samples: int,
  seed: int,
) -> None:
  """Writes the best and the worst of K reference samples, with their scores.

  Args:
    task: reference.
    scores: f64 [P, N], the judge's.
    path: JSONL file.
    num: groups that are drawn; one of equal scores is left out.
    num_samples: K.
    seed: seed of the draws.
  """
  rng = np.random.default_rng((seed, 5))
  prompts = rng.integers(0, len(task.space.prompts), num)
  drawn = task.draw(prompts, num_samples, rng)
  judged = scores[prompts[:, None], drawn]
  best, worst = judged.argmax(1), judged.argmin(1)
  texts = task.space.texts
  write_lines(
    path,
    (
      {
        "prompt": task.space.prompts[prompts[i]],
        "chosen": texts[drawn[i, best[i]]],
        "rejected": texts[drawn[i, worst[i]]],
        "score_chosen": judged[i, best[i]],
        "score_rejected": judged[i, worst[i]],
      }
      for i in range(num)
      if judged[i, best[i]] > judged[i, worst[i]]
    ),
  )


def _add_judge(builder: Builder, agreement: float) -> str:
  """Adds a run that writes a judge's table, unless it exists.

  Returns:
    The run's name.
  """
  name = f"judge_{agreement:g}"

  def work(folder: str) -> None:
    task = Task.read(f"{builder.root}/reference")
    scores = judge_rewards(task, agreement)
    Task(task.ref_logps, scores).write(folder)

  builder.runs.setdefault(
    name,
    Run(
      name,
      exact_sweep.make_labels("judge", 0, knob=f"{agreement:g}"),
      after=("reference",),
      work=work,
      measure=lambda folder: [],
      inputs={"agreement": agreement},
    ),
  )
  return name


def _judged(task: Task, logps: np.ndarray, *, agreement: float) -> Row:
  scores = judge_rewards(task, agreement)
  return {"judged": float((np.exp(logps) * scores).sum(-1).mean())}


def _add_data(
  builder: Builder, agreement: float, num_samples: int, seed: int
) -> str:
  num = builder.steps * _JUDGED // num_samples

  def write(task: Task, path: str) -> None:
    scores = judge_rewards(task, agreement)
    write_best_and_worst(
      task, scores, path, num, num_samples=num_samples, seed=seed
    )

  return builder.add_data(
    f"pairs_{agreement:g}_k{num_samples}_s{seed}",
    write,
    exact_sweep.make_labels("pairs", seed),
    groups=num,
    samples=num_samples,
    agreement=agreement,
  )


def add_runs(
  builder: Builder, agreement: float, num_samples: int, seed: int
) -> None:
  """Adds every objective, offline and online, with one judge and one K."""
  judge = _add_judge(builder, agreement)
  table = f"table:{builder.root}/{judge}/table.jsonl"
  data = _add_data(builder, agreement, num_samples, seed)
  sampled: dict[str, Any] = dict(
    kind="pairs",
    every_steps=builder.steps // _ROUNDS,
    num_samples=num_samples,
    label="argmax",
    judge=table,
  )
  rollouts = dict(
    kind="rollouts",
    every_steps=1,
    num_samples=num_samples,
    kl_weight=BETA,
    judge=table,
  )
  add = functools.partial(
    builder.add,
    seed=seed,
    beta=BETA,
    knob=f"K={num_samples}, judge {agreement:g}",
    data=data,
    learning_rate=_LEARNING_RATE,
    extra=functools.partial(_judged, agreement=agreement),
    changes={"batch_size": _JUDGED // num_samples},
  )
  for name, loss in LOSSES.items():
    add(f"offline {name}", loss)
    add(f"online {name}", loss, online=sampled, after=(judge,))
  add("online RLOO", dict(name="reinforce"), online=rollouts, after=(judge,))


def runs(settings: Settings) -> list[Run]:
  """Returns every objective at every K with every judge."""
  scale = settings.scale
  builder = Builder(settings, steps=_STEPS[scale])
  for seed in builder.seeds:
    for agreement in AGREEMENTS[scale]:
      for num_samples in NUM_SAMPLES[scale]:
        add_runs(builder, agreement, num_samples, seed)
  return list(builder.runs.values())


collect = exact_sweep.collect


def means(rows: list[Row]) -> list[Row]:
  """Averages seeds, by objective, K and judge; other rows are left out.

  Returns:
    Rows of `sweep.mean_and_spread`, with `K`; `judge`, its agreement; `source`,
    "offline" or "online"; and `objective`.
  """
  rows = [row for row in rows if "judged" in row]
  found = sweep.mean_and_spread(rows, ("method", "knob"), METRICS)
  for row in found:
    samples, judge = row["knob"].split(", judge ")
    row |= {"K": int(samples.removeprefix("K=")), "judge": float(judge)}
    row["source"], _, row["objective"] = row["method"].partition(" ")
  return found


def table(rows: list[Row]) -> list[Row]:
  """Returns the metrics of each objective, K and judge, means over seeds.

  Returns:
    "objective", "K", "judge" and METRICS, with the spreads "+-reward" and
    "+-share".
  """
  out = []
  for row in means(rows):
    line: Row = {"objective": row["method"]}
    line |= {name: row[name] for name in ("K", "judge")}
    for name in METRICS:
      line[name] = row[name]
      if name in ("reward", "share"):
        line[f"+-{name}"] = row[f"{name}_spread"]
    out.append(line)
  return out


def plot(rows: list[Row], path: str) -> list[str]:
  """Plots the share of the frontier by judge: a panel for each source and K."""
  found = means(rows)
  numbers = sorted({row["K"] for row in found})
  figure, axes = plt.subplots(
    2,
    max(len(numbers), 1),
    figsize=(5.0 * max(len(numbers), 1), 6.4),
    layout="constrained",
    sharey=True,
    squeeze=False,
  )
  for source, panels in zip(("offline", "online"), axes, strict=True):
    panels[0].set(ylabel="share of the frontier's E[r]")
    for axis, number in zip(panels, numbers, strict=False):
      mine = [r for r in found if (r["source"], r["K"]) == (source, number)]
      sweep.draw(axis, mine, "judge", "share", by="objective")
      axis.set(title=f"{source}, K = {number}")
  for axis in axes[-1]:
    axis.set(xlabel="judge's correlation with the truth")
  # The panels share an axis, so all curves are drawn before labels are placed.
  for axis in axes.flat:
    sweep.label_curves(axis, room=0.36)
  return sweep.save_figure(figure, rows, path)


if __name__ == "__main__":
  sweep.main(sys.modules[__name__], table)
