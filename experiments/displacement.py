"""How far the chosen responses' log-probs fall, by the similarity of a pair.

  python -m experiments.displacement --workdir=runs/displacement

On the exact task, pairs that share 0 or 3 of their 4 letters. Pal et al. 2024
(DPOP, arXiv:2402.13228) and Razin et al. 2024 (arXiv:2410.08847) find that DPO
lowers the chosen response's log-prob, the more so the more alike the two
responses are. Pairs that are alike are learnt more slowly, so the fall is
compared for each nat that the margin has grown. By itself a fall is
harmless: pi* lowers most chosen responses too. Hardware: two CPU cores.
"""

import functools
import json
import sys

import matplotlib.pyplot as plt
import numpy as np

from experiments import exact_data, exact_sweep, sweep
from experiments.exact_sweep import Builder
from experiments.exact_task import Task
from experiments.sweep import Row, Run, Settings

BETA = 0.1
# Equal letters of the two responses of a pair, out of four.
SIMILARITIES = {"tiny": (0, 3), "paper": (0, 1, 2, 3)}
LOSSES = {
  "DPO": dict(name="dpo", beta=BETA),
  "DPOP": dict(name="dpop", beta=BETA, penalty_weight=5.0),
  "Cal-DPO": dict(name="cal_dpo", beta=BETA),
  "APO-zero": dict(name="apo_zero", beta=BETA),
}
_STEPS = {"tiny": 120, "paper": 2500}
_PAIRS = {"tiny": 1000, "paper": 20_000}
_BATCH = 32
METRICS = (
  *("fall", "chosen", "rejected", "share_fallen", "optimum_chosen"),
  *("reward", "kl", "share"),
)


def read_pairs(task: Task, path: str) -> tuple[np.ndarray, np.ndarray]:
  """Reads the indices of pairs: i64 [n] prompts, i64 [n, 2] completions.

  The chosen completion is the first of two.
  """
  with open(path, encoding="utf-8") as file:
    rows = [json.loads(line) for line in file]
  prompts = [task.space.prompts.index(row["prompt"]) for row in rows]
  index = task.space.index
  pairs = [(index[row["chosen"]], index[row["rejected"]]) for row in rows]
  return np.array(prompts), np.array(pairs)


def shifts(task: Task, logps: np.ndarray, *, path: str) -> Row:
  """Computes how the log-probs of the training pairs have moved.

  Args:
    task: reference and rewards.
    logps: f64 [P, N], log-probs of all completions.
    path: JSONL file of the pairs.

  Returns:
    `chosen` and `rejected`, mean log-ratios, nats; `fall`, -chosen / (chosen -
    rejected), the fall for a nat of margin; `share_fallen`, the share of chosen
    responses below the reference; and `optimum_chosen`, the mean log-ratio of
    chosen responses of pi* at BETA.
  """
  prompts, pairs = read_pairs(task, path)
  where = prompts[:, None], pairs
  moved = logps[where] - task.ref_logps[where]
  best = task.optimum(BETA)[where] - task.ref_logps[where]
  chosen, rejected = moved.mean(0).tolist()
  return {
    "fall": -chosen / (chosen - rejected),
    "chosen": chosen,
    "rejected": rejected,
    "share_fallen": float((moved[:, 0] < 0).mean()),
    "optimum_chosen": float(best[:, 0].mean()),
  }


def add_run(
  builder: Builder, method: str, num_equal: int, num: int, seed: int
) -> str:
  """Adds a run of LOSSES[method] on `num` pairs with `num_equal` equal letters.

  The run that writes the pairs is added too, unless it exists.

  Returns:
    The run's name.
  """
  data = builder.add_data(
    f"pairs_{num_equal}_equal_s{seed}",
    functools.partial(
      exact_data.write_similar_pairs, num=num, num_equal=num_equal, seed=seed
    ),
    exact_sweep.make_labels("pairs", seed),
    pairs=num,
    equal=num_equal,
  )
  return builder.add(
    method,
    LOSSES[method],
    seed=seed,
    beta=BETA,
    knob=f"{num_equal} equal",
    data=data,
    extra=functools.partial(shifts, path=f"{builder.root}/{data}/pairs.jsonl"),
    # A short run has no use for a cache of its log-probs.
    changes={"reference.kind": "frozen"},
  )


def runs(settings: Settings) -> list[Run]:
  """Returns every loss at every similarity."""
  scale = settings.scale
  builder = Builder(
    settings, steps=_STEPS[scale], batch_size=_BATCH, num_slots=2
  )
  for seed in builder.seeds:
    for num_equal in SIMILARITIES[scale]:
      for method in LOSSES:
        add_run(builder, method, num_equal, _PAIRS[scale], seed)
  return list(builder.runs.values())


collect = exact_sweep.collect


def means(rows: list[Row]) -> list[Row]:
  """Averages seeds, by loss and number of equal letters.

  Returns:
    Rows of `sweep.mean_and_spread`, with that number as `equal`. Methods that
    are not in LOSSES are left out.
  """
  rows = [row for row in rows if row["method"] in LOSSES]
  found = sweep.mean_and_spread(rows, ("method", "knob"), METRICS)
  for row in found:
    row["equal"] = int(row["knob"].split()[0])
  return found


def table(rows: list[Row]) -> list[Row]:
  """Returns the movement of log-probs, and what it bought.

  Returns:
    "loss", "equal letters", "fall" and its spread "+-", and the other METRICS.
  """
  out = []
  for row in means(rows):
    line = {"loss": row["method"], "equal letters": row["equal"]}
    line |= {"fall": row["fall"], "+-": row["fall_spread"]}
    out.append(line | {name: row[name] for name in METRICS[1:]})
  return out


def plot(rows: list[Row], path: str) -> list[str]:
  """Plots the fall for a nat of margin, the log-ratio, and the reward."""
  figure, axes = plt.subplots(1, 3, figsize=(14, 4.2), layout="constrained")
  found = means(rows)
  for axis, name, label in (
    (axes[0], "fall", "fall of the chosen for a nat of margin"),
    (axes[1], "chosen", "log-ratio of the chosen responses (nats)"),
    (axes[2], "reward", "true reward, E[r]"),
  ):
    sweep.draw(axis, found, "equal", name)
    axis.axhline(0.0, color="0.7", linewidth=1)
    axis.set(xlabel="equal letters of a pair, of 4", ylabel=label)
    axis.set(xticks=sorted({row["equal"] for row in found}))
    sweep.label_curves(axis)
  return sweep.save_figure(figure, rows, path)


if __name__ == "__main__":
  sweep.main(sys.modules[__name__], table)
