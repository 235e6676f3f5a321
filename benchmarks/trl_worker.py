"""A contender: TRL's DPOTrainer on a workload, from exported weights.

  python -m benchmarks.trl_worker --model=FOLDER

for a Python with torch and trl, and without jax. Its `training_step` and
collator are TRL's own; optimizer and order of the data are those of
`benchmarks.ours`. TRL's Llama reads the weights that `benchmarks.peers` wrote.
"""

import argparse
import json
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
    with open(f"{options.model}/work.json") as file:
      self.work = json.load(file)
    tokens = np.load(f"{options.model}/tokens.npy")
    lengths = np.array(self.work["lengths"])
    ends = np.cumsum(lengths.reshape(-1)).reshape(lengths.shape)
    names = ("prompt_ids", "chosen_ids", "rejected_ids")
    self.examples = [
      {
        name: tokens[end - length : end].tolist()
        for name, end, length in zip(names, row_ends, row, strict=True)
      }
      for row_ends, row in zip(ends, lengths, strict=True)
    ]
    self.next = 0

  def start(self) -> dict[str, Any]:
    """Builds the trainer, scores the reference, and takes the first step."""
    options, work = self.options, self.work
    began = time.monotonic()

    def load():
      return transformers.AutoModelForCausalLM.from_pretrained(
        options.model, dtype=torch.float32
      )

    model = load()
    if options.head == "scored":
      # TRL projects response positions only where it has Triton: let it here.
      trl.trainer.utils._use_triton = lambda device: True
    is_cached = options.reference == "cached"
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
    # Text and tokenizer are made up: the ids that are trained on are given.
    self.trainer = trl.DPOTrainer(
      model=model,
      ref_model=None if is_cached else load(),
      args=arguments,
      train_dataset=_placeholder(),
      processing_class=_tokenizer(options.model),
    )
    if is_cached:
      self.trainer.precompute_ref_logps = False
      used = {i for order in work["order"][: work["num_steps"]] for i in order}
      for i in sorted(used):
        batch = self.trainer.data_collator([self.examples[i]])
        chosen, rejected = self.trainer.compute_ref_log_probs(model, batch)
        self.examples[i] |= {
          "ref_chosen_logps": chosen.item(),
          "ref_rejected_logps": rejected.item(),
        }
      self.trainer.precompute_ref_logps = True
    reference_s = time.monotonic() - began
    self.model = self.trainer.model
    self.model.train()
    # What Trainer.train sets, which we do not run.
    self.trainer.current_gradient_accumulation_steps = 1
    self.optimizer = torch.optim.AdamW(
      self.model.parameters(),
      lr=work["learning_rate"],
      betas=(0.9, 0.999),
      weight_decay=0.0,
      fused=True,
    )
    began = time.monotonic()
    first = self.run(1)
    first["first_step_s"] = time.monotonic() - began
    first["reference_s"] = reference_s
    return first

  def run(self, num_steps: int) -> dict[str, Any]:
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
  """Letters: DPOTrainer wants a tokenizer, and our ids come without."""
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
  parser.add_argument("--head", default="all")  # as it comes; or "scored"
  interleave.serve(Trainer(parser.parse_args(sys.argv[1:])))


if __name__ == "__main__":
  main()
