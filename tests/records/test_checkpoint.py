"""Checkpoints come back bit for bit, or are not believed."""

import itertools
import json
import logging
import shutil
import time
import types

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from dpo_jax.models import partition_rules
from dpo_jax.parallel import mesh as mesh_lib
from dpo_jax.records import manifest
from dpo_jax.records.arrays import check_same_tree
from dpo_jax.records.checkpoint import Checkpoints
from dpo_jax.records.manifest import verify
from dpo_jax.types import TrainState
from tests import faults, tiny

ONE = {"data": 1, "fsdp": 1, "tensor": 1}
MESHES = [
  ONE,
  {"data": 2, "fsdp": 1, "tensor": 1},
  {"data": 1, "fsdp": 2, "tensor": 1},
  {"data": 8, "fsdp": 1, "tensor": 1},
  {"data": 2, "fsdp": 2, "tensor": 2},
  {"data": 1, "fsdp": 8, "tensor": 1},
]
METRIC = "eval/reward/accuracy"


def open_checkpoints(workdir, keep=2, best_is_lower=False, **fields):
  return Checkpoints(
    workdir,
    keep=keep,
    best_metric=METRIC,
    best_is_lower=best_is_lower,
    **fields,
  )


def place(state, sizes=ONE):
  """A state on a mesh, and what to restore it onto."""
  devices = jax.devices()[: np.prod(list(sizes.values()))]
  mesh = mesh_lib.make_mesh(sizes, devices)
  shardings = partition_rules.state_shardings(state, state.params, mesh)
  # A new buffer each time, which may be donated.
  state = jax.jit(
    lambda s: jax.tree.map(lambda x: x + jnp.zeros_like(x), s),
    out_shardings=shardings,
  )(jax.device_get(state))
  target = jax.tree.map(
    lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s),
    state,
    shardings,
  )
  return state, target


def make_state(step=3, seed=0, **fields):
  """A state with float32, bfloat16 and int32 leaves and a loss state."""
  policy = tiny.make_policy(**fields)
  params = tiny.make_params(policy, seed)
  opt_state = optax.adamw(1e-3).init(params)
  # Moments that are not all zero, so that their order matters.
  opt_state = jax.tree.map(
    lambda x: x + (jnp.arange(x.size, dtype=x.dtype)).reshape(x.shape),
    opt_state,
  )
  return TrainState(
    step=jnp.int32(step),
    params=params,
    opt_state=opt_state,
    loss_state={"mean": jnp.float32(0.1)},
    ref_params=jax.tree.map(
      lambda x: x.astype(jnp.bfloat16), tiny.make_params(policy, seed + 1)
    ),
  )


# Noise, which does not compress: the arrays are the largest file.
HEAD = np.random.default_rng(0).normal(size=(64, 64)).astype(np.float32)


def small_state(step):
  return TrainState(
    step=jnp.int32(step),
    params={"head": HEAD + jnp.float32(step)},
    opt_state=optax.sgd(1.0).init({"head": jnp.zeros(1)}),
  )


def small_target():
  return place(small_state(0))[1]


def save_steps(workdir, steps, metrics=None, **fields):
  checkpoints = open_checkpoints(workdir, **fields)
  for step in steps:
    figure = (metrics or {}).get(step)
    checkpoints.save(
      step,
      place(small_state(step))[0],
      None if figure is None else {METRIC: figure},
    )
  checkpoints.close()
  return workdir / "checkpoints"


def restored_step(workdir, **fields):
  """Step that a run would resume from, after a check of its state."""
  checkpoints = open_checkpoints(workdir, **fields)
  state = checkpoints.restore(small_target())
  checkpoints.close()
  if state is None:
    return None
  step = int(state.step)
  np.testing.assert_array_equal(state.params["head"], HEAD + np.float32(step))
  return step


def assert_same_bits(one, other):
  assert jax.tree.structure(one) == jax.tree.structure(other)
  for (path, a), b in zip(
    jax.tree_util.tree_leaves_with_path(one),
    jax.tree.leaves(other),
    strict=True,
  ):
    assert a.dtype == b.dtype, path
    assert np.asarray(a).tobytes() == np.asarray(b).tobytes(), path


def test_a_state_comes_back_bit_for_bit_with_its_types(tmp_path):
  state, target = place(make_state())
  checkpoints = open_checkpoints(tmp_path)
  checkpoints.save(3, state, {METRIC: 0.5})
  checkpoints.close()
  checkpoints = open_checkpoints(tmp_path)
  restored = checkpoints.restore(target)
  checkpoints.close()
  assert_same_bits(state, restored)
  assert type(restored.opt_state[0]) is type(state.opt_state[0])
  assert {str(x.dtype) for x in jax.tree.leaves(restored)} == {
    "float32",
    "bfloat16",
    "int32",
  }


def test_a_relative_workdir_is_as_good_as_another(tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  state, target = place(make_state())
  checkpoints = open_checkpoints("runs/first")
  checkpoints.save(3, state, None)
  checkpoints.close()
  assert (tmp_path / "runs/first/checkpoints/3/manifest.json").exists()
  checkpoints = open_checkpoints("runs/first")
  assert_same_bits(state, checkpoints.restore(target))
  checkpoints.close()


@pytest.mark.fault(51)
@pytest.mark.slow
@pytest.mark.parametrize("there", MESHES[3:], ids=str)
def test_a_state_comes_back_on_any_mesh(tmp_path, there):
  source = make_state()
  state, _ = place(source, there)
  checkpoints = open_checkpoints(tmp_path)
  checkpoints.save(3, state, None)
  checkpoints.wait()
  for here in MESHES:
    _, target = place(source, here)
    restored = checkpoints.restore(target)
    assert_same_bits(source, restored)
    jax.tree.map(
      lambda x, t: (
        x.sharding.is_equivalent_to(t.sharding, x.ndim)
        or pytest.fail(f"{x.sharding} is not {t.sharding}")
      ),
      restored,
      target,
    )
  checkpoints.close()


@pytest.mark.slow
def test_a_checkpoint_gives_the_same_logits_on_any_mesh(tmp_path):
  policy = tiny.make_policy()
  source = make_state()
  checkpoints = open_checkpoints(tmp_path)
  checkpoints.save(3, place(source, MESHES[4])[0], None)
  checkpoints.wait()
  tokens = jnp.tile(jnp.arange(24, dtype=jnp.int32), (8, 1))
  ones, zeros = jnp.ones_like(tokens), jnp.zeros_like(tokens)

  def logits(params):
    hidden = policy.hidden_states(params, tokens, tokens, ones, zeros)
    return policy.readout(params).logits(hidden)

  wanted = jax.jit(logits)(source.params)
  for here in (ONE, MESHES[1], MESHES[4], MESHES[5]):
    restored = checkpoints.restore(place(source, here)[1])
    mesh = jax.tree.leaves(restored.params)[0].sharding.mesh
    with jax.set_mesh(mesh):
      got = jax.jit(logits)(restored.params)
    np.testing.assert_allclose(got, wanted, atol=1e-5)
  checkpoints.close()


def test_the_policy_alone_comes_back(tmp_path):
  state, target = place(make_state())
  checkpoints = open_checkpoints(tmp_path)
  checkpoints.save(3, state, None)
  checkpoints.wait()
  params = checkpoints.restore_params(target.params, step=3)
  assert_same_bits(state.params, params)
  checkpoints.close()


def test_a_fresh_workdir_has_nothing_to_restore(tmp_path):
  checkpoints = open_checkpoints(tmp_path)
  assert checkpoints.restore(small_target()) is None
  assert checkpoints.steps == [] and checkpoints.best_step is None
  checkpoints.close()


def test_any_step_can_be_asked_for(tmp_path):
  save_steps(tmp_path, [1, 2, 3], keep=3)
  checkpoints = open_checkpoints(tmp_path, keep=3)
  assert int(checkpoints.restore(small_target(), step=2).step) == 2
  assert int(checkpoints.restore(small_target()).step) == 3
  checkpoints.close()


@pytest.mark.parametrize(
  ("metrics", "best_is_lower", "kept", "best"),
  [
    ({1: 0.6, 2: 0.9, 3: 0.7, 4: 0.8, 5: 0.5}, False, [2, 4, 5], 2),
    ({1: 0.6, 2: 0.9, 3: 0.7, 4: 0.8, 5: 0.5}, True, [4, 5], 5),
    ({1: 0.1, 2: 0.9, 3: 0.7, 4: 0.8, 5: 0.5}, True, [1, 4, 5], 1),
    ({1: 0.9, 2: np.nan, 3: 0.7, 4: np.nan, 5: 0.5}, False, [1, 4, 5], 1),
    ({2: 0.4}, False, [2, 4, 5], 2),
    ({}, False, [4, 5], 5),
  ],
)
def test_the_latest_two_and_the_best_are_kept(
  tmp_path, metrics, best_is_lower, kept, best
):
  root = save_steps(
    tmp_path, [1, 2, 3, 4, 5], metrics, best_is_lower=best_is_lower
  )
  assert sorted(int(p.name) for p in root.iterdir()) == kept
  checkpoints = open_checkpoints(tmp_path, best_is_lower=best_is_lower)
  assert checkpoints.steps == kept
  assert checkpoints.best_step == best
  checkpoints.close()


def test_of_equally_good_steps_the_later_is_best(tmp_path):
  save_steps(tmp_path, [1, 2, 3], {1: 0.5, 2: 0.5, 3: 0.4}, keep=3)
  checkpoints = open_checkpoints(tmp_path, keep=3)
  assert checkpoints.best_step == 2
  checkpoints.close()


@pytest.mark.fault(50)
def test_the_best_is_remembered_over_a_restart(tmp_path):
  save_steps(tmp_path, [1, 2], {1: 0.9, 2: 0.2})
  root = save_steps(tmp_path, [3, 4], {3: 0.3, 4: 0.1})
  assert sorted(p.name for p in root.iterdir()) == ["1", "3", "4"]


def test_a_best_metric_that_nobody_measures_is_told(tmp_path, caplog):
  checkpoints = open_checkpoints(tmp_path)
  with caplog.at_level(logging.WARNING, "dpo_jax"):
    checkpoints.save(1, place(small_state(1))[0], {"eval/loss": 1.0})
    checkpoints.save(2, place(small_state(2))[0], {"eval/loss": 2.0})
  assert f"{METRIC!r} is not measured" in caplog.text
  assert "Measured: eval/loss" in caplog.text
  checkpoints.wait()
  assert checkpoints.best_step == 2
  checkpoints.close()


def test_without_a_best_metric_the_latest_step_is_best(tmp_path):
  """Also if it was saved without metrics, as when a run is told to stop."""
  checkpoints = Checkpoints(
    tmp_path, keep=2, best_metric="", best_is_lower=False
  )
  checkpoints.save(1, place(small_state(1))[0], {"eval/loss": 1.0})
  checkpoints.save(2, place(small_state(2))[0], None)
  checkpoints.wait()
  assert checkpoints.best_step == 2
  checkpoints.close()


@pytest.mark.fault(47)
def test_a_clock_that_runs_backwards_changes_no_step(tmp_path, monkeypatch):
  year = itertools.count(0, -365 * 24 * 3600)
  monkeypatch.setattr(time, "time", lambda: 2e9 + next(year))
  monkeypatch.setattr(time, "time_ns", lambda: 10**18 + 10**9 * next(year))
  save_steps(tmp_path, [1, 2, 3])
  assert restored_step(tmp_path) == 3
  save_steps(tmp_path, [4])
  assert restored_step(tmp_path) == 4


def test_a_run_that_went_back_saves_its_steps_again(tmp_path):
  save_steps(tmp_path, [1, 2])
  checkpoints = open_checkpoints(tmp_path)
  other = small_state(2).replace(params={"head": jnp.full((64, 64), 7.0)})
  checkpoints.save(2, place(other)[0], None)
  checkpoints.close()
  checkpoints = open_checkpoints(tmp_path)
  restored = checkpoints.restore(small_target())
  assert float(restored.params["head"][0, 0]) == 7.0
  checkpoints.close()


def test_a_state_may_be_donated_once_save_returns(tmp_path):
  state, _ = place(small_state(1))
  spoil = jax.jit(
    lambda s: jax.tree.map(lambda x: x * 0 - 1, s), donate_argnums=0
  )
  checkpoints = open_checkpoints(tmp_path)
  checkpoints.save(1, state, None)
  state = jax.block_until_ready(spoil(state))
  assert float(state.params["head"][0, 0]) == -1.0
  checkpoints.close()
  assert restored_step(tmp_path) == 1


def test_a_save_is_finished_by_polling(tmp_path):
  checkpoints = open_checkpoints(tmp_path)
  checkpoints.save(1, place(small_state(1))[0], None)
  manifest = tmp_path / "checkpoints" / "1" / "manifest.json"
  for _ in range(1000):
    checkpoints.poll()
    if manifest.exists():
      break
    time.sleep(0.01)
  assert verify(tmp_path / "checkpoints" / "1") == ""
  checkpoints.close()


def test_every_file_is_in_the_manifest(tmp_path):
  folder = save_steps(tmp_path, [1]) / "1"
  listed = set(json.loads((folder / "manifest.json").read_text()))
  there = {str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file()}
  assert there == listed | {"manifest.json"}
  assert any(name.startswith("params/") for name in listed)


def remove_arrays(folder):
  faults.largest_file(folder).unlink()


def empty(folder):
  shutil.rmtree(folder)
  folder.mkdir()


def make_foreign(folder):
  empty(folder)
  (folder / "notes.txt").write_text("not a checkpoint")


def make_file(folder):
  shutil.rmtree(folder)
  folder.write_text("not a folder")


def leave_out(folder):
  """Takes the largest file from the manifest, and flips a byte of it."""
  largest = faults.largest_file(folder)
  manifest = json.loads((folder / "manifest.json").read_text())
  del manifest[str(largest.relative_to(folder))]
  (folder / "manifest.json").write_text(json.dumps(manifest))
  faults.flip_byte(largest)


@pytest.mark.fault(40, 41, 42)
@pytest.mark.parametrize(
  ("damage", "reason"),
  [
    (lambda f: faults.flip_byte(faults.largest_file(f)), "is damaged"),
    (lambda f: faults.flip_byte(faults.largest_file(f), 0), "is damaged"),
    (lambda f: faults.flip_byte(faults.largest_file(f), -1), "is damaged"),
    (lambda f: faults.truncate(faults.largest_file(f)), "is damaged"),
    (remove_arrays, "is missing"),
    (empty, "no manifest"),
    (make_foreign, "no manifest"),
    (make_file, "no manifest"),
    (lambda f: (f / "manifest.json").unlink(), "no manifest"),
    (lambda f: faults.truncate(f / "manifest.json"), "manifest.json is"),
    (lambda f: faults.flip_byte(f / "manifest.json", 0), "manifest.json is"),
    (lambda f: (f / "manifest.json").write_text("[]"), "manifest.json is"),
    (lambda f: (f / "manifest.json").write_text("3"), "manifest.json is"),
    (lambda f: (f / "manifest.json").write_text("{}"), "manifest.json is"),
    (leave_out, "is not in manifest.json"),
    (lambda f: (f / "params" / "x").write_text(""), "is not in manifest.json"),
  ],
  ids=[
    "byte flipped",
    "first byte flipped",
    "last byte flipped",
    "file truncated",
    "file missing",
    "empty folder",
    "foreign folder",
    "foreign file",
    "no manifest",
    "manifest truncated",
    "manifest byte flipped",
    "manifest is a list",
    "manifest is a number",
    "manifest is empty",
    "manifest lacks a file",
    "file added",
  ],
)
def test_a_damaged_step_is_moved_aside_and_the_one_before_is_restored(
  tmp_path, caplog, damage, reason
):
  root = save_steps(tmp_path, [1, 2])
  damage(root / "2")
  with caplog.at_level(logging.WARNING, "dpo_jax"):
    assert restored_step(tmp_path) == 1
  assert reason in caplog.text
  assert str(root / "2") in caplog.text
  assert (tmp_path / "quarantine" / "2-0").exists()
  assert not (root / "2").exists()


def test_a_step_that_was_set_aside_is_trained_and_saved_again(tmp_path):
  root = save_steps(tmp_path, [1, 2])
  for number in range(3):
    faults.flip_byte(faults.largest_file(root / "2"))
    assert restored_step(tmp_path) == 1
    # A user may have looked at one and thrown it away.
    if number == 1:
      shutil.rmtree(tmp_path / "quarantine" / "2-0")
    save_steps(tmp_path, [2])
    assert restored_step(tmp_path) == 2
  assert len(list((tmp_path / "quarantine").iterdir())) == 2


def test_whole_steps_are_left_where_they_are(tmp_path, caplog):
  root = save_steps(tmp_path, [1, 2])
  (root / "README").write_text("not a step")
  with caplog.at_level(logging.WARNING, "dpo_jax"):
    assert restored_step(tmp_path) == 2
  assert not caplog.records
  assert not (tmp_path / "quarantine").exists()


def test_a_reader_passes_damage_over_and_leaves_the_folder_alone(
  tmp_path, caplog
):
  root = save_steps(tmp_path, [1, 2, 3], {1: 0.7, 2: 0.8, 3: 0.9}, keep=3)
  (root / "3" / "manifest.json").unlink()  # as in a save that is under way
  unfinished = root / "4.orbax-checkpoint-tmp-0"
  unfinished.mkdir()
  with caplog.at_level(logging.WARNING, "dpo_jax"):
    checkpoints = open_checkpoints(tmp_path, is_reader=True)
  assert checkpoints.steps == [1, 2] and checkpoints.best_step == 2
  params = checkpoints.restore_params(small_target().params, step=2)
  np.testing.assert_array_equal(params["head"], HEAD + np.float32(2))
  checkpoints.close()
  assert "no manifest" in caplog.text
  assert (root / "3").exists() and unfinished.exists()
  assert not (tmp_path / "quarantine").exists()


def test_a_reader_verifies_the_params_of_the_step_that_it_reads(tmp_path):
  """And no other file: an optimizer's is twice as large."""
  root = save_steps(tmp_path, [1, 2, 3], {1: 0.9, 2: 0.8, 3: 0.7}, keep=3)
  read = []
  with pytest.MonkeyPatch.context() as patch:
    sha256 = manifest._sha256
    patch.setattr(
      manifest, "_sha256", lambda path: read.append(path) or sha256(path)
    )
    checkpoints = open_checkpoints(tmp_path, is_reader=True)
    best = checkpoints.best_step
    shutil.rmtree(root / "1" / "rest")
    checkpoints.restore_params(small_target().params, step=best)
    checkpoints.close()
  assert best == 1 and read
  parts = {path.relative_to(root).parts[:2] for path in read}
  assert {part for step, part in parts} & {"params"}
  assert all(step == "1" and part != "rest" for step, part in parts)
  # Damage there is noticed, and the next best taken.
  [largest] = sorted(
    (p for p in (root / "1" / "params").rglob("*") if p.is_file()),
    key=lambda p: p.stat().st_size,
  )[-1:]
  largest.write_bytes(b"?" + largest.read_bytes()[1:] + b"?")
  checkpoints = open_checkpoints(tmp_path, is_reader=True)
  assert checkpoints.best_step == 2
  checkpoints.close()


def test_a_reader_of_nothing_finds_nothing(tmp_path):
  checkpoints = open_checkpoints(tmp_path / "run", is_reader=True)
  assert checkpoints.best_step is None
  checkpoints.close()


def restore_onto(tmp_path, change):
  save_steps(tmp_path, [1])
  checkpoints = open_checkpoints(tmp_path)
  target = small_target()
  try:
    return checkpoints.restore(target.replace(**change(target)))
  finally:
    checkpoints.close()


def with_head(shape, dtype):
  def change(target):
    head = target.params["head"]
    leaf = jax.ShapeDtypeStruct(shape, dtype, sharding=head.sharding)
    return {"params": {"head": leaf}}

  return change


@pytest.mark.fault(44)
@pytest.mark.parametrize(
  ("change", "message"),
  [
    (
      with_head((64, 32), jnp.float32),
      r"head: \(\(64, 64\), 'float32'\) there",
    ),
    (with_head((64, 64), jnp.bfloat16), "'bfloat16'\\) wanted"),
    (
      lambda t: {"params": {"tail": t.params["head"]}},
      "tail: nothing there",
    ),
    (lambda t: {"opt_state": {"mu": t.step}}, "opt_state/mu: nothing there"),
  ],
  ids=["shape", "dtype", "tree", "optimizer"],
)
def test_a_checkpoint_of_something_else_is_refused(tmp_path, change, message):
  with pytest.raises(ValueError, match=message):
    restore_onto(tmp_path, change)


def test_the_policy_of_another_model_is_refused(tmp_path):
  save_steps(tmp_path, [1])
  checkpoints = open_checkpoints(tmp_path)
  wanted = with_head((64, 64), jnp.bfloat16)(small_target())["params"]
  with pytest.raises(ValueError, match="1/params holds another model"):
    checkpoints.restore_params(wanted, step=1)
  checkpoints.close()


def test_the_first_five_differences_are_listed_and_all_are_counted():
  wanted = {f"w{i}": jax.ShapeDtypeStruct((2,), jnp.float32) for i in range(7)}
  found = {k: jax.ShapeDtypeStruct((3,), jnp.float32) for k in wanted}
  with pytest.raises(ValueError) as error:
    check_same_tree(wanted, found, "there")
  message = str(error.value)
  assert "7 arrays differ" in message
  assert "w4: ((3,), 'float32') there, ((2,), 'float32') wanted" in message
  assert "w5" not in message


@pytest.mark.fault(43)
def test_no_room_is_said_in_bytes_before_anything_is_written(
  tmp_path, monkeypatch
):
  save_steps(tmp_path, [1])
  monkeypatch.setattr(
    shutil, "disk_usage", lambda path: types.SimpleNamespace(free=10_000)
  )
  checkpoints = open_checkpoints(tmp_path)
  # 64 * 64 float32 and the step.
  with pytest.raises(OSError, match=r"takes 16,388 bytes, and .* 10,000 free"):
    checkpoints.save(2, place(small_state(2))[0], None)
  checkpoints.close()
  assert restored_step(tmp_path) == 1


def test_a_bucket_has_no_end(tmp_path, monkeypatch):
  def no_such_folder(path):
    raise OSError("not a local folder")

  monkeypatch.setattr(shutil, "disk_usage", no_such_folder)
  save_steps(tmp_path, [1])
  assert restored_step(tmp_path) == 1
