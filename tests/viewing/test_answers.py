"""Answers of a policy: as they come, in batches, in a chat, side by side."""

import io
import json
import logging

import jax
import numpy as np
import pytest
from rich.console import Console
from tokenizers import decoders

from dpo_jax.data import encoding, tokenizers
from dpo_jax.data.alphabets import ByteTokenizer
from dpo_jax.models import logps as logps_lib
from dpo_jax.parallel import mesh, stop_signal
from dpo_jax.parallel.placement import Placement
from dpo_jax.viewing import answers, open_policy
from dpo_jax.viewing.open_policy import OpenPolicy
from tests import tiny
from tests.data import folders

pytestmark = pytest.mark.usefixtures("unoptimized")


def open_tiny(tokenizer, name="tiny", seed=0):
  policy = tiny.make_policy(vocab_size=tokenizer.vocab_size)
  placement = Placement(mesh.make_mesh({"data": 1}, jax.devices()[:1]))
  params = tiny.make_params(policy, seed)
  return OpenPolicy(name, policy, params, tokenizer, placement, 16)


@pytest.fixture(scope="module")
def of_bytes():
  return open_tiny(ByteTokenizer())


@pytest.fixture(scope="module")
def of_chats(tmp_path_factory):
  folder = folders.write_folder(tmp_path_factory.mktemp("chat"))
  return open_tiny(tokenizers.load_tokenizer(folder), "chats")


def settings_of(policy, **settings):
  settings = {"max_response_tokens": 24, "temperature": 1.0, **settings}
  return policy.sampling(**settings)


def test_streamed_text_is_that_of_a_batch(of_bytes):
  """Random bytes are seldom whole characters, so pieces must wait for them."""
  prompts = ["the film", "\u00fcber"]
  settings = settings_of(of_bytes)
  wanted = list(of_bytes.sample(prompts, settings, seed=1))
  for index, (prompt, answer) in enumerate(zip(prompts, wanted, strict=True)):
    *pieces, last = of_bytes.stream(prompt, settings, seed=1, index=index)
    assert last == answer
    assert "".join(pieces) == answer.text
    assert len(answer.text) > 3


def test_a_space_at_the_beginning_of_an_answer_is_kept(tmp_path):
  """Decoders of sentencepiece's kind drop a space at a text's beginning."""
  pieces = folders.train_pieces("always")
  pieces.decoder = decoders.Metaspace(prepend_scheme="always")
  folder = folders.write_folder(tmp_path / "t", pieces)
  tokenizer = tokenizers.load_tokenizer(folder)
  policy = open_tiny(tokenizer)
  prompt_ids = policy.encode("the answer")
  [ids] = tokenizer.encode([" is no"], is_rendered=False, is_continuation=True)
  assert policy._answer("the answer", prompt_ids, ids).text == " is no"


def test_messages_are_encoded_as_in_training(of_chats):
  tokenizer = of_chats.tokenizer
  said = "what is </s> the answer"
  ids = encoding.encode_prompt([{"role": "user", "content": said}], tokenizer)
  eos, bos = tokenizer.eos_id, tokenizer.bos_id
  assert ids.count(bos) == 1 and eos not in ids
  text = "".join(tokenizer._plain.id_to_token(i) for i in ids)
  assert text.startswith("<s><|user|>what") and text.endswith("<|assistant|>")


def test_a_shown_stream_has_prompt_answer_and_speed(of_bytes, caplog):
  written = io.StringIO()
  settings = settings_of(of_bytes)
  with caplog.at_level("INFO"):
    [answer] = answers.show_streams(
      of_bytes, ["abc"], settings, seed=0, write=written.write
    )
  shown = written.getvalue()
  assert shown.startswith("abc") and shown.endswith(" [cut off]\n")
  assert not any(ord(c) < 32 and c not in "\n\t" for c in shown)
  assert answer.is_complete is False
  assert "the first token after" in caplog.text


def test_the_answer_has_ended_before_its_speed_is_logged(of_bytes):
  events = []
  handler = logging.Handler()
  handler.emit = lambda record: events.append("log")
  log = logging.getLogger(answers.__name__)
  log.addHandler(handler)
  log.setLevel("INFO")
  try:
    settings = settings_of(of_bytes, max_response_tokens=3)
    list(
      answers.show_streams(
        of_bytes, ["ab"], settings, seed=0, write=events.append
      )
    )
  finally:
    log.removeHandler(handler)
    log.setLevel(logging.NOTSET)
  assert events[-1] == "log" and events[-2].endswith("\n")


def test_answers_come_batch_by_batch(of_bytes, monkeypatch):
  """So those of a call that is interrupted are not lost."""
  monkeypatch.setattr(open_policy, "_BATCH_SIZE", 2)
  settings = settings_of(of_bytes, max_response_tokens=4)
  prompts = ["a", "b", "c"]
  found = of_bytes.sample(prompts, settings, seed=0)
  first = next(found)
  with pytest.MonkeyPatch.context() as patch:

    def interrupt():
      raise KeyboardInterrupt

    patch.setattr(stop_signal, "check", interrupt)
    assert next(found).prompt == "b"
    with pytest.raises(KeyboardInterrupt):
      next(found)
  assert [first] == list(of_bytes.sample(prompts[:1], settings, seed=0))


def test_a_chat_keeps_its_messages_until_it_begins_anew(of_chats):
  said = iter(["what is the answer", "", "and the cat", "/new", "the dog"])
  asked = []
  stream = OpenPolicy.stream

  class Recording(OpenPolicy):
    def stream(self, prompt, *args, **kwargs):
      asked.append([m["content"] for m in prompt])
      return stream(self, prompt, *args, **kwargs)

  policy = Recording(**vars(of_chats))

  def read():
    for text in said:
      return text
    raise EOFError

  found = list(
    answers.chat(
      policy,
      settings_of(policy, max_response_tokens=4),
      system="be brief",
      seed=0,
      read=read,
      write=lambda text: None,
    )
  )
  assert asked == [
    ["be brief", "what is the answer"],
    ["be brief", "what is the answer", found[0].text, "and the cat"],
    ["be brief", "the dog"],
  ]


def test_a_message_that_is_too_long_does_not_end_the_chat(of_chats):
  said = iter(["the cat " * 300, "the cat"])
  written = io.StringIO()

  def read():
    for text in said:
      return text
    raise EOFError

  found = answers.chat(
    of_chats,
    settings_of(of_chats, max_response_tokens=4),
    system="",
    seed=0,
    read=read,
    write=written.write,
  )
  assert len(list(found)) == 1
  assert "exceed the model's max_positions=512" in written.getvalue()


def test_a_model_without_a_chat_template_is_not_chatted_with(of_bytes):
  chat = answers.chat(
    of_bytes,
    settings_of(of_bytes),
    system="",
    seed=0,
    read=input,
    write=print,
  )
  with pytest.raises(
    ValueError, match="tiny has no chat template: ask it with"
  ):
    next(chat)


def test_compared_answers_have_the_log_probs_of_the_forward_pass(of_bytes):
  other = open_tiny(ByteTokenizer(), "other", seed=1)
  policies = [of_bytes, other]
  prompts = answers.repeat(["ab", "cde"], 2)
  settings = [settings_of(policy) for policy in policies]
  compared = answers.compare(policies, prompts, settings, seed=0)
  assert [len(column) for column in compared] == [4, 4]

  @jax.jit
  def score(params, batch):
    policy = of_bytes.policy
    return logps_lib.response_logps(policy, params, batch, chunk_size=16)

  for column in compared:
    for answer, logps in column:
      batch = tiny.pack([[np.int32(answer.prompt_ids), np.int32(answer.ids)]])
      for policy, logp in zip(policies, logps, strict=True):
        wanted = score(policy.params, batch).ravel()[0]
        np.testing.assert_allclose(logp, wanted, rtol=1e-4)
  console = Console(record=True, width=60, file=io.StringIO())
  answers.show_side_by_side(console, policies, compared)
  text = console.export_text()
  assert "A: tiny" in text and "B: other" in text
  logps = compared[1][0][1]
  assert f"log-prob: A {logps[0]:,.2f}" in text


def test_other_tokenizers_are_not_scored(of_bytes, of_chats):
  policies = [of_bytes, of_chats]
  settings = [settings_of(p, max_response_tokens=3) for p in policies]
  compared = answers.compare(policies, ["ab"], settings, seed=0)
  [(_, ours)], [(_, theirs)] = compared
  assert ours[1] is None and theirs[0] is None
  assert ours[0] < 0 and theirs[1] < 0


def test_prompts_are_read_from_lines_and_from_json(tmp_path):
  plain = tmp_path / "prompts.txt"
  plain.write_text("one\n\ntwo words\n")
  assert answers.read_prompts(str(plain)) == ["one", "two words"]
  messages = [{"role": "user", "content": "hi"}]
  rows = tmp_path / "prompts.jsonl"
  rows.write_text(
    "".join(json.dumps({"prompt": p, "x": 1}) + "\n" for p in ("a", messages))
  )
  assert answers.read_prompts(str(rows)) == ["a", messages]


def test_a_line_ends_at_a_line_break_alone(tmp_path):
  """Other separators may stand in a prompt."""
  prompt = "one\u2028two\u0085three\x0cfour"
  path = tmp_path / "p.jsonl"
  path.write_text(json.dumps({"prompt": prompt}, ensure_ascii=False) + "\n")
  assert answers.read_prompts(str(path)) == [prompt]
  plain = tmp_path / "p.txt"
  plain.write_bytes(f"{prompt}\r\nfive\r\n".encode())
  assert answers.read_prompts(str(plain)) == [prompt, "five"]


def test_a_run_that_is_named_by_its_folder_alone_is_recognised(tmp_path):
  (tmp_path / "model.json").write_text("{}")
  with pytest.raises(ValueError, match=f"It is a run: --init='run:{tmp_path}'"):
    OpenPolicy.open(str(tmp_path), key="--init")


@pytest.mark.parametrize(
  ("text", "message"),
  [
    ("", "holds no prompt"),
    ('{"prompt": "a"}\n{"question": "b"}\n', ":2: no JSON object with"),
    ('{"prompt": 3}\n', ':1: "prompt" must be a text, or a list'),
    ('{"prompt": [{"role": "user"}]}\n', ':1: "prompt" must be a text'),
    ("not json\n", ":1: no JSON object"),
  ],
)
def test_bad_files_of_prompts_are_named(tmp_path, text, message):
  path = tmp_path / "p.jsonl"
  path.write_text(text)
  with pytest.raises(ValueError, match=message):
    answers.read_prompts(str(path))


def test_sources_that_cannot_answer_are_refused(tmp_path):
  with pytest.raises(ValueError, match="--init=random: random weights have"):
    OpenPolicy.open("random", key="--init")
  with pytest.raises(FileNotFoundError, match=r"not the workdir of a run"):
    OpenPolicy.open(f"run:{tmp_path}", key="--workdir")
  with pytest.raises(ValueError, match="--dtype=int8 must be one of"):
    OpenPolicy.open("random", dtype="int8", key="--init")


def test_a_prompt_that_is_too_long_shows_nothing_but_its_error(of_bytes):
  written = io.StringIO()
  shown = answers.show_streams(
    of_bytes,
    ["x" * 600],
    settings_of(of_bytes),
    seed=0,
    write=written.write,
  )
  with pytest.raises(ValueError, match="exceed the model's max_positions=512"):
    next(shown)
  assert written.getvalue() == ""
