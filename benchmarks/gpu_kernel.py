"""Checks the GPU's attention kernels, and times their block sizes.

  python -m benchmarks.gpu_kernel [--budget_s=120]

First output and gradients are compared with `dense` in float32, over head
sizes, grouped heads, windows, a soft cap and both dtypes; it ends with code 3
if one disagrees. Then the candidates of each kernel and head size are timed on
one long row. One that does not give what `triton_tiles.TILES` give is left out.
TFLOP/s are those of visible scores, H d each times 4 in the forward kernel, 6
in dq and 8 in dkv, and 14 for both passes, which counts no score twice.
"""

import argparse
from collections.abc import Callable, Sequence
import dataclasses
import functools
import itertools
import sys
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import attention_worker, cells
from benchmarks.attention_worker import Shape
from benchmarks.matmul_worker import seconds_a_call
from dpo_jax.models import attention
from dpo_jax.models.attention import triton
from dpo_jax.models.attention.triton_tiles import (
  Kernels,
  Tiles,
  choose_kernels,
)

_NAMES = ("out", "dq", "dk", "dv")
# Largest error, relative to the norm. Bfloat16 rounds the weights of attention
# to 8 bits; float32 runs without TF32.
_TOLERANCES = {"bfloat16": 1e-2, "float32": 1e-4}


@dataclasses.dataclass(frozen=True)
class Case:
  """One comparison with `dense`.

  Attributes:
    shape: shape of the attention.
    dtype: dtype of queries, keys and values.
    window: see `attention.attend_rows`.
    soft_cap: see `attention.attend_rows`.
  """

  shape: Shape
  dtype: str = "bfloat16"
  window: int | None = None
  soft_cap: float | None = None


_MIXED = (90, 33, 1, 57)  # three responses, one of them a token
CASES = (
  Case(Shape(64, 8, 2, 1, (512, 768, 768))),
  Case(Shape(128, 4, 4, 1, (512, 768, 768))),
  Case(Shape(64, 8, 2, 11, _MIXED), window=100),
  Case(Shape(80, 4, 2, 11, _MIXED), soft_cap=30.0),
  Case(Shape(64, 4, 2, 11, _MIXED), dtype="float32"),
  Case(Shape(256, 2, 1, 11, _MIXED)),
)


# Block sizes to try by head size: queries, keys, warps, stages. All compile for
# an H200, whose shared memory they fit into.
_SIZES = {
  64: {
    "forward": ((128, 64, 8, 3), (128, 64, 4, 3), (64, 128, 4, 2)),
    "dkv": ((64, 64, 4, 2), (64, 64, 8, 3), (32, 64, 4, 3), (64, 32, 4, 3)),
    "dq": ((128, 64, 8, 3), (64, 64, 4, 2), (64, 32, 4, 3)),
  },
  128: {
    "forward": ((128, 64, 8, 2), (64, 64, 4, 3), (128, 32, 8, 3)),
    "dkv": ((64, 64, 4, 2), (64, 64, 8, 2), (32, 64, 4, 2), (64, 32, 4, 2)),
    "dq": ((64, 64, 4, 3), (128, 64, 8, 2), (64, 32, 4, 3)),
  },
}
_FACTORS = {"forward": 4, "dq": 6, "dkv": 8}


def make_arrays(shape: Shape, dtype: Any) -> list[jax.Array]:
  """Returns the arrays of `attention_worker.jax_arrays` in another dtype."""
  return [x.astype(dtype) for x in attention_worker.jax_arrays(shape)]


def run_backend(
  case: Case, backend: str, arrays: Sequence[jax.Array]
) -> list[np.ndarray]:
  """Computes attention and its gradients by a backend.

  Args:
    case: shape, window and soft cap.
    backend: name of a backend of `attention.make_rows`.
    arrays: queries, keys, values and the gradient of the output.

  Returns:
    Output, and gradients of queries, keys and values: f32, numpy.
  """
  labels = [jnp.asarray(x)[None] for x in case.shape.labels()]
  window = None if case.window is None else jnp.int32(case.window)

  def attend(queries, keys, values):
    rows = attention.make_rows(
      *labels, head_dim=case.shape.head_dim, backend=backend
    )
    return attention.attend_rows(
      queries,
      keys,
      values,
      rows,
      window=window,
      scale=case.shape.head_dim**-0.5,
      soft_cap=case.soft_cap,
    )

  @jax.jit
  def both(queries, keys, values, dout):
    out, vjp = jax.vjp(attend, queries, keys, values)
    return out, *vjp(dout)

  return [np.asarray(x, np.float32) for x in both(*arrays)]


def distance(found: Any, wanted: Any) -> float:
  """Returns the norm of the difference, relative to that of `wanted`."""
  found, wanted = (np.asarray(x, np.float32) for x in (found, wanted))
  return float(np.linalg.norm(found - wanted) / np.linalg.norm(wanted))


def check(case: Case) -> bool:
  """Compares the kernels with dense in float32, and prints the errors.

  Returns:
    Whether all errors are below the tolerance of the case's dtype. A kernel
    that does not compile does not agree.
  """
  arrays = make_arrays(case.shape, case.dtype)
  try:
    found = run_backend(case, "triton", arrays)
  except Exception as error:
    print(f"FAILED: {_first_line(error)}; {case}", flush=True)
    return False
  with jax.default_matmul_precision("highest"):
    exact = [x.astype(jnp.float32) for x in arrays]
    wanted = run_backend(case, "dense", exact)
  errors = [distance(a, b) for a, b in zip(found, wanted, strict=True)]
  # NaN is not below the tolerance.
  agrees = all(error < _TOLERANCES[case.dtype] for error in errors)
  text = ", ".join(
    f"{name} {error:.1e}" for name, error in zip(_NAMES, errors, strict=True)
  )
  print(f"{'agrees' if agrees else 'DISAGREES'}: {text}; {case}", flush=True)
  return agrees


def _first_line(error: Exception) -> str:
  return f"{type(error).__name__}: {error}".splitlines()[0][:150]


@dataclasses.dataclass(frozen=True)
class Timing:
  """Time and result of a kernel with some block sizes."""

  tiles: Tiles
  tflops: float
  result: Any


class Bench:
  """Times the kernels on one long row."""

  def __init__(self, shape: Shape, num_calls: int):
    self.shape, self.num_calls = shape, num_calls
    self.arrays = make_arrays(shape, jnp.bfloat16)
    width = 1 << (shape.head_dim - 1).bit_length()
    self.default = choose_kernels(width, jnp.bfloat16)
    self.labels = tuple(jnp.asarray(x)[None] for x in shape.labels())

  def attend(self, kernels: Kernels) -> Callable[..., jax.Array]:
    """Returns attention with these block sizes."""
    return functools.partial(
      triton.attend_triton,
      labels=self.labels,
      window=None,
      scale=self.shape.head_dim**-0.5,
      soft_cap=None,
      kernels=kernels,
    )

  def time(self, name: str, tiles: Tiles) -> Timing:
    """Times a kernel, "forward", "dq" or "dkv", alone and with these sizes."""
    kernels = dataclasses.replace(self.default, **{name: tiles})
    attend = self.attend(kernels)
    *inputs, dout = self.arrays
    if name == "forward":
      call = functools.partial(jax.jit(attend), *inputs)
    else:
      # The other kernel's results are not used, and XLA drops it.
      wanted = slice(0, 1) if name == "dq" else slice(1, 3)
      _, vjp = jax.jit(lambda *x: jax.vjp(attend, *x))(*inputs)
      backward = jax.jit(lambda vjp, dout: vjp(dout)[wanted])
      call = functools.partial(backward, vjp, dout)
    return self._timing(call, tiles, _FACTORS[name])

  def time_both(self, kernels: Kernels) -> str:
    """Returns TFLOP/s of the forward and backward pass, as text."""

    def both(queries, keys, values, dout):
      out, vjp = jax.vjp(self.attend(kernels), queries, keys, values)
      return out, vjp(dout)

    call = functools.partial(jax.jit(both), *self.arrays)
    try:
      return f"{self._timing(call, kernels.forward, 14).tflops:.0f}"
    except Exception as error:
      return f"FAILED, {_first_line(error)}"

  def _timing(
    self, call: Callable[[], Any], tiles: Tiles, factor: float
  ) -> Timing:
    seconds = seconds_a_call(
      call, jax.block_until_ready, num_calls=self.num_calls
    )
    scores = self.shape.scores
    speed = attention_worker.tflops(self.shape, seconds, factor, scores)
    return Timing(tiles, speed, call())

  def fastest(
    self, name: str, candidates: Sequence[Tiles], has_time: Callable[[], bool]
  ) -> Timing | None:
    """Times a kernel's tiles of TILES, and then candidates.

    Returns:
      The fastest of those that agree with TILES; None if TILES fail.
    """
    default = best = None
    for tiles in (getattr(self.default, name), *candidates):
      if default and not has_time():
        print(f"skipped, no time left: {name} {tiles}", flush=True)
        continue
      try:
        timing = self.time(name, tiles)
      except Exception as error:  # too much shared memory, say: the next one
        print(f"FAILED: {name} {tiles}: {_first_line(error)}", flush=True)
        if default is None:
          return None
        continue
      if default is None:
        default = best = timing
        self._print(name, timing, "TILES")
        continue
      agrees = self._agree(timing, default)
      self._print(name, timing, "agrees" if agrees else "DISAGREES")
      if agrees and timing.tflops > best.tflops:
        best = timing
    return best

  def _agree(self, one: Timing, other: Timing) -> bool:
    pairs = zip(
      jax.tree.leaves(one.result), jax.tree.leaves(other.result), strict=True
    )
    return all(distance(*pair) < _TOLERANCES["bfloat16"] for pair in pairs)

  def _print(self, name: str, timing: Timing, remark: str) -> None:
    t = timing.tiles
    sizes = f"{t.queries}, {t.keys}, {t.warps}, {t.stages}"
    print(
      f"d {self.shape.head_dim} {name} ({sizes}): {timing.tflops:.0f} TFLOP/s,"
      f" {remark}",
      flush=True,
    )


def choose(
  shape: Shape,
  num_calls: int,
  num_candidates: int,
  has_time: Callable[[], bool],
) -> None:
  """Prints the fastest block sizes of a head size.

  Args:
    shape: shape of the attention that is timed.
    num_calls: calls of a measurement.
    num_candidates: candidates of each kernel.
    has_time: whether there is time for another candidate.
  """
  bench = Bench(shape, num_calls)
  known = next((d for d in _SIZES if d >= shape.head_dim), max(_SIZES))
  best = {}
  for name, sizes in _SIZES[known].items():
    candidates = list(itertools.starmap(Tiles, sizes[:num_candidates]))
    if timing := bench.fastest(name, candidates, has_time):
      best[name] = timing.tiles
  chosen = dataclasses.replace(bench.default, **best)
  print(
    f"d {shape.head_dim}, both passes, TFLOP/s: fastest"
    f" {bench.time_both(chosen)}, TILES {bench.time_both(bench.default)}:"
    f" {chosen}",
    flush=True,
  )


def main(argv: Sequence[str] | None = None) -> None:
  parser = argparse.ArgumentParser()
  parser.add_argument("--budget_s", type=float, default=120.0)
  parser.add_argument("--head_dims", default="128,64")
  parser.add_argument("--num_groups", type=int, default=16)
  parser.add_argument("--heads", default="32,8", help="queries', keys'")
  parser.add_argument("--group", default="512,768,768")
  parser.add_argument("--num_calls", type=int, default=20)
  parser.add_argument("--num_cases", type=int, default=len(CASES))
  parser.add_argument("--num_candidates", type=int, default=10)
  options = parser.parse_args(argv)
  began = time.monotonic()

  def has_time() -> bool:
    return time.monotonic() - began < options.budget_s

  print(f"{jax.devices()[0].device_kind}, jax {jax.__version__}", flush=True)
  agree = [check(case) for case in CASES[: options.num_cases]]
  heads, kv_heads = map(int, options.heads.split(","))
  group = tuple(map(int, options.group.split(",")))
  for head_dim in map(int, options.head_dims.split(",")):
    shape = Shape(head_dim, heads, kv_heads, options.num_groups, group)
    choose(shape, options.num_calls, options.num_candidates, has_time)
  if not all(agree):
    print("the kernels disagree: see DISAGREES and FAILED above", flush=True)
    sys.exit(cells.DISAGREES)


if __name__ == "__main__":
  main()
