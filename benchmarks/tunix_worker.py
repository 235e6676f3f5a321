"""Runs Tunix's DPOTrainer on a workload, from exported weights.

  python -m benchmarks.tunix_worker --model=FOLDER

This contender needs google-tunix. Its `_prepare_inputs`, which scores the
frozen reference, and its jitted train step are Tunix's own. Tunix pads all
batches to one shape. By default this is the longest prompt and the longest
response of the data, the smallest shape that fits.
"""

import argparse
import importlib.metadata
import json
import time
from typing import Any

import jax
import numpy as np
import optax
from tunix.models.llama3 import model as llama3
from tunix.models.llama3 import params as llama3_params
from tunix.sft.dpo import dpo_trainer

from benchmarks import interleave

_PAD = 0


class Trainer:
  """DPOTrainer, fed batch by batch."""

  def __init__(self, options: argparse.Namespace):
    self.options = options
    self.work, self.groups = interleave.read_work(options.model)
    with open(f"{options.model}/config.json") as file:
      self.config = json.load(file)
    self.next = 0
    lengths = np.array(self.work["lengths"])
    longest = lengths[:, 0].max(), lengths[:, 1:].max()
    self.widths = longest
    if options.widths:
      self.widths = tuple(map(int, options.widths.split(",")))
    if self.widths[0] < longest[0] or self.widths[1] < longest[1]:
      raise SystemExit(
        f"--widths={options.widths} must be at least {longest[0]},{longest[1]},"
        " the longest prompt and response of the data"
      )

  def _load(self) -> Any:
    c = self.config
    config = llama3.ModelConfig(
      num_layers=c["num_hidden_layers"],
      vocab_size=c["vocab_size"],
      embed_dim=c["hidden_size"],
      hidden_dim=c["intermediate_size"],
      num_heads=c["num_attention_heads"],
      head_dim=c["head_dim"],
      num_kv_heads=c["num_key_value_heads"],
      rope_theta=int(c["rope_theta"]),
      norm_eps=c["rms_norm_eps"],
    )
    # Auto: Tunix's sharding annotations are hints to the partitioner.
    grid = jax.make_mesh(
      (1, 1),
      ("fsdp", "tp"),
      axis_types=(jax.sharding.AxisType.Auto,) * 2,
      devices=jax.devices()[:1],
    )
    return llama3_params.create_model_from_safe_tensors(
      self.options.model, config, mesh=grid, dtype=np.float32
    )

  def start(self) -> dict[str, Any]:
    """Loads policy and reference, compiles, and takes the first step.

    Returns:
      The answer of `run`, with "first_step_s".
    """
    work = self.work
    is_frozen = self.options.reference == "frozen"
    self.trainer = dpo_trainer.DPOTrainer(
      model=self._load(),
      ref_model=self._load() if is_frozen else None,
      optimizer=optax.adamw(
        work["learning_rate"], b1=0.9, b2=0.999, weight_decay=0.0
      ),
      training_config=dpo_trainer.DPOTrainingConfig(
        beta=work["beta"], eval_every_n_steps=10**9, max_steps=10**9
      ),
    )
    self.step, _ = self.trainer.jit_train_and_eval_step()
    began = time.monotonic()
    first = self.run(1)
    first["first_step_s"] = time.monotonic() - began
    return first

  def _batch(self, index: int) -> tuple[dpo_trainer.TrainingInput, float]:
    """Returns the batch of a step, and its padding fraction."""
    chosen = [self.groups[i] for i in self.work["order"][index]]
    prompt, response = self.widths
    widths = (prompt, response, response)
    fields: dict[str, np.ndarray] = {}
    names = ("prompt", "chosen", "rejected")
    for part, (name, width) in enumerate(zip(names, widths, strict=True)):
      ids = np.full((len(chosen), width), _PAD, np.int32)
      mask = np.zeros(ids.shape, bool)
      for row, group in enumerate(chosen):
        n = len(group[part])
        # Prompts are padded on the left, responses on the right.
        span = slice(width - n, width) if part == 0 else slice(0, n)
        ids[row, span], mask[row, span] = group[part], True
      fields |= {f"{name}_ids": ids, f"{name}_mask": mask}
    real = sum(fields[f"{name}_mask"].sum() for name in names)
    real += fields["prompt_mask"].sum()  # each prompt precedes both
    slots = 2 * len(chosen) * (prompt + response)
    return dpo_trainer.TrainingInput(**fields), 1.0 - real / slots

  def run(self, num_steps: int) -> dict[str, Any]:
    """Takes steps, and returns their time, work and metrics.

    Returns:
      The answer of `Stopwatch.stop`, with "loss" and "grad_norm" of the last
      step, mean "padding" and "versions".
    """
    padding = []
    steps = range(self.next, self.next + num_steps)
    watch = interleave.Stopwatch(self.work, steps)
    for step in steps:
      batch, fraction = self._batch(step)
      loss, _, norm = self.step(self.trainer._prepare_inputs(batch))
      padding.append(fraction)
      loss, norm = float(loss), float(norm)
    self.next += num_steps
    return watch.stop(
      padding=float(np.mean(padding)),
      loss=loss,
      grad_norm=norm,
      versions={"google-tunix": importlib.metadata.version("google-tunix")},
    )


def main() -> None:
  parser = argparse.ArgumentParser()
  parser.add_argument("--model", required=True)
  parser.add_argument(
    "--reference", default="frozen", choices=("frozen", "none")
  )
  parser.add_argument(
    "--widths", default="", help="of prompts and responses, as in 384,512"
  )
  interleave.serve(Trainer(parser.parse_args()))


if __name__ == "__main__":
  main()
