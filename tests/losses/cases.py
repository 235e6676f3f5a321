"""Losses and knobs that the tests go through, and batches as plain lists."""

import numpy as np

from dpo_jax.losses import CATALOGUE

NAMES = sorted(CATALOGUE)
WIDTH = {"first": 1, "single": 1, "pair": 2, "ranking": 4, "samples": 3}
# Knobs other than the defaults, each with a formula of its own.
VARIANTS = [(name, {}) for name in NAMES] + [
  ("ipo", {"length_normalize": True}),
  ("sft", {"per_sequence": True}),
  ("cpo", {"sft_per_token": True}),
  ("slic", {"sft_per_token": True}),
  ("unlikelihood", {"token_level": True}),
  ("alphapo", {"alpha": -0.25}),
  ("kto", {"desirable_weight": 1.3, "undesirable_weight": 0.4}),
  ("f_dpo", {"divergence": "forward_kl"}),
  ("f_dpo", {"divergence": "jensen_shannon"}),
  ("f_dpo", {"divergence": "alpha", "alpha": 0.3}),
  ("aot", {"label_smoothing": 0.2}),
  ("reward_aware", {"distance": "squared", "score_scale": 0.7}),
  ("reward_aware", {"distance": "forward_kl", "score_scale": 0.7}),
  ("reward_model", {"margin_weight": 0.7, "center_weight": 0.01}),
]


# Keys of the oracles by field of Sequences.
KEYS = {
  "logps": "lp",
  "ref_logps": "ref",
  "num_tokens": "n",
  "score": "score",
  "head_logps": "head",
  "ref_head_logps": "ref_head",
  "sampled_logps": "sampled",
  "ref_sampled_logps": "ref_sampled",
  "mismatched_logps": "other_lp",
  "mismatched_ref_logps": "other_ref",
  "complement_logps": "complement",
  "alignment": "alignment",
  "kl": "kl",
  "values": "values",
  "old_logps": "old_lp",
  "token_mask": "mask",
  "token_logps": "tokens",
  "old_token_logps": "old_tokens",
  "token_values": "token_values",
  "old_token_values": "old_values",
  "advantages": "advantages",
  "returns": "returns",
}


def as_groups(sequences):
  """Returns sequences as float64 lists by group, for the oracles."""
  num = sequences.logps.shape[0]
  return [
    {
      key: np.asarray(getattr(sequences, field), np.float64)[i].tolist()
      for field, key in KEYS.items()
    }
    for i in range(num)
  ]
