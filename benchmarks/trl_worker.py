"""Runs TRL's DPOTrainer on a workload, from exported weights.

  python -m benchmarks.trl_worker --model=FOLDER

This contender needs torch and trl, and not jax. Its `training_step` and
collator are TRL's own; optimizer and order of the data are those of
`benchmarks.ours`. Its Llama reads the weights that `benchmarks.peers` wrote.
"""

import argparse
import sys
import time
from typing import Any

import numpy as np
import torch
import transformers
import trl

from benchmarks import interleave


class Trainer:
  """DPOTrainer, fed batch by batch."""

  def __init__(self, options: argparse.Namespace):
    self.options = options
    self.work, groups = interleave.read_work(options.model)
    names = ("prompt_ids", "chosen_ids", "rejected_ids")
    self.examples = [
      {name: ids.tolist() for name, ids in zip(names, group, strict=True)}
      for group in groups
    ]
    self.next = 0

  def start(self) -> dict[str, Any]:
    """Builds the trainer, scores the reference, and takes the first step."""
    began = time.monotonic()
    self.trainer = self._build_trainer()
    if self.options.reference == "cached":
      self._score_reference()
    reference_s = time.monotonic() - began
    self.model = self.trainer.model
    self.model.train()
    # Trainer.train sets it, and is not run here.
    self.trainer.current_gradient_accumulation_steps = 1
    self.optimizer = torch.optim.AdamW(
      self.model.parameters(),
      lr=self.work["learning_rate"],
      betas=(0.9, 0.999),
      weight_decay=0.0,
      fused=True,
    )
    began = time.monotonic()
    first = self.run(1)
    first["first_step_s"] = time.monotonic() - began
    first["reference_s"] = reference_s
    return first

  def _build_trainer(self) -> trl.DPOTrainer:
    options, work = self.options, self.work

    def load():
      return transformers.AutoModelForCausalLM.from_pretrained(
        options.model, dtype=torch.float32
      )

    model = load()
    if options.head == "scored":
      # TRL projects only response positions if it has Triton; enable it here.
      trl.trainer.utils._use_triton = lambda device: True
    arguments = trl.DPOConfig(
      output_dir=f"{options.model}/trl",
      beta=work["beta"],
      per_device_train_batch_size=work["batch_size"],
      max_length=None,
      gradient_checkpointing=False,
      bf16=False,
      use_cpu=True,
      report_to=[],
      disable_dropout=True,
      dataloader_pin_memory=False,
    )
    # Text and tokenizer are placeholders: training reads ids of the workload.
    return trl.DPOTrainer(
      model=model,
      ref_model=None if options.reference == "cached" else load(),
      args=arguments,
      train_dataset=_placeholder(),
      processing_class=_tokenizer(options.model),
    )

  def _score_reference(self) -> None:
    """Adds the reference's log-probs to the examples that steps will use."""
    work = self.work
    self.trainer.precompute_ref_logps = False
    used = {i for order in work["order"][: work["num_steps"]] for i in order}
    for i in sorted(used):
      batch = self.trainer.data_collator([self.examples[i]])
      chosen, rejected = self.trainer.compute_ref_log_probs(
        self.trainer.model, batch
      )
      self.examples[i] |= {
        "ref_chosen_logps": chosen.item(),
        "ref_rejected_logps": rejected.item(),
      }
    self.trainer.precompute_ref_logps = True

  def run(self, num_steps: int) -> dict[str, Any]:
    """Takes steps, and returns their metrics and time."""
    work = self.work
    losses, padding = [], []
    steps = range(self.next, self.next + num_steps)
    watch = interleave.Stopwatch(work, steps)
    for step in steps:
      examples = [self.examples[i] for i in work["order"][step]]
      batch = self.trainer.data_collator(examples)
      padding.append(1.0 - batch["attention_mask"].float().mean().item())
      loss = self.trainer.training_step(self.model, batch)
      losses.append(loss.item())
      norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1e9)
      self.optimizer.step()
      self.optimizer.zero_grad(set_to_none=True)
    self.next += num_steps
    return watch.stop(
      padding=float(np.mean(padding)),
      loss=losses[-1],
      grad_norm=norm.item(),
      versions={
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "trl": trl.__version__,
      },
    )


def _placeholder() -> Any:
  import datasets

  return datasets.Dataset.from_list(
    [{"prompt": "a", "chosen": "b", "rejected": "c"}]
  )


def _tokenizer(folder: str) -> Any:
  """Makes a tokenizer of letters, since DPOTrainer requires one."""
  import tokenizers

  letters = {chr(97 + i): i + 3 for i in range(26)}
  vocabulary = {"<pad>": 0, "<s>": 1, "</s>": 2, **letters}
  model = tokenizers.models.WordLevel(vocabulary, unk_token="a")
  return transformers.PreTrainedTokenizerFast(
    tokenizer_object=tokenizers.Tokenizer(model),
    pad_token="<pad>",
    bos_token="<s>",
    eos_token="</s>",
  )


def main() -> None:
  parser = argparse.ArgumentParser()
  parser.add_argument("--model", required=True)
  parser.add_argument("--reference", default="cached")
  parser.add_argument(
    "--head",
    default="all",
    choices=("all", "scored"),
    help="positions that are projected to the vocabulary; all: unpatched TRL",
  )
  interleave.serve(Trainer(parser.parse_args(sys.argv[1:])))


if __name__ == "__main__":
  main()
