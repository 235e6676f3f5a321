"""Plans: by formula, by hand, and by compiling for each kind of TPU."""

import dataclasses
import math
import os
import signal
import subprocess
import sys
import types

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec
import numpy as np
import pytest

from dpo_jax.models import logps as logps_lib
from dpo_jax.models import presets
from dpo_jax.models.config import REMAT_POLICIES
from dpo_jax.models.decoder import Readout
from dpo_jax.parallel import active_mesh, mesh
from dpo_jax.parallel.placement import Placement
from dpo_jax.planning import (
  compilation,
  hlo,
  remedies,
  report,
  roofline,
  sweep,
  topology,
)
from dpo_jax.records.workdir import Workdir
from dpo_jax.training.setup import build_run
from tests import faults, tiny


def make_request(name="v5e-8", **fields):
  config = tiny.make_config(
    mesh={"data": 2, "fsdp": -1, "tensor": 2}, policy__remat="full"
  )
  shapes = dict(rows=8, row_tokens=128, vocab_size=256) | fields
  return compilation.Request(config, topology.parse_topology(name), **shapes)


@pytest.fixture
def on_cpu(monkeypatch):
  """The eight simulated devices in the place of a v5e-8."""
  monkeypatch.setattr(
    topology.Topology, "devices", lambda self: jax.devices()[:8]
  )


@pytest.mark.parametrize(
  "given", ["rows", "row_tokens", "scored_tokens", "vocab_size"]
)
def test_any_part_of_the_shapes_makes_a_stand_in(given):
  """None is ignored: without one the data are read."""
  none = dict(rows=0, row_tokens=0, scored_tokens=0, vocab_size=0)
  assert not make_request(**none).is_stand_in
  assert make_request(**none | {given: 64}).is_stand_in


def test_flops_are_those_of_a_loop_over_matrices():
  policy = tiny.make_policy(remat="full")
  c = policy.config
  rows, tokens, scored = 3, 10, 4
  forward = 0
  for _ in range(c.num_layers):
    for entries in (
      c.d_model * c.num_heads * c.head_dim,
      c.d_model * c.num_kv_heads * c.head_dim,
      c.d_model * c.num_kv_heads * c.head_dim,
      c.num_heads * c.head_dim * c.d_model,
      3 * c.d_model * c.d_ff,
    ):
      forward += 2 * entries * rows * tokens
    for token in range(tokens):
      # Scores and weighted values of every token that this one sees.
      seen = token + 1
      forward += rows * 2 * (2 * c.num_heads * c.head_dim * seen)
  head = 2 * c.vocab_size * c.d_model * rows * scored
  work = roofline.count_work(
    c,
    policy.abstract_params(),
    num_rows=rows,
    row_tokens=tokens,
    scored_tokens=scored,
    has_live_reference=True,
  )
  assert work.model_flops == 4 * (forward + head)
  assert work.executed_flops == work.model_flops + forward + head


def test_matrices_and_the_rest_are_all_parameters():
  policy = tiny.make_policy()
  work = roofline.count_work(
    policy.config,
    policy.abstract_params(),
    num_rows=1,
    row_tokens=1,
    scored_tokens=1,
    has_live_reference=False,
  )
  norms = (2 * policy.config.num_layers + 1) * policy.config.d_model
  total = work.layer_entries + work.head_entries + norms
  assert total == policy.config.num_params()


def test_the_state_of_a_device_is_counted_shard_by_shard(on_cpu):
  request = make_request()
  subject = compilation.build(request)
  _, shardings = subject.program.abstract_state()
  memory = compilation.known_memory(subject)
  device = jax.devices()[0]
  params = jax.tree.map(
    lambda x, sharding: jax.device_put(np.zeros(x.shape, x.dtype), sharding),
    subject.program.policy.abstract_params(),
    shardings.params,
  )
  held = sum(
    shard.data.nbytes
    for leaf in jax.tree.leaves(params)
    for shard in leaf.addressable_shards
    if shard.device == device
  )
  assert memory["parameters"] == held
  # Adam's two moments, and two counts.
  assert memory["optimizer state"] == pytest.approx(2 * held, abs=16)


def test_the_plan_has_the_shapes_of_the_runs_own_batch(on_cpu):
  request = dataclasses.replace(
    make_request(), rows=0, row_tokens=0, vocab_size=0
  )
  request.config.data.source = "synthetic:review_pairs:80"
  subject = compilation.build(request)
  batch, placement = subject.batch, subject.program.placement
  run = build_run(request.config, Workdir.at("x"), on=placement.mesh)
  real = placement.place_rows(run.data.train.batch(0))
  for name in ("tokens", "targets", "valid"):
    planned, placed = getattr(batch, name), getattr(real, name)
    assert (planned.shape, planned.dtype) == (placed.shape, placed.dtype)
    assert planned.sharding == placed.sharding
  assert batch.ref_logps.shape == batch.score.shape


@dataclasses.dataclass
class Step:
  """A step in XLA's words.

  Attributes:
    text: text of the compiled program.
    error: message of a failed compilation, or "".
    peak: bytes of a device.
  """

  text: str = ""
  error: str = ""
  peak: int = 2**30

  def lower(self, *arguments):
    return self

  def compile(self):
    if self.error:
      raise jax.errors.JaxRuntimeError(f"RESOURCE_EXHAUSTED: {self.error}")
    return self

  def as_text(self):
    return self.text

  def memory_analysis(self):
    return types.SimpleNamespace(
      peak_memory_in_bytes=self.peak,
      temp_size_in_bytes=0,
      argument_size_in_bytes=0,
    )


def make_report(step, monkeypatch):
  monkeypatch.setattr(Placement, "compile_step", lambda self, *arguments: step)
  return report.report(dataclasses.replace(make_request(), price=1.0))


_STEP = """
ENTRY %main (p: f32[64]) -> f32[64] {
  %p = f32[64] parameter(0)
  ROOT %r = f32[64] all-reduce(%p), replica_groups={}, to_apply=%add
}
"""


@pytest.mark.parametrize(
  "text", [_STEP.replace("all-reduce", "all-add"), _STEP.replace(" = ", " := ")]
)
def test_an_unreadable_program_is_not_one_without_collectives(
  on_cpu, monkeypatch, text
):
  made = make_report(Step(text), monkeypatch)
  assert made.fits and math.isnan(made.received) and math.isnan(made.seconds)
  assert f"collectives: {hlo.UNREADABLE}" in made.text
  assert "no collectives" not in made.text and "nan" not in made.text
  table = made.text.partition("MFU reached there")[0].splitlines()
  for name in ("ICI at least", "DCN at least", "a step at MFU"):
    (line,) = [line for line in table if line.startswith(name)]
    assert line.endswith(hlo.UNREADABLE)
  assert f"bound by: {hlo.UNREADABLE}" in made.text
  assert f"{hlo.UNREADABLE} ({jax.__version__}): " in made.text
  readable = make_report(Step(_STEP), monkeypatch)
  assert readable.received == 2 * 256 * 7 / 8
  assert hlo.UNREADABLE not in readable.text


def test_devices_or_slices_that_seem_not_to_communicate_are_unreadable():
  """A training step's do: its gradient is of all rows."""
  one_slice = jax.devices()[:4]
  two_slices = [types.SimpleNamespace(slice_index=i // 2) for i in range(4)]
  within = _STEP.replace("{}", "{{0,1},{2,3}}")
  alone = _STEP.replace("all-reduce", "negate")
  for text, devices in (
    (alone, one_slice),
    (alone, two_slices),
    (within, two_slices),
  ):
    with pytest.raises(hlo.UnreadableError, match="no collective of"):
      compilation.read_collectives(text, devices)
  assert len(compilation.read_collectives(within, one_slice)) == 1
  assert compilation.read_collectives(alone, one_slice[:1]) == []


def test_an_unreadable_message_is_not_printed_as_a_number(on_cpu, monkeypatch):
  made = make_report(Step(error="no room for it"), monkeypatch)
  assert not made.fits and math.isnan(made.peak)
  assert f"It does not fit: what it wanted is {hlo.UNREADABLE}" in made.text
  assert made.text.endswith("RESOURCE_EXHAUSTED: no room for it")
  assert "nan" not in made.text


def test_what_does_not_fit_is_a_table_of_remedies(on_cpu, monkeypatch):
  step = Step(
    error="Ran out of memory on HBM, the total memory required for HLO"
    " temporaries (20.50G) exceeds available HBM (15.75G)."
  )
  monkeypatch.setattr(Placement, "compile_step", lambda self, *arguments: step)
  request = make_request()
  request.config.policy.remat = "none"
  made = compilation.make_plan(compilation.build(request), request)
  assert not made.fits
  assert made.peak == pytest.approx(20.5 * 2**30, rel=1e-4)
  text = report.describe(made, request)
  assert "It does not fit: 20.50 GiB wanted, 16.00" in text
  for change in (
    "policy.remat=attention",
    "policy.remat=full",
    "mesh.data=1 mesh.fsdp=4",
    "lora.rank=16 policy.param_dtype=bfloat16",
    "optimizer.name=rmsprop",
    "optimizer.name=adafactor",
  ):
    assert change in text


def test_bfloat16_is_offered_for_what_is_not_trained(libtpu):
  """It frees half of the frozen parameters, and is refused for the others."""
  request = make_request()
  request.config.policy.frozen = "^embedding"
  subject = compilation.build(request)
  memory = compilation.known_memory(subject)
  made = types.SimpleNamespace(
    subject=subject, memory=memory, peak=sum(memory.values())
  )
  freed = {row["what to change"]: row for row in remedies.remedies(made)}
  share = freed["policy.param_dtype=bfloat16"]["frees about, GiB"]
  request.config.policy.param_dtype = "bfloat16"
  less = compilation.build(request)
  other = compilation.known_memory(less)
  saved = (memory["parameters"] - other["parameters"]) / 2**30
  # Norms are not sharded as the embedding is.
  assert share == pytest.approx(saved, rel=0.05)


_STRONGER = {
  "none": ["attention", "full"],
  "dots": ["attention", "full"],
  "attention": ["full"],
  "full": [],
}


def test_every_remat_policy_is_tested():
  assert _STRONGER.keys() == REMAT_POLICIES.keys()


@pytest.mark.parametrize("remat", _STRONGER)
def test_remedies_offer_remat_policies_that_keep_less(on_cpu, remat):
  request = make_request()
  request.config.policy.remat = remat
  subject = compilation.build(request)
  memory = compilation.known_memory(subject)
  activations = 2.0 * 2**30
  made = types.SimpleNamespace(
    subject=subject, memory=memory, peak=sum(memory.values()) + activations
  )
  freed = {
    row["what to change"].removeprefix("policy.remat="): row["frees about, GiB"]
    for row in remedies.remedies(made)
    if row["what to change"].startswith("policy.remat=")
  }
  assert list(freed) == _STRONGER[remat]
  # A policy that keeps less frees more, and never all activations.
  assert list(freed.values()) == sorted(freed.values())
  assert all(0.0 < gib < 2.0 for gib in freed.values())


@pytest.mark.parametrize(
  ("message", "size"),
  [
    (
      "Ran out of memory on HBM, the total memory required for HLO temporaries"
      " (38.08G) exceeds available HBM (15.75G).",
      38.08 * 2**30 + 7,
    ),
    ("Used 300.0M of 15.75G hbm. Exceeded", 300 * 2**20),
    ("something else", math.nan),
  ],
)
def test_what_xla_wanted_is_read_from_its_message(message, size):
  np.testing.assert_equal(compilation.wanted_bytes(message, 7.0), size)


@pytest.mark.slow
def test_a_step_that_is_too_large_is_told_by_the_real_compiler(libtpu):
  """The message is libtpu's own, whose words may change."""
  request = make_request("v5e-1", rows=1, row_tokens=4096, vocab_size=128_256)
  request.config.policy.preset = "llama3-8b"
  request.config.policy.remat = "none"
  request.config.batch_size = request.config.eval.batch_size = 1
  request.config.mesh = {"data": 1}
  made = compilation.make_plan(compilation.build(request), request)
  assert not made.fits
  assert made.peak > made.memory["parameters"] > 2**34
  text = report.describe(made, request)
  assert "nan" not in text and "policy.remat=full" in text


def test_bounds_by_hand():
  """One chip of v5e that does exactly a second of each."""
  chip = topology.CHIPS["v5e"]
  work = roofline.Work(1.0, 16 * chip.flops, 3, 3, 1, 1)
  bounds = roofline.lower_bounds(
    work,
    chip.hbm_bandwidth,
    [
      hlo.Collective("all-gather", 2 * chip.ici_bandwidth, 2, 16),
      hlo.Collective("all-reduce", chip.dcn_bandwidth, 1, 2, True),
    ],
    topology.parse_topology("v5e-16"),
  )
  assert bounds == {"compute": 1.0, "HBM": 1.0, "ICI": 1.0, "DCN": 1.0}


def test_a_batch_that_the_mesh_does_not_divide_is_refused(on_cpu):
  with pytest.raises(ValueError, match="--rows=6 must be a multiple of 4"):
    request = make_request(rows=6)
    compilation.build(request)


@pytest.mark.slow
def test_a_sweep_ranks_the_meshes_that_divide_the_work(on_cpu):
  """The eight simulated devices, which compile in earnest."""
  request = make_request()
  tried, received = [], []
  for sizes in sweep.candidates(request, 100):
    program = compilation.build(request, sizes).program
    tried.append(sizes)
    work = roofline.count_work(
      program.policy.config,
      program.policy.abstract_params(),
      num_rows=8,
      row_tokens=128,
      scored_tokens=128,
      has_live_reference=program.has_live_reference,
    )
    received.append(
      roofline.collective_bytes(
        work, program.policy.config, sizes, num_rows=8, row_tokens=128
      )
    )
  assert len({tuple(sizes.items()) for sizes in tried}) == len(tried) > 3
  assert received == sorted(received) and received[0] < received[-1]
  for sizes in tried:
    assert math.prod(sizes.values()) == 8
    # Two heads of keys and values; rows too short for a context axis.
    assert sizes["tensor"] <= 2 and sizes["context"] == 1
  rows = sweep.sweep(request, 3)
  assert {row["mesh"] for row in rows} == {
    " x ".join(f"{axis} {n}" for axis, n in sizes.items())
    for sizes in tried[:3]
  }
  assert {row["fits"] for row in rows} == {"yes"}
  order = [(row["step, s"], row["received, GiB"]) for row in rows]
  assert order == sorted(order) and order[0] < order[-1]


def test_a_sweep_without_a_mesh_says_so(on_cpu):
  with pytest.raises(ValueError, match="no mesh of v5e-8 divides"):
    sweep.sweep(make_request(rows=3), 3)


def test_a_mesh_that_does_not_compile_is_the_last_line_of_a_sweep(
  on_cpu, capsys
):
  """The others are ranked: what fits, then the fastest."""
  seconds = iter([None, 3.0, math.nan, 1.0, 2.0])

  def get_report(request, sizes):
    step = next(seconds)
    if step is None:
      raise RuntimeError("a failed check")
    return report.Report("tables", step != 3, 2.0**30, step, step, "ICI")

  rows = sweep.sweep(make_request(), 5, get_report)
  assert [row["fits"] for row in rows] == ["yes"] * 3 + ["no", "not compiled"]
  assert [row["step, s"] for row in rows[:3]] == [1.0, 2.0, hlo.UNREADABLE]
  assert rows[2]["received, GiB"] == hlo.UNREADABLE
  assert f"{rows[-1]['mesh']}: a failed check" in capsys.readouterr().err


def test_a_compiler_that_ends_its_process_is_an_error():
  assert report.in_child(math.sqrt, 4.0) == 2.0
  with pytest.raises(RuntimeError, match="the compiler ended its process"):
    report.in_child(os.abort)
  with pytest.raises(ValueError, match="invalid literal"):
    report.in_child(int, "four")


_IN_CHILD = """
from dpo_jax.planning import report
from dpo_jax.system import signals

signals.begin()
report.in_child(exec, "import time; print('ready', flush=True); time.sleep(60)")
"""


@pytest.mark.parametrize("to_all", [False, True])
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_the_compiler_too_and_prints_nothing(number, to_all):
  """To the command alone, or from a terminal, whose Ctrl-C reaches both."""
  process = faults.spawn(_IN_CHILD)
  assert process.stdout.readline() == "ready\n"
  (os.killpg if to_all else os.kill)(process.pid, number)
  # The pipe ends when both have ended.
  assert process.communicate(timeout=20)[0] == ""
  assert process.returncode == -number


@pytest.mark.slow
@pytest.mark.parametrize(
  "name", ["v4-8", "v5e-8", "v5p-16", "v6e-8", "tpu7x-8", "2xv5e-4"]
)
def test_the_tiny_step_compiles_for_every_kind(libtpu, name):
  request = make_request(name)
  made = compilation.make_plan(compilation.build(request), request)
  assert made.fits
  assert 0 < made.peak < 2**30
  kinds = {c.kind for c in made.collectives}
  assert kinds & {"all-gather", "reduce-scatter", "all-reduce"}
  assert any(c.crosses for c in made.collectives) == ("x" in name[:2])
  text = report.describe(made, request)
  assert "bound by" in text and "all-gather" in text


@pytest.mark.slow
def test_the_step_compiles_for_gpus_that_are_not_here(cuda):
  """With the attention kernels in it, and collectives over NVLink."""
  request = make_request("h200-8")
  plan = compilation.make_plan(compilation.build(request), request)
  assert plan.fits and not plan.unread
  assert plan.peak > plan.memory["parameters"] > 0
  kinds = {c.kind for c in plan.collectives}
  assert "all-gather" in kinds and "all-reduce" in kinds
  assert not any(c.crosses for c in plan.collectives)
  assert plan.bounds["NVLink"] > 0 and plan.bounds["network"] == 0
  assert "NVLink at least" in report.describe(plan, request)


@pytest.mark.slow
def test_a_block_of_the_vocabulary_is_cut_before_it_is_gathered(libtpu):
  """A TPU's compiler would gather the whole head for each of 16 blocks."""
  request = make_request("v5e-4", rows=4, row_tokens=2048, vocab_size=32768)
  request.config.mesh = {"data": 1, "fsdp": -1, "tensor": 1, "context": 1}
  subject = compilation.build(request)
  made = compilation.make_plan(subject, request)
  received = sum(
    c.num_bytes * c.trips for c in made.collectives if c.kind == "all-gather"
  )
  params = subject.program.policy.abstract_params()
  whole = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(params))
  # At most forward, recomputed, and backward.
  assert 0 < received < 3 * whole


@pytest.mark.slow
def test_a_kernel_is_gathered_once_a_pass(libtpu, monkeypatch):
  """A TPU's compiler would gather it for each product that reads it."""
  shape = dict(num_layers=2, d_model=1024, d_ff=4096, head_dim=128)
  wide = presets.PRESETS["tiny"] | dict(num_heads=8, num_kv_heads=8) | shape
  monkeypatch.setitem(presets.PRESETS, "tiny", wide)
  request = make_request("v5e-8", row_tokens=1024)
  request.config.mesh = {"data": 1, "fsdp": -1}
  request.config.policy.compute_dtype = "bfloat16"
  subject = compilation.build(request)
  made = compilation.make_plan(subject, request)
  received = sum(c.num_bytes * c.trips for c in made.collectives)
  params = subject.program.policy.abstract_params()
  whole = 2 * sum(x.size for x in jax.tree.leaves(params))
  # Forward, backward, and the gradient, which a ring of products sums in
  # twice its bytes.
  assert 2 * whole < received < 4.1 * whole


@pytest.mark.slow
def test_a_block_of_tied_embeddings_is_gathered_as_a_gather(libtpu):
  """Not as an all-reduce of zeros with a device's part, at twice the bytes,
  which a TPU's compiler makes of a gather along its lanes."""
  grid = mesh.make_mesh(
    {"fsdp": -1}, topology.parse_topology("v5e-64").devices()
  )

  def place(*shape, spec, dtype=jnp.bfloat16):
    sharding = NamedSharding(grid, PartitionSpec(*spec))
    return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)

  def logps(hidden, embedding, targets):
    return logps_lib.chunked_token_figures(
      hidden,
      Readout(embedding.T.astype(jnp.bfloat16)),
      targets,
      chunk_size=0,
      figures=frozenset({"logps"}),
    )["logps"]

  depth, vocab_size = 2048, 16384
  with jax.set_mesh(grid):
    text = (
      jax.jit(logps)
      .lower(
        place(64, 2048, depth, spec=(active_mesh.ROW_AXES,)),
        place(vocab_size, depth, spec=(None, "fsdp"), dtype=jnp.float32),
        place(64, 2048, spec=(active_mesh.ROW_AXES,), dtype=jnp.int32),
      )
      .compile()
      .as_text()
    )
  received = sum(c.num_bytes * c.trips for c in hlo.collectives(text, 64))
  assert 0.9 < received / (2 * depth * vocab_size) < 1.1


@pytest.mark.slow
def test_remat_dots_runs_no_attention_kernel_again(libtpu, monkeypatch):
  """On a TPU; `tests/models/test_decoder.py` has the blocks of XLA."""
  texts = []
  read = hlo.collectives

  def keep(text, *arguments):
    texts.append(text)
    return read(text, *arguments)

  monkeypatch.setattr(hlo, "collectives", keep)

  def num_kernels(remat):
    request = make_request("v5e-4", rows=4, row_tokens=512)
    request.config.policy.remat = remat
    compilation.make_plan(compilation.build(request), request)
    return texts[-1].count('custom_call_target="tpu_custom_call"')

  kept = num_kernels("none")
  assert num_kernels("dots") == kept > 0
  assert num_kernels("full") > kept


@pytest.mark.slow
def test_the_command_prints_a_plan(libtpu, tmp_path):
  config = tmp_path / "config.py"
  config.write_text(
    "from tests import tiny\n"
    "def get_config():\n"
    "  return tiny.make_config(data__source='jsonl:/nowhere.jsonl',\n"
    "                          mesh={'data': 1, 'fsdp': -1})\n"
  )
  command = [sys.executable, "-m", "dpo_jax.plan", f"--config={config}"]

  def run(*more):
    return subprocess.run(
      command + list(more),
      capture_output=True,
      text=True,
      env=faults.environment(),
      cwd=faults.ROOT,
      check=False,
    )

  done = run("--topology=v5e-4")
  assert done.returncode == 1
  assert "give the shapes by --row_tokens" in done.stderr
  assert "Traceback" not in done.stderr
  done = run("--topology=v5e-4", "--row_tokens=128", "--price_per_chip_hour=1")
  assert done.returncode == 0, done.stderr
  assert "4 chips (v5e:2x2), 4 devices" in done.stdout
  assert "cost at 1 a chip-hour" in done.stdout
