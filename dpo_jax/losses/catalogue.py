"""The table of losses: a variant is a row of data.

A row is a reward of a response, a link over the group, and regularizers. To
add a loss, write what is new of these as a pure function and add a row:
configs, the strict check of knobs, the tests of the catalogue and
docs/losses.md read this table, so the row is all that it takes.
"""

from collections.abc import Callable, Mapping
import dataclasses
import inspect
from typing import Any

from dpo_jax.losses import regularizers
from dpo_jax.losses.knobs import Knob
from dpo_jax.losses.links import LINKS, Link
from dpo_jax.losses.rewards import REWARDS, Reward

GROUPS = ("first", "single", "pair", "ranking", "samples")


@dataclasses.dataclass(frozen=True)
class Loss:
  """One row: reward of a response -> link over the group + regularizers.

  Attributes:
    name: what a config calls it.
    reward: name in `rewards.REWARDS`.
    link: name in `links.LINKS`.
    defaults: a value for every knob.
    formula: for the documentation.
    paper: source.
    regularizers: functions that are added.
    group: what a group must be: "first" (only slot 0 is read, so only slot 0
      is packed), "single" (K = 1 with a label), "pair" (K = 2, slot 0
      chosen), "ranking" (best first), or "samples" (of the policy, in any
      order, with their rewards as scores).
    scale: knob that multiplies the reward in the metrics `reward/*`.
    is_per_token: whether the mean is over tokens, unless the knob
      `per_sequence` says otherwise.
    conditions: (what, knob, value): the knob or field `what` is read only
      where `knob` has that value.
    ranges: knobs whose range is narrower here than in KNOBS.
    peers: the same thing elsewhere, and where it differs.
  """

  name: str
  reward: str
  link: str
  defaults: Mapping[str, Any]
  formula: str
  paper: str
  regularizers: tuple[Callable[..., Any], ...] = ()
  group: str = "pair"
  scale: str | None = "beta"
  is_per_token: bool = False
  conditions: tuple[tuple[str, str, Any], ...] = ()
  ranges: Mapping[str, Knob] = dataclasses.field(default_factory=dict)
  peers: str = ""

  @property
  def reward_row(self) -> Reward:
    return REWARDS[self.reward]

  @property
  def link_row(self) -> Link:
    return LINKS[self.link]

  @property
  def functions(self) -> tuple[Callable[..., Any], ...]:
    first = (self.reward_row.function, self.link_row.function)
    return first + self.regularizers

  @property
  def knobs(self) -> tuple[str, ...]:
    """Names of the hyper-parameters that this loss reads, sorted."""
    return tuple(sorted({k for f in self.functions for k in knobs_of(f)}))

  def needs(self, knobs: Mapping[str, Any]) -> frozenset[str]:
    """Optional fields of `Sequences` that this loss reads with these knobs."""
    fields = self.reward_row.needs | self.link_row.needs
    if regularizers.calibration in self.regularizers:
      fields |= {"ref_logps"}
    return frozenset(f for f in fields if self.is_read(f, knobs))

  def is_read(self, what: str, knobs: Mapping[str, Any]) -> bool:
    """Whether a knob or a field is read, given the other knobs."""
    return all(
      knobs[knob] == value
      for name, knob, value in self.conditions
      if name == what
    )


def knobs_of(function: Callable[..., Any]) -> tuple[str, ...]:
  """Names of a function's keyword-only parameters."""
  parameters = inspect.signature(function).parameters.values()
  return tuple(p.name for p in parameters if p.kind is p.KEYWORD_ONLY)


_LOG_RATIO = "log_ratio"
_SUM_OR_MEAN = (
  "The paper's sum is larger than the mean over tokens by the mean length of a"
  " chosen response: 40 times on 1,149 pairs of Anthropic's harmless-base with"
  " GPT-2's tokenizer, 87 times with a vocabulary of 512. The sum then decides"
  " the gradient, and the margin hardly counts"
)
_ROWS = (
  Loss(
    "dpo",
    _LOG_RATIO,
    "logistic",
    dict(beta=0.1),
    "-log s(beta D)",
    "Rafailov et al. 2023, arXiv:2305.18290, eq. 7",
    peers="TRL, EasyDeL `sigmoid`; TRL's ignores label smoothing silently",
  ),
  Loss(
    "cdpo",
    _LOG_RATIO,
    "smoothed_logistic",
    dict(beta=0.1, label_smoothing=0.1),
    "-(1 - e) log s(beta D) - e log s(-beta D)",
    "Mitchell 2023, A note on DPO with noisy preferences, eq. 3",
    peers="EasyDeL calls it `kto`; gone from TRL",
  ),
  Loss(
    "robust_dpo",
    _LOG_RATIO,
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
    peers="TRL, EasyDeL, HALOs take means over tokens (length_normalize=True);"
    " the DPO repository and OpenRLHF take sums; tau is their beta",
  ),
  Loss(
    "hinge",
    _LOG_RATIO,
    "hinge",
    dict(beta=0.1),
    "max(0, 1 - beta D)",
    "Liu et al. 2023 (RSO), arXiv:2309.06657",
    peers="TRL, EasyDeL `hinge`",
  ),
  Loss(
    "slic",
    "logps",
    "shifted_hinge",
    dict(delta=1.0, sft_weight=0.1, sft_per_token=False),
    "max(0, delta - lp_w + lp_l) - lambda lp_w",
    "Zhao et al. 2023, arXiv:2305.10425",
    regularizers=(regularizers.likelihood,),
    scale=None,
    peers=f"HALOs `slic` adds [B] to [B, T]. {_SUM_OR_MEAN}",
  ),
  Loss(
    "simpo",
    "mean_logps",
    "shifted_logistic",
    dict(beta=2.0, gamma_over_beta=0.5),
    "-log s(beta (lp_w / n_w - lp_l / n_l) - gamma)",
    "Meng et al. 2024, arXiv:2405.14734",
    peers="TRL, EasyDeL take gamma itself; TRL's cpo_alpha must be 0",
  ),
  Loss(
    "alphapo",
    "power_mean_prob",
    "shifted_logistic",
    dict(beta=2.0, gamma_over_beta=0.5, alpha=0.25),
    "SimPO on the reward (1 - p^-alpha) / alpha",
    "Gupta et al. 2025, arXiv:2501.03884",
    peers="TRL CPO `alpha`",
  ),
  Loss(
    "cpo",
    "logps",
    "logistic",
    dict(beta=0.1, sft_weight=1.0, sft_per_token=False),
    "-log s(beta (lp_w - lp_l)) - lambda lp_w",
    "Xu et al. 2024, arXiv:2401.08417",
    regularizers=(regularizers.likelihood,),
    peers="TRL and EasyDeL take the NLL's mean over tokens, as"
    f" `sft_per_token=True` does. {_SUM_OR_MEAN}",
  ),
  Loss(
    "orpo",
    "log_odds",
    "weighted_logistic",
    dict(odds_ratio_weight=0.1),
    "-lp_w / n_w - lambda log s(logit p_w - logit p_l)",
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
    "DPO on lp = sum up to the shorter length + alpha * the rest",
    "Liu et al. 2024, arXiv:2409.06411",
    ranges={"alpha": Knob(float, "weight of the rest", low=0, high=1)},
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
    "odpo",
    _LOG_RATIO,
    "offset_logistic",
    dict(beta=0.1, alpha=1.0),
    "-log s(beta D - alpha log(score_w - score_l))",
    "Amini et al. 2024, arXiv:2402.10571",
  ),
  Loss(
    "dpop",
    _LOG_RATIO,
    "positive_logistic",
    dict(beta=0.1, penalty_weight=5.0),
    "-log s(beta (D - lambda max(0, -r_w)))",
    "Pal et al. 2024, arXiv:2402.13228",
  ),
  Loss(
    "rpo",
    _LOG_RATIO,
    "logistic",
    dict(beta=0.1, sft_weight=1.0),
    "-log s(beta D) - alpha lp_w / n_w",
    "Pang et al. 2024, arXiv:2404.19733",
    regularizers=(regularizers.mean_likelihood,),
    peers="EasyDeL `rpo_alpha` is never read; TRL pools over the micro-batch",
  ),
  Loss(
    "cal_dpo",
    _LOG_RATIO,
    "unscaled_logistic",
    dict(beta=0.002),
    "-log s(D) + [(r_w - 1/(2 beta))^2 + (r_l + 1/(2 beta))^2] / 2",
    "Xiao et al. 2024, arXiv:2412.14516; formula and beta of the authors' code"
    " (tengxiao1/Cal-DPO), whose first term has no beta",
    regularizers=(regularizers.calibration,),
  ),
  Loss(
    "beta_dpo",
    _LOG_RATIO,
    "dynamic_logistic",
    dict(beta=0.1, alpha=0.6),
    "DPO with beta (1 + alpha (M - M0)), M the batch's mean beta D",
    "Wu et al. 2024, arXiv:2407.08639",
  ),
  Loss(
    "dpo_shift",
    _LOG_RATIO,
    "shifted_reward_logistic",
    dict(beta=0.1, shift=0.75),
    "-log s(beta r_w - lambda beta r_l)",
    "Yang et al. 2025, arXiv:2502.07599",
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
    _LOG_RATIO,
    "exact",
    dict(beta=0.1, label_smoothing=0.001),
    "s(z) [log s(z) - log(1 - e)] + s(-z) [log s(-z) - log e], z = beta D",
    "Ji et al. 2024, arXiv:2402.00856",
    ranges={
      "label_smoothing": Knob(
        float,
        "smoothing of the label; 0 is an infinite loss",
        low=0,
        above=True,
        high=0.5,
        below=True,
      )
    },
    peers="TRL `exo_pair`; EasyDeL's breaks under jit",
  ),
  Loss(
    "nca",
    _LOG_RATIO,
    "noise_contrastive",
    dict(beta=0.1),
    "-log s(b r_w) - 1/2 log s(-b r_w) - 1/2 log s(-b r_l)",
    "Chen et al. 2024, arXiv:2402.05369",
    peers="TRL, EasyDeL `nca_pair`",
  ),
  Loss(
    "bco_pair",
    _LOG_RATIO,
    "binary_pair",
    dict(beta=0.1),
    "-log s(b r_w - d) - log s(-(b r_l - d)), d a running mean",
    "Jung et al. 2024, arXiv:2404.04656",
    peers="TRL's DPO has d = 0, EasyDeL the batch's mean with its gradient",
  ),
  Loss(
    "sppo_hard",
    _LOG_RATIO,
    "two_squares",
    dict(beta=0.001),
    "(r_w - 1/(2 beta))^2 + (r_l + 1/(2 beta))^2",
    "Wu et al. 2024, arXiv:2405.00675",
    peers="TRL, EasyDeL `sppo_hard`",
  ),
  Loss(
    "aot",
    _LOG_RATIO,
    "optimal_transport",
    dict(beta=0.1, label_smoothing=0.0),
    "cDPO on sort(lp_w - lp_l) - sort(ref_w - ref_l)",
    "Melnyk et al. 2024, arXiv:2406.05882",
    peers="TRL `aot`; sorted within a micro-batch there",
  ),
  Loss(
    "aot_unpaired",
    _LOG_RATIO,
    "unpaired_optimal_transport",
    dict(beta=0.1, label_smoothing=0.0),
    "cDPO on sort(r_w) - sort(r_l)",
    "Melnyk et al. 2024, arXiv:2406.05882",
    peers="TRL `aot_unpaired`; EasyDeL calls it `aot_pair`",
  ),
  Loss(
    "apo_zero",
    _LOG_RATIO,
    "anchored_zero",
    dict(beta=0.1),
    "1 - s(b r_w) + s(b r_l)",
    "D'Oosterlinck et al. 2024, arXiv:2408.06266",
    peers="TRL, EasyDeL `apo_zero`",
  ),
  Loss(
    "apo_down",
    _LOG_RATIO,
    "anchored_down",
    dict(beta=0.1),
    "s(b r_w) + 1 - s(b D)",
    "D'Oosterlinck et al. 2024, arXiv:2408.06266",
    peers="TRL, EasyDeL `apo_down`",
  ),
  Loss(
    "discopop",
    _LOG_RATIO,
    "discovered",
    dict(beta=0.05, tau=0.05),
    "(1 - m)(-log s(z)) + m exp(-z), m = s(z / tau), z = beta D",
    "Lu et al. 2024, arXiv:2406.08414",
    peers="EasyDeL's tau is stuck at 1; both overflow at z = -100",
  ),
  Loss(
    "gpo_exponential",
    _LOG_RATIO,
    "exponential",
    dict(beta=0.1),
    "exp(-beta D)",
    "Tang et al. 2024, arXiv:2402.05749",
  ),
  Loss(
    "tdpo",
    _LOG_RATIO,
    "token_level_logistic",
    dict(beta=0.1, alpha=0.5),
    "-log s(b D - b alpha (KL_l - sg KL_w))",
    "Zeng et al. 2024, arXiv:2404.11999 (TDPO2)",
  ),
  Loss(
    "wpo",
    _LOG_RATIO,
    "weighted_policy_logistic",
    dict(beta=0.01),
    "-sg(w_w w_l) log s(beta D)",
    "Zhou et al. 2024, arXiv:2406.11827",
    peers="TRL `use_weighting`; open-instruct keeps gradients and clamps",
  ),
  Loss(
    "chi_po",
    "chi_squared",
    "clipped_logistic",
    dict(beta=0.05, clip=1.0),
    "-log s(clip(beta (phi_w - phi_l), -2R, 2R)), phi = u + log u",
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
        float, "of the alpha-divergence", low=0, above=True, high=1, below=True
      )
    },
    peers="TRL `f_divergence_type`, whose alpha is 1 - ours",
  ),
  Loss(
    "unlikelihood",
    "logps",
    "unlikely",
    dict(alpha=0.5, token_level=False),
    "-lp_w + alpha lp_l",
    "Rafailov et al. 2023, arXiv:2305.18290, sec. 6; Welleck et al. 2019,"
    " arXiv:1908.04319 (token_level)",
    scale=None,
    conditions=(("complement_logps", "token_level", True),),
  ),
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
    _LOG_RATIO,
    "kahneman_tversky",
    dict(beta=0.1, desirable_weight=1.0, undesirable_weight=1.0),
    "lam_D (1 - s(b r - z)), or lam_U (1 - s(z - b r)), z over mismatches",
    "Ethayarajh et al. 2024, arXiv:2402.01306",
    group="single",
    peers="z over the global batch; per micro-batch in TRL. EasyDeL's `kto` is"
    " cDPO",
  ),
  Loss(
    "bco",
    _LOG_RATIO,
    "binary",
    dict(beta=0.1),
    "-log s(b r - d), or -log s(-(b r - d)); d from running means",
    "Jung et al. 2024, arXiv:2404.04656",
    group="single",
    peers="TRL has no BCO trainer any more (1.16)",
  ),
  Loss(
    "apo_zero_unpaired",
    _LOG_RATIO,
    "anchored_unpaired",
    dict(beta=0.1),
    "1 - s(b r), or s(b r)",
    "D'Oosterlinck et al. 2024, arXiv:2408.06266",
    group="single",
    peers="TRL's KTO trainer has it",
  ),
  Loss(
    "plackett_luce",
    _LOG_RATIO,
    "plackett_luce",
    dict(beta=0.1),
    "-sum_k [b r_k - logsumexp_{j >= k} b r_j]",
    "Rafailov et al. 2023, arXiv:2305.18290, app. A.3",
    group="ranking",
  ),
  Loss(
    "reward_model",
    "values",
    "bradley_terry",
    dict(),
    "-log s(v_w - v_l); K > 2 by Plackett-Luce",
    "Rafailov et al. 2023, arXiv:2305.18290, eq. 2",
    group="ranking",
    scale=None,
  ),
  Loss(
    "ppo",
    "logps",
    "clipped_policy_gradient",
    dict(clip=0.2, value_clip=0.2, value_weight=0.1),
    "-min(ratio A, clip(ratio) A) + value_weight (V - R)^2 / 2, per token",
    "Schulman et al. 2017, arXiv:1707.06347; Ziegler et al. 2019,"
    " arXiv:1909.08593",
    group="samples",
    scale=None,
    is_per_token=True,
    peers="TRL's PPO trainer, whose vf_coef is value_weight",
  ),
  Loss(
    "reinforce",
    "logps",
    "leave_one_out",
    dict(clip=0.2),
    "-min(u A, clip(u, 1 - clip, 1 + clip) A), the mean over the samples; u ="
    " pi / pi_old, A = R - mean of the siblings' R",
    "Ahmadian et al. 2024, arXiv:2402.14740 (RLOO)",
    group="samples",
    scale=None,
    peers="TRL's RLOO trainer, whose epsilon is clip",
  ),
)
CATALOGUE: dict[str, Loss] = {row.name: row for row in _ROWS}
