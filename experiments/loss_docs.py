"""Writes docs/losses.md and docs/losses.png from the catalogue.

  python -m experiments.loss_docs

A test keeps both current: run this after a change to the table of losses.
"""

import math
import pathlib

import jax
import jax.numpy as jnp
import matplotlib
import numpy as np

from dpo_jax import command_line
from dpo_jax.losses import CATALOGUE, KNOBS, Loss, build_objective
from dpo_jax.types import Sequences

matplotlib.use("Agg")
import matplotlib.pyplot as plt

FOLDER = pathlib.Path(__file__).parents[1] / "docs"
_KINDS = {
  "pair": "Pairs",
  "single": "Single responses with a label",
  "first": "Demonstrations",
  "ranking": "Rankings, best first (two are a pair)",
  "samples": "Rewarded samples of the policy (`online.kind=rollouts`)",
}
_INTRODUCTION = """# Losses

Written by `python -m experiments.loss_docs` from
`dpo_jax/losses/catalogue.py`; do not edit.

`--config.loss.name=NAME` trains a loss with the defaults below,
`--config.loss.KNOB=VALUE` sets a knob, and a knob that the loss does not read
is an error. `--config.loss.reward=` and `--config.loss.link=` put another
reward or link into a row, where that makes sense. Several losses are a list:
`config.loss = [{"name": "dpo", "weight": 0.8}, {"name": "sft", "weight":
1.0}]`.

lp is log pi(y|x) summed over the response's tokens, n their number, EOS
included; r = lp - ref; u = exp(r); w chosen, l rejected; D = r_w - r_l; s the
sigmoid; sg a stop-gradient; b is beta and e is label_smoothing. A loss is per
group, and the step takes the mean over the global batch. A loss marked
*couples* depends on the whole batch: its value is the same on any mesh and
with any number of accumulation steps, and `pmap` refuses it.

![losses and gradients](losses.png)

Loss (solid) and its derivative (dashed) against the margin D in nats, half of
it on the chosen and half on the rejected response, both of 10 tokens and at
-10 nats under the reference; a single response has all of D.
"""


def render() -> str:
  """docs/losses.md."""
  parts = [_INTRODUCTION]
  for group, title in _KINDS.items():
    parts.append(f"\n## {title}\n")
    parts += [_section(r) for r in CATALOGUE.values() if r.group == group]
  parts.append("\n## Knobs\n\n| knob | meaning | range |\n|---|---|---|")
  for name, knob in KNOBS.items():
    parts.append(f"| `{name}` | {knob.doc} | {_range(knob)} |")
  return "\n".join(parts) + "\n"


def _range(knob) -> str:
  if knob.choices:
    return ", ".join(f"`{c}`" for c in knob.choices)
  if knob.type is bool:
    return "True, False"
  low = "-inf" if knob.low is None else f"{knob.low:g}"
  high = "inf" if knob.high is None else f"{knob.high:g}"
  opening = "(" if knob.above or knob.low is None else "["
  closing = ")" if knob.below or knob.high is None else "]"
  return f"{opening}{low}, {high}{closing}"


def _section(row: Loss) -> str:
  knobs = ", ".join(f"`{k}={v}`" for k, v in row.defaults.items()) or "none"
  needs = sorted(row.needs(row.defaults))
  lines = [
    f"### `{row.name}`",
    "",
    f"`{row.formula}`",
    "",
    f"- {row.paper}",
    f"- reward `{row.reward}`, link `{row.link}`"
    + "".join(f", plus `{f.__name__}`" for f in row.regularizers),
    f"- knobs: {knobs}",
    "- reads: " + (", ".join(f"`{n}`" for n in needs) or "no reference"),
  ]
  if row.link_row.is_coupled:
    lines.append("- couples the batch")
  if row.peers:
    lines.append(f"- elsewhere: {row.peers}")
  return "\n".join(lines) + "\n"


def curve(name: str, margins: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
  """Loss and its derivative by the margin, one margin at a time."""
  objective = build_objective({"name": name})
  width = {"first": 1, "single": 1, "pair": 2, "ranking": 2}[objective.group]
  ref_logps = jnp.full((1, width), -10.0)

  def loss(margin):
    # Half up, half down: a loss that reads single rewards shows both sides.
    sides = jnp.array([[0.5, -0.5]]) if width == 2 else jnp.ones((1, 1))
    logps = ref_logps + margin * sides
    shape = (1, width)
    sequences = Sequences(
      logps=logps,
      ref_logps=ref_logps,
      num_tokens=jnp.full(shape, 10.0),
      score=jnp.arange(width, 0.0, -1.0)[None],
      valid=jnp.ones(shape, bool),
      head_logps=logps,
      ref_head_logps=ref_logps,
      sampled_logps=logps,
      ref_sampled_logps=ref_logps,
      mismatched_logps=ref_logps[:, 0],
      mismatched_ref_logps=ref_logps[:, 0],
      complement_logps=jnp.full(shape, -5.0),
      alignment=jnp.zeros(shape),
      kl=jnp.zeros(shape),
      values=logps - ref_logps,
    )
    return objective.apply(sequences, objective.init())[0].sum()

  both = jax.jit(jax.vmap(jax.value_and_grad(loss)))(jnp.asarray(margins))
  return np.asarray(both[0]), np.asarray(both[1])


def plot(path: pathlib.Path) -> None:
  """One small panel a loss."""
  # Of a pair's margin: what learns from rewarded samples has none.
  names = [name for name, row in CATALOGUE.items() if row.group != "samples"]
  columns = 8
  rows = math.ceil(len(names) / columns)
  figure, axes = plt.subplots(
    rows, columns, figsize=(2.1 * columns, 1.7 * rows), layout="constrained"
  )
  margins = np.linspace(-9.5, 9.5, 77, dtype=np.float32)
  for axis, name in zip(axes.flat, names, strict=False):
    loss, slope = curve(name, margins)
    axis.plot(margins, loss, color="tab:blue", linewidth=1.2)
    axis.set_title(name, fontsize=8)
    twin = axis.twinx()
    twin.plot(margins, slope, "--", color="tab:orange", linewidth=1.0)
    for one in (axis, twin):
      one.tick_params(labelsize=5, length=2, pad=1)
  for axis in axes.flat[len(names) :]:
    axis.axis("off")
  figure.savefig(path, dpi=70)
  plt.close(figure)


def main() -> None:
  FOLDER.mkdir(exist_ok=True)
  (FOLDER / "losses.md").write_text(render(), encoding="utf-8")
  plot(FOLDER / "losses.png")
  print(f"{FOLDER / 'losses.md'}: {len(CATALOGUE)} losses")


if __name__ == "__main__":
  command_line.run(main)
