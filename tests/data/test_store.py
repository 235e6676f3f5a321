"""The store: limits, drops, its address, its writing, its split."""

from collections import Counter
import dataclasses
import datetime
import errno
import gzip
import itertools
import json
import logging
import os
import shutil
import tempfile
import time

import numpy as np
import pytest

from dpo_jax.data import (
  checksums,
  groups,
  messages,
  mismatched,
  sources,
  synthetic,
)
from dpo_jax.data.examples import RecordError
from dpo_jax.data.reading import Reading, Seen, shape_records
from dpo_jax.data.store import Limits, Store, build_store
from dpo_jax.data.template_child import Caps
from dpo_jax.data.templates import ChatTemplate
from dpo_jax.data.tokenizers import ByteTokenizer, HFTokenizer
from tests import faults, tiny
from tests.data import folders

BOS, EOS = ByteTokenizer.bos_id, ByteTokenizer.eos_id
BYTES = ByteTokenizer()
LIMITS = Limits(100, 50)


@dataclasses.dataclass
class Listed:
  """A source of given records."""

  records: list[dict]
  spec: str = "listed:records"
  digest: str = "of the content"

  def __iter__(self):
    for i, record in enumerate(self.records):
      yield f"{self.spec}:{i + 1}", record


def pair(prompt, chosen, rejected="no"):
  return {"prompt": prompt, "chosen": chosen, "rejected": rejected}


def build(records, tmp_path, limits=LIMITS, tokenizer=BYTES):
  """A store of its own, however often a test asks for one."""
  folder = tmp_path / f"store_{len(list(tmp_path.iterdir()))}"
  return build_store(Listed(records), tokenizer, limits, str(folder))


def texts(opened, index):
  """A group's parts as text, `[` for BOS and `]` for EOS."""
  marks = {BOS: "[", EOS: "]"}
  return [
    "".join(marks.get(i) or chr(i) for i in part.tolist())
    for part in opened.group(index)
  ]


# What is stored.


def test_a_group_is_its_prompt_and_its_responses(tmp_path):
  opened = build([pair("ab", " c", " de"), pair("f", "g", "h")], tmp_path)
  assert [texts(opened, i) for i in range(2)] == [
    ["[ab", " c]", " de]"],
    ["[f", "g]", "h]"],
  ]
  np.testing.assert_array_equal(opened.lengths, [[3, 3, 4], [2, 2, 2]])
  np.testing.assert_array_equal(opened.starts[:, 0], [0, 10])
  np.testing.assert_array_equal(opened.score, [[1, 0], [1, 0]])
  assert (len(opened), opened.num_slots) == (2, 2)


def test_a_truncated_response_has_no_eos(tmp_path):
  ranking = {"prompt": "p", "responses": ["a", "bb", "c"], "scores": [1, 3, 2]}
  records = [
    {**pair("p", "c", "r"), "truncated": [False, True]},
    {**ranking, "truncated": [True, False, False]},
    {"prompt": "p", "completion": "c", "label": True, "truncated": True},
    {**pair("p", "c", "r"), "truncated": None},
  ]
  opened = build(records, tmp_path)
  assert [texts(opened, i) for i in range(4)] == [
    ["[p", "c]", "r", ""],
    ["[p", "bb]", "c]", "a"],
    ["[p", "c", "", ""],
    ["[p", "c]", "r]", ""],
  ]
  np.testing.assert_array_equal(opened.num_scored[0], [2, 1, 0])


def test_a_truncated_answer_loses_the_end_that_its_template_wrote(tmp_path):
  """From the first stop id on."""
  tokenizer = HFTokenizer(folders.write_folder(tmp_path / "tokenizer"))
  messages = [
    [{"role": role, "content": content}]
    for role, content in (
      ("user", "hi"),
      ("assistant", "yes"),
      ("assistant", "no"),
    )
  ]
  record = pair(*messages)
  flags = ([False, False], [True, False])
  whole, cut = (
    build([{**record, "truncated": flag}], tmp_path, tokenizer=tokenizer)
    for flag in flags
  )
  ids = [part.tolist() for part in whole.group(0)]
  assert ids[1][-1] in tokenizer.stop_ids
  assert [part.tolist() for part in cut.group(0)] == [
    ids[0],
    ids[1][:-1],
    ids[2],
  ]


def test_groups_of_uneven_size_leave_slots_empty(tmp_path):
  ranking = {"prompt": "p", "responses": ["a", "bb", "c"], "scores": [1, 3, 2]}
  opened = build([pair("p", "x"), ranking], tmp_path)
  assert texts(opened, 0) == ["[p", "x]", "no]", ""]
  assert texts(opened, 1) == ["[p", "bb]", "c]", "a]"]
  np.testing.assert_array_equal(opened.score, [[1, 0, 0], [3, 2, 1]])
  np.testing.assert_array_equal(opened.lengths[0], [2, 2, 3, 0])


def test_first_slots_keeps_the_best_responses(tmp_path):
  records = [
    {"prompt": f"p{i}", "responses": ["a", "b", "c"], "scores": [i, 1, 2]}
    for i in range(3)
  ]
  opened = build(records, tmp_path)
  two = opened.first_slots(2)
  assert [texts(two, i) for i in range(3)] == [
    ["[p0", "c]", "b]"],
    ["[p1", "c]", "a]"],
    ["[p2", "a]", "c]"],
  ]
  np.testing.assert_array_equal(two.score, opened.score[:, :2])
  assert opened.first_slots(3) is opened
  # Reference log-probs are cached by the digest.
  assert len({opened.digest, two.digest, opened.first_slots(1).digest}) == 3


def test_every_record_of_a_large_source_arrives(tmp_path):
  """More than three chunks of the tokenizer, and in the order of the source."""
  num = 3 * groups._CHUNK + 501
  opened = build_store(
    sources.open_source(f"synthetic:review_pairs:{num}"),
    BYTES,
    Limits(400, 200),
    str(tmp_path),
  )
  expected = [
    [f"[{r['prompt']}", f"{r['chosen']}]", f"{r['rejected']}]"]
    for r in synthetic.review_pairs(num, 0)
    if r["chosen"] != r["rejected"]
  ]
  assert opened.report["records"] == num
  assert len(opened) == len(expected)
  assert [texts(opened, i) for i in range(len(opened))] == expected


def test_long_records_are_tokenized_a_few_at_a_time(tmp_path, monkeypatch):
  """A chunk ends where it holds enough text, and no record is lost."""
  records = [pair(f"{i}", "x" * 30, "y" * 20) for i in range(7)]
  whole = build(records, tmp_path)
  monkeypatch.setattr(groups, "_CHUNK_CHARS", 100)
  chunks = groups._chunks(shape_records(Listed(records), Reading(), Seen()))
  assert [len(chunk) for chunk in chunks] == [2, 2, 2, 1]
  assert_same(snapshot(whole), snapshot(build(records, tmp_path)))


# Limits: tokens of "bytes" are letters, plus BOS and EOS.


@pytest.mark.fault(8, 10)
@pytest.mark.parametrize(
  ("record", "expected"),
  [
    # 11 + 3 tokens fit in 20: the prompt's limit of 8 does not count.
    (pair("abcdefghij", "xy"), ["[abcdefghij", "xy]", "no]"]),
    # 11 + 11 do not: the prompt gives two, and keeps its BOS.
    (pair("abcdefghij", "x" * 10), ["[cdefghij", "x" * 10 + "]", "no]"]),
    # The prompt is down to 8, so the response loses its end, and its EOS.
    (pair("abcdefghij", "x" * 15), ["[defghij", "x" * 12, "no]"]),
    # A short prompt is not cut, and leaves the response the room.
    (pair("ab", "x" * 30), ["[ab", "x" * 17, "no]"]),
    # The longest response decides, whichever it is.
    (pair("abcdefghij", "xy", "z" * 15), ["[defghij", "xy]", "z" * 12]),
    # Just fits.
    (pair("abcdefgh", "x" * 10), ["[abcdefgh", "x" * 10 + "]", "no]"]),
    (pair("abcdefg", "x" * 11), ["[abcdefg", "x" * 11 + "]", "no]"]),
  ],
)
def test_a_prompt_loses_its_beginning_then_a_response_its_end(
  tmp_path, record, expected
):
  opened = build([record], tmp_path, Limits(20, 8))
  assert texts(opened, 0) == expected
  assert opened.report["prompts_cut"] == (expected[0] != f"[{record['prompt']}")
  assert opened.report["responses_cut"] == sum(
    not text.endswith("]") for text in expected[1:]
  )


def test_a_prompt_without_bos_loses_its_beginning_too(tmp_path):
  folder = folders.write_folder(tmp_path / "tokenizer", puts_bos=False)
  tokenizer = HFTokenizer(folder)
  prompt = "what does the cat say and the dog"
  whole = tokenizer.encode([prompt], is_rendered=False, is_continuation=False)[
    0
  ]
  assert len(whole) > 5
  opened = build(
    [pair(prompt, "x y z " * 9)], tmp_path, Limits(20, 5), tokenizer
  )
  assert opened.group(0)[0].tolist() == whole[-5:]
  assert opened.lengths[0, 1] == 15


def test_limits_hold_for_any_lengths(tmp_path):
  rng = np.random.default_rng(0)
  records = [
    pair("p" * rng.integers(1, 40), "c" * rng.integers(1, 40), "r")
    for _ in range(200)
  ]
  opened = build(records, tmp_path, Limits(24, 9))
  for i, record in enumerate(records):
    prompt, *responses = texts(opened, i)
    whole_prompt = "[" + record["prompt"]
    longest = len(record["chosen"]) + 1
    assert max(len(prompt) + len(r) for r in responses) <= 24
    # Nothing is cut that need not be.
    if len(whole_prompt) + longest <= 24:
      assert (prompt, responses[0]) == (whole_prompt, record["chosen"] + "]")
    else:
      assert len(prompt) + len(responses[0]) == 24 or len(prompt) <= 9
      assert len(prompt) >= min(9, len(whole_prompt))
    assert prompt[0] == "["


@pytest.mark.parametrize(("most", "prompt"), [(10, 10), (10, 0), (5, 9)])
def test_limits_that_leave_no_room_are_refused(most, prompt):
  with pytest.raises(ValueError, match=f"max_prompt_tokens={prompt} must be"):
    Limits(most, prompt)


# Drops.


@pytest.mark.fault(11, 12)
def test_what_is_dropped_is_counted_by_reason(tmp_path):
  talk = "\n\nHuman: a\n\nAssistant: x"
  records = [
    pair("p", ""),
    pair("p", "a", " \n"),
    {"prompt": "p", "completion": "\t"},
    pair("p", "same", "same"),
    {"chosen": talk, "rejected": talk},
    {"chosen": talk, "rejected": talk.replace("Human: a", "Human: b")},
    {"chosen": talk, "rejected": talk + "\n\nHuman: b\n\nAssistant: y"},
    pair("p", "good"),
  ]
  opened = build(records, tmp_path)
  assert opened.report["records"] == 8
  assert opened.report["groups"] == 1
  assert opened.report["dropped"] == {
    "empty_response": 3,
    "identical_responses": 2,
    "prompts_differ": 2,
  }
  assert opened.report["shapes"] == {
    "demonstration": 1,
    "pair": 4,
    "transcripts": 3,
  }
  assert texts(opened, 0) == ["[p", "good]", "no]"]


@pytest.mark.fault(9)
def test_responses_that_a_cut_makes_identical_are_dropped(tmp_path):
  records = [pair("p", "x" * 40 + "a", "x" * 40 + "b"), pair("p", "a")]
  opened = build(records, tmp_path, Limits(20, 8))
  assert opened.report["dropped"] == {"identical_responses": 1}
  assert len(build(records, tmp_path, Limits(60, 8))) == 2


def test_a_ranking_is_dropped_only_if_all_its_responses_are_the_same(tmp_path):
  records = [
    {"prompt": "p", "responses": list(letters), "scores": [1, 2, 3]}
    for letters in ("aaa", "aab", "baa")
  ]
  opened = build(records, tmp_path)
  assert opened.report["dropped"] == {"identical_responses": 1}
  assert [texts(opened, i)[1:] for i in range(2)] == [
    ["b]", "a]", "a]"],
    ["a]", "a]", "b]"],
  ]


def test_an_empty_prompt_needs_a_bos(tmp_path):
  records = [pair("", "the cat"), pair("what", "the cat")]
  assert texts(build(records, tmp_path), 0)[0] == "["
  folder = folders.write_folder(tmp_path / "tokenizer", puts_bos=False)
  opened = build(records, tmp_path, tokenizer=HFTokenizer(folder))
  assert opened.report["dropped"] == {"empty_prompt": 1}


def test_text_without_tokens_is_an_empty_response(tmp_path):
  """A vocabulary without the letters, and without an unknown token."""
  trained = folders.train_pieces("prepend")
  content = json.loads(trained.to_str())
  content["model"]["unk_token"] = None
  trained = type(trained).from_str(json.dumps(content))
  tokenizer = HFTokenizer(folders.write_folder(tmp_path / "tokenizer", trained))
  nothing = pair("the cat", "日本", "the dog")
  records = [
    nothing,
    {**nothing, "truncated": [True, True]},
    pair("the cat", "the dog"),
  ]
  opened = build(records, tmp_path, tokenizer=tokenizer)
  assert opened.report["dropped"] == {"empty_response": 2}


@pytest.mark.fault(14, 22)
def test_no_usable_group_is_an_error_that_tells_why(tmp_path):
  records = [pair("p", "x", "x"), pair("p", "x", ""), pair("p", "")]
  with pytest.raises(ValueError) as caught:
    build(records, tmp_path)
  message = str(caught.value)
  assert "listed:records holds no usable group: 3 records" in message
  assert "'identical_responses': 1" in message
  assert "'empty_response': 2" in message


def test_no_records_at_all_is_an_error(tmp_path):
  with pytest.raises(ValueError, match="no usable group: 0 records"):
    build([], tmp_path)


# Faults of the source.


def test_an_io_error_in_the_middle_leaves_no_store(tmp_path):
  class Failing(Listed):
    def __iter__(self):
      for i in range(groups._CHUNK + 5):
        yield f"{i}", pair(f"p{i}", "x")
      raise OSError("Input/output error")

  with pytest.raises(OSError, match="Input/output error"):
    build_store(Failing([]), BYTES, LIMITS, str(tmp_path))
  assert list(tmp_path.iterdir()) == []


def test_a_line_that_is_not_json_stops_the_run_and_is_named(tmp_path):
  path = tmp_path / "a.jsonl"
  path.write_text('{"prompt": "p", "chosen": "a", "rejected": "b"}\n{"prom')
  source = sources.open_source(f"jsonl:{path}")
  with pytest.raises(RecordError, match=f"^{path}:2: not a line of JSON"):
    build_store(source, BYTES, Limits(20, 10), str(tmp_path))


def test_a_cache_in_a_bucket_is_refused():
  source = sources.open_source("synthetic:review_pairs:3")
  with pytest.raises(ValueError, match="must be a local folder"):
    build_store(source, BYTES, Limits(20, 10), "gs://b")


def test_a_broken_record_stops_the_run_and_is_named(tmp_path):
  with pytest.raises(RecordError, match=r"^listed:records:2: found the colum"):
    build([pair("p", "x"), {"promt": "p"}], tmp_path)


def test_as_many_broken_records_as_allowed_are_left_out(tmp_path, caplog):
  broken = ValueError("listed:records:3: not a line of JSON")
  records = [pair("p", "x"), {"promt": "p"}, broken, pair("q", "y")]

  def build_with(most):
    return build_store(
      Listed(records),
      BYTES,
      LIMITS,
      str(tmp_path),
      Reading(max_broken_records=most),
    )

  opened = build_with(2)
  assert (opened.report["broken"], opened.report["records"]) == (2, 4)
  assert [texts(opened, i)[0] for i in range(2)] == ["[p", "[q"]
  assert "left out: listed:records:2: found the columns promt" in caplog.text
  assert "left out: listed:records:3: not a line of JSON" in caplog.text
  with pytest.raises(RecordError, match=r"^listed:records:3: not a line"):
    build_with(1)


# Endless for an answer "endless", and fails for "broken".
FAULTY = (
  "{% for m in messages %}{{ m.content }}</s>{% if m.content == 'endless' %}"
  "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}"
  "{% endfor %}{% elif m.content == 'broken' %}{{ raise_exception('no') }}"
  "{% endif %}{% endfor %}"
)


def chat(answer):
  asked = {"role": "user", "content": "p"}
  answers = [{"role": "assistant", "content": text} for text in (answer, "no")]
  return {"prompt": [asked], "chosen": answers[:1], "rejected": answers[1:]}


@pytest.fixture(scope="module")
def faulty(tmp_path_factory):
  folder = tmp_path_factory.mktemp("faulty")
  return HFTokenizer(folders.write_folder(folder, chat_template=FAULTY))


@pytest.mark.parametrize("most", [0, 9])
def test_a_template_that_takes_too_long_stops_the_run_at_its_record(
  tmp_path, faulty, most
):
  """However many broken records are allowed: it is the time of a chunk."""
  records = [chat("a"), chat("b"), *[chat("endless")] * 50]
  start = time.monotonic()
  with pytest.raises(TimeoutError, match=r"^listed:records:3: .* 7 of 156 con"):
    build_store(
      Listed(records),
      faulty,
      LIMITS,
      str(tmp_path),
      Reading(max_broken_records=most),
      template_timeout_s=1.0,
    )
  assert time.monotonic() - start < 8


def test_the_first_record_over_its_own_cap_stops_the_run(
  tmp_path, faulty, monkeypatch
):
  template = ChatTemplate(
    FAULTY, {}, date=datetime.date.today(), caps=Caps(seconds=1)
  )
  monkeypatch.setattr(faulty, "_template", template)
  start = time.monotonic()
  with pytest.raises(RecordError, match=r"^listed:records:2: .*than 1 s"):
    build([chat("a"), *[chat("endless")] * 50], tmp_path, tokenizer=faulty)
  assert time.monotonic() - start < 8


def test_a_record_that_a_template_fails_on_moves_no_other(tmp_path, faulty):
  records = [chat("a"), chat("broken"), chat("b")]
  opened = build_store(
    Listed(records),
    faulty,
    LIMITS,
    str(tmp_path),
    Reading(max_broken_records=1),
  )
  found = [faulty.decode(opened.group(i)[1]) for i in range(len(opened))]
  assert [text.strip() for text in found] == ["a", "b"]
  assert opened.report["broken"] == 1


@pytest.mark.fault(21)
def test_groups_that_repeat_or_contradict_another_are_counted(tmp_path):
  def fed_back(completion, label):
    return {"prompt": "p", "completion": completion, "label": label}

  records = [
    *(pair("p", "a"), pair("p", "a"), pair("q", "a"), pair("p", "b")),
    *(pair("p", "no", "b"), pair("p", "a", "b")),
    *(fed_back("x", True), fed_back("x", False), fed_back("y", True)),
    fed_back("y", True),
    {**pair("p", "u", "v"), "score_chosen": 1, "score_rejected": 2},
    {**pair("p", "v", "u"), "score_chosen": 2, "score_rejected": 2},
  ]
  report = build(records, tmp_path).report
  assert report["duplicates"] == 2  # pairs 1 and 2, and y wanted twice
  assert report["contradictions"] == 4  # pairs 4 and 5, and x of both labels
  assert report["ties"] == 1
  assert report["chosen_scores_lower"] == 1


def test_messages_that_are_too_long_to_render_are_cut(tmp_path, monkeypatch):
  """A prompt at its start, a response at its end, as tokens are cut."""
  monkeypatch.setattr(messages, "MAX_CHARS", 12)
  tokenizer = HFTokenizer(folders.write_folder(tmp_path / "tokenizer"))
  turns = [
    {"role": role, "content": content}
    for role, content in (
      ("system", "the dog ran"),
      ("user", "what does the cat"),
      ("assistant", "the cat sat on"),
    )
  ]
  record = {"prompt": turns[:2], "chosen": turns[2:], "rejected": "no"}
  opened = build([record], tmp_path, tokenizer=tokenizer)
  prompt, chosen, _ = (
    tokenizer._plain.decode(part.tolist(), skip_special_tokens=False)
    for part in opened.group(0)
  )
  assert prompt == "<s><|system|><|user|>does the cat<|assistant|>"
  assert chosen == "the cat sat </s>"
  assert opened.report["messages_cut"] == 2


@pytest.mark.fault(17)
def test_formats_may_be_mixed_in_one_source(tmp_path):
  opened = build(
    [
      pair("p", "x"),
      {"chosen": "\n\nHuman: q\n\nAssistant: a", "rejected": "x"},
      {"prompt": "p", "completion": "c", "label": False},
      {
        "chosen": "\n\nHuman: q\n\nAssistant: a",
        "rejected": "\n\nHuman: q\n\nAssistant: b",
      },
    ],
    tmp_path,
  )
  assert [texts(opened, i) for i in range(3)] == [
    ["[p", "x]", "no]"],
    ["[p", "c]", ""],
    ["[\n\nHuman: q\n\nAssistant:", " a]", " b]"],
  ]
  assert opened.report["dropped"] == {"prompts_differ": 1}


# The address.


class Unread(Listed):
  """A source that must not be read."""

  def __iter__(self):
    raise AssertionError("the source was read again")


def test_a_store_is_tokenized_once(tmp_path):
  records = [pair("p", "x"), pair("q", "yy")]
  first = build_store(Listed(records), BYTES, LIMITS, str(tmp_path))
  again = build_store(Unread(records), BYTES, LIMITS, str(tmp_path))
  assert again.digest == first.digest
  assert again.report == first.report
  for i in range(2):
    assert texts(again, i) == texts(first, i)
  np.testing.assert_array_equal(again.score, first.score)
  np.testing.assert_array_equal(again.prompt_hashes, first.prompt_hashes)


def test_the_address_is_of_content_tokenizer_limits_and_reading(tmp_path):
  records = [pair("p", "x")]
  tokenizer = HFTokenizer(folders.write_folder(tmp_path / "tokenizer"))
  cache = str(tmp_path / "cache")
  digests = [
    build_store(source, ids, limits, cache).digest
    for source, ids, limits in (
      (Listed(records), BYTES, LIMITS),
      (Listed(records, digest="other content"), BYTES, LIMITS),
      (Listed(records), tokenizer, LIMITS),
      (Listed(records), BYTES, Limits(101, 50)),
      (Listed(records), BYTES, Limits(100, 51)),
    )
  ]
  for reading in (
    Reading(columns="system="),
    Reading(roles="bot=user"),
    Reading(format="pair"),
    Reading(scored_turns="all"),
    Reading(max_broken_records=1),
  ):
    opened = build_store(Listed(records), BYTES, LIMITS, cache, reading)
    digests.append(opened.digest)
  assert len(set(digests)) == len(digests)
  assert sorted(os.listdir(cache)) == sorted(digests)


def test_a_moved_file_is_the_same_store_under_its_new_name(tmp_path):
  path = tmp_path / "a.jsonl"
  path.write_text(json.dumps(pair("p", "x")) + "\n")
  cache = str(tmp_path / "cache")

  def opened(spec):
    source = sources.open_source(spec)
    return build_store(source, BYTES, LIMITS, cache)

  first = opened(f"jsonl:{path}")
  path.rename(tmp_path / "b.jsonl")
  second = opened(f"jsonl:{tmp_path}/b.jsonl")
  assert second.digest == first.digest
  assert second.report["source"] == f"jsonl:{tmp_path}/b.jsonl"
  path.write_text(json.dumps(pair("p", "y")) + "\n")
  assert opened(f"jsonl:{path}").digest != first.digest


# The writing.


@pytest.mark.parametrize("fails_at", range(1, 6))
def test_a_half_written_store_is_never_seen(tmp_path, monkeypatch, fails_at):
  save, calls = np.save, []

  def full(path, value):
    calls.append(path)
    save(path, value)
    if len(calls) == fails_at:
      raise OSError("No space left on device")

  monkeypatch.setattr(np, "save", full)
  arguments = [Listed([pair("p", "x")]), BYTES, LIMITS, str(tmp_path)]
  with pytest.raises(OSError, match="No space left"):
    build_store(*arguments)
  assert os.listdir(tmp_path) == []
  monkeypatch.setattr(np, "save", save)
  assert texts(build_store(*arguments), 0) == ["[p", "x]", "no]"]


def test_a_folder_that_a_killed_process_left_is_not_a_store(
  tmp_path, monkeypatch
):
  class Killed(BaseException):
    pass

  def die(*unused, **unused_too):
    raise Killed

  arguments = [Listed([pair("p", "x")]), BYTES, LIMITS, str(tmp_path)]
  monkeypatch.setattr(np, "save", die)
  # A killed process does not clean up.
  monkeypatch.setattr(shutil, "rmtree", lambda *unused, **more: None)
  with pytest.raises(Killed):
    build_store(*arguments)
  monkeypatch.undo()
  [left] = os.listdir(tmp_path)
  opened = build_store(*arguments)
  assert texts(opened, 0) == ["[p", "x]", "no]"]
  assert set(os.listdir(tmp_path)) == {left, opened.digest}


def test_folders_of_killed_processes_are_deleted_after_a_day(tmp_path):
  """Those that are younger, or hold files of a user, are left."""
  folders = {
    "writing_old_0abc": ("tokens.npy", 25),
    "writing_new_0abc": ("tokens.npy", 23),
    "writing_notes_of": ("notes.txt", 99),
    "writing_old_0abcd": ("tokens.npy", 99),
  }
  for name, (file, hours) in folders.items():
    (tmp_path / name).mkdir()
    (tmp_path / name / file).write_text("")
    then = time.time() - 3600 * hours
    os.utime(tmp_path / name, (then, then))
  opened = build_store(Listed([pair("p", "x")]), BYTES, LIMITS, str(tmp_path))
  left = folders.keys() - {"writing_old_0abc"}
  assert set(os.listdir(tmp_path)) == {opened.digest, *left}


def test_a_full_disk_names_the_cache_the_store_and_the_bytes(tmp_path):
  records = [pair(f"{i}", "x" * 90) for i in range(100)]
  message = (
    rf"^data\.cache_dir='{tmp_path}': cannot write [\d,]+ bytes of"
    rf" {tmp_path}/\w+: \d+ requested and \d+ written\. Set data\.cache_dir to"
  )
  with faults.limited_files(4_000), pytest.raises(OSError, match=message):
    build_store(Listed(records), BYTES, LIMITS, str(tmp_path))
  assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("kind", ["file", "read_only"])
def test_a_cache_that_cannot_be_written_is_named_before_reading(
  tmp_path, monkeypatch, kind
):
  class Unread(Listed):
    def __iter__(self):
      raise AssertionError("data were read")

  cache = tmp_path / "cache"
  if kind == "file":
    cache.write_text("")
  else:

    def refuse(*unused, **unused_too):
      raise OSError(errno.EROFS, "Read-only file system", str(cache / "x"))

    monkeypatch.setattr(tempfile, "mkdtemp", refuse)
  message = rf"^data\.cache_dir='{cache}': cannot make .*{cache}.* Set data\.c"
  with pytest.raises(OSError, match=message):
    build_store(Unread([]), BYTES, LIMITS, str(cache))


def test_a_faster_process_s_store_is_used(tmp_path):
  records = [pair("p", "x"), pair("q", "y")]
  arguments = [BYTES, LIMITS, str(tmp_path)]

  class Overtaken(Listed):
    """While it is read, another process writes the same store."""

    def __iter__(self):
      build_store(Listed(self.records), *arguments)
      yield from super().__iter__()

  opened = build_store(Overtaken(records), *arguments)
  assert os.listdir(tmp_path) == [opened.digest]
  assert [texts(opened, i)[0] for i in range(2)] == ["[p", "[q"]


# The split.


def records_by_prompt(num_prompts, copies=3):
  return [
    pair(f"prompt {i}", f"yes {copy}" * (1 + 5 * copy))
    for copy in range(copies)
    for i in range(num_prompts)
  ]


def prompts_of(records, indices):
  return {records[i]["prompt"] for i in indices}


@pytest.mark.fault(21)
def test_no_prompt_is_on_both_sides_of_the_split(tmp_path):
  records = records_by_prompt(100)
  train, held_out = build(records, tmp_path).split(0.3)
  assert sorted([*train, *held_out]) == list(range(300))
  assert not prompts_of(records, train) & prompts_of(records, held_out)
  # 100 prompts, 30 expected, standard deviation 4.6.
  assert 15 <= len(held_out) / 3 <= 45


def test_no_prompt_is_on_both_sides_where_prompts_are_cut_unevenly(tmp_path):
  """A long response shortens its prompt; it is the same prompt all the same."""
  records = [
    pair(f"{i} {'x' * 40}", "y" * length)
    for i in range(60)
    for length in (4, 9)
  ]
  opened = build(records, tmp_path, Limits(32, 10))
  assert opened.lengths[0, 0] != opened.lengths[1, 0]
  train, held_out = opened.split(0.5)
  assert not prompts_of(records, train) & prompts_of(records, held_out)


def test_a_prompt_stays_on_its_side_when_data_are_added(tmp_path):
  few, many = records_by_prompt(40), records_by_prompt(90)
  sides = []
  for records in (few, many):
    train, held_out = build(records, tmp_path).split(0.25)
    assert len(held_out)
    sides.append((prompts_of(records, train), prompts_of(records, held_out)))
  assert sides[0][0] <= sides[1][0]
  assert sides[0][1] <= sides[1][1]


def test_a_larger_part_holds_out_what_a_smaller_did(tmp_path):
  opened = build(records_by_prompt(100), tmp_path)
  parts = [set(opened.split(f)[1].tolist()) for f in (0.0, 0.1, 0.4, 0.9)]
  assert not parts[0]
  assert all(a < b for a, b in itertools.pairwise(parts))


@pytest.mark.parametrize("fraction", [1.0, 1.5, -0.1])
def test_a_fraction_that_is_none_is_refused(tmp_path, fraction):
  opened = build([pair("p", "x")], tmp_path)
  with pytest.raises(ValueError, match=f"eval_fraction={fraction}"):
    opened.split(fraction)


# Real data.


def test_real_transcripts_are_kept_or_counted(real_data, tmp_path):
  path = real_data / "hh_harmless_base_half.jsonl.gz"
  expected, kept = Counter(), []
  with gzip.open(path, "rt", encoding="utf-8") as file:
    for line in file:
      record = json.loads(line)
      sides = []
      for name in ("chosen", "rejected"):
        at = record[name].rindex("\n\nAssistant:") + len("\n\nAssistant:")
        sides.append((record[name][:at], record[name][at:]))
      (prompt, chosen), (other, rejected) = sides
      if prompt != other:
        expected["prompts_differ"] += 1
      elif not chosen.strip() or not rejected.strip():
        expected["empty_response"] += 1
      elif chosen == rejected:
        expected["identical_responses"] += 1
      else:
        kept.append((prompt, chosen, rejected))
  opened = build_store(
    sources.open_source(f"jsonl:{path}"),
    BYTES,
    Limits(10_000, 5_000),
    str(tmp_path),
  )
  assert opened.report["dropped"] == dict(expected)
  assert expected["prompts_differ"] and expected["empty_response"]
  assert opened.report["records"] == len(kept) + expected.total() == 1156
  for i, parts in enumerate(kept):
    assert tuple(map(BYTES.decode, opened.group(i))) == parts
  train, held_out = opened.split(0.1)
  prompts = [{kept[i][0] for i in side} for side in (train, held_out)]
  assert not prompts[0] & prompts[1]


def pairs_store():
  return tiny.make_loader(tiny.make_groups(5), 2).store


def test_a_single_response_keeps_its_label_beside_pairs(tmp_path):
  records = [
    pair("a", "cat"),
    {"prompt": "b", "completion": "dog", "label": False},
    {"prompt": "c", "completion": "cow", "label": True},
  ]
  opened = build(records, tmp_path)
  split = opened.split_pairs()
  is_there = split.lengths[:, 1] > 0
  assert is_there.tolist() == [True, True, True, False, True, False]
  assert split.score[is_there, 0].tolist() == [1.0, 0.0, 0.0, 1.0]
  assert opened.tied_pairs().tolist() == [False, False, False]


def test_split_pairs_become_two_labelled_groups():
  store = pairs_store()
  split = store.split_pairs()
  assert len(split) == 10
  assert split.digest != store.digest
  for i in range(5):
    prompt, chosen, rejected = store.group(i)
    for j, (response, label) in enumerate(((chosen, 1.0), (rejected, 0.0))):
      parts = split.group(2 * i + j)
      np.testing.assert_array_equal(parts[0], prompt)
      np.testing.assert_array_equal(parts[1], response)
      assert split.score[2 * i + j].tolist() == [label]


def test_mismatched_responses_are_those_of_other_groups():
  store = pairs_store().split_pairs()
  paired = mismatched.add_slot(store, seed=3, max_tokens=1000)
  responses = [store.group(i)[1].tolist() for i in range(len(store))]
  taken = [paired.group(i)[2].tolist() for i in range(len(store))]
  # Every response is a mismatch once, and never of its own group.
  assert sorted(taken) == sorted(responses)
  assert all(a != b for a, b in zip(taken, responses, strict=True))
  assert paired.score[:, 1].tolist() == [0.0] * len(store)
  other = mismatched.add_slot(store, seed=4, max_tokens=1000)
  assert other.digest != paired.digest


def test_a_group_without_a_response_gives_no_mismatch():
  groups = [[[1], [2, 3]], [[4], []], [[5], [6]], [[7], [8, 9]]]
  store = Store.from_groups(
    [[np.array(part, np.int32) for part in group] for group in groups],
    np.ones((4, 1)),
  )
  for seed in range(5):
    paired = mismatched.add_slot(store, seed=seed, max_tokens=99)
    taken = [paired.group(i)[2].tolist() for i in range(4)]
    assert [] not in taken
    own = [paired.group(i)[1].tolist() for i in range(4)]
    assert all(a != b for a, b in zip(taken, own, strict=True))
    assert sorted(taken[i] for i in (0, 2, 3)) == [[2, 3], [6], [8, 9]]


def test_a_mismatched_response_is_cut_to_the_room_that_is_left():
  store = pairs_store().first_slots(1)
  paired = mismatched.add_slot(store, seed=0, max_tokens=13)
  totals = paired.lengths[:, 0] + paired.lengths[:, 2]
  assert totals.max() == 13
  assert paired.lengths[:, 2].min() > 0


def test_one_group_has_no_mismatch():
  one = tiny.make_loader(tiny.make_groups(1, 1), 1).store
  with pytest.raises(ValueError, match="at least two groups"):
    mismatched.add_slot(one, seed=0, max_tokens=99)


def snapshot(store):
  """Arrays and report of a store."""
  names = ("tokens", "starts", "lengths", "score", "prompt_hashes")
  arrays = {name: np.array(getattr(store, name)) for name in names}
  return arrays, store.report, store.digest


def assert_same(one, other):
  for name, value in one[0].items():
    np.testing.assert_array_equal(value, other[0][name], err_msg=name)
  assert one[1:] == other[1:]


def make_store(cache):
  records = [
    dict(prompt=f"p{i}", chosen=f"good {i}", rejected=f"bad {i}")
    for i in range(20)
  ]
  return build_store(Listed(records), BYTES, LIMITS, str(cache))


def flip(path, rng):
  data = bytearray(path.read_bytes())
  data[rng.integers(len(data))] ^= 1 << rng.integers(8)
  path.write_bytes(data)


@pytest.mark.parametrize("seed", range(24))
def test_a_damaged_store_is_made_again(tmp_path, caplog, seed):
  """A flipped bit, a cut file or a missing one, in any file of the store."""
  rng = np.random.default_rng(seed)
  store = make_store(tmp_path)
  before = snapshot(store)
  files = sorted((tmp_path / store.digest).iterdir())
  path = files[seed % len(files)]
  damage = seed % 3
  if damage == 0:
    flip(path, rng)
  elif damage == 1:
    path.write_bytes(path.read_bytes()[: rng.integers(path.stat().st_size)])
  else:
    path.unlink()
  with caplog.at_level(logging.WARNING, "dpo_jax"):
    assert_same(before, snapshot(make_store(tmp_path)))
  if path.name != "checksums.json":
    assert f"{store.digest} is not used: {path.name}" in caplog.text
    assert (tmp_path / f"{store.digest}.damaged").is_dir()
  caplog.clear()
  assert_same(before, snapshot(make_store(tmp_path)))
  assert not caplog.text


def replace_with_link(path, target):
  shutil.rmtree(path) if path.is_dir() else path.unlink()
  path.symlink_to(target)


def replace_with_file(path):
  shutil.rmtree(path)
  path.write_text("")


def replace_with_folder(path):
  path.unlink()
  path.mkdir()


def replace_with_pipe(path):
  path.unlink()
  os.mkfifo(path)


NOT_A_FOLDER = "it is a file or a broken link, not a folder"


@pytest.mark.parametrize(
  ("damage", "message"),
  [
    (replace_with_file, NOT_A_FOLDER),
    (lambda folder: replace_with_link(folder, "gone"), NOT_A_FOLDER),
    (lambda folder: replace_with_link(folder, folder.name), NOT_A_FOLDER),
    (lambda f: (f / ".checkpoints").mkdir(), ".checkpoints is not a file"),
    (lambda f: (f / "x").symlink_to("gone"), "x is not a file"),
    (lambda f: replace_with_folder(f / "tokens.npy"), "tokens.npy is not a"),
    (lambda f: replace_with_pipe(f / "tokens.npy"), "tokens.npy is not a"),
    (lambda f: replace_with_pipe(f / "checksums.json"), "checksums.json is"),
    (
      lambda f: replace_with_link(f / "tokens.npy", "gone"),
      "tokens.npy is not",
    ),
    (
      lambda f: (f / "checksums.json").write_text("[" * 100_000),
      "checksums.json is damaged",
    ),
  ],
)
@pytest.mark.parametrize("has_aside", [False, True])
def test_what_is_not_a_store_is_moved_aside_and_made_again(
  tmp_path, caplog, damage, message, has_aside
):
  store = make_store(tmp_path)
  before = snapshot(store)
  folder = tmp_path / store.digest
  aside = tmp_path / f"{store.digest}.damaged"
  if has_aside:
    aside.write_text("a file")
  damage(folder)
  with caplog.at_level(logging.WARNING, "dpo_jax"):
    assert_same(before, snapshot(make_store(tmp_path)))
  assert f"{store.digest} is not used: {message}" in caplog.text
  assert f"Moved to {aside}" in caplog.text
  assert os.path.lexists(aside)
  caplog.clear()
  assert_same(before, snapshot(make_store(tmp_path)))
  assert not caplog.text


def test_a_damaged_store_that_cannot_be_moved_is_an_error(
  tmp_path, caplog, monkeypatch
):
  store = make_store(tmp_path)
  (tmp_path / store.digest / "tokens.npy").write_text("")

  def refuse(*unused):
    raise OSError(errno.EROFS, "Read-only file system")

  monkeypatch.setattr(os, "rename", refuse)
  monkeypatch.setattr(os, "replace", refuse)
  message = rf"^data\.cache_dir='{tmp_path}': cannot move the damaged store"
  with pytest.raises(OSError, match=message):
    make_store(tmp_path)
  assert "Moved" not in caplog.text


@pytest.mark.fault(15)
@pytest.mark.parametrize(
  ("name", "change", "message"),
  [
    ("lengths", lambda x: x[:1, 1].__ior__(1 << 29), "a length is outside"),
    ("lengths", lambda x: x[:1, 1].__imul__(-1), "a length is outside"),
    ("starts", lambda x: x[-1:].__iadd__(1 << 40), "a part is outside"),
    ("tokens", lambda x: x[:1].__ior__(-(2**31)), "a token id is negative"),
    ("score", lambda x: x[:1].__iadd__(np.inf), "a score is not finite"),
  ],
)
def test_impossible_values_are_found_before_anything_is_allocated(
  tmp_path, caplog, name, change, message
):
  """Files that agree with their checksums, and still cannot be."""
  store = make_store(tmp_path)
  before = snapshot(store)
  folder = tmp_path / store.digest
  array = np.load(folder / f"{name}.npy")
  change(array)
  np.save(folder / f"{name}.npy", array)
  (folder / "checksums.json").unlink()
  checksums.write(str(folder))
  with caplog.at_level(logging.WARNING, "dpo_jax"):
    assert_same(before, snapshot(make_store(tmp_path)))
  assert message in caplog.text


def test_a_store_without_checksums_is_made_again(tmp_path):
  store = make_store(tmp_path)
  before = snapshot(store)
  (tmp_path / store.digest / "checksums.json").unlink()
  np.save(tmp_path / store.digest / "tokens.npy", store.tokens * 0)
  assert_same(before, snapshot(make_store(tmp_path)))


def test_a_store_of_other_data_is_made_again(tmp_path, caplog):
  """A whole folder, copied by hand, agrees with its own checksums."""
  store = make_store(tmp_path)
  before = snapshot(store)
  source = Listed([pair("a", "b")], digest="of other content")
  other = build_store(source, BYTES, LIMITS, str(tmp_path))
  folder = tmp_path / store.digest
  shutil.rmtree(folder)
  (tmp_path / other.digest).rename(folder)
  with caplog.at_level(logging.WARNING, "dpo_jax"):
    assert_same(before, snapshot(make_store(tmp_path)))
  assert "it is the store of other data" in caplog.text


def test_a_store_without_a_column_that_is_read_now_is_built_again(tmp_path):
  record = {**pair("a", "b"), "margin": 2.0}
  made = build_store(Listed([record]), BYTES, LIMITS, str(tmp_path))
  before = snapshot(made)
  folder = tmp_path / made.digest
  report = json.loads((folder / "report.json").read_text())
  report["unread"] = ["margin"]
  (folder / "report.json").write_text(json.dumps(report))
  np.save(folder / "score.npy", np.float32([[1.0, 0.0]]))
  (folder / "checksums.json").unlink()
  checksums.write(str(folder))
  again = build_store(Listed([record]), BYTES, LIMITS, str(tmp_path))
  assert again.report["unread"] == []
  assert_same(before, snapshot(again))
  assert again.score.tolist() == [[2.0, 0.0]]


def test_a_store_that_does_not_name_its_digest_is_read(tmp_path, caplog):
  """Stores of an older version."""
  store = make_store(tmp_path)
  before = snapshot(store)
  folder = tmp_path / store.digest
  report = json.loads((folder / "report.json").read_text())
  del report["digest"]
  (folder / "report.json").write_text(json.dumps(report))
  (folder / "checksums.json").unlink()
  checksums.write(str(folder))
  with caplog.at_level(logging.WARNING, "dpo_jax"):
    assert_same(before, snapshot(make_store(tmp_path)))
  assert not caplog.text
