"""The same labels and steps, on pairs of the reference or of the policy.

  python -m experiments.online_vs_offline --workdir=runs/online_vs_offline

On the exact task: offline DPO, and DPO that samples pairs from the policy in 1,
4 or 16 rounds and has the true reward label them by Bradley-Terry. One round is
offline DPO again, with new pairs. Claims of arXiv:2405.08448, 2402.04792 and
2312.11456: a smaller gap at the same KL. Two CPU cores.
"""

import sys

import matplotlib.pyplot as plt

from experiments import exact_sweep, harness
from experiments.exact_sweep import Sweep
from experiments.harness import Row, Run, Settings

ROUNDS = (1, 4, 16)
BETAS = (0.25, 1.0)


def runs(settings: Settings) -> list[Run]:
  """Offline on as many pairs as the others sample, each seen once."""
  sweep = Sweep(settings)
  sweep.use_every_pair_once()
  for seed in sweep.seeds:
    for beta in BETAS:
      sweep.add_dpo(seed, beta, knob="offline")
      for rounds in ROUNDS:
        sweep.add_on_policy_dpo(
          seed, beta, rounds=rounds, knob=f"{rounds} rounds"
        )
  return list(sweep.runs.values())


def collect(workdir: str) -> harness.Collected:
  return exact_sweep.collect(workdir)


def plot(rows: list[Row], path: str) -> list[str]:
  """Reward against KL, and the regret by rounds."""
  figure, axes = plt.subplots(1, 2, figsize=(10, 4.4), layout="constrained")
  means = harness.mean_and_spread(rows, exact_sweep.BY, exact_sweep.FIGURES)
  means = [row for row in means if row["beta"] is not None]
  exact_sweep.draw_frontier(axes[0], rows)
  exact_sweep.draw(axes[0], means, "kl", "reward", by="knob")
  axes[0].set(xlabel="KL to the reference (nats)", ylabel="E[r]")
  axes[0].legend()
  rounds = {"offline": 0} | {f"{n} rounds": n for n in ROUNDS}
  bars = [row | {"rounds": rounds[row["knob"]]} for row in means]
  for row in bars:
    row["beta"] = f"beta {row['beta']:g}"
  exact_sweep.draw(axes[1], bars, "rounds", "regret", by="beta")
  axes[1].set(xlabel="rounds of sampling; 0: offline", ylabel="J(pi*) - J(pi)")
  if bars:
    axes[1].legend()
  written = harness.save_figure(figure, rows, path)
  plt.close(figure)
  return written


if __name__ == "__main__":
  harness.main(sys.modules[__name__], exact_sweep.table)
