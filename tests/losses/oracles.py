"""Oracles: every loss as float64 loops, from the papers' formulas.

Nothing here uses dpo_jax. `groups` is a list of groups. A group is a dict of
lists over its responses: lp, ref, n, score and others that a loss reads.
"""

import math


def log_sigmoid(z):
  return -math.log1p(math.exp(-z)) if z > 0 else z - math.log1p(math.exp(z))


def sigmoid(z):
  return math.exp(log_sigmoid(z))


def ratio(group, k):
  return group["lp"][k] - group["ref"][k]


def margin(group):
  return ratio(group, 0) - ratio(group, 1)


def mean(group, k):
  return group["lp"][k] / group["n"][k]


def smoothed(z, e):
  return -(1 - e) * log_sigmoid(z) - e * log_sigmoid(-z)


def dpo(g, beta):
  return -log_sigmoid(beta * margin(g))


def cdpo(g, beta, label_smoothing):
  return smoothed(beta * margin(g), label_smoothing)


def robust_dpo(g, beta, label_smoothing):
  e, z = label_smoothing, beta * margin(g)
  return (-(1 - e) * log_sigmoid(z) + e * log_sigmoid(-z)) / (1 - 2 * e)


def ipo(g, tau, length_normalize):
  if length_normalize:
    h = ratio(g, 0) / g["n"][0] - ratio(g, 1) / g["n"][1]
  else:
    h = margin(g)
  return (h - 1 / (2 * tau)) ** 2


def hinge(g, beta):
  return max(0.0, 1 - beta * margin(g))


def slic(groups, delta, sft_weight, sft_per_token):
  margins = [max(0.0, delta - g["lp"][0] + g["lp"][1]) for g in groups]
  return with_nll(margins, groups, sft_weight, sft_per_token)


def with_nll(losses, groups, weight, per_token):
  """Adds the chosen responses' NLL: sums, or their mean over all tokens."""
  share = 1.0
  if per_token:
    share = len(groups) / sum(g["n"][0] for g in groups)
  return [
    x - weight * share * g["lp"][0] for x, g in zip(losses, groups, strict=True)
  ]


def simpo(g, beta, gamma_over_beta):
  gamma = gamma_over_beta * beta
  return -log_sigmoid(beta * (mean(g, 0) - mean(g, 1)) - gamma)


def alphapo(g, beta, gamma_over_beta, alpha):
  r = [(1 - math.exp(mean(g, k)) ** -alpha) / alpha for k in (0, 1)]
  return -log_sigmoid(beta * (r[0] - r[1]) - gamma_over_beta * beta)


def cpo(groups, beta, sft_weight, sft_per_token):
  margins = [-log_sigmoid(beta * (g["lp"][0] - g["lp"][1])) for g in groups]
  return with_nll(margins, groups, sft_weight, sft_per_token)


def orpo(g, odds_ratio_weight):
  p = [math.exp(mean(g, k)) for k in (0, 1)]
  odds = [math.log(x / (1 - x)) for x in p]
  return -mean(g, 0) - odds_ratio_weight * log_sigmoid(odds[0] - odds[1])


def length_normalized_dpo(g, beta):
  z = ratio(g, 0) / g["n"][0] - ratio(g, 1) / g["n"][1]
  return -log_sigmoid(beta * z)


def r_dpo(g, beta, alpha):
  return -log_sigmoid(beta * margin(g) + alpha * (g["n"][0] - g["n"][1]))


def ld_dpo(g, beta, alpha):
  r = []
  for k in (0, 1):
    head = g["head"][k] - g["ref_head"][k]
    r.append(head + alpha * (ratio(g, k) - head))
  return -log_sigmoid(beta * (r[0] - r[1]))


def sampo(g, beta):
  r = [g["sampled"][k] - g["ref_sampled"][k] for k in (0, 1)]
  return -log_sigmoid(beta * (r[0] - r[1]))


def odpo(g, beta, alpha):
  gap = g["score"][0] - g["score"][1]
  if gap <= 0:
    return 0.0
  return -log_sigmoid(beta * margin(g) - alpha * math.log(gap))


def reward_aware(g, beta, score_scale, distance):
  ours = beta * margin(g)
  wanted = score_scale * (g["score"][0] - g["score"][1])
  if distance == "squared":
    return (ours - wanted) ** 2
  p, q = (1 / (1 + math.exp(-x)) for x in (wanted, ours))
  if distance == "forward_kl":
    p, q = q, p
  return p * math.log(p / q) + (1 - p) * math.log((1 - p) / (1 - q))


def dpop(g, beta, penalty_weight):
  penalty = penalty_weight * max(0.0, -ratio(g, 0))
  return -log_sigmoid(beta * (margin(g) - penalty))


def rpo(g, beta, sft_weight):
  return dpo(g, beta) - sft_weight * mean(g, 0)


def cal_dpo(g, beta):
  return dpo(g, 1.0) + sppo_hard(g, beta) / 2


def dpo_shift(g, beta, shift):
  return -log_sigmoid(beta * ratio(g, 0) - shift * beta * ratio(g, 1))


def simper(g):
  return -math.exp(mean(g, 0)) + math.exp(mean(g, 1))


def exo(g, beta, label_smoothing):
  z, e = beta * margin(g), label_smoothing
  return sigmoid(z) * (log_sigmoid(z) - math.log(1 - e)) + sigmoid(-z) * (
    log_sigmoid(-z) - math.log(e)
  )


def nca(g, beta):
  w, x = beta * ratio(g, 0), beta * ratio(g, 1)
  return -log_sigmoid(w) - 0.5 * log_sigmoid(-w) - 0.5 * log_sigmoid(-x)


def sppo_hard(g, beta):
  c = 1 / (2 * beta)
  return (ratio(g, 0) - c) ** 2 + (ratio(g, 1) + c) ** 2


def apo_zero(g, beta):
  return 1 - sigmoid(beta * ratio(g, 0)) + sigmoid(beta * ratio(g, 1))


def apo_down(g, beta):
  return sigmoid(beta * ratio(g, 0)) + 1 - sigmoid(beta * margin(g))


def discopop(g, beta, tau):
  z = beta * margin(g)
  m = sigmoid(z / tau)
  return (1 - m) * -log_sigmoid(z) + m * math.exp(-z)


def gpo_exponential(g, beta):
  return math.exp(-beta * margin(g))


def tdpo(g, beta, alpha):
  return -log_sigmoid(beta * (margin(g) - alpha * (g["kl"][1] - g["kl"][0])))


def wpo(g, beta):
  weight = math.exp(g["alignment"][0]) * math.exp(g["alignment"][1])
  return -weight * log_sigmoid(beta * margin(g))


def chi_po(g, beta, clip):
  phi = [math.exp(ratio(g, k)) + ratio(g, k) for k in (0, 1)]
  z = min(max(beta * (phi[0] - phi[1]), -2 * clip), 2 * clip)
  return -log_sigmoid(z)


def f_dpo(g, beta, divergence, alpha):
  derivative = {
    "reverse_kl": lambda u: math.log(u),
    "forward_kl": lambda u: -1 / u,
    "jensen_shannon": lambda u: math.log(2 * u / (1 + u)),
    "alpha": lambda u: (1 - u**-alpha) / alpha,
  }[divergence]
  u = [math.exp(ratio(g, k)) for k in (0, 1)]
  return -log_sigmoid(beta * (derivative(u[0]) - derivative(u[1])))


def unlikelihood(g, alpha, token_level):
  if token_level:
    return -g["lp"][0] - alpha * g["complement"][1]
  return -g["lp"][0] + alpha * g["lp"][1]


def apo_zero_unpaired(g, beta):
  good = sigmoid(beta * ratio(g, 0))
  return 1 - good if g["score"][0] > 0.5 else good


def plackett_luce(g, beta):
  return ranking([beta * ratio(g, k) for k in range(len(g["lp"]))], g["score"])


def reward_model(g, margin_weight, center_weight):
  pairs = zip(g["values"], g["score"], strict=True)
  shifted = [v - margin_weight * score for v, score in pairs]
  return ranking(shifted, g["score"]) + center_weight * sum(g["values"]) ** 2


def ranking(z, score):
  total = 0.0
  for k in range(len(z)):
    rivals = [z[j] for j in range(k + 1, len(z)) if score[j] != score[k]]
    total -= z[k] - math.log(sum(math.exp(x) for x in [z[k], *rivals]))
  return total


# Losses that see the whole batch: list of groups -> list.


def sft(groups, per_sequence):
  if per_sequence:
    return [-mean(g, 0) for g in groups]
  tokens = sum(g["n"][0] for g in groups)
  return [-g["lp"][0] * len(groups) / tokens for g in groups]


def sorted_loss(x, y, beta, e):
  pairs = zip(sorted(x), sorted(y), strict=True)
  losses = [smoothed(beta * (a - b), e) for a, b in pairs]
  return [sum(losses) / len(losses)] * len(losses)


def aot(groups, beta, label_smoothing):
  return sorted_loss(
    [g["lp"][0] - g["lp"][1] for g in groups],
    [g["ref"][0] - g["ref"][1] for g in groups],
    beta,
    label_smoothing,
  )


def aot_unpaired(groups, beta, label_smoothing):
  return sorted_loss(
    [ratio(g, 0) for g in groups],
    [ratio(g, 1) for g in groups],
    beta,
    label_smoothing,
  )


def kto(groups, beta, desirable_weight, undesirable_weight):
  mismatched = [beta * (g["other_lp"] - g["other_ref"]) for g in groups]
  z = max(0.0, sum(mismatched) / len(groups))
  out = []
  for g in groups:
    r = beta * ratio(g, 0)
    if g["score"][0] > 0.5:
      out.append(desirable_weight * (1 - sigmoid(r - z)))
    else:
      out.append(undesirable_weight * (1 - sigmoid(z - r)))
  return out


def bco_pair(groups, beta):
  means = [beta * (ratio(g, 0) + ratio(g, 1)) / 2 for g in groups]
  d = sum(means) / len(groups)
  return [
    -log_sigmoid(beta * ratio(g, 0) - d) - log_sigmoid(d - beta * ratio(g, 1))
    for g in groups
  ]


def bco(groups, beta):
  classes = {True: [], False: []}
  for g in groups:
    classes[g["score"][0] > 0.5].append(beta * ratio(g, 0))
  d = sum(sum(c) / len(c) for c in classes.values()) / 2
  out = []
  for g in groups:
    sign = 1 if g["score"][0] > 0.5 else -1
    out.append(-log_sigmoid(sign * (beta * ratio(g, 0) - d)))
  return out


def beta_dpo(groups, beta, alpha):
  m = sum(beta * margin(g) for g in groups) / len(groups)
  b = beta * max(1 + alpha * m, 1e-3)  # the running mean starts at 0
  return [-log_sigmoid(b * margin(g)) for g in groups]


def ppo(groups, clip, value_clip, value_weight):
  """Mean over the tokens that `num_tokens` counts."""
  sums = []
  for g in groups:
    total = 0.0
    for k in range(len(g["lp"])):
      for t, counts in enumerate(g["mask"][k]):
        if not counts:
          continue
        ratio_ = math.exp(g["tokens"][k][t] - g["old_tokens"][k][t])
        near = min(max(ratio_, 1 - clip), 1 + clip)
        a = g["advantages"][k][t]
        v, old, wanted = (
          g[name][k][t] for name in ("token_values", "old_values", "returns")
        )
        moved = old + min(max(v - old, -value_clip), value_clip)
        total -= min(ratio_ * a, near * a)
        total += (
          value_weight * max((v - wanted) ** 2, (moved - wanted) ** 2) / 2
        )
    sums.append(total)
  num_tokens = sum(sum(g["n"]) for g in groups)
  return [x * len(groups) / num_tokens for x in sums]


def reinforce(g, clip):
  total = 0.0
  for k, (lp, old) in enumerate(zip(g["lp"], g["old_lp"], strict=True)):
    others = [s for j, s in enumerate(g["score"]) if j != k]
    a = g["score"][k] - sum(others) / len(others)
    u = math.exp(lp - old)
    total -= min(u * a, min(max(u, 1 - clip), 1 + clip) * a)
  return total / len(g["lp"])


preferred_ft = sft
OF_A_BATCH = [
  "cpo",
  "slic",
  "ppo",
  "sft",
  "preferred_ft",
  "aot",
  "aot_unpaired",
  "kto",
  "bco_pair",
  "bco",
  "beta_dpo",
]


def loss(name, groups, knobs):
  """Returns the loss of every group of a batch."""
  function = globals()[name]
  if name in OF_A_BATCH:
    return function(groups, **knobs)
  return [function(group, **knobs) for group in groups]
