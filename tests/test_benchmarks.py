"""Benchmarks: the work they count, exported data, turns and checks."""

import argparse
import json
import subprocess
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks import (
  attention_worker,
  cells,
  gpu,
  gpu_1b,
  gpu_cells,
  gpu_kernel,
  gpu_shapes,
  interleave,
  ours,
  peers,
  workload,
)
from dpo_jax.data import packing
from dpo_jax.models.attention import shared_prompt_mask, triton
from dpo_jax.models.attention.triton_tiles import Tiles
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
    for ids, wanted in zip(group, trainer.data.store.group(index), strict=True):
      np.testing.assert_array_equal(ids, wanted)
  for step in range(2):
    batch = trainer.loader.batch(step)
    chosen = [i for i in batch.example_ids.flat if i >= 0]
    assert sorted(chosen) == sorted(work["order"][step])
    wanted = workload.count_work(
      trainer.data.lengths[chosen], trainer.data.config
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


def test_ultrafeedback_lengths_have_the_published_median():
  totals = [
    np.median(
      workload.make_lengths(
        256, seed, max_tokens=1024, kind="ultrafeedback"
      ).sum(1)
    )
    for seed in range(4)
  ]
  assert np.mean(totals) == pytest.approx(409, rel=0.02)


def test_visible_scores_equal_a_count_of_the_mask():
  shape = attention_worker.Shape(16, 2, 1, 3, (5, 1, 4))
  positions, segments, branches = (jnp.asarray(x) for x in shape.labels())
  mask = shared_prompt_mask(segments[None], branches[None])
  assert shape.tokens == 30
  assert shape.scores == int(mask.sum())
  np.testing.assert_array_equal(positions[:10], [0, 1, 2, 3, 4, 5, 5, 6, 7, 8])
  # 4 H d FLOPs a score and second.
  found = attention_worker.tflops(shape, 0.5, 4, shape.scores)
  assert found == pytest.approx(4 * 2 * 16 * shape.scores / 0.5 / 1e12)


def test_the_work_of_another_library_needs_no_weights(tmp_path):
  options = ours.parse(
    ["--shape=1b", "--batch_size=4", "--num_groups=8", "--max_tokens=64"]
  )
  data = ours.make_data(options)
  peers.export_data(data, str(tmp_path), num_steps=3)
  work, groups = interleave.read_work(str(tmp_path))
  assert sorted(p.name for p in tmp_path.iterdir()) == [
    "config.json",
    "tokens.npy",
    "work.json",
  ]
  assert len(groups) == 8 and len(work["order"]) == 3
  first = workload.count_work(data.lengths[work["order"][0]], data.config)
  assert work["useful_flops"][0] == first.useful_flops


def _cells_options(**changed):
  parser = argparse.ArgumentParser()
  cells.add_options(parser, budget_s=300.0)
  parser.set_defaults(num_turns=1, steps_a_turn=1, matmul_tflops="torch:1e-3")
  parser.set_defaults(**changed)
  return parser.parse_args([])


def _script(name, code, **fields):
  return cells.Cell(name, [sys.executable, "-c", code], **fields)


def _counting_cell(name, path, **fields):
  command = [sys.executable, "-c", _COUNTER, "a", str(path)]
  return cells.Cell(name, command, workload="w", **fields)


def test_a_failing_cell_is_reported_and_the_next_one_runs(tmp_path, capsys):
  path = tmp_path / "order.txt"
  found = cells.run_table(
    "some_table",
    [
      _counting_cell("ours", path, executed="shared_flops"),
      _script("lacking", "import no_such_package", workload="w"),
      _counting_cell("peer", path),
    ],
    _cells_options(out=str(tmp_path / "out")),
    title="A table",
    notes=[],
  )
  ours_row, lacking_row, peer_row = found
  assert "No module named 'no_such_package'" in lacking_row["error"]
  assert peer_row["dpo_jax_times"] == 1.0
  # Useful: each prompt for each response; executed: each prompt once.
  assert ours_row["useful_of_matmul"] == pytest.approx(1e-9)
  assert ours_row["executed_of_matmul"] == pytest.approx(0.5e-9)
  assert peer_row["executed_of_matmul"] == pytest.approx(1e-9)
  written = json.loads((tmp_path / "out" / "some_table.json").read_text())
  assert [row["name"] for row in written["rows"]] == ["ours", "lacking", "peer"]
  printed = capsys.readouterr().out
  assert "lacking: failed: ModuleNotFoundError" in printed
  assert "shares are of torch's" in printed


def test_cells_after_the_budget_are_named_and_not_started(tmp_path):
  path = tmp_path / "order.txt"
  found = cells.run(
    [_counting_cell("late", path)],
    _cells_options(),
    began=time.monotonic() - 301,
    report=lambda row: None,
  )
  error = "skipped: 300 s of a budget of 300 s are spent"
  assert found == [{"name": "late", "workload": "w", "error": error}]
  assert not path.exists()


def test_a_cell_does_not_start_in_the_last_tenth_of_the_budget():
  began = time.monotonic() - 280
  options = _cells_options()
  [row] = cells.run(
    [_script("late", "", is_trainer=False)],
    options,
    began=began,
    report=lambda row: None,
  )
  assert row["error"] == "skipped: 280 s of a budget of 300 s are spent"


def test_a_cell_is_stopped_when_the_budget_ends():
  cell = _script("stuck", "import time; time.sleep(60)", is_trainer=False)
  began = time.monotonic()
  [row] = cells.run(
    [cell],
    _cells_options(budget_s=0.2),
    began=began,
    report=lambda row: None,
  )
  assert row["error"].startswith("stopped after ")
  assert time.monotonic() - began < 50


def test_rows_are_compared_with_the_first_of_their_work():
  def row(name, workload, rate):
    return {"name": name, "workload": workload, "pairs_per_second": rate}

  rows = [row("ours", "long", 6.0), row("TRL", "long", 4.0)]
  assert cells.ratio(rows[1], rows) == 1.5
  assert cells.ratio(row("TRL", "real", 2.0), rows) is None
  assert cells.ratio({"name": "TRL", "workload": "long"}, rows) is None


def test_the_larger_matmul_rate_is_the_limit():
  options = _cells_options(matmul_tflops="jax:600,torch:800")
  matmuls = cells.matmul_rates(options)
  row = {
    "useful_gflops_per_second": 400e3,
    "executed_gflops_per_second": 200e3,
  }
  cells.add_shares(row, matmuls)
  assert row["useful_of_matmul"] == pytest.approx(0.5)
  assert row["executed_of_matmul"] == pytest.approx(0.25)


def test_a_table_has_a_row_for_each_cell_and_says_what_failed():
  text = cells.table(
    [
      {"name": "a", "pairs_per_second": 2.0, "useful_of_matmul": 0.25},
      {"name": "b", "error": "failed: out of memory"},
    ]
  )
  assert text.splitlines() == [
    "| name | pairs/s | of matmul % |",
    "|---|---|---|",
    "| a | 2 | 25 |",
    "| b |  |  |",
    "",
    "b: failed: out of memory",
  ]


def test_a_kernel_that_disagrees_sends_the_tables_to_xla(
  monkeypatch, capsys, tmp_path
):
  """A kernel part that crashes or takes too long does not."""
  commands, codes = [], {}

  def run(command, timeout):
    commands.append(command[2:])
    code = codes.get(command[2], 0)
    if code == 124:
      raise subprocess.TimeoutExpired(command, timeout)
    if command[2] == "benchmarks.gpu_1b":
      content = {"extra": {"matmul_tflops": "jax 0.11:690,torch 2.11:780"}}
      (tmp_path / "gpu_1b.json").write_text(json.dumps(content))
    return argparse.Namespace(returncode=code)

  monkeypatch.setattr(gpu.subprocess, "run", run)
  out = f"--out={tmp_path}"
  options = argparse.Namespace(out=str(tmp_path), scale=0.5)
  for code in (1, 124, cells.DISAGREES):
    codes["benchmarks.gpu_kernel"] = code
    found = gpu.run_parts(["kernel", "1b"], options)
    assert found == {"kernel": code, "1b": 0}
    assert commands[-2] == ["benchmarks.gpu_kernel", "--budget_s=60"]
    xla = ["--attention=xla"] if code == cells.DISAGREES else []
    assert commands[-1][1:] == ["--budget_s=150", out, *xla]
    assert ("attention=xla" in capsys.readouterr().out) == bool(xla)
  gpu.run_parts(["1b", "shapes"], options)
  rates = "--matmul_tflops=jax 0.11:690,torch 2.11:780"
  assert commands[-1][1:] == ["--budget_s=90", out, rates]
  gpu.run_parts(["shapes"], options)
  assert commands[-1][1:] == ["--budget_s=90", out]


@pytest.mark.parametrize(
  ("table", "options"), [(gpu_1b, ("xla", "")), (gpu_shapes, ("xla",))]
)
def test_no_gpu_row_compiles_in_a_timed_turn(
  table, options, monkeypatch, tmp_path
):
  """Each shape of the timed batches is one of the batches before them."""
  monkeypatch.setattr(gpu_cells.peers, "export_data", lambda *_: None)
  turn, num_turns = table.TURNS["steps_a_turn"], table.TURNS["num_turns"]
  for cell in table.make_cells(str(tmp_path), *options):
    if "benchmarks.ours" not in cell.command:
      continue
    options = [x for x in cell.command if x.startswith("--")]
    loader = ours.make_data(ours.parse(options)).loader
    shapes = [
      _shape_of(loader, step) for step in range(1 + turn + turn * num_turns)
    ]
    assert set(shapes[1 + turn :]) <= set(shapes[: 1 + turn]), cell.name


def _shape_of(loader, step):
  chosen = loader.order(step)
  lengths = packing.group_tokens(
    loader.store.lengths[chosen], loader.plan.layout
  )
  scored = loader.store.num_scored[chosen].sum(1, dtype=np.int64)
  return loader.plan.pack(lengths, scored)[0]


def test_gpu_tables_give_all_contenders_of_a_row_the_same_work(tmp_path):
  made = gpu_1b.make_cells(str(tmp_path), "xla", "", shape="a")
  assert [cell.name for cell in made] == [
    "dpo_jax, long",
    "TRL, long",
    "dpo_jax, real",
    "TRL, real",
    "dpo_jax, ultrafeedback",
    "TRL, ultrafeedback",
    "TRL, long, float32 weights",
  ]
  mine, peer = made[2:4]
  [folder] = [x for x in peer.command if x.startswith("--model=")]
  work, _ = interleave.read_work(folder.partition("=")[2])
  options = [x for x in mine.command[3:] if x.startswith("--")]
  data = ours.make_data(ours.parse(options))
  assert work["useful_flops"][:2] == data.work(range(2))["useful_flops"]
  assert (mine.executed, peer.executed) == ("shared_flops", "useful_flops")


@pytest.mark.slow
def test_the_kernel_check_runs_interpreted_and_finds_a_wrong_kernel(
  monkeypatch,
):
  shape = attention_worker.Shape(16, 2, 1, 1, (50, 40, 38))
  case = gpu_kernel.Case(shape, dtype="float32")
  assert gpu_kernel.check(case)
  bench = gpu_kernel.Bench(shape, num_calls=1)
  candidate = Tiles(128, 64, 4, 2)
  found = bench.fastest("forward", [candidate], lambda: True)
  assert found.tflops > 0
  right = triton.attend_triton

  def wrong_candidate(*x, kernels, **y):
    factor = 2.0 if kernels.forward == candidate else 1.0
    return factor * right(*x, kernels=kernels, **y)

  monkeypatch.setattr(triton, "attend_triton", wrong_candidate)
  found = bench.fastest("forward", [candidate], lambda: True)
  assert found.tiles == bench.default.forward
  monkeypatch.setattr(
    triton, "attend_triton", lambda *x, **y: 1.001 * right(*x, **y)
  )
  assert not gpu_kernel.check(case)


_COUNTER = """
import subprocess
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
            "shared_flops": 0.5,
            "peak_rss_mb": 1.0, "padding": 0.0}


interleave.serve(Counter())
"""
