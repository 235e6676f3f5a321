"""Runs TRL's DPOTrainer on a workload, from exported or random weights.

  python -m benchmarks.trl_worker --model=FOLDER

This contender needs torch and trl, and not jax. Its `training_step` and
collator are TRL's own; optimizer and order of the data are those of
`benchmarks.ours`. Its Llama reads the weights that `benchmarks.peers` wrote,
or draws them on the device. A step may take its batch in parts.
"""

import argparse
import sys
import time
from typing import Any

import numpy as np
import torch
import transformers
from transformers.integrations import liger
import trl

from benchmarks import interleave


class Trainer:
  """DPOTrainer, fed batch by batch."""

  def __init__(self, options: argparse.Namespace):
    self.options = options
    self.work, groups = interleave.read_work(options.model)
    names = ("prompt_ids", "chosen_ids", "rejected_ids")
    given = {}
    if options.reference == "given":
      given = {"ref_chosen_logps": 0.0, "ref_rejected_logps": 0.0}
    self.examples = [
      {name: ids.tolist() for name, ids in zip(names, group, strict=True)}
      | given
      for group in groups
    ]
    self.next = 0

  def start(self) -> dict[str, Any]:
    """Builds the trainer, scores the reference, and takes the first step.

    Returns:
      The answer of `run`, with "first_step_s" and "reference_s".
    """
    began = time.monotonic()
    self.trainer = self._build_trainer()
    if self.options.reference == "cached":
      self._score_reference()
    reference_s = time.monotonic() - began
    self._prepare_model()
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

  def _prepare_model(self) -> None:
    """Prepares the model as TRL's `train` would, which is not called."""
    options = self.options
    trainer = self.trainer
    if options.liger:
      # As TRL asks for them: without the loss that replaces its own head.
      liger.apply_liger_kernel(
        trainer.model, {"fused_linear_cross_entropy": False}
      )
    if options.recompute:
      trainer.model.gradient_checkpointing_enable({"use_reentrant": False})
    self.model = trainer.accelerator.prepare_model(trainer.model)
    self.model.train()
    self.pairs_at_once = options.pairs_at_once or self.work["batch_size"]
    trainer.current_gradient_accumulation_steps = -(
      -self.work["batch_size"] // self.pairs_at_once
    )

  def _load(self) -> transformers.PreTrainedModel:
    options = self.options
    auto = transformers.AutoModelForCausalLM
    dtype = getattr(torch, options.weights_dtype)
    if not options.random_weights:
      return auto.from_pretrained(options.model, dtype=dtype)
    config = transformers.AutoConfig.from_pretrained(options.model)
    with torch.device(options.device):
      return auto.from_config(config, dtype=dtype, attn_implementation="sdpa")

  def _reference(self) -> transformers.PreTrainedModel | None:
    """Returns a reference model; None if the trainer is to load it from files.

    A frozen one is loaded. Otherwise random weights have no files, and the
    model is a small one whose log-probs are not used.
    """
    if self.options.reference == "frozen":
      return self._load()
    if not self.options.random_weights:
      return None
    # DPOTrainer wants one where there are no files; log-probs replace it.
    config = transformers.AutoConfig.from_pretrained(self.options.model)
    config.update(_SMALL)
    return transformers.AutoModelForCausalLM.from_config(config)

  def _build_trainer(self) -> trl.DPOTrainer:
    options, work = self.options, self.work
    model = self._load()
    if options.head == "scored":
      # TRL projects only response positions if it has Triton; enable it here.
      trl.trainer.utils._use_triton = lambda device: True
    arguments = trl.DPOConfig(
      output_dir=f"{options.model}/trl",
      beta=work["beta"],
      per_device_train_batch_size=work["batch_size"],
      max_length=None,
      gradient_checkpointing=False,
      bf16=options.autocast,
      use_cpu=options.device == "cpu",
      report_to=[],
      disable_dropout=True,
      dataloader_pin_memory=False,
    )
    # Text and tokenizer are placeholders: training reads ids of the workload.
    trainer = trl.DPOTrainer(
      model=model,
      ref_model=self._reference(),
      args=arguments,
      train_dataset=_placeholder(),
      processing_class=_tokenizer(),
    )
    if options.reference == "given":
      trainer.ref_model, trainer.precompute_ref_logps = None, True
    return trainer

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
    """Takes steps, and returns their time, work and metrics.

    Returns:
      The answer of `Stopwatch.stop`, with "loss" and "grad_norm" of the last
      step, mean "padding" and "versions"; on a GPU also "peak_device_gib".
    """
    work, size = self.work, self.pairs_at_once
    losses, padding = [], []
    steps = range(self.next, self.next + num_steps)
    watch = interleave.Stopwatch(work, steps)
    for step in steps:
      examples = [self.examples[i] for i in work["order"][step]]
      for first in range(0, len(examples), size):
        batch = self.trainer.data_collator(examples[first : first + size])
        padding.append(1.0 - batch["attention_mask"].float().mean().item())
        losses.append(self.trainer.training_step(self.model, batch))
      norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1e9)
      self.optimizer.step()
      self.optimizer.zero_grad(set_to_none=True)
    self.next += num_steps
    parts = self.trainer.current_gradient_accumulation_steps
    metrics = {
      "loss": sum(loss.item() for loss in losses[-parts:]),
      "grad_norm": norm.item(),
    }
    if self.options.device != "cpu":
      torch.cuda.synchronize()
      most = torch.cuda.max_memory_allocated()
      metrics["peak_device_gib"] = most / 2**30
    return watch.stop(
      padding=float(np.mean(padding)),
      **metrics,
      versions={
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "trl": trl.__version__,
      },
    )


_SMALL = {
  "hidden_size": 8,
  "intermediate_size": 8,
  "num_hidden_layers": 1,
  "num_attention_heads": 1,
  "num_key_value_heads": 1,
  "head_dim": 8,
}


def _placeholder() -> Any:
  import datasets

  return datasets.Dataset.from_list(
    [{"prompt": "a", "chosen": "b", "rejected": "c"}]
  )


def _tokenizer() -> Any:
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
  parser.add_argument(
    "--reference",
    default="cached",
    choices=("cached", "frozen", "given"),
    help="given: log-probs of zero that nothing computes",
  )
  parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
  parser.add_argument(
    "--random_weights", action="store_true", help="need config.json alone"
  )
  parser.add_argument(
    "--weights_dtype",
    default="float32",
    choices=("float32", "bfloat16"),
    help="of weights, gradients and moments",
  )
  parser.add_argument(
    "--autocast", action="store_true", help="compute in bfloat16"
  )
  parser.add_argument("--liger", action="store_true")
  parser.add_argument(
    "--recompute", action="store_true", help="checkpoint each layer"
  )
  parser.add_argument(
    "--pairs_at_once", type=int, default=0, help="0: the whole batch"
  )
  parser.add_argument(
    "--head",
    default="all",
    choices=("all", "scored"),
    help="positions that are projected to the vocabulary; all: unpatched TRL",
  )
  interleave.serve(Trainer(parser.parse_args(sys.argv[1:])))


if __name__ == "__main__":
  main()
