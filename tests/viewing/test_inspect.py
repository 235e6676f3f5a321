"""Groups of a batch are shown as the step gets them."""

import io
import json

import numpy as np
import pytest
from rich.console import Console

from dpo_jax import config as config_lib
from dpo_jax.data import packing
from dpo_jax.data.alphabets import ByteTokenizer
from dpo_jax.data.groups import Limits
from dpo_jax.train import NonFiniteError, train
from dpo_jax.viewing import groups, preflight, rows
from tests import tiny
from tests.test_train import change_batches

SHAPE = dict(num_groups=3, num_slots=3)


def text_group(prompt, *responses):
  """Token ids of bytes, BOS before the prompt and EOS after a response."""
  return [
    np.int32([256, *prompt.encode()]),
    *(np.int32([*r.encode(), 257] if r else []) for r in responses),
  ]


@pytest.fixture
def console():
  return Console(
    record=True, width=100, force_terminal=True, file=io.StringIO()
  )


@pytest.mark.parametrize("layout", packing.LAYOUTS)
def test_groups_of_a_batch_are_those_that_were_packed(layout):
  rng = np.random.default_rng(0)
  made = tiny.make_groups(9, num_slots=3, seed=4)
  made[2][2] = np.int32([])  # an empty slot
  masks = [[rng.random(len(r)) < 0.6 for r in group[1:]] for group in made]
  lengths = np.array([[len(part) for part in group] for group in made])
  chosen = packing.assign_rows(
    packing.group_tokens(lengths, layout),
    np.array([sum(m.sum() for m in group) for group in masks]),
    shape=packing.RowShape(160, 160, **SHAPE),
    layout=layout,
  )
  scores = rng.normal(size=(9, 3)).astype(np.float32)
  batch = packing.fill_rows(
    chosen,
    made,
    scores,
    np.arange(100, 109),
    shape=packing.RowShape(160, 160, **SHAPE),
    layout=layout,
    ref_logps=None,
    scored=masks,
  )
  found = list(rows.read_groups(batch))
  wanted = [(row, i) for row, members in enumerate(chosen) for i in members]
  assert [(g.row, g.example_id - 100) for g in found] == wanted
  for group in found:
    i = group.example_id - 100
    np.testing.assert_array_equal(group.prompt.ids, made[i][0])
    np.testing.assert_array_equal(group.scores, scores[i])
    present = [k for k in range(3) if len(made[i][k + 1])]
    assert [part.slot for part in group.responses] == present
    for part in group.responses:
      np.testing.assert_array_equal(part.ids, made[i][part.slot + 1])
      np.testing.assert_array_equal(part.is_scored, masks[i][part.slot])
    copies = 1 if layout == "shared" else len(present)
    assert len(group.parts) == len(present) + copies


def part(ids, is_scored=None, slot=0):
  ids = np.int32(list(ids))
  everything = np.ones(len(ids), bool)
  return rows.Part(slot, ids, everything if is_scored is None else is_scored)


def spans(text):
  """Pieces of a text with their styles."""
  return [(text.plain[s.start : s.end], str(s.style)) for s in text.spans]


def render(one, *, with_ids=False, has_color=True):
  return rows.render_part(
    one, ByteTokenizer(), with_ids=with_ids, has_color=has_color
  )


def test_each_kind_of_token_has_its_colour():
  assert spans(render(part([256, *b"hi"], slot=-1))) == [
    ("<bos>", "cyan reverse"),
    ("hi", "cyan"),
  ]
  is_scored = np.array([True, True, False, False, True, True])
  assert spans(render(part([*b"abcde", 257], is_scored))) == [
    ("ab", "green"),
    ("cd", "yellow"),
    ("e", "green"),
    ("<eos>", "green reverse"),
  ]


def test_without_colour_brackets_mark_what_is_not_scored():
  is_scored = np.array([False, True, True])
  text = render(part([*b"ab", 257], is_scored), has_color=False)
  assert text.plain == "[a]b<eos>"


def test_a_response_without_its_end_is_marked_as_cut():
  assert render(part(b"ab")).plain == "ab [cut: no EOS]"
  assert render(part([*b"ab", 257])).plain == "ab<eos>"


def test_ids_stand_before_their_tokens():
  text = render(part([*b"ab", 257]), with_ids=True)
  assert text.plain == "97:a 98:b 257:<eos> "


def test_control_characters_do_not_reach_the_terminal():
  text = render(part([*b"a\r\x1b[31mb\x7f\n", 257])).plain
  assert text == "a\u240d\u241b[31mb\u2421\n<eos>"


def test_a_prompt_that_was_cut_is_at_its_limit():
  limits = Limits(max_tokens=20, max_prompt_tokens=8)

  def is_at_limit(num_prompt, num_response):
    its = [part(b"p" * num_prompt, slot=-1), part(b"r" * num_response)]
    return rows.Group(0, 0, its, np.zeros(1)).is_prompt_at_limit(limits)

  assert is_at_limit(8, 12) and is_at_limit(15, 5)
  assert not is_at_limit(7, 12) and not is_at_limit(14, 5)


def write(path, records):
  path.write_text("".join(json.dumps(record) + "\n" for record in records))
  return f"jsonl:{path}"


def pairs(num):
  return [
    {"prompt": f"question {i}:", "chosen": f" yes {i}", "rejected": " no"}
    for i in range(num)
  ]


@pytest.fixture
def config(tmp_path):
  source = write(tmp_path / "pairs.jsonl", pairs(40))
  return tiny.make_config(data__source=source, data__eval_fraction=0.25)


def test_a_run_is_shown_with_file_and_line(config, console, tmp_path):
  run = groups.build(config)
  groups.show(console, run, "train", 0, 2, with_ids=False)
  text = console.export_text()
  batch = run.data.train.batch(0)
  for example in batch.example_ids[batch.example_ids >= 0].ravel()[:2]:
    line = int(run.data.train.store.records[example])
    address = f"{tmp_path}/pairs.jsonl:{line + 1}"
    assert address in text.replace("\n", "")
    assert f"<bos>question {line}:" in text
    assert f" yes {line}<eos>" in text
  assert text.count("response 0, score 1,") == 2


def test_a_held_out_set_is_shown_and_others_are_refused(config, console):
  run = groups.build(config)
  groups.show(console, run, "eval", 0, 1, with_ids=False)
  with pytest.raises(ValueError, match="--split=test must be one of train, ev"):
    groups.show(console, run, "test", 0, 1, with_ids=False)
  with pytest.raises(ValueError, match=r"--step=99: eval has \d batches"):
    groups.show(console, run, "eval", 99, 1, with_ids=False)


def test_a_config_for_a_pod_is_inspected_on_one_machine(config, caplog):
  config.mesh = {"data": 4, "fsdp": 64}
  config.batch_size = 256
  run = groups.build(config)
  assert run.program.placement.mesh.size == 1
  assert "mesh={'data': 4, 'fsdp': 64} is not of this machine" in caplog.text


def test_the_report_agrees_with_the_texts(config, tmp_path):
  run = groups.build(config)
  report = preflight.make_report(run)
  report.write(tmp_path / "report")
  facts = json.loads((tmp_path / "report" / "report.json").read_text())
  texts = [
    pairs(40)[int(i)]
    for i in run.data.train.store.records[run.data.train.indices]
  ]
  for name, column, extra in (
    ("prompts", "prompt", 1),  # BOS
    ("chosen", "chosen", 1),  # EOS
    ("rejected", "rejected", 1),
  ):
    lengths = [len(text[column]) + extra for text in texts]
    tokens = facts["tokens"]["train"][name]
    assert tokens["median"] == np.median(lengths)
    assert tokens["longest"] == max(lengths)
  assert facts["length_accuracy"] == 1.0  # " yes 7" is longer than " no"
  assert facts["steps_per_epoch"] == len(texts) / 8
  steps = [run.data.train.num_tokens(step) for step in range(8)]
  assert facts["tokens_per_step"] == np.mean(steps)
  assert sorted({c["name"] for c in facts["checks"]}) == sorted(
    config_lib.default_config().data.checks
  )
  assert (tmp_path / "report" / "lengths.png").read_bytes()[:4] == b"\x89PNG"
  text = (tmp_path / "report" / "report.txt").read_text()
  assert "100.0 % of the training pairs" in text.replace("\n            ", " ")


def test_a_check_that_would_stop_is_reported_and_does_not_stop(config):
  config.data.checks.length_bias = "stop"
  report = preflight.make_report(groups.build(config))
  [message] = report.stops
  assert "choosing by length alone" in message
  assert f"stop: {message}" in report.text
  config.data.checks.length_bias = "off"
  report = preflight.make_report(groups.build(config))
  assert not report.stops and "choosing by length" not in report.text


@pytest.mark.usefixtures("in_haste")
def test_a_dump_shows_the_blamed_group_first(
  config, console, tmp_path, monkeypatch
):
  poisoned = []

  def poison(loader, step, batch):
    if step != 1:
      return batch
    ref_logps = batch.ref_logps.copy()
    ref_logps[0, -1] = np.nan
    poisoned.append(int(batch.example_ids[0, -1]))
    return batch.replace(ref_logps=ref_logps)

  change_batches(monkeypatch, poison)
  config.data.layout = "padded"  # each group has a row, so none is padding
  with pytest.raises(NonFiniteError):
    train(config, tmp_path / "run")
  dump = tmp_path / "run" / "nonfinite" / "2.npz"
  groups.show_dump(console, dump, 2, with_ids=False)
  text = console.export_text().replace("\n", "")
  first, second = (text.index(part) for part in ("group ", "pairs.jsonl:"))
  assert "step 2: loss is nan" in text[:first]
  assert text[first:second].startswith(f"group {poisoned[0]}, row 0: ")
  assert ", guilty, loss nan, " in text and text.count("guilty") == 1
  with pytest.raises(FileNotFoundError, match=r"3\.npz does not exist"):
    groups.show_dump(console, dump.with_name("3.npz"), 2, with_ids=False)
