"""What the benchmarks count."""

import jax
import numpy as np
import pytest

from benchmarks import interleave, ours, workload
from dpo_jax import hlo, mesh
from dpo_jax.models.config import ModelConfig
from dpo_jax.models.presets import PRESETS


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
