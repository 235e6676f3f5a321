"""On-policy batches: what is sampled, judged, kept, and learned from."""

import dataclasses
import json
import types

from etils import epath
import jax
import numpy as np
import pytest

from dpo_jax import online
from dpo_jax.config import resolve
from dpo_jax.data import tokenizers
from dpo_jax.judges.classifier import Classifier
from dpo_jax.models import logps as logps_lib
from dpo_jax.online import mixing, rollouts
from dpo_jax.records.metrics import read_metrics
from dpo_jax.records.workdir import Workdir
from dpo_jax.train import Preempted, train
from dpo_jax.training import forward, initial_state
from dpo_jax.training.setup import build_run
from tests import faults, tiny

pytestmark = pytest.mark.usefixtures("in_haste")


def settle(loss="dpo", **overrides):
  config = tiny.make_config(**{f"online__{k}": v for k, v in overrides.items()})
  config.loss.name = loss
  return resolve(config).online


def test_a_kind_fills_in_the_knobs_it_reads():
  assert settle().judge is None
  pairs = settle(kind="pairs", judge="sentiment", flips=0.1)
  assert (pairs.label, pairs.every_steps, pairs.flips) == ("argmax", 1, 0.1)
  assert pairs.kl_weight is None
  ppo = settle("ppo", kind="rollouts", judge="sentiment")
  assert (ppo.gae_lambda, ppo.discount) == (0.95, 1.0)
  rloo = settle("reinforce", kind="rollouts", judge="sentiment")
  assert rloo.gae_lambda is None


@pytest.mark.parametrize(
  ("loss", "overrides", "message"),
  [
    ("dpo", dict(kind="pair"), "must be one of none, pairs, rollouts"),
    ("dpo", dict(every_steps=4), "'none' with loss 'dpo' does not read it"),
    ("dpo", dict(kind="pairs"), "online.judge is not set"),
    ("dpo", dict(kind="pairs", kl_target=0.1), "does not read it. It reads: e"),
    ("dpo", dict(kl_weight=0.1), "kl_weight=0.1 is set, and .*='none'"),
    ("dpo", dict(offline_fraction=0.5), "fraction=0.5 is set, and .*='none'"),
    (
      "ppo",
      dict(kind="rollouts", judge="x", offline_fraction=0.5),
      "fraction=0.5 is set, and online.kind='rollouts'",
    ),
    *(
      (
        "dpo",
        dict(kind="pairs", judge="x", offline_fraction=value),
        r"outside \(0, 1\): part of a batch",
      )
      for value in (-0.5, 0.0, 1.0, 1.5)
    ),
    (
      "dpo",
      dict(kind="pairs", judge="x", offline_fraction=0.3),
      "of batch_size=8 is 2.4 groups",
    ),
    (
      "dpo",
      dict(kind="pairs", judge="x", replay=True, offline_fraction=0.5),
      "unset one of the two",
    ),
    (
      "simpo",
      dict(kind="pairs", judge="x", kl_weight=0.1),
      "requires a single loss that reads a reference; got 'simpo'",
    ),
    ("ppo", dict(), "loss 'ppo' with online.kind='none'"),
    ("dpo", dict(kind="rollouts"), "such as ppo and reinforce"),
    ("kto", dict(kind="pairs"), "reads groups of the kind 'single'"),
    (
      "reinforce",
      dict(kind="rollouts", judge="sentiment", gae_lambda=0.9),
      "gae_lambda=0.9 is set",
    ),
    (
      "dpo",
      dict(kind="pairs", judge="x", label="bradley_terry", num_samples=4),
      "set it to 2",
    ),
    (
      "dpo",
      dict(kind="pairs", judge="x", epochs=3, offline_fraction=0.5),
      "epochs=3 must divide .* = 4, without groups of the data",
    ),
    ("dpo", dict(kind="pairs", judge="x", num_samples=1), "must be at least 2"),
    ("dpo", dict(kind="pairs", judge="x", flips=0.7), r"outside \[0, 0.5\]"),
    (
      "reward_aware",
      dict(kind="pairs", judge="x", flips=0.1),
      "online.flips=0.1 changes the order",
    ),
    (
      "reward_aware",
      dict(kind="pairs", judge="x", label="bradley_terry", num_samples=2),
      "online.label='bradley_terry' changes the order",
    ),
    (
      "dpo",
      dict(kind="pairs", judge="x", label="me"),
      "label='me' must be one",
    ),
    (
      "ppo",
      dict(kind="rollouts", judge="x", epochs=3),
      "epochs=3 must divide .* = 8",
    ),
  ],
)
def test_what_does_not_fit_is_refused(loss, overrides, message):
  with pytest.raises(ValueError, match=message):
    settle(loss, **overrides)


def test_single_tokens_lie_where_their_responses_put_them():
  groups = tiny.make_groups(5, num_slots=3)
  batch = tiny.pack(groups)
  values = np.arange(batch.slots.size, dtype=np.float32)
  values = values.reshape(batch.slots.shape)
  out = np.asarray(
    logps_lib.spread_by_slot(values, batch.slots, batch.valid.shape[1:], 6)
  )
  wanted = np.zeros_like(out)
  for r, row in enumerate(batch.slots):
    seen = {}
    for s, slot in enumerate(row):
      place = seen.setdefault(int(slot), 0)
      seen[int(slot)] += 1
      if slot < batch.valid[0].size and place < 6:
        g, k = divmod(int(slot), 3)
        wanted[r, g, k, place] = values[r, s]
  np.testing.assert_array_equal(out, wanted)


def test_log_probs_of_single_tokens_sum_to_the_response_s():
  policy = tiny.make_policy(value_head=True)
  params = tiny.make_params(policy)
  batch = tiny.pack(tiny.make_groups(4))
  sequences = forward.read_sequences(
    policy,
    params,
    None,
    batch,
    chunk_size=16,
    needs=frozenset({"token_logps", "token_values"}),
    max_tokens=16,
  )
  sums = np.asarray(sequences.token_logps).sum(-1)
  np.testing.assert_allclose(sums, sequences.logps, rtol=1e-5, atol=1e-5)
  counts = np.asarray(sequences.token_mask).sum(-1)
  np.testing.assert_array_equal(counts, sequences.num_tokens)
  assert sequences.token_values.shape == sequences.token_logps.shape


def label_pairs(responses, rewards, **settings):
  known = dict(label="argmax", flips=0.0, rng=np.random.default_rng(0))
  return rollouts.label_pairs(
    np.array(responses), np.array(rewards, float), **(known | settings)
  )


def test_the_best_is_held_against_the_worst_and_ties_are_left_out():
  responses = [[[1], [2], [3]], [[4], [5], [6]], [[7], [7], [7]]]
  pairs, score, is_tied = label_pairs(
    responses, [[0.0, 2.0, 1.0], [1.0, 1.0, 1.0], [3.0, 1.0, 2.0]]
  )
  assert pairs[0].tolist() == [[2], [1]]
  assert score[0].tolist() == [2.0, 0.0]
  assert is_tied.tolist() == [False, True, True]
  assert (pairs[1:] == -1).all()


def test_bradley_terry_labels_and_flips_have_their_rates():
  num = 4000
  responses = np.tile([[[1], [2]]], (num, 1, 1))
  rewards = np.tile([[1.0, 0.0]], (num, 1))
  first = label_pairs(responses, rewards, label="bradley_terry")[0][:, 0, 0]
  assert (first == 1).mean() == pytest.approx(1 / (1 + np.exp(-1)), abs=0.03)
  first = label_pairs(responses, rewards, flips=0.2)[0][:, 0, 0]
  assert (first == 1).mean() == pytest.approx(0.8, abs=0.03)


@pytest.mark.parametrize("reward", [0.0, 1.0])
def test_pairs_of_nothing_but_ties_are_told(caplog, reward):
  responses = np.array([[[1], [2]], [[3], [4]]])
  rewards = np.array([[reward, 0.0], [0.0, 0.0]])
  is_tied = label_pairs(responses, rewards)[2]
  assert is_tied.tolist() == [reward == 0.0, True]
  assert ("every sampled pair is a tie" in caplog.text) == (reward == 0.0)


def test_a_snapshot_comes_back_whole_or_not_at_all(tmp_path):
  snapshot = online.Snapshot(
    3,
    np.arange(2),
    np.ones((2, 2, 4), np.int32),
    np.ones((2, 2), np.float32),
    -np.ones((2, 2), np.float32),
    0.07,
    {"advantages": np.random.default_rng(0).normal(size=(2, 2, 4))},
  )
  path = epath.Path(tmp_path) / "online" / "3.npz"
  snapshot.write(path)
  back = online.Snapshot.read(path)
  assert (back.step, back.kl_weight) == (3, 0.07)
  np.testing.assert_array_equal(
    back.fields["advantages"], snapshot.fields["advantages"]
  )
  other = path.with_name("8.npz")
  other.write_bytes(path.read_bytes())
  with pytest.raises(ValueError, match=r"8\.npz holds the samples of step 3"):
    online.Snapshot.read(other)
  faults.flip_byte(path)
  with pytest.raises(ValueError, match=r"missing or damaged.* of step 3"):
    online.Snapshot.read(path)


def test_a_response_that_was_cut_off_goes_on_at_its_last_value():
  """The last return is V after the last token; 0 where it ended of itself."""
  tokenizer = types.SimpleNamespace(stop_ids=(9, 7), eos_id=9, vocab_size=10)
  responses = np.array([[[1, 9, -1], [1, 2, 3]], [[7, -1, -1], [4, 5, 7]]])
  is_cut = rollouts.are_cut(responses, tokenizer)
  assert is_cut.tolist() == [[False, True], [False, False]]
  letters = tokenizers.LetterTokenizer(4)  # its texts have one length
  assert not rollouts.are_cut(np.ones((2, 2, 3), int), letters).any()
  mask = responses >= 0
  zeros = np.zeros(responses.shape, np.float32)
  measured = {
    "token_logps": zeros,
    "ref_token_logps": zeros,
    "token_values": zeros,
    "token_mask": mask,
    "values": np.array([[5.0, 5.0], [5.0, 5.0]], np.float32),
  }
  rewards = np.array([[1.0, 2.0], [3.0, 4.0]])
  fields = rollouts.advantage_fields(
    rewards, measured, is_cut, kl_weight=0.0, discount=1.0, gae_lambda=1.0
  )
  # Without values and discount a return is the reward, and what comes after.
  wanted = np.where(is_cut, rewards + 5.0, rewards)[..., None] * mask
  np.testing.assert_allclose(fields["returns"], wanted, rtol=1e-6)


def run_config(folder, loss, **overrides):
  """A run whose judge, a classifier with random weights, tells texts apart."""
  rng = np.random.default_rng(0)
  path = f"{folder}/classifier.npz"
  Classifier(rng.normal(0, 2, 4096).astype(np.float32), 0.0).write(path)
  kinds = {"dpo": "pairs"}
  return tiny.make_config(
    **dict(
      loss__name=loss,
      online__kind=kinds.get(loss, "rollouts"),
      online__judge=f"classifier:{path}",
      online__every_steps=3,
      online__max_response_tokens=24,
      data__cache_dir=f"{folder}/cache",
      data__eval_fraction=0.0,
      optimizer__learning_rate=3e-3,
      total_steps=8,
      checkpoint__every_steps=2,
    )
    | overrides
  )


def figures(workdir):
  """Metrics of all steps and samplings, without rates."""
  rows = read_metrics(workdir, "train") + read_metrics(workdir, "online")
  return [
    {
      k: v
      for k, v in row.items()
      if not k.endswith(("per_second", "wait_fraction"))
    }
    for row in rows
  ]


def open_hybrid(folder, **overrides):
  """Returns the loader of a run of which half a batch is read from data."""
  config = run_config(folder, "dpo", online__offline_fraction=0.5, **overrides)
  run = build_run(config, Workdir.at(f"{folder}/run"))
  params = initial_state.load_params(run, run.config.policy.init)
  state = run.program.make_state(params, None)
  loader, _ = online.open_loaders(run, state, label="")
  loader.begin(0, state.policy_params, oldest=0)
  return run, loader


def test_half_of_a_hybrid_batch_is_read_from_the_data_in_its_order(tmp_path):
  run, loader = open_hybrid(tmp_path, online__kl_weight=0.1)
  offline = dataclasses.replace(run.data.train, batch_size=4)
  store = run.data.train.store
  for step in range(3):
    batch = loader.batch(step)
    is_group = batch.example_ids >= 0
    is_read = (batch.on_policy["sample_weight"] == 0).all(-1) & is_group
    ids = batch.example_ids[is_read]
    assert len(ids) == 4
    read = loader.order(step)[-4:]
    np.testing.assert_array_equal(read, offline.order(step))
    # The batch has the tokens of these groups, not samples for their prompts.
    wanted = sorted(np.concatenate(store.group(i)).tolist() for i in read)
    found = [row_of_group(batch, r, g) for r, g in np.argwhere(is_read)]
    assert sorted(found) == wanted
    weights = batch.on_policy["sample_weight"]
    np.testing.assert_allclose(weights.sum(), 8.0, rtol=1e-6)


def test_replay_keeps_the_pairs_of_all_samplings(tmp_path):
  """At step 3 batches are drawn from 24 pairs of step 0 and 24 of step 3."""
  config = run_config(tmp_path, "dpo", online__replay=True)
  run = build_run(config, Workdir.at(f"{tmp_path}/run"))
  params = initial_state.load_params(run, run.config.policy.init)
  state = run.program.make_state(params, None)
  loader, _ = online.open_loaders(run, state, label="")
  folder = run.workdir.online
  for step in (0, 3):
    loader.begin(step, state.policy_params, oldest=0)
  first, both = (online.Snapshot.read(folder / f"{n}.npz") for n in (0, 3))
  assert len(both.prompts) == 48
  for name in ("prompts", "responses", "ref_logps"):
    joined = getattr(both, name)
    np.testing.assert_array_equal(joined[:24], getattr(first, name))
  assert (both.responses[:24] != both.responses[24:]).any()
  ids = [loader.batch(step).example_ids for step in (3, 4, 5)]
  drawn = np.concatenate([x[x >= 0] for x in ids])
  assert len(set(drawn.tolist())) == len(drawn)
  assert 0 < (drawn < 24).sum() < len(drawn)


def row_of_group(batch, row, group):
  """Returns the tokens of a group: prompt, then responses."""
  segments = np.unique(batch.segments[row])
  segment = segments[segments > 0][group]
  return batch.tokens[row][batch.segments[row] == segment].tolist()


def test_data_with_unscored_response_tokens_are_not_mixed_in():
  store = types.SimpleNamespace(scored=np.ones(3, bool))
  source = types.SimpleNamespace(store=store)
  with pytest.raises(ValueError, match="one answer a response"):
    mixing.add_groups(source, [0], *[np.zeros((1, 1, 1))] * 3)


@pytest.mark.slow
@pytest.mark.parametrize(
  "loss", ["ppo", "reinforce", "dpo", "hybrid", "replay"]
)
def test_a_resume_between_two_samplings_changes_nothing(
  tmp_path, monkeypatch, loss
):
  extra = {} if loss == "dpo" else {"online__kl_target": 1.0}
  if loss == "hybrid":
    loss = "dpo"
    extra = {"online__offline_fraction": 0.5, "online__kl_weight": 0.1}
  if loss == "replay":
    loss, extra = "dpo", {"online__replay": True, "online__kl_weight": 0.1}
  config = run_config(tmp_path, loss, **extra)
  train(config, tmp_path / "whole")
  # Stopped at 4, which is between the samplings at 3 and 6; and at 6.
  faults.stop_at(monkeypatch, 4, 6)
  for _ in range(2):
    with pytest.raises(Preempted):
      train(config, tmp_path / "parts")
  train(config, tmp_path / "parts")
  whole, parts = figures(tmp_path / "whole"), figures(tmp_path / "parts")
  assert whole == parts
  sampled = read_metrics(tmp_path / "whole", "online")
  assert [row["step"] for row in sampled] == [0, 3, 6]
  assert len({row["reward"] for row in sampled}) == 3
  assert sampled[0]["kl"] == pytest.approx(0.0, abs=1e-4)
  if loss != "dpo":
    assert sampled[1]["kl_weight"] == pytest.approx(0.05 * (1 - 0.1 * 0.2))
  assert all(row["grad_norm"] > 0 for row in whole if "grad_norm" in row)


def test_prompts_of_a_mixture_are_sampled_by_their_weights(tmp_path):
  """One prompt of two sources is too long; the others keep their shares."""
  rows = {
    "a": [
      {"prompt": f"{i} a", "chosen": " x", "rejected": " y"} for i in range(4)
    ],
    "b": [
      {"prompt": f"{i} b", "chosen": " x", "rejected": " y"} for i in range(9)
    ],
  }
  rows["a"][0]["prompt"] = "0" * 60 + " a"
  entries = []
  for (name, records), weight in zip(rows.items(), (3.0, 1.0), strict=True):
    path = tmp_path / f"{name}.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in records))
    entries.append({"source": f"jsonl:{path}", "weight": weight})
  limit = tiny.make_policy().config.max_positions - 20
  config = run_config(
    tmp_path,
    "dpo",
    data__source="",
    data__sources=tuple(entries),
    online__max_response_tokens=limit,
  )
  run = build_run(config, Workdir.at(tmp_path / "run"))
  params = initial_state.load_params(run, run.config.policy.init)
  state = run.program.make_state(params, None)
  loader, _ = online.open_loaders(run, state, label="")
  loader.begin(0, state.policy_params, oldest=0)
  drawn = np.concatenate([loader.order(step) for step in range(3)])
  ids = loader.batch(0).example_ids.ravel()
  lines = [
    f"{tmp_path}/a.jsonl:{i + 1}" if i < 4 else f"{tmp_path}/b.jsonl:{i - 3}"
    for i in loader.order(0)
  ]
  assert sorted(loader.addresses(ids[ids >= 0])) == sorted(lines)
  assert 0 not in drawn  # the long one
  assert (drawn < 4).sum() > (drawn >= 4).sum()
  assert all(loader.batch(step).tokens.any() for step in range(3))


@pytest.mark.slow
def test_a_batch_of_nothing_but_ties_does_not_stop_the_run(tmp_path):
  """Its judge finds all responses the same; then weights stay as they are."""
  path = f"{tmp_path}/same.npz"
  config = run_config(tmp_path, "dpo", total_steps=4)
  Classifier(np.zeros(4096, np.float32), 0.0).write(path)
  config.online.judge = f"classifier:{path}"
  train(config, tmp_path / "run")
  rows = read_metrics(tmp_path / "run", "train")
  assert [row["loss"] for row in rows] == [0.0] * 4
  assert [row["grad_norm"] for row in rows] == [0.0] * 4
  assert [row["reward/accuracy"] for row in rows] == [None] * 4
  sampled = read_metrics(tmp_path / "run", "online")
  assert [row["ties"] for row in sampled] == [1.0, 1.0]


@pytest.mark.slow
def test_samples_used_twice_are_weighed_by_the_ratio(tmp_path):
  """At the first step of a sampling the ratio is 1 and the loss -mean A, 0."""
  config = run_config(
    tmp_path,
    "reinforce",
    online__every_steps=4,
    online__epochs=2,
    online__kl_weight=0.0,
    total_steps=4,
    optimizer__learning_rate=1e-2,
  )
  train(config, tmp_path / "run")
  losses = [row["loss"] for row in read_metrics(tmp_path / "run", "train")]
  assert losses[0] == pytest.approx(0.0, abs=1e-5)
  assert max(map(abs, losses[1:])) > 1e-3


@pytest.mark.slow
def test_a_kl_that_explodes_stops_the_run_and_keeps_what_is_done(tmp_path):
  config = run_config(
    tmp_path,
    "ppo",
    online__max_kl=0.5,
    online__kl_weight=0.0,
    optimizer__learning_rate=0.1,
  )
  with pytest.raises(online.DriftError, match=r"online.max_kl=0.5.*are kept"):
    train(config, tmp_path / "run")
  assert read_metrics(tmp_path / "run", "train")
  assert list((tmp_path / "run" / "checkpoints").glob("*/manifest.json"))


@pytest.mark.slow
def test_layouts_of_the_mesh_give_the_same_advantages(on_all_devices, tmp_path):
  """PPO on one device's mesh and on eight."""
  for name, sizes in (
    ("fsdp", {"data": 1, "fsdp": 8, "tensor": 1}),
    ("data", {"data": 8, "fsdp": 1, "tensor": 1}),
  ):
    config = run_config(tmp_path, "ppo", total_steps=2, mesh=sizes)
    train(config, tmp_path / name)
  assert len(jax.devices()) == 8
  one, other = (read_metrics(tmp_path / n, "train") for n in ("fsdp", "data"))
  for a, b in zip(one, other, strict=True):
    assert a["loss"] == pytest.approx(b["loss"], abs=1e-4)
    assert a["score/mean"] == pytest.approx(b["score/mean"], abs=1e-3)
