"""Benchmarks: the work they count, exported data, turns and checks."""

import argparse
import sys

import jax
import numpy as np
import pytest

from benchmarks import interleave, ours, peers, workload
from dpo_jax.models.config import ModelConfig
from dpo_jax.models.presets import PRESETS
from dpo_jax.parallel import mesh
from dpo_jax.planning import hlo


def test_lengths_have_the_published_medians_and_means():
  lengths = workload.make_lengths(256, 0)
  assert lengths.min() >= 1
  assert (lengths[:, :1] + lengths[:, 1:]).max() <= 512
  np.testing.assert_allclose(np.median(lengths, 0), [74.5, 91, 91], atol=1)
  np.testing.assert_allclose(lengths.mean(0), [89, 108, 109], atol=2)


def test_work_equals_a_loop_over_tokens():
  config = ModelConfig(vocab_size=50, **PRESETS["tiny"])
  c = config
  lengths = np.array([[3, 2, 4], [5, 1, 0]])
  tokens = useful = shared = 0
  weights = 2 * c.d_model * c.head_dim * (c.num_heads + c.num_kv_heads)
  weights = c.num_layers * (weights + 3 * c.d_model * c.d_ff)
  score = 4 * c.num_layers * c.num_heads * c.head_dim
  for prompt, *responses in lengths:
    for k, response in enumerate(r for r in responses if r):
      for position in range(prompt + response):
        cost = 2 * weights + score * (position + 1)
        cost += 2 * c.d_model * c.vocab_size * (position >= prompt)
        tokens += 1
        useful += 3 * cost
        shared += 3 * cost * (position >= prompt or k == 0)
  work = workload.count_work(lengths, config)
  assert work.tokens == tokens
  np.testing.assert_allclose(work.useful_flops, useful)
  np.testing.assert_allclose(work.shared_flops, shared)


@pytest.mark.slow
def test_a_trainer_compiles_for_its_mesh():
  options = ours.parse(
    ["--shape=a", "--vocab_size=512", "--batch_size=8", "--num_groups=8"]
  )
  sizes = dict.fromkeys(mesh.AXES, 1) | {"fsdp": 4}
  grid = mesh.make_mesh(sizes, jax.devices()[:4])
  compiled = ours.Trainer(options, grid).compile()
  found = hlo.collectives(compiled.as_text(), 4)
  params = 4 * (2 * 512 * 256 + 6 * (4 * 256**2 + 3 * 256 * 1024))
  gathered = sum(c.num_bytes * c.trips for c in found if c.group_size == 4)
  assert gathered > params  # the weights at least once, and the gradients
  assert hlo.collectives(ours.Trainer(options).compile().as_text(), 1) == []


@pytest.mark.slow
def test_exported_work_is_that_of_our_first_steps(tmp_path):
  """Another library reads the ids, the order and the work of our batches."""
  options = ours.parse(
    ["--vocab_size=512", "--batch_size=4", "--num_groups=12"]
  )
  trainer = ours.Trainer(options)
  peers.export(trainer, str(tmp_path), num_steps=2)
  work, groups = interleave.read_work(str(tmp_path))
  assert len(groups) == 12
  for index, group in enumerate(groups):
    for ids, wanted in zip(group, trainer.store.group(index), strict=True):
      np.testing.assert_array_equal(ids, wanted)
  for step in range(2):
    batch = trainer.loader.batch(step)
    chosen = [i for i in batch.example_ids.flat if i >= 0]
    assert sorted(chosen) == sorted(work["order"][step])
    wanted = workload.count_work(
      trainer.lengths[chosen], trainer.program.policy.config
    )
    assert work["tokens"][step] == wanted.tokens
    assert work["useful_flops"][step] == pytest.approx(wanted.useful_flops)
  first = trainer.start()
  assert first["tokens"] == work["tokens"][0]
  assert first["loss"] == pytest.approx(np.log(2), abs=1e-5)


def test_contenders_with_another_first_loss_are_refused():
  class Fake:
    def __init__(self, name, loss):
      self.name, self.first = name, {"loss": loss, "grad_norm": 2.0}

  interleave.check_same_work([Fake("a", 0.69), Fake("b", 0.69002)])
  with pytest.raises(ValueError, match="b has loss"):
    interleave.check_same_work([Fake("a", 0.69), Fake("b", 0.6903)])


def test_a_ratio_is_the_median_over_simultaneous_turns():
  """A slow minute slows one turn of each contender, and not the median."""

  class Fake:
    def __init__(self, seconds):
      self.turns = [{"tokens": 12.0, "seconds": x} for x in seconds]

  mine, peer = Fake([1.0, 2.0, 4.0]), Fake([3.0, 8.0, 20.0])
  assert interleave.times_as_fast(mine, peer) == 4.0
  assert interleave.times_as_fast(peer, mine) == 0.25


def test_contenders_take_turns_and_the_first_turn_is_dropped(tmp_path):
  """Two processes count the steps that they are asked for."""
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


def test_a_contender_that_ends_early_is_named():
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
