"""Measures one kernel of attention on rows of shared prompts.

  python -m benchmarks.attention_worker --kernel=flex --head_dim=128

`triton` is this package's and `flex` is torch's FlexAttention with the same
mask. `cudnn` is cuDNN's causal attention, called through JAX, on the same
tokens in rows of one group: it has no mask for shared prompts, and its scores
are others. TFLOP/s are those of visible scores: 4 H d each in the forward pass,
and 2.5 times as many in the backward pass.
"""

import argparse
from collections.abc import Callable
import dataclasses
import json
from typing import Any

import numpy as np

from benchmarks.interleave import MARK
from benchmarks.matmul_worker import seconds_a_call

_NUM_CALLS = 20


@dataclasses.dataclass(frozen=True)
class Shape:
  """Shape of an attention.

  Attributes:
    head_dim: channels of a head.
    num_heads: heads.
    num_kv_heads: heads of keys and values.
    num_groups: groups of a row.
    group: tokens of a prompt and of each of its responses.
  """

  head_dim: int
  num_heads: int = 32
  num_kv_heads: int = 8
  num_groups: int = 16
  group: tuple[int, ...] = (512, 768, 768)

  @property
  def tokens(self) -> int:
    return self.num_groups * sum(self.group)

  @property
  def scores(self) -> int:
    """Pairs of a query and a key that it sees, in a row."""
    prompt, *responses = self.group
    seen = triangle(prompt)
    seen += sum(prompt * n + triangle(n) for n in responses)
    return self.num_groups * seen

  def labels(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Returns positions, segments and branches of a row, i32 [T] each."""
    prompt, *responses = self.group
    parts = [(0, prompt, 0)]
    parts += [(prompt, n, k) for k, n in enumerate(responses, 1)]
    positions = np.concatenate([np.arange(n) + at for at, n, _ in parts])
    branches = np.concatenate([np.full(n, k) for _, n, k in parts])
    segments = np.repeat(1 + np.arange(self.num_groups), sum(self.group))
    tile = [np.tile(x, self.num_groups) for x in (positions, branches)]
    rows = (tile[0], segments, tile[1])
    return tuple(x.astype(np.int32) for x in rows)


def triangle(n: int) -> int:
  """Returns the number of scores of n tokens that see those before them."""
  return n * (n + 1) // 2


def tflops(shape: Shape, seconds: float, factor: float, scores: int) -> float:
  """Returns TFLOP/s of visible scores; factor: 4 forward, 14 with backward."""
  return factor * scores * shape.num_heads * shape.head_dim / seconds / 1e12


def jax_arrays(shape: Shape, rows: int = 1) -> list[Any]:
  """Returns random queries, keys, values and a gradient of the output.

  bf16 [rows, T, heads, head_dim] each, T = shape.tokens / rows. Keys and values
  have num_kv_heads heads.
  """
  import jax
  import jax.numpy as jnp

  heads = (shape.num_heads, *[shape.num_kv_heads] * 2, shape.num_heads)
  return [
    jax.random.normal(
      jax.random.key(i),
      (rows, shape.tokens // rows, h, shape.head_dim),
      jnp.bfloat16,
    )
    for i, h in enumerate(heads)
  ]


def measure_jax(
  attend: Callable[..., Any], arrays: list[Any], num_calls: int = _NUM_CALLS
) -> tuple[float, float]:
  """Returns seconds of the forward pass, and of both passes."""
  import jax

  def both(queries, keys, values, dout):
    out, vjp = jax.vjp(attend, queries, keys, values)
    return out, vjp(dout)

  *inputs, dout = arrays
  forward, both = jax.jit(attend), jax.jit(both)
  wait = jax.block_until_ready
  return (
    seconds_a_call(lambda: forward(*inputs), wait, num_calls=num_calls),
    seconds_a_call(lambda: both(*inputs, dout), wait, num_calls=num_calls),
  )


def measure_triton(shape: Shape) -> tuple[float, float, int]:
  """Measures this package's kernel.

  Returns:
    Seconds of the forward pass, seconds of both passes, and visible scores.
  """
  import jax.numpy as jnp

  from dpo_jax.models import attention

  labels = [jnp.asarray(x)[None] for x in shape.labels()]

  def attend(queries, keys, values):
    rows = attention.make_rows(
      *labels, head_dim=shape.head_dim, backend="triton"
    )
    return attention.attend_rows(
      queries,
      keys,
      values,
      rows,
      window=None,
      scale=shape.head_dim**-0.5,
      soft_cap=None,
    )

  return *measure_jax(attend, jax_arrays(shape)), shape.scores


def measure_cudnn(shape: Shape) -> tuple[float, float, int]:
  """Measures cuDNN's causal attention on rows of one group.

  Returns:
    Seconds of the forward pass, seconds of both passes, and visible scores.
  """
  import jax

  def attend(queries, keys, values):
    return jax.nn.dot_product_attention(
      queries, keys, values, is_causal=True, implementation="cudnn"
    )

  arrays = jax_arrays(shape, rows=shape.num_groups)
  scores = shape.num_groups * triangle(sum(shape.group))
  return *measure_jax(attend, arrays), scores


def measure_flex(shape: Shape) -> tuple[float, float, int]:
  """Measures FlexAttention with the same mask.

  Dong et al. 2024, arXiv:2412.05496.

  Returns:
    Seconds of the forward pass, seconds of both passes, and visible scores.
  """
  import torch
  from torch.nn.attention.flex_attention import (
    create_block_mask,
    flex_attention,
  )

  _, segments, branches = (torch.from_numpy(x).cuda() for x in shape.labels())

  def is_seen(b, h, query, key):
    near = (segments[query] == segments[key]) & (query >= key)
    own = branches[query] == branches[key]
    return near & (own | (branches[key] == 0))

  tokens = shape.tokens
  mask = torch.compile(create_block_mask)(
    is_seen, None, None, tokens, tokens, device="cuda"
  )
  attend = torch.compile(flex_attention)
  heads = (shape.num_heads, *[shape.num_kv_heads] * 2, shape.num_heads)
  queries, keys, values, dout = (
    torch.randn(
      (1, h, tokens, shape.head_dim), device="cuda", dtype=torch.bfloat16
    )
    for h in heads
  )
  inputs = [x.requires_grad_() for x in (queries, keys, values)]

  def forward():
    with torch.no_grad():
      return attend(*inputs, block_mask=mask, enable_gqa=True)

  def both():
    out = attend(*inputs, block_mask=mask, enable_gqa=True)
    return torch.autograd.grad(out, inputs, dout)

  forward_s, both_s = (
    seconds_a_call(
      call, lambda _: torch.cuda.synchronize(), num_calls=_NUM_CALLS
    )
    for call in (forward, both)
  )
  return forward_s, both_s, shape.scores


_KERNELS = {
  "triton": measure_triton,
  "cudnn": measure_cudnn,
  "flex": measure_flex,
}


def main() -> None:
  parser = argparse.ArgumentParser()
  parser.add_argument("--kernel", choices=_KERNELS, required=True)
  parser.add_argument("--head_dim", type=int, default=128)
  options = parser.parse_args()
  shape = Shape(options.head_dim)
  forward_s, both_s, scores = _KERNELS[options.kernel](shape)
  answer = {
    "forward_tflops": tflops(shape, forward_s, 4, scores),
    "both_tflops": tflops(shape, both_s, 14, scores),
  }
  print(MARK + json.dumps(answer), flush=True)


if __name__ == "__main__":
  main()
