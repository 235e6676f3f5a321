"""Losses of pairs that are a function of the margin of two rewards."""

from dpo_jax.losses import regularizers
from dpo_jax.losses.catalogue.row import Loss
from dpo_jax.losses.knobs import Knob

_SUM_OR_MEAN = (
  "The paper's sum is larger than the mean over tokens by a factor of the mean"
  " length of a chosen response: 40 on 1,149 pairs of Anthropic's harmless-base"
  " with GPT-2's tokenizer, 87 with a vocabulary of 512. The sum then dominates"
  " the gradient of the margin"
)

ROWS: tuple[Loss, ...] = (
  Loss(
    "dpo",
    "log_ratio",
    "logistic",
    dict(beta=0.1),
    "-log s(beta D)",
    "Rafailov et al. 2023, arXiv:2305.18290, eq. 7",
    peers="TRL, EasyDeL `sigmoid`; TRL's ignores label smoothing silently",
  ),
  Loss(
    "cdpo",
    "log_ratio",
    "smoothed_logistic",
    dict(beta=0.1, label_smoothing=0.1),
    "-(1 - e) log s(beta D) - e log s(-beta D)",
    "Mitchell 2023, A note on DPO with noisy preferences, eq. 3",
    peers="EasyDeL calls it `kto`; gone from TRL",
  ),
  Loss(
    "robust_dpo",
    "log_ratio",
    "robust_logistic",
    dict(beta=0.1, label_smoothing=0.1),
    "[-(1 - e) log s(beta D) + e log s(-beta D)] / (1 - 2e)",
    "Chowdhury et al. 2024, arXiv:2403.00409",
    peers="TRL, EasyDeL `robust`",
  ),
  Loss(
    "ipo",
    "summed_or_mean_log_ratio",
    "squared",
    dict(tau=0.1, length_normalize=False),
    "(D - 1 / (2 tau))^2",
    "Azar et al. 2023, arXiv:2310.12036, eq. 17",
    scale="tau",
    conditions=(("num_tokens", "length_normalize", True),),
    peers="TRL, EasyDeL, HALOs take means over tokens (length_normalize=True);"
    " the DPO repository and OpenRLHF take sums; tau is their beta",
  ),
  Loss(
    "hinge",
    "log_ratio",
    "hinge",
    dict(beta=0.1),
    "max(0, 1 - beta D)",
    "Liu et al. 2023 (RSO), arXiv:2309.06657; gamma there is beta here",
    peers="TRL, EasyDeL `hinge`",
  ),
  Loss(
    "slic",
    "logps",
    "shifted_hinge",
    dict(delta=1.0, sft_weight=0.1, sft_per_token=False),
    "max(0, delta - lp_w + lp_l) - sft_weight lp_w",
    "Zhao et al. 2023, arXiv:2305.10425",
    regularizers=(regularizers.likelihood,),
    scale=None,
    conditions=(("num_tokens", "sft_per_token", True),),
    peers=f"HALOs `slic` adds [B] to [B, T]. {_SUM_OR_MEAN}",
  ),
  Loss(
    "simpo",
    "mean_logps",
    "shifted_logistic",
    dict(beta=2.0, gamma_over_beta=0.5),
    "-log s(beta (lp_w / n_w - lp_l / n_l - gamma_over_beta))",
    "Meng et al. 2024, arXiv:2405.14734",
    peers="TRL, EasyDeL take gamma itself; TRL's cpo_alpha must be 0",
  ),
  Loss(
    "alphapo",
    "power_mean_prob",
    "shifted_logistic",
    dict(beta=2.0, gamma_over_beta=0.5, alpha=0.25),
    "SimPO on the reward (1 - p^-alpha) / alpha, p = exp(lp / n)",
    "Gupta et al. 2025, arXiv:2501.03884",
    peers="TRL CPO `alpha`",
  ),
  Loss(
    "cpo",
    "logps",
    "logistic",
    dict(beta=0.1, sft_weight=1.0, sft_per_token=False),
    "-log s(beta (lp_w - lp_l)) - sft_weight lp_w",
    "Xu et al. 2024, arXiv:2401.08417",
    regularizers=(regularizers.likelihood,),
    conditions=(("num_tokens", "sft_per_token", True),),
    peers="TRL and EasyDeL take the NLL's mean over tokens, as"
    f" `sft_per_token=True` does. {_SUM_OR_MEAN}",
  ),
  Loss(
    "orpo",
    "log_odds",
    "weighted_logistic",
    dict(odds_ratio_weight=0.1),
    "-lp_w / n_w - odds_ratio_weight log s(logit p_w - logit p_l),"
    " p = exp(lp / n)",
    "Hong et al. 2024, arXiv:2403.07691",
    regularizers=(regularizers.mean_nll,),
    scale=None,
    peers="TRL's NLL covers the prompt too and pools tokens; EasyDeL's is -inf"
    " at a log-odds ratio of -120",
  ),
  Loss(
    "length_normalized_dpo",
    "mean_log_ratio",
    "logistic",
    dict(beta=5.0),
    "-log s(beta (r_w / n_w - r_l / n_l))",
    "Lambert et al. 2024 (Tulu 3), arXiv:2411.15124",
    peers="TRL `sigmoid_norm`, open-instruct `dpo_norm`",
  ),
  Loss(
    "r_dpo",
    "penalized_log_ratio",
    "logistic",
    dict(beta=0.1, alpha=0.01),
    "-log s(beta D + alpha (n_w - n_l))",
    "Park et al. 2024, arXiv:2403.19159",
    peers="some later papers print the other sign",
  ),
  Loss(
    "ld_dpo",
    "desensitized_log_ratio",
    "logistic",
    dict(beta=0.1, alpha=0.5),
    "DPO on lp = sum over the first min(n_w, n_l) tokens + alpha times the"
    " sum over the rest",
    "Liu et al. 2024, arXiv:2409.06411",
    ranges={
      "alpha": Knob(
        float, "weight of the tokens beyond the shorter length", low=0, high=1
      )
    },
    peers="TRL `ld_alpha`",
  ),
  Loss(
    "sampo",
    "sampled_log_ratio",
    "logistic",
    dict(beta=0.1),
    "DPO on min(n_w, n_l) tokens drawn from each response",
    "Lu et al. 2024, arXiv:2406.10957",
  ),
  Loss(
    "rpo",
    "log_ratio",
    "logistic",
    dict(beta=0.1, sft_weight=1.0),
    "-log s(beta D) - sft_weight lp_w / n_w",
    "Pang et al. 2024, arXiv:2404.19733",
    regularizers=(regularizers.mean_likelihood,),
    peers="EasyDeL `rpo_alpha` is never read; TRL pools over the microbatch",
  ),
  Loss(
    "cal_dpo",
    "log_ratio",
    "unscaled_logistic",
    dict(beta=0.002),
    "-log s(D) + [(r_w - 1/(2 beta))^2 + (r_l + 1/(2 beta))^2] / 2",
    "Xiao et al. 2024, arXiv:2412.14516; formula and beta of the authors' code"
    " (tengxiao1/Cal-DPO), whose first term has no beta",
    regularizers=(regularizers.calibration,),
  ),
  Loss(
    "simper",
    "mean_prob",
    "linear",
    dict(),
    "-exp(lp_w / n_w) + exp(lp_l / n_l)",
    "Xiao et al. 2025, arXiv:2502.00883",
    scale=None,
  ),
  Loss(
    "exo",
    "log_ratio",
    "exact",
    dict(beta=0.1, label_smoothing=0.001),
    "s(z) [log s(z) - log(1 - e)] + s(-z) [log s(-z) - log e], z = beta D",
    "Ji et al. 2024, arXiv:2402.00856",
    ranges={
      "label_smoothing": Knob(
        float,
        "smoothing of the label; 0 gives an infinite loss",
        low=0,
        above=True,
        high=0.5,
        below=True,
      )
    },
    peers="TRL `exo_pair`; EasyDeL's breaks under jit",
  ),
  Loss(
    "discopop",
    "log_ratio",
    "discovered",
    dict(beta=0.05, tau=0.05),
    "(1 - m)(-log s(z)) + m exp(-z), m = s(z / tau), z = beta D",
    "Lu et al. 2024, arXiv:2406.08414",
    peers="EasyDeL's tau is stuck at 1; both overflow at z = -100",
  ),
  Loss(
    "gpo_exponential",
    "log_ratio",
    "exponential",
    dict(beta=0.1),
    "exp(-beta D)",
    "Tang et al. 2024, arXiv:2402.05749",
  ),
  Loss(
    "chi_po",
    "chi_squared",
    "clipped_logistic",
    dict(beta=0.05, clip=1.0),
    "-log s(clip(beta (phi_w - phi_l), -2 clip, 2 clip)), phi = u + log u",
    "Huang et al. 2024, arXiv:2407.13399",
  ),
  Loss(
    "f_dpo",
    "f_divergence",
    "logistic",
    dict(beta=0.1, divergence="reverse_kl", alpha=0.5),
    "-log s(beta (f'(u_w) - f'(u_l)))",
    "Wang et al. 2023, arXiv:2309.16240",
    conditions=(("alpha", "divergence", "alpha"),),
    ranges={
      "alpha": Knob(
        float,
        "alpha of the alpha-divergence",
        low=0,
        above=True,
        high=1,
        below=True,
      )
    },
    peers="TRL `f_divergence_type`, whose alpha is 1 - ours",
  ),
)
