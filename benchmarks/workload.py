"""Workload A: pairs of realistic lengths, made from a seed, and their FLOPs.

Lengths are quantiles of log-normals, so that a seed only shuffles them. Prompts
have a median of 74.5 and at most 316 tokens. Chosen and rejected responses have
a median of 91 and at most 408; prompt and response together at most 512. Token
ids are uniform, since their values do not change the time.

`--lengths=ultrafeedback` has pairs as long as UltraFeedback's: a median of 409
tokens with the prompt once, as Wang & Hegde 2024 (arXiv:2410.20305) report it
in their repository. How they divide between prompt and responses is ours.
"""

import argparse
import dataclasses
import math
import statistics
import time

import jax
import jax.numpy as jnp
import numpy as np

from dpo_jax.data import batch_plan
from dpo_jax.data import loader as loader_lib
from dpo_jax.data.store import Store
from dpo_jax.models.config import ModelConfig

MODEL = dict(
  vocab_size=32_000,
  d_model=256,
  num_layers=6,
  num_heads=4,
  num_kv_heads=4,
  head_dim=64,
  d_ff=1024,
  max_positions=512,
  rope_theta=1e6,
  norm_eps=1e-5,
  tie_embeddings=False,
)


def _llama(d_model: int, layers: int, heads: int, kv: int, d_ff: int) -> dict:
  return MODEL | dict(
    vocab_size=128_256,
    d_model=d_model,
    num_layers=layers,
    num_heads=heads,
    num_kv_heads=kv,
    head_dim=d_model // heads,
    d_ff=d_ff,
    rope_theta=5e5,
    param_dtype="float32",
    compute_dtype="bfloat16",
  )


# Shapes by name: workload A's, and Llamas for accelerators.
SHAPES = {
  "a": MODEL,
  "0.5b": _llama(1024, 20, 16, 8, 2816),
  "1b": _llama(2048, 16, 32, 8, 8192),
  "3b": _llama(3072, 28, 24, 8, 8192),
  "8b": _llama(4096, 32, 32, 8, 14336),
}
BATCH_SIZE = 8
BETA = 0.1
LEARNING_RATE = 1e-4
# Tokens of prompt, chosen and rejected: median, mean, largest.
LENGTHS = {
  "a": ((74.5, 89.0, 316), (91.0, 108.0, 408), (91.0, 109.5, 408)),
  "ultrafeedback": ((70, 110, 800), (148, 188, 800), (130, 168, 800)),
}


def make_lengths(
  num_groups: int, seed: int, *, max_tokens: int = 512, kind: str = "a"
) -> np.ndarray:
  """Makes prompt, chosen and rejected lengths: i32 [N, 3].

  Args:
    num_groups: N.
    seed: seed of their order.
    max_tokens: most tokens of a prompt and a response.
    kind: a key of LENGTHS.
  """
  rng = np.random.default_rng(seed)
  columns = []
  normal = statistics.NormalDist()
  fractions = (np.arange(num_groups) + 0.5) / num_groups
  quantiles = np.array([normal.inv_cdf(p) for p in fractions])
  for median, mean, largest in LENGTHS[kind]:
    spread = math.sqrt(2.0 * math.log(mean / median))
    lengths = np.rint(median * np.exp(spread * quantiles)).astype(np.int32)
    columns.append(rng.permutation(np.minimum(lengths, largest)))
  lengths = np.stack(columns, 1)
  room = np.maximum(max_tokens - lengths[:, :1], 1)
  lengths[:, 1:] = np.minimum(lengths[:, 1:], room)
  return lengths


def make_store(
  lengths: np.ndarray, seed: int, *, vocab_size: int = MODEL["vocab_size"]
) -> Store:
  """Makes groups of random ids with these lengths, best response first."""
  rng = np.random.default_rng((seed, 1))
  # The lowest ids are special tokens of a tokenizer.
  tokens = rng.integers(8, vocab_size, int(lengths.sum())).astype(np.int32)
  parts = iter(np.split(tokens, np.cumsum(lengths)))
  groups = [[next(parts) for _ in group] for group in lengths]
  ranks = np.arange(lengths.shape[1] - 1)
  return Store.from_groups(groups, np.tile(-ranks, (len(lengths), 1)))


def make_loader(
  store: Store,
  *,
  batch_size: int,
  seed: int,
  layout: str = "shared",
  row_tokens: int = 0,
  row_multiple: int = 1,
  **limits: int,
) -> loader_lib.Loader:
  """Makes a loader of all groups of a store.

  Args:
    store: groups.
    batch_size: groups a batch.
    seed: seed of their order.
    layout: "shared", "packed" or "padded".
    row_tokens: tokens of a row; 0: chosen by the plan.
    row_multiple: number that the rows of a batch must divide by.
    **limits: further limits of `batch_plan.make_plan`.
  """
  indices = np.arange(len(store))
  plan = batch_plan.make_plan(
    store,
    indices,
    batch_size=batch_size,
    row_tokens=row_tokens,
    row_multiple=row_multiple,
    layout=layout,
    **limits,
  )
  return loader_lib.Loader(store, indices, plan, batch_size, seed)


@dataclasses.dataclass(frozen=True)
class Work:
  """Work of a batch, independent of the implementation.

  Attributes:
    tokens: number of tokens, a prompt counted once for each response.
    useful_flops: FLOPs of forward and backward passes over these tokens, with
      causal attention and the head on response tokens; no reference.
    shared_flops: the same FLOPs with each prompt counted once.
  """

  tokens: int
  useful_flops: float
  shared_flops: float


def count_work(lengths: np.ndarray, config: ModelConfig) -> Work:
  """Counts the work of groups of these lengths, i32 [B, 1 + K].

  Three times the forward pass. In it a token takes two FLOPs for each weight, n
  tokens take n (n + 1) / 2 attention scores of 4 H d FLOPs in each layer, and a
  scored token takes 2 D V.
  """
  lengths = lengths.astype(np.float64)
  prompts, responses = lengths[:, 0], lengths[:, 1:]
  attention = 2 * config.d_model * config.head_dim
  attention *= config.num_heads + config.num_kv_heads
  weights = config.num_layers * (attention + 3 * config.d_model * config.d_ff)
  score = 4 * config.num_heads * config.head_dim * config.num_layers
  head = 2 * config.d_model * config.vocab_size * responses.sum()

  def triangle(n):
    return n * (n + 1) / 2

  copies = (responses > 0).sum(1)
  alone = (prompts[:, None] + responses) * (responses > 0)
  prompt_scores = triangle(prompts)
  scores = triangle(alone).sum()
  shared_scores = scores - ((copies - 1) * prompt_scores).sum()
  tokens = alone.sum()
  shared_tokens = tokens - ((copies - 1) * prompts).sum()
  return Work(
    tokens=int(tokens),
    useful_flops=3 * (2 * weights * tokens + score * scores + head),
    shared_flops=3
    * (2 * weights * shared_tokens + score * shared_scores + head),
  )


def matmul_rate(size: int = 2048, repeats: int = 3) -> tuple[float, float]:
  """Measures XLA's float32 matmul, the fastest of `repeats`.

  Returns:
    FLOPs a second of wall time, and of CPU time.
  """
  x = jnp.ones((size, size), jnp.float32)
  multiply = jax.jit(jnp.dot)
  multiply(x, x).block_until_ready()
  wall, cpu = [], []
  for _ in range(repeats):
    began, cpu_began = time.perf_counter(), time.process_time()
    multiply(x, x).block_until_ready()
    wall.append(time.perf_counter() - began)
    cpu.append(time.process_time() - cpu_began)
  return 2 * size**3 / min(wall), 2 * size**3 / min(cpu)


def add_options(parser: argparse.ArgumentParser) -> None:
  """Adds the options that describe the work to every contender."""
  parser.add_argument("--seed", type=int, default=0)
  parser.add_argument("--batch_size", type=int, default=BATCH_SIZE)
  parser.add_argument("--num_groups", type=int, default=256)
  parser.add_argument("--max_tokens", type=int, default=512)
  parser.add_argument(
    "--vocab_size", type=int, default=0, help="0: that of the shape"
  )
  parser.add_argument("--lengths", default="a", choices=LENGTHS)
  parser.add_argument(
    "--equal_lengths",
    default="",
    help="prompt and response of all groups, as in 512,1536; empty: --lengths",
  )


def read_lengths(options: argparse.Namespace) -> np.ndarray:
  """Returns the lengths that the options describe: i32 [N, 3]."""
  if not options.equal_lengths:
    return make_lengths(
      options.num_groups,
      options.seed,
      max_tokens=options.max_tokens,
      kind=options.lengths,
    )
  prompt, response = map(int, options.equal_lengths.split(","))
  row = np.array([prompt, response, response], np.int32)
  return np.tile(row, (options.num_groups, 1))
