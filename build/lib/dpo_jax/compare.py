"""Compares runs: what differs, their metrics, samples and curves.

  python -m dpo_jax.compare runs/dpo runs/ipo
  python -m dpo_jax.compare runs/dpo runs/ipo --metrics=loss,kl --out=two.png

The runs may be finished or running; nothing in them is changed.
"""

from absl import flags

from dpo_jax import command_line
from dpo_jax.viewing import runs as runs_lib
from dpo_jax.viewing.terminal import make_console


def main(workdirs: list[str]) -> None:
  given = flags.FLAGS
  runs = runs_lib.read_runs(workdirs)
  figure = runs_lib.plot(runs, given.metrics) if given.out else None
  console = make_console()
  runs_lib.show(console, runs, given.num_samples)
  if figure is not None:
    runs_lib.write_figure(figure, given.out)
    console.print(f"{given.out}: the curves")


def define_flags() -> None:
  flags.DEFINE_list("metrics", [], "metrics to plot, such as loss,kl")
  flags.DEFINE_string("out", "compare.png", "figure to write; '' for none")
  flags.DEFINE_integer("num_samples", 3, "prompts to show samples of", 0)


if __name__ == "__main__":
  define_flags()
  command_line.run(main, takes_arguments=True)
