"""Writes what follows from the catalogue of losses.

  python -m experiments.loss_docs

These are docs/losses.md with its plots in docs/losses.png, docs/api.md, and
dpo_jax/losses/functions.py. Run it after a change to the table of losses; a
test fails while one of them is out of date.
"""

import importlib
import math
import pathlib
import textwrap

import jax
import jax.numpy as jnp
import matplotlib
import numpy as np

from dpo_jax import command_line, losses
from dpo_jax.losses import CATALOGUE, KNOBS, Loss, build_objective
from dpo_jax.types import Sequences
from experiments import loss_functions

matplotlib.use("Agg")
import matplotlib.pyplot as plt

FOLDER = pathlib.Path(__file__).parents[1] / "docs"
FUNCTIONS = pathlib.Path(losses.__file__).with_name("functions.py")
_WIDTH = 99
_INTRODUCTION = """# Losses

Written by `python -m experiments.loss_docs` from `dpo_jax/losses/catalogue/`;
do not edit.

- `--config.loss.name=NAME` trains a loss with the defaults below.
- `--config.loss.KNOB=VALUE` sets a knob. A knob that the loss does not read is
  an error.
- `--config.loss.reward=` and `--config.loss.link=` replace the reward or the
  link of a row, where the combination is defined.
- Several losses are a list: `config.loss = [{"name": "dpo", "weight": 0.8},
  {"name": "sft", "weight": 1.0}]`.
- [api.md](api.md) lists the losses as functions of plain arrays.

| symbol | meaning |
|---|---|
| lp | log pi(y\\|x) summed over the response's tokens |
| n | number of those tokens, EOS included |
| r | log-ratio lp - log pi_ref(y\\|x) |
| u | exp(r) |
| w, l | chosen and rejected response |
| D | margin r_w - r_l |
| s | sigmoid |
| sg | stop-gradient |
| e | label_smoothing |

A loss is per group; a training step takes the mean over the global batch. A
loss marked *couples the batch* depends on all groups. Its value is the same on
any mesh and with any number of accumulation steps; `pmap` refuses it.

![losses and gradients](losses.png)

Loss (solid) and its derivative (dashed) against the margin D in nats. Half of
D is on the chosen and half on the rejected response; a single response has all
of it. Both have 10 tokens, and -10 nats under the reference.
"""


def render() -> str:
  """Returns the text of docs/losses.md."""
  parts = [_INTRODUCTION]
  for group, title in loss_functions.KINDS.items():
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
  return knob.interval


def _section(row: Loss) -> str:
  knobs = ", ".join(f"`{k}={v}`" for k, v in row.defaults.items()) or "none"
  needs = sorted(row.needs(row.defaults))
  items = [
    row.paper,
    f"reward `{row.reward}`, link `{row.link}`"
    + "".join(f", plus `{f.__name__}`" for f in row.regularizers),
    f"knobs: {knobs}",
    "reads: " + (", ".join(f"`{n}`" for n in needs) or "no reference"),
  ]
  if row.is_coupled:
    items.append("couples the batch")
  if row.peers:
    items.append(f"elsewhere: {row.peers}")
  lines = [f"### `{row.name}`", "", *_wrapped(f"`{row.formula}`"), ""]
  for item in items:
    lines += _wrapped(f"- {item}", indent="  ")
  return "\n".join(lines) + "\n"


def _wrapped(text: str, indent: str = "") -> list[str]:
  return textwrap.wrap(
    text, _WIDTH, subsequent_indent=indent, break_on_hyphens=False
  )


def curve(name: str, margins: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
  """Computes a loss and its derivative at margins: f32 [n] each.

  Responses are as _INTRODUCTION says: 10 tokens, -10 nats under the reference.

  Args:
    name: name of a loss with its default knobs, not one of samples.
    margins: f32 [n], D, nats.
  """
  objective = build_objective({"name": name})
  width = {"first": 1, "single": 1, "pair": 2, "ranking": 2}[objective.group]
  ref_logps = jnp.full((1, width), -10.0)

  def loss(margin):
    # A loss that reads single rewards then shows both sides.
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
  """Writes a PNG file with a small panel for each loss: see `curve`."""
  # Losses of rewarded samples have no margin.
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
  FUNCTIONS.write_text(loss_functions.render_functions(), encoding="utf-8")
  print(FUNCTIONS)
  # docs/api.md lists the functions as they are now.
  importlib.reload(losses.functions)
  importlib.reload(losses)
  files = {
    FOLDER / "losses.md": render(),
    FOLDER / "api.md": loss_functions.render_api(),
  }
  for path, text in files.items():
    path.write_text(text, encoding="utf-8")
    print(path)
  plot(FOLDER / "losses.png")
  print(FOLDER / "losses.png")


if __name__ == "__main__":
  command_line.run(main)
