"""What the benchmarks count."""

import numpy as np
import pytest

from benchmarks import interleave, scaling, workload
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


def test_collectives_are_counted_in_a_program_s_text():
  text = """
  %a = f32[8,16]{1,0} all-reduce(%x), channel_id=1
  %b = (bf16[4]{0}, f32[2,2]{1,0}) all-gather-start(%y), dimensions={0}
  %c = f32[8,16]{1,0} add(%a, %a)
  %d = f32[]{:T(128)} all-reduce(%z)
  """
  assert scaling.collectives(text) == {
    "all-reduce": (2, 8 * 16 * 4 + 4),
    "all-gather": (1, 4 * 2 + 4 * 4),
  }


def test_contenders_that_do_other_work_are_refused():
  class Fake:
    def __init__(self, name, loss):
      self.name, self.first = name, {"loss": loss, "grad_norm": 2.0}

  interleave.check_ticket([Fake("a", 0.69), Fake("b", 0.69002)])
  with pytest.raises(ValueError, match="b has loss"):
    interleave.check_ticket([Fake("a", 0.69), Fake("b", 0.6903)])
