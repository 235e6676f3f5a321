"""What the benchmarks count."""

import argparse
import sys

import jax
import numpy as np
import pytest

from benchmarks import interleave, ours, workload
from dpo_jax.models.config import ModelConfig
from dpo_jax.models.presets import PRESETS
from dpo_jax.parallel import mesh
from dpo_jax.planning import hlo


def test_lengths_are_those_of_the_workload():
  lengths = workload.make_lengths(256, 0)
  assert lengths.min() >= 1
  assert (lengths[:, :1] + lengths[:, 1:]).max() <= 512
  np.testing.assert_allclose(np.median(lengths, 0), [74.5, 91, 91], atol=1)
  np.testing.assert_allclose(lengths.mean(0), [89, 108, 109], atol=2)


def test_work_is_that_of_a_loop():
  config = ModelConfig(vocab_size=50, **PRESETS["tiny"])
  c = config
  lengths = np.array([[3, 2, 4], [5, 1, 0]])
  tokens = useful = shared = 0
  weights = 2 * c.d_model * c.head_dim * (c.num_heads + c.num_kv_heads)
  weights = c.num_layers * (weights + 3 * c.d_model * c.d_ff)
  score = 4 * c.num_layers * c.num_heads * c.head_dim
  for prompt, *responses in lengths:
    for k, response in enumerate(r for r in responses if r):
      for place in range(prompt + response):
        cost = 2 * weights + score * (place + 1)
        cost += 2 * c.d_model * c.vocab_size * (place >= prompt)
        tokens += 1
        useful += 3 * cost
        shared += 3 * cost * (place >= prompt or k == 0)
  work = workload.count_work(lengths, config)
  assert work.tokens == tokens
  np.testing.assert_allclose(work.useful_flops, useful)
  np.testing.assert_allclose(work.shared_flops, shared)


@pytest.mark.slow
def test_a_trainer_takes_its_step_on_the_mesh_that_it_gets():
  options = ours.parse(
    ["--shape=a", "--vocab_size=512", "--batch_size=8", "--num_groups=8"]
  )
  sizes = dict.fromkeys(mesh.AXES, 1) | {"fsdp": 4}
  grid = mesh.make_mesh(sizes, jax.devices()[:4])
  compiled = ours.Trainer(options, grid).compile()
  found = hlo.collectives(compiled.as_text(), 4)
  params = 4 * (2 * 512 * 256 + 6 * (4 * 256**2 + 3 * 256 * 1024))
  gathered = sum(c.num_bytes * c.trips for c in found if c.group_size == 4)
  assert gathered > params  # the weights at least once, and their gradients
  assert hlo.collectives(ours.Trainer(options).compile().as_text(), 1) == []


def test_contenders_that_do_other_work_are_refused():
  class Fake:
    def __init__(self, name, loss):
      self.name, self.first = name, {"loss": loss, "grad_norm": 2.0}

  interleave.check_ticket([Fake("a", 0.69), Fake("b", 0.69002)])
  with pytest.raises(ValueError, match="b has loss"):
    interleave.check_ticket([Fake("a", 0.69), Fake("b", 0.6903)])


def test_a_ratio_is_the_median_of_turns_side_by_side():
  """A slow minute slows a turn of each, and is not the median."""

  class Fake:
    def __init__(self, seconds):
      self.turns = [{"tokens": 12.0, "seconds": x} for x in seconds]

  mine, peer = Fake([1.0, 2.0, 4.0]), Fake([3.0, 8.0, 20.0])
  assert interleave.times_as_fast(mine, peer) == 4.0
  assert interleave.times_as_fast(peer, mine) == 0.25


def test_contenders_take_turns_and_the_warm_ones_are_not_kept(tmp_path):
  """Two processes that count the steps which they are asked for."""
  order = tmp_path / "order.txt"
  contenders = [
    interleave.Contender(
      name, [sys.executable, "-c", _COUNTER, name, str(order)]
    )
    for name in "ab"
  ]
  options = argparse.Namespace(num_turns=2, steps_a_turn=3)
  rows = interleave.measure(contenders, options)
  assert order.read_text() == "ab" * 4  # the start, a warm turn, two turns
  assert [row["name"] for row in rows] == ["a", "b"]
  assert [turn["steps"] for turn in contenders[0].turns] == [[4, 7], [7, 10]]
  assert rows[0]["tokens_per_second"] == 100.0


def test_a_contender_that_ends_is_named():
  """Before it is asked, or while it works; the others are ended too."""
  code = "print('no trainer'); raise SystemExit(3)"
  contender = interleave.Contender("a", [sys.executable, "-c", code])
  options = argparse.Namespace(num_turns=1, steps_a_turn=1)
  with pytest.raises(RuntimeError, match="a ended with code 3 at 'start'"):
    interleave.measure([contender], options)


_COUNTER = """
import sys

from benchmarks import interleave


class Counter:
  def __init__(self):
    self.next = 0

  def start(self):
    return self.run(1) | {"loss": 0.5, "grad_norm": 1.0}

  def run(self, num):
    with open(sys.argv[2], "a") as file:
      file.write(sys.argv[1])
    start, self.next = self.next, self.next + num
    return {"steps": [start, self.next], "tokens": 100.0, "seconds": 1.0,
            "pairs": 1, "cpu_seconds": 1.0, "useful_flops": 1.0,
            "peak_rss_mb": 1.0, "padding": 0.0}


interleave.serve(Counter())
"""
