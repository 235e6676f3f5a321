"""DPO on pairs of the reference or of the policy, with the same labels.

  python -m experiments.online_vs_offline --workdir=runs/online_vs_offline

On the exact task: offline DPO, and DPO that samples pairs from the policy in 1,
4 or 16 rounds. The true reward labels them by Bradley-Terry. All take as many
steps and labels. One round is offline DPO on other pairs. arXiv:2405.08448,
2402.04792 and 2312.11456 claim a smaller gap at the same KL. Hardware: two CPU
cores.
"""

import sys

import matplotlib.pyplot as plt

from experiments import exact_sweep, sweep
from experiments.exact_sweep import Builder
from experiments.sweep import Row, Run, Settings

ROUNDS = (1, 4, 16)
BETAS = (0.25, 1.0)


def runs(settings: Settings) -> list[Run]:
  """Returns offline and on-policy runs with the same number of pairs.

  Each pair is seen once.
  """
  builder = Builder(settings)
  builder.use_every_pair_once()
  for seed in builder.seeds:
    for beta in BETAS:
      builder.add_dpo(seed, beta, knob="offline")
      for rounds in ROUNDS:
        builder.add_on_policy_dpo(
          seed, beta, rounds=rounds, knob=f"{rounds} rounds"
        )
  return list(builder.runs.values())


collect = exact_sweep.collect


def plot(rows: list[Row], path: str) -> list[str]:
  """Plots reward against KL, and regret against rounds."""
  figure, axes = plt.subplots(1, 2, figsize=(10, 4.4), layout="constrained")
  means = exact_sweep.mean_rows(rows)
  means = [row for row in means if row["beta"] is not None]
  exact_sweep.draw_frontier(axes[0], rows)
  sweep.draw(axes[0], means, "kl", "reward", by="knob")
  axes[0].set(xlabel="KL to the reference (nats)", ylabel="E[r]")
  axes[0].legend()
  rounds = {"offline": 0} | {f"{n} rounds": n for n in ROUNDS}
  bars = [row | {"rounds": rounds[row["knob"]]} for row in means]
  for row in bars:
    row["beta"] = f"beta {row['beta']:g}"
  sweep.draw(axes[1], bars, "rounds", "regret", by="beta")
  axes[1].set(xlabel="rounds of sampling; 0: offline", ylabel="J(pi*) - J(pi)")
  if bars:
    axes[1].legend()
  return sweep.save_figure(figure, rows, path)


if __name__ == "__main__":
  sweep.main(sys.modules[__name__], exact_sweep.table)
