"""Controlled sentiment: reward against KL, the DPO paper's fig. 2 left.

  python -m experiments.imdb_sentiment --workdir=runs/imdb_sentiment
  python -m experiments.imdb_sentiment --workdir=runs/stories \
      --policy=stories260k --reviews=imdb_train.jsonl.gz
  python -m experiments.imdb_sentiment --scale=paper --workdir=runs/imdb \
      --policy=gpt2-large --reviews=tfds

The reference writes four completions for each prefix. A classifier rewards
them, which orders up to six pairs. Every method is trained on these over its
sweep, and each checkpoint is measured: gold reward, and KL to the reference
(Rafailov et al. 2023, arXiv:2305.18290, sec. 6.1).

Without --reviews the data are the synthetic review task, whose true reward is
known and also labels the pairs. With reviews, a classifier of one half of them
labels, and a classifier of the other half is the gold judge. Were they one,
over-optimisation could not show. The paper's gold judge is a RoBERTa and ours
is a bag of n-grams, so rewards differ from the paper's. With --policy at `tiny`
the policy is its own reference and writes its own prefixes; at `paper` it is
first fine-tuned on the reviews.
"""

import sys

import matplotlib.pyplot as plt

from experiments import sweep
from experiments.sentiment.runs import runs
from experiments.sweep import Row

__all__ = ["collect", "plot", "runs", "table"]

_METRICS = ("reward", "p_positive", "kl", "kl_error")
# Approximate KL and reward, read off the paper's figure.
_PAPER = {
  "DPO (paper)": ((2.0, 0.90), (3.0, 0.95), (5.0, 0.99)),
  "PPO (paper)": ((5.0, 0.73), (10.0, 0.90)),
  "PPO on the truth (paper)": ((5.0, 0.75), (10.0, 0.88)),
  "Unlikelihood (paper)": ((1.0, 0.58), (4.0, 0.77), (9.0, 0.95)),
}

collect = sweep.collect


def table(rows: list[Row]) -> list[Row]:
  """Returns one row for each checkpoint, means over seeds.

  Returns:
    "method", "knob", "step", "seeds", _METRICS, and the spreads of `reward` and
    `kl`.
  """
  rows = [row for row in rows if "reward" in row]
  columns = ("method", "knob", "step")
  means = sweep.mean_and_spread(rows, columns, _METRICS)
  for row in means:
    del row["p_positive_spread"], row["kl_error_spread"]
  return means


def plot(rows: list[Row], path: str) -> list[str]:
  """Plots gold reward and p(positive) against the KL to the reference."""
  figure, axes = plt.subplots(1, 2, figsize=(12, 4.8), layout="constrained")
  means = sweep.mean_and_spread(
    [row for row in rows if "reward" in row],
    ("method", "knob", "step"),
    _METRICS,
  )
  sweep.draw(axes[0], means, "kl", "reward")
  sweep.draw(axes[1], means, "kl", "p_positive")
  # A method has one colour, here and in the paper.
  methods = list(dict.fromkeys(row["method"] for row in means))
  for name, points in _PAPER.items():
    method = name.removesuffix(" (paper)")
    if method not in methods:
      methods.append(method)
    kls, rewards = zip(*points, strict=True)
    color = sweep.colour(methods.index(method))
    axes[1].plot(kls, rewards, "--", color=color, label=name, alpha=0.6)
  axes[0].set(xlabel="KL to the reference (nats)", ylabel="gold reward")
  axes[1].set(
    xlabel="KL to the reference (nats)",
    ylabel="sigmoid of the reward; dashed: the paper's p(positive)",
    xlim=(-0.5, 25),
  )
  axes[1].legend(fontsize=7)
  return sweep.save_figure(figure, rows, path)


if __name__ == "__main__":
  sweep.main(sys.modules[__name__], table)
