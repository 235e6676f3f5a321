"""Measures log-ratios that would be zero without bfloat16 rounding.

  JAX_PLATFORMS=cpu python -m benchmarks.rounding [--tokens=256,1024,2048]

A policy that equals its reference has log-ratios of zero. If another program
scored the reference, or the batch had another layout, rounding errors remain.
Rows of the table: a cached reference, and a live one (`frozen`).

The model has random weights, a Llama shape of 12 layers (D 512, 33M
parameters, 8,192 words); matrices are 2.5 times as large as at initialisation,
so that attention and logits are not flat. A prompt takes a quarter of the
tokens, each of two responses the rest, lengths uniform from 60 to 100 % of
that; 16 pairs, scored 4 at a time and trained 8 at a time.
"""

import argparse
import dataclasses

import jax
import numpy as np

from benchmarks import workload
from dpo_jax.data.store import Store
from dpo_jax.models.config import ModelConfig
from dpo_jax.models.decoder import Policy
from dpo_jax.parallel import mesh
from dpo_jax.parallel.placement import Placement
from dpo_jax.records.metrics import format_table
from dpo_jax.training import forward, reference

_VOCAB = 8192
_PAIRS, _SCORED, _TRAINED = 16, 4, 8


def make_store(tokens: int) -> Store:
  """Makes random pairs whose prompt and response have at most `tokens`."""
  rng = np.random.default_rng(0)
  prompt = tokens // 4
  columns = [
    rng.integers(int(0.6 * size), size + 1, _PAIRS)
    for size in (prompt, tokens - prompt, tokens - prompt)
  ]
  lengths = np.stack(columns, 1).astype(np.int32)
  tokens = rng.integers(0, _VOCAB, int(lengths.sum())).astype(np.int32)
  parts = iter(np.split(tokens, np.cumsum(lengths)))
  groups = [[next(parts) for _ in columns] for _ in range(_PAIRS)]
  return Store.from_groups(groups, np.tile([1, 0], (_PAIRS, 1)))


def measure(tokens: int, *, is_live: bool) -> np.ndarray:
  """Returns log-ratios of all responses, of a policy equal to its reference.

  Args:
    tokens: most tokens of prompt and response.
    is_live: whether the reference runs in the same program, or is cached.

  Returns:
    f32 [N], nats.
  """
  policy = Policy(
    ModelConfig(
      vocab_size=_VOCAB,
      d_model=512,
      num_layers=12,
      num_heads=8,
      num_kv_heads=8,
      head_dim=64,
      d_ff=1536,
      max_positions=tokens,
      tie_embeddings=False,
      compute_dtype="bfloat16",
    )
  )
  params = jax.tree.map(
    lambda x: 2.5 * x if x.ndim > 1 else x, policy.init(jax.random.key(0))
  )
  placement = Placement(mesh.make_mesh({"data": 1}, jax.devices()[:1]))
  scoring, training = (
    workload.make_loader(
      make_store(tokens), batch_size=size, seed=size, max_shapes=1
    )
    for size in (_SCORED, _TRAINED)
  )
  if not is_live:
    score = reference.make_logps_step(policy, placement, 0)
    training = dataclasses.replace(
      training,
      ref_logps=reference.compute_logps(score, params, scoring, placement),
    )
  step = jax.jit(
    forward.make_eval_step(policy, chunk_size=0, needs=frozenset({"ref_logps"}))
  )
  found = []
  for index in range(_PAIRS // _TRAINED):
    batch = training.batch(index)
    sequences = step(params, params if is_live else None, batch)
    is_there = np.asarray(sequences.valid)
    found.append(np.asarray(sequences.logps - sequences.ref_logps)[is_there])
  return np.concatenate(found)


def main() -> None:
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument(
    "--tokens", default="256,1024,2048", help="lengths, comma-separated"
  )
  options = parser.parse_args()
  rows = []
  for tokens in map(int, options.tokens.split(",")):
    for name, is_live in (("cached", False), ("frozen", True)):
      ratios = np.abs(measure(tokens, is_live=is_live))
      rows.append(
        {
          "reference": name,
          "tokens": str(tokens),
          "median, nats": float(np.median(ratios)),
          "largest, nats": float(ratios.max()),
        }
      )
      print(format_table(rows[-1:]), flush=True)
  print(format_table(rows))


if __name__ == "__main__":
  main()
