"""Losses of single responses: with a label, or as demonstrations."""

from dpo_jax.losses.catalogue.row import Loss

ROWS: tuple[Loss, ...] = (
  Loss(
    "sft",
    "summed_or_mean_logps",
    "negative",
    dict(per_sequence=False),
    "-lp, per token of the global batch",
    "maximum likelihood",
    group="first",
    scale=None,
    is_per_token=True,
  ),
  Loss(
    "preferred_ft",
    "summed_or_mean_logps",
    "negative",
    dict(per_sequence=False),
    "-lp_w, per token of the global batch",
    "Rafailov et al. 2023, arXiv:2305.18290, sec. 6",
    group="first",
    scale=None,
    is_per_token=True,
  ),
  Loss(
    "kto",
    "log_ratio",
    "kahneman_tversky",
    dict(beta=0.1, desirable_weight=1.0, undesirable_weight=1.0),
    "desirable_weight (1 - s(beta r - z)) or undesirable_weight (1 - s(z - beta"
    " r)); z the batch's mean of beta r over mismatched responses, at least 0",
    "Ethayarajh et al. 2024, arXiv:2402.01306",
    group="single",
    peers="z over the global batch; per microbatch in TRL. EasyDeL's `kto` is"
    " cDPO",
  ),
  Loss(
    "bco",
    "log_ratio",
    "binary",
    dict(beta=0.1),
    "-log s(beta r - d) or -log s(-(beta r - d)); d halfway between the labels'"
    " running means of beta r",
    "Jung et al. 2024, arXiv:2404.04656",
    group="single",
    peers="TRL 1.16 has no BCO trainer",
  ),
  Loss(
    "apo_zero_unpaired",
    "log_ratio",
    "anchored_unpaired",
    dict(beta=0.1),
    "1 - s(beta r) or s(beta r)",
    "D'Oosterlinck et al. 2024, arXiv:2408.06266",
    group="single",
    peers="TRL's KTO trainer has it",
  ),
)
