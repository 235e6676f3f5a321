"""Direct Preference Optimization from scratch, on `dpo_loss` alone.

  python -m examples.dpo_from_scratch    # about 15 s on one CPU core

A tiny transformer imitates random reviews such as "great food and noisy room":
the reference. Preferences between pairs of reviews then teach it to write good
ones. DPO (Rafailov et al. 2023, arXiv:2305.18290) needs no reward model: it
raises log pi(y|x) - log pi_ref(y|x) of the chosen response over that of the
rejected one. If preferences follow a reward r, its optimum is the policy
pi_ref(y|x) exp(r(x, y) / beta) / Z(x). Here r counts good adjectives, so that
policy is known, and the last lines compare with it.
"""

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np
import optax

from dpo_jax.losses import dpo_loss

# %% The words, the tokens of a prompt and of prompt + response, and beta.
NOUNS = ("food", "room", "staff", "pool")
GOOD, BAD = ("great", "lovely", "clean"), ("awful", "dirty", "noisy")
WORDS = (*NOUNS, *GOOD, *BAD, "and")
FIRST_GOOD, FIRST_BAD, AND = len(NOUNS), len(NOUNS + GOOD), len(WORDS) - 1
PROMPT, LENGTH, BETA = 2, 7, 0.5
rng = np.random.default_rng(0)
jax.config.update("jax_default_prng_impl", "rbg")  # compiles faster


# %% A prompt is two nouns; a response gives each a random adjective.
def random_reviews(prompts):
  """Completes prompts i32 [B, 2] to tokens i32 [B, LENGTH]."""
  first, second = rng.integers(FIRST_GOOD, AND, (2, len(prompts)))
  review = first, prompts[:, 0], np.full_like(first, AND), second, prompts[:, 1]
  return np.stack([*prompts.T, *review], axis=1)


def reward(tokens):
  """Number of good adjectives in each response: i32 [B]."""
  is_good = (tokens >= FIRST_GOOD) & (tokens < FIRST_BAD)
  return is_good[:, PROMPT:].sum(axis=1)


def preference_pairs(num):
  """Draws chosen and rejected reviews by Bradley-Terry: [2, num, LENGTH]."""
  prompts = rng.integers(0, len(NOUNS), (num, PROMPT))
  a, b = random_reviews(prompts), random_reviews(prompts)
  a_wins = rng.random(num) < 1 / (1 + np.exp(reward(b) - reward(a)))
  return np.where(a_wins[:, None], (a, b), (b, a))


# %% The policy: one transformer block.
class Transformer(nnx.Module):
  """Next-token logits: i32 [B, T] -> f32 [B, T, len(WORDS)]."""

  def __init__(self, width, rngs):
    self.embed = nnx.Embed(len(WORDS), width, rngs=rngs)
    self.position = nnx.Embed(LENGTH, width, rngs=rngs)
    self.qkv = nnx.Linear(width, 3 * width, rngs=rngs)
    self.up = nnx.Linear(width, 4 * width, rngs=rngs)
    self.down = nnx.Linear(4 * width, width, rngs=rngs)
    self.head = nnx.Linear(width, len(WORDS), rngs=rngs)

  def __call__(self, tokens):
    x = self.embed(tokens) + self.position(jnp.arange(tokens.shape[1]))
    qkv = jnp.split(self.qkv(x)[:, :, None], 3, axis=-1)  # one head
    x += jax.nn.dot_product_attention(*qkv, is_causal=True)[:, :, 0]
    x += self.down(nnx.gelu(self.up(x)))
    return self.head(x)


graph, initial_params = nnx.split(Transformer(32, nnx.Rngs(0)))


@jax.jit
def response_logps(params, tokens):
  """log pi(response | prompt): f32 [B], nats. The prompt is not scored."""
  logits = nnx.merge(graph, params)(tokens)[:, PROMPT - 1 : -1]
  nll = optax.softmax_cross_entropy_with_integer_labels
  return -nll(logits, tokens[:, PROMPT:]).sum(axis=1)


@jax.jit
def sample(params, key, prompts):
  """Samples a response to each prompt: tokens i32 [B, LENGTH]."""

  def add_token(tokens, i):
    logits = nnx.merge(graph, params)(tokens)[:, i - 1]
    token = jax.random.categorical(jax.random.fold_in(key, i), logits)
    return tokens.at[:, i].set(token), None

  tokens = jnp.pad(prompts, ((0, 0), (0, LENGTH - PROMPT)))
  return jax.lax.scan(add_token, tokens, jnp.arange(PROMPT, LENGTH))[0]


# %% One training loop for both stages.
def train(loss, params, data, learning_rate, num_steps=300):
  """Minimises loss(params, *batch) with Adam; returns params and the losses."""
  optimizer = optax.adam(optax.linear_schedule(learning_rate, 0.0, num_steps))

  @jax.jit
  def step(params, opt_state, batch):
    value, gradient = jax.value_and_grad(loss)(params, *batch)
    updates, opt_state = optimizer.update(gradient, opt_state)
    return optax.apply_updates(params, updates), opt_state, value

  opt_state, losses = optimizer.init(params), []
  for _ in range(num_steps):
    rows = rng.integers(0, len(data[0]), 128)
    batch = [array[rows] for array in data]
    params, opt_state, value = step(params, opt_state, batch)
    losses.append(float(value))
  return params, losses


# %% Supervised fine-tuning on all reviews gives the reference.
def sft_loss(params, tokens):
  return -response_logps(params, tokens).mean()


chosen, rejected = preference_pairs(8192)
data = [np.concatenate([chosen, rejected])]
reference, _ = train(sft_loss, initial_params, data, 5e-3)


# %% DPO starts from the reference, whose log-probs are computed once.
def pair_loss(params, chosen, rejected, ref_chosen, ref_rejected):
  logps = response_logps(params, chosen), response_logps(params, rejected)
  return dpo_loss(*logps, ref_chosen, ref_rejected, beta=BETA).mean()


ref = [np.asarray(response_logps(reference, x)) for x in (chosen, rejected)]
policy, losses = train(pair_loss, reference, [chosen, rejected, *ref], 1e-3)
print(f"loss {losses[0]:.3f} (log 2) -> {np.mean(losses[-50:]):.3f}")

# %% Before, after, and the optimum: an adjective is good with probability p.
p = 1 / (1 + np.exp(-1 / BETA))
kl = np.log(2) + p * np.log(p) + (1 - p) * np.log(1 - p)
results = {}
for name, params in {"before": reference, "after": policy}.items():
  tokens = sample(params, jax.random.key(0), chosen[:1024, :PROMPT])
  logps = [response_logps(x, tokens) for x in (params, reference)]
  tokens = np.asarray(tokens)
  results[name] = reward(tokens).mean(), float((logps[0] - logps[1]).mean())
  print(name, [" ".join(WORDS[i] for i in row[PROMPT:]) for row in tokens[:3]])
results["optimum"] = 2 * p, 2 * kl
for name, (goods, kl) in results.items():
  print(f"{name:8} {goods:.2f} of 2 adjectives good, KL {kl:.2f} nats")
