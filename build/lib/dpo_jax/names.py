"""Suggests names in errors."""

from collections.abc import Iterable
import difflib

# Names of TRL (docs/from_trl.md has them too), transformers, open-instruct,
# OpenRLHF, SimPO and the DPO repository -> ours. Keys are those of a config.
PEERS: dict[str, str] = {
  # Losses.
  "bco": "bco_pair",
  "conservative": "cdpo",
  "dpo_norm": "length_normalized_dpo",
  "exo_pair": "exo",
  "f_divergence_type": "f_dpo",
  "kto_pair": "kto",
  "ld_alpha": "ld_dpo",
  "nca_pair": "nca",
  "rdpo": "r_dpo",
  "robust": "robust_dpo",
  "sigmoid": "dpo",
  "sigmoid_norm": "length_normalized_dpo",
  "use_weighting": "wpo",
  # Their hyper-parameters.
  "beta": "loss.beta",
  "center_rewards_coefficient": "loss.center_weight",
  "cpo_alpha": "loss.sft_weight",
  "discopop_tau": "loss.tau",
  "gamma": "loss.gamma_over_beta",
  "gamma_beta_ratio": "loss.gamma_over_beta",
  "label_smoothing": "loss.label_smoothing",
  "loss_type": "loss.name",
  "nll_loss_coef": "loss.sft_weight",
  "rpo_alpha": "loss.sft_weight",
  "simpo_gamma": "loss.gamma_over_beta",
  # Model and data.
  "chat_template": "data.chat_template",
  "dataset": "data.source",
  "dataset_mixer": "data.sources",
  "dataset_name": "data.source",
  "eval_dataset": "data.eval_sources",
  "lora_alpha": "lora.alpha",
  "lora_r": "lora.rank",
  "max_length": "data.max_tokens",
  "max_prompt_length": "data.max_prompt_tokens",
  "max_seq_length": "data.max_tokens",
  "model": "policy.init",
  "model_name_or_path": "policy.init",
  "padding_free": "data.layout",
  "r": "lora.rank",
  "ref_model": "reference.init",
  "target_modules": "lora.targets",
  "train_dataset": "data.source",
  "truncation_mode": "data.max_prompt_tokens",
  "use_rslora": "lora.rank_stabilized",
  # Training.
  "activation_offloading": "policy.remat",
  "adam_beta1": "optimizer.b1",
  "adam_beta2": "optimizer.b2",
  "adam_epsilon": "optimizer.epsilon",
  "bf16": "policy.compute_dtype",
  "compute_metrics": "eval.losses",
  "eval_steps": "eval.every_steps",
  "fsdp": "mesh.fsdp",
  "fsdp_config": "mesh.fsdp",
  "gradient_accumulation_steps": "accumulation_steps",
  "gradient_checkpointing": "policy.remat",
  "learning_rate": "optimizer.learning_rate",
  "logging_steps": "log.every_steps",
  "lr": "optimizer.learning_rate",
  "lr_scheduler_type": "optimizer.schedule",
  "max_grad_norm": "optimizer.max_grad_norm",
  "max_steps": "total_steps",
  "metric_for_best_model": "checkpoint.best_metric",
  "n_epochs": "epochs",
  "num_train_epochs": "epochs",
  "optim": "optimizer.name",
  "per_device_train_batch_size": "batch_size",
  "precompute_ref_batch_size": "eval.batch_size",
  "precompute_ref_log_probs": "reference.kind",
  "ref_model_mixup_alpha": "reference.alpha",
  "ref_model_sync_steps": "reference.every_steps",
  "report_to": "log.trackers",
  "save_steps": "checkpoint.every_steps",
  "save_total_limit": "checkpoint.keep",
  "sync_ref_model": "reference.kind",
  "warmup_ratio": "optimizer.warmup_steps",
  "warmup_steps": "optimizer.warmup_steps",
  "weight_decay": "optimizer.weight_decay",
}


def did_you_mean(name: str, known: Iterable[str]) -> str:
  """Returns ' Did you mean 'x'?' for the nearest known name, or ''.

  Args:
    name: name that is not known, perhaps with the key it is under.
    known: known names. A peer's word for one of them is nearer than its
      spelling.
  """
  known = list(known)
  ours = PEERS.get(name.rpartition(".")[2], "")
  nearest = [x for x in (ours, ours.removeprefix("loss.")) if x in known]
  nearest = nearest or difflib.get_close_matches(name, known, n=1)
  return f" Did you mean {nearest[0]!r}?" if nearest else ""
