"""Ids of text: one BOS, one EOS, exact borders, and a sandbox."""

import json
import os
import time

import numpy as np
import pytest
from tokenizers import processors

from dpo_jax.config import default_config
from dpo_jax.data import packing, sources, store
from dpo_jax.data.dialogues import Request
from dpo_jax.data.examples import RecordError
from dpo_jax.data.tokenizers import (
  ByteTokenizer,
  HFTokenizer,
  load_tokenizer,
)
from dpo_jax.records.workdir import Workdir
from dpo_jax.training.setup import build_run
from tests import bucket
from tests.data import folders
from tests.data.folders import BOS, CHAT_TEMPLATE, EOS, write_folder

USER = {"role": "user", "content": "what is the answer"}
YES = {"role": "assistant", "content": "the cat"}
NO = {"role": "assistant", "content": "the dog ran"}
PAIR = {
  "prompt": "what is the answer",
  "chosen": " the cat",
  "rejected": " the dog ran away",
}


@pytest.fixture
def tokenizer(tmp_path):
  return HFTokenizer(write_folder(tmp_path / "tokenizer"))


def groups_of(records, tokenizer, tmp_path, max_tokens=200):
  path = tmp_path / "records.jsonl"
  path.write_text("".join(json.dumps(record) + "\n" for record in records))
  opened = store.build_store(
    sources.open_source(f"jsonl:{path}"),
    tokenizer,
    store.Limits(max_tokens, max_tokens // 2),
    str(tmp_path / "stores"),
  )
  assert len(opened) == len(records)
  return [[p.tolist() for p in opened.group(i)] for i in range(len(opened))]


def encode(tokenizer, text, *, is_continuation=True, is_rendered=False):
  return tokenizer.encode(
    [text], is_rendered=is_rendered, is_continuation=is_continuation
  )[0]


def assert_one_bos_and_one_eos(group, bos_id, eos_id):
  prompt, *responses = group
  assert prompt[0] == bos_id
  assert bos_id not in prompt[1:]
  assert eos_id not in prompt
  for response in responses:
    assert response[-1] == eos_id
    assert eos_id not in response[:-1]
    assert bos_id not in response


# BOS and EOS.


@pytest.mark.fault(4, 7)
def test_a_prompt_has_one_bos_and_a_response_one_eos(tokenizer, tmp_path):
  [group] = groups_of([PAIR], tokenizer, tmp_path)
  assert (tokenizer.bos_id, tokenizer.eos_id) == (0, 1)
  assert_one_bos_and_one_eos(group, 0, 1)
  texts = [tokenizer.decode(part) for part in group]
  assert texts == list(PAIR.values())


@pytest.mark.fault(3)
def test_a_tokenizer_that_adds_both_does_not_double_them(tmp_path):
  trained = folders.train_bytes()
  trained.post_processor = processors.TemplateProcessing(
    single=f"{BOS} $A {EOS}", special_tokens=[(BOS, 0), (EOS, 1)]
  )
  both = trained.encode("a").ids
  assert (both[0], both[-1]) == (0, 1)
  folder = write_folder(tmp_path / "tokenizer", trained, puts_bos=False)
  [group] = groups_of([PAIR], HFTokenizer(folder), tmp_path)
  assert_one_bos_and_one_eos(group, 0, 1)


def test_a_tokenizer_that_adds_no_bos_gets_none(tmp_path):
  folder = write_folder(tmp_path / "tokenizer", puts_bos=False)
  tokenizer = HFTokenizer(folder)
  assert tokenizer.bos_id is None
  [group] = groups_of([PAIR], tokenizer, tmp_path)
  assert all(0 not in part for part in group)
  assert [tokenizer.decode(part) for part in group] == list(PAIR.values())


def test_add_bos_token_beside_a_tokenizer_json_puts_none(tmp_path, caplog):
  folder = write_folder(tmp_path, puts_bos=False, add_bos_token=True)
  assert HFTokenizer(folder).bos_id is None
  assert "add_bos_token" in caplog.text
  folder = write_folder(tmp_path, puts_bos=True, add_bos_token=False)
  assert HFTokenizer(folder).bos_id == 0


@pytest.mark.slow
@pytest.mark.parametrize("add_bos_token", [None, True, False])
@pytest.mark.parametrize("puts_bos", [True, False])
def test_a_bos_is_put_where_transformers_puts_one(
  tmp_path, puts_bos, add_bos_token
):
  transformers = pytest.importorskip("transformers")
  folder = write_folder(
    tmp_path, puts_bos=puts_bos, add_bos_token=add_bos_token
  )
  theirs = transformers.AutoTokenizer.from_pretrained(folder)
  assert (theirs("the cat")["input_ids"][0] == 0) == puts_bos
  assert (HFTokenizer(folder).bos_id == 0) == puts_bos


def test_eos_is_scored(tokenizer, tmp_path):
  [group] = groups_of([PAIR], tokenizer, tmp_path)
  batch = packing.fill_rows(
    [[0]],
    [[np.array(part, np.int32) for part in group]],
    np.zeros((1, 2), np.float32),
    np.arange(1),
    shape=packing.RowShape(128, 128, 1, 2),
    layout="shared",
    ref_logps=None,
  )
  for slot, response in enumerate(group[1:]):
    scored = batch.targets[0][batch.slots[0] == slot].tolist()
    assert scored == response
    assert scored[-1] == tokenizer.eos_id


@pytest.mark.fault(6)
def test_a_pad_token_that_is_the_eos_changes_nothing(tmp_path):
  padded = folders.train_bytes()
  padded.enable_padding(pad_id=1, pad_token=EOS, length=50)
  padded.enable_truncation(3)
  groups = []
  for name, trained, config in (
    ("plain", folders.train_bytes(), {}),
    ("padded", padded, {"pad_token": EOS}),
  ):
    folder = write_folder(tmp_path / name, trained, **config)
    groups.append(groups_of([PAIR], HFTokenizer(folder), tmp_path / name))
  assert groups[0] == groups[1]
  assert_one_bos_and_one_eos(groups[1][0], 0, 1)


def test_special_tokens_spelled_in_plain_text_are_letters(tokenizer, tmp_path):
  record = {
    "prompt": f"{BOS}ignore this{EOS}<|user|>",
    "chosen": f" stop{EOS} here",
    "rejected": f"{EOS}",
  }
  [group] = groups_of([record], tokenizer, tmp_path)
  assert_one_bos_and_one_eos(group, 0, 1)
  special = set(range(len(folders.SPECIALS)))
  assert special.isdisjoint([*group[0][1:], *group[1][:-1], *group[2][:-1]])
  assert [tokenizer.decode(part) for part in group] == list(record.values())


def test_a_tokenizer_without_eos_is_refused(tmp_path):
  folder = write_folder(tmp_path, eos_token=None)
  with pytest.raises(ValueError, match=r"name it as data\.eos_token"):
    HFTokenizer(folder)
  folder = write_folder(tmp_path, eos_token="<end>")
  with pytest.raises(ValueError, match=r"no EOS token \('<end>'\)"):
    HFTokenizer(folder)


def test_a_folder_without_tokenizer_is_refused(tmp_path):
  with pytest.raises(FileNotFoundError, match=r"tokenizer\.json .*'bytes'"):
    load_tokenizer(str(tmp_path))


def test_special_tokens_may_be_spelled_as_objects(tmp_path):
  folder = write_folder(
    tmp_path, eos_token={"content": EOS, "lstrip": False, "special": True}
  )
  assert HFTokenizer(folder).eos_id == 1


# Borders.


@pytest.mark.fault(1)
def test_no_token_straddles_the_border(tokenizer, tmp_path):
  record = {"prompt": "the ans", "completion": "wer is"}
  joined = encode(tokenizer, "the answer is")
  [(prompt, response)] = groups_of([record], tokenizer, tmp_path)
  # As one text there is a token of both sides, so this can go wrong.
  assert [0, *joined, 1] != prompt + response
  assert tokenizer.decode(prompt) == "the ans"
  assert tokenizer.decode(response) == "wer is"


def piece_tokenizers(tmp_path):
  for kind in ("prepend", "metaspace"):
    trained = folders.train_pieces(kind)
    folder = write_folder(tmp_path / kind, trained)
    yield trained, HFTokenizer(folder)
  trained = folders.train_bytes(add_prefix_space=True)
  yield trained, HFTokenizer(write_folder(tmp_path / "bytes", trained))


@pytest.mark.parametrize(
  "text", ["the cat", " the cat", "\nthe cat", "\n\nthe cat", "  the", "t", " "]
)
def test_a_tokenizer_prepends_nothing_to_a_response(tmp_path, text):
  """The pieces of a response spell it, without an extra space."""
  for trained, tokenizer in piece_tokenizers(tmp_path):
    ids = encode(tokenizer, text)
    spelled = "".join(trained.id_to_token(i) for i in ids)
    for mark, letter in (("\u2581", " "), ("\u0120", " "), ("\u010a", "\n")):
      spelled = spelled.replace(mark, letter)
    assert spelled == text


def test_a_prompt_is_encoded_as_the_tokenizer_means_it(tmp_path):
  for trained, tokenizer in piece_tokenizers(tmp_path):
    ids = encode(tokenizer, "the cat", is_continuation=False)
    assert ids == trained.encode("the cat", add_special_tokens=False).ids
    assert ids == encode(tokenizer, " the cat")


def test_a_real_sentencepiece_vocabulary_keeps_the_border(real_data, tmp_path):
  tokenizer = load_tokenizer(str(real_data / "stories260k"))
  assert (tokenizer.vocab_size, tokenizer.bos_id, tokenizer.eos_id) == (
    512,
    1,
    2,
  )
  record = {
    "prompt": "Once upon a time",
    "chosen": ", there was a cat",
    "rejected": " there</s> was",
  }
  [group] = groups_of([record], tokenizer, tmp_path)
  assert_one_bos_and_one_eos(group, 1, 2)
  spelled = [
    "".join(tokenizer._plain.id_to_token(i) for i in ids).replace("\u2581", " ")
    for ids in (group[0][1:], group[1][:-1], group[2][:-1])
  ]
  # A prompt is a beginning, and sentencepiece marks it as a word's.
  assert spelled == [
    " Once upon a time",
    ", there was a cat",
    " there</s> was",
  ]


# Chat templates.


@pytest.mark.fault(2)
def test_a_template_that_writes_bos_and_eos_does_not_double_them(
  tokenizer, tmp_path
):
  dialogue = [USER, YES, USER]
  record = {"prompt": dialogue, "chosen": [YES], "rejected": [NO]}
  [group] = groups_of([record], tokenizer, tmp_path)
  prompt, *responses = group
  assert prompt.count(0) == 1
  assert prompt[0] == 0
  # The EOS of the first answer belongs to the prompt.
  assert prompt.count(1) == 1
  user, assistant = 2, 3
  assert [i for i in prompt if i < 5] == [
    0,
    user,
    assistant,
    1,
    user,
    assistant,
  ]
  for response, text in zip(responses, ("the cat", "the dog ran"), strict=True):
    assert response == [*encode(tokenizer, text), 1]


def test_a_template_that_writes_neither_gets_both(tmp_path):
  template = CHAT_TEMPLATE.replace("bos_token", "''").replace(
    "eos_token + ", ""
  )
  assert "os_token" not in template
  folder = write_folder(tmp_path / "tokenizer", chat_template=template)
  record = {"prompt": [USER], "chosen": [YES], "rejected": [NO]}
  [group] = groups_of([record], HFTokenizer(folder), tmp_path)
  assert_one_bos_and_one_eos(group, 0, 1)


def test_the_folder_may_hold_its_template_in_any_of_its_places(tmp_path):
  first, second = "{{ 'first' }}", "{{ 'second' }}"
  folder = write_folder(tmp_path, chat_template=first)
  assert HFTokenizer(folder).render([], False) == "first"
  named = [
    {"name": "tool_use", "template": first},
    {"name": "default", "template": second},
  ]
  write_folder(tmp_path, chat_template=named)
  assert HFTokenizer(folder).render([], False) == "second"
  (tmp_path / "chat_template.jinja").write_text("{{ 'third' }}")
  assert HFTokenizer(folder).render([], False) == "third"
  own = tmp_path / "own.jinja"
  own.write_text("{{ 'own' }}")
  tokenizer = load_tokenizer(folder, chat_template=str(own))
  assert tokenizer.render([], False) == "own"


def test_a_tokenizer_of_a_bucket_is_the_same(tmp_path, monkeypatch):
  bucket.stand_in(tmp_path, monkeypatch)
  folder = write_folder(tmp_path / "b")
  (tmp_path / "b" / "own.jinja").write_text("{{ 'own' }}")
  digests = {
    load_tokenizer(where, chat_template=f"{where}/own.jinja").digest
    for where in (folder, "gs://b")
  }
  assert len(digests) == 1
  with pytest.raises(FileNotFoundError, match=r"'gs://b' holds .*own\.jinja"):
    load_tokenizer("gs://b", chat_template="gs://b/own.jinj")


def test_a_folder_without_template_has_none(tmp_path):
  folder = write_folder(tmp_path, chat_template=None)
  assert not HFTokenizer(folder).has_chat_template


def test_a_template_reads_messages_tokens_and_the_header_flag(tmp_path):
  template = (
    "{{ bos_token }}{{ messages[0].content | tojson }}{{ eos_token }}"
    "{{ add_generation_prompt }}"
  )
  folder = write_folder(tmp_path, chat_template=template)
  message = {"role": "user", "content": '<é "x">'}
  rendered = HFTokenizer(folder).render([message], True)
  assert rendered == '<s>"<é \\"x\\">"</s>True'


@pytest.mark.fault(61)
@pytest.mark.parametrize(
  "template",
  [
    "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "{{ cycler.__init__.__globals__.os.popen('touch MARKER').read() }}",
    "{{ raise_exception.__globals__['__builtins__'] }}",
    "{{ '{0.__class__.__mro__}'.format(messages) }}",
    "{{ messages.append(messages[0]) }}",
    "{{ messages[0].update(role='system') }}",
    "{% include '/etc/hostname' %}",
  ],
)
def test_an_evil_template_is_refused_and_does_nothing(tmp_path, template):
  marker = tmp_path / "marker"
  template = template.replace("MARKER", str(marker))
  folder = write_folder(tmp_path / "tokenizer", chat_template=template)
  message = dict(USER)
  with pytest.raises(RecordError, match="chat template fails"):
    HFTokenizer(folder).render([message], True)
  assert not marker.exists()
  assert message == USER


@pytest.mark.parametrize(
  ("template", "message"),
  [
    ("{{ raise_exception('no system') }}", "no system"),
    ("{{ 1 // 0 }}", "ZeroDivisionError"),
    ("{{ messages[0].content.index('zzz') }}", "ValueError"),
    ("{{ messages[0].content + 1 }}", "TypeError"),
    ("{{ messages[0].nothing.at_all }}", "UndefinedError"),
    ("{% for %}", "TemplateSyntaxError"),
    ("{% for i in range(10 ** 9) %}{% endfor %}", "OverflowError"),
  ],
)
def test_template_exceptions_become_record_errors(tmp_path, template, message):
  folder = write_folder(tmp_path, chat_template=template)
  with pytest.raises(RecordError, match=rf"roles \['user'\].*{message}"):
    HFTokenizer(folder).render([USER], True)


def test_a_real_chat_template_ends_a_response_once(real_data, tmp_path):
  tokenizer = load_tokenizer(str(real_data / "tokenizers" / "chatml_6400"))
  record = {"prompt": [USER], "chosen": [YES], "rejected": [NO]}
  [(prompt, chosen, rejected)] = groups_of([record], tokenizer, tmp_path)
  for response, text in ((chosen, "the cat"), (rejected, "the dog ran")):
    assert response.count(tokenizer.eos_id) == 1
    assert response[-1] == tokenizer.eos_id
    assert tokenizer.decode(response).strip().endswith(text)
  turn = tokenizer._plain.token_to_id("<|im_start|>")
  assert prompt.count(turn) == prompt.count(tokenizer.eos_id) + 1


# Damaged files.


@pytest.mark.parametrize(
  ("name", "content"),
  [
    ("tokenizer.json", "{"),
    ("tokenizer.json", '{"model": 3}'),
    ("tokenizer.json", "[" * 100_000),
    ("tokenizer_config.json", "[]"),
    ("tokenizer_config.json", '{"eos_token": 3}'),
    ("tokenizer_config.json", '{"eos_token": {"text": "</s>"}}'),
    ("tokenizer_config.json", '{"added_tokens_decoder": {"x": {}}}'),
    ("tokenizer_config.json", '{"added_tokens_decoder": [1]}'),
    (
      "tokenizer_config.json",
      '{"eos_token": "</s>", "chat_template": [{"name": "default"}]}',
    ),
    ("tokenizer_config.json", '{"eos_token": "</s>", "chat_template": 3}'),
    ("special_tokens_map.json", '{"unk_token": []}'),
    ("added_tokens.json", '{"<new>": "5"}'),
    ("added_tokens.json", '{"<new>": -1}'),
    ("generation_config.json", '{"eos_token_id": "1"}'),
    ("generation_config.json", '{"eos_token_id": [1, -1]}'),
    ("chat_template.jinja", b"\xff"),
  ],
)
def test_a_damaged_tokenizer_file_is_named(tmp_path, name, content):
  folder = write_folder(tmp_path)
  content = content if isinstance(content, bytes) else content.encode()
  (tmp_path / name).write_bytes(content)
  with pytest.raises(ValueError, match=f"^{tmp_path / name}"):
    HFTokenizer(folder)


@pytest.mark.parametrize(
  ("name", "content"),
  [
    ("vocab.json", "{"),
    ("vocab.json", '{"a": -1}'),
    ("vocab.json", '{"a": 1000000000}'),
    ("vocab.json", '{"b": 0}'),
    ("merges.txt", "one\n"),
    ("merges.txt", "one two three\n"),
    ("merges.txt", b"\xff"),
  ],
)
def test_a_damaged_vocabulary_is_named(tmp_path, name, content):
  (tmp_path / "vocab.json").write_text('{"a": 0, "b": 1, "ab": 2}')
  (tmp_path / "merges.txt").write_text("#version: 0.2\na b\n")
  HFTokenizer(str(tmp_path), eos_token="b")
  content = content if isinstance(content, bytes) else content.encode()
  (tmp_path / name).write_bytes(content)
  with pytest.raises(ValueError) as caught:
    HFTokenizer(str(tmp_path), eos_token="b")
  assert str(caught.value).startswith(str(tmp_path))
  assert name in str(caught.value)


def test_ids_out_of_range_are_refused_before_they_are_counted(tmp_path):
  folder = write_folder(tmp_path)
  path = tmp_path / "tokenizer.json"
  content = json.loads(path.read_text())
  content["model"]["vocab"]["new"] = 2**24
  path.write_text(json.dumps(content))
  (tmp_path / "added_tokens.json").write_text('{"<new>": 330}')
  with pytest.raises(
    ValueError, match=r"tokenizer\.json is damaged: .*ids must"
  ):
    HFTokenizer(folder)


@pytest.mark.parametrize(
  "name",
  [
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "config.json",
    "generation_config.json",
    "chat_template.jinja",
  ],
)
def test_pipes_and_broken_links_do_not_count_as_absent(tmp_path, name):
  folder = write_folder(tmp_path)
  path = tmp_path / name
  path.unlink(missing_ok=True)
  for target in ("gone", name):
    path.symlink_to(target)
    message = f"{name}' is a link to '{target}', which cannot be opened"
    with pytest.raises(FileNotFoundError, match=message):
      HFTokenizer(folder)
    path.unlink()
  os.mkfifo(path)
  with pytest.raises(OSError, match=f"{name}' is a pipe or a device"):
    HFTokenizer(folder)


def test_a_byte_order_mark_is_not_a_part_of_a_template(tmp_path):
  folder = write_folder(tmp_path, chat_template=None)
  path = tmp_path / "chat_template.jinja"
  path.write_bytes(b"\xef\xbb\xbf{{ messages[0].content }}")
  assert HFTokenizer(folder).render([USER], False) == USER["content"]


@pytest.mark.parametrize("key", ["eos_token", "chat_template", "pad_token"])
def test_half_of_a_character_is_refused_with_its_key(tmp_path, key):
  folder = write_folder(tmp_path, **{key: "\ud800"})
  message = rf"tokenizer_config\.json: '{key}' holds text that is not Unicode"
  with pytest.raises(ValueError, match=message):
    HFTokenizer(folder)


# The rest.


def test_ids_are_below_the_vocabulary_even_with_holes_in_it(tmp_path):
  folder = write_folder(tmp_path)
  path = tmp_path / "tokenizer.json"
  content = json.loads(path.read_text())
  largest = max(content["model"]["vocab"].values())
  token = next(t for t, i in content["model"]["vocab"].items() if i == largest)
  content["model"]["vocab"][token] = largest + 100
  path.write_text(json.dumps(content))
  assert HFTokenizer(folder).vocab_size == largest + 101


def test_the_digest_covers_what_decides_the_ids(tmp_path):
  small = folders.train_bytes()
  small.add_tokens(["answer"])
  digests = [
    HFTokenizer(write_folder(tmp_path / str(i), trained, **config)).digest
    for i, (trained, config) in enumerate(
      (
        (None, {}),
        (small, {}),
        (None, {"puts_bos": False}),
        (None, {"eos_token": "<|user|>"}),
        (None, {"chat_template": CHAT_TEMPLATE + " "}),
        (None, {"chat_template": None}),
        # Not a token of the vocabulary, but a template may write it.
        (None, {"puts_bos": False, "bos_token": "<begin>"}),
        (None, {"pad_token": "<pad>"}),
        (None, {}),
      )
    )
  ]
  assert digests[0] == digests[-1]
  assert len(set(digests)) == len(digests) - 1


@pytest.mark.parametrize("text", ["", "plain", "é 日本 🙂\n\x00", "<s></s>"])
def test_bytes_round_trip(text):
  tokenizer = ByteTokenizer()
  ids = encode(tokenizer, text)
  assert ids == list(text.encode())
  assert tokenizer.decode([256, *ids, 257]) == text
  assert max([*ids, tokenizer.bos_id, tokenizer.eos_id]) < tokenizer.vocab_size


def test_bytes_of_a_cut_character_decode_to_a_replacement():
  assert ByteTokenizer().decode(list("aé".encode())[:-1]) == "a\ufffd"


def test_bytes_has_no_chat_template(tmp_path):
  tokenizer = load_tokenizer("bytes")
  assert isinstance(tokenizer, ByteTokenizer)
  assert not tokenizer.has_chat_template
  record = {"prompt": [USER], "chosen": [YES], "rejected": [NO]}
  with pytest.raises(RecordError, match=r"jsonl:1: .*data\.chat_template"):
    groups_of([record], tokenizer, tmp_path)


# Folders of every kind.

HELLO = "Hello world, this movie was great!"


def test_gpt2_s_two_files_are_a_tokenizer(real_data, tmp_path):
  tokenizer = load_tokenizer(str(real_data / "tokenizers" / "gpt2"))
  assert encode(tokenizer, HELLO) == [
    *(15496, 995, 11, 428, 3807, 373, 1049, 0)
  ]
  assert tokenizer.vocab_size == 50257
  assert (tokenizer.bos_id, tokenizer.eos_id) == (None, 50256)
  assert encode(tokenizer, "<|endoftext|>", is_rendered=True) == [50256]
  assert 50256 not in encode(tokenizer, "<|endoftext|>")
  assert tokenizer.decode([15496, 995, 50256]) == "Hello world"
  [group] = groups_of([PAIR], tokenizer, tmp_path)
  assert [tokenizer.decode(part) for part in group] == list(PAIR.values())


def test_a_tokenizer_of_two_files_is_that_of_its_json(tmp_path):
  trained = folders.train_bytes()
  whole = HFTokenizer(write_folder(tmp_path / "whole", trained))
  two = tmp_path / "two"
  write_folder(two, trained, add_bos_token=True)
  trained.model.save(str(two))
  (two / "tokenizer.json").unlink()
  (two / "added_tokens.json").write_text(
    json.dumps({name: i for i, name in enumerate(folders.SPECIALS)})
  )
  tokenizer = HFTokenizer(str(two))
  assert tokenizer.vocab_size == whole.vocab_size
  assert (tokenizer.bos_id, tokenizer.eos_id) == (0, 1)
  for text in folders.SENTENCES[:3]:
    assert encode(tokenizer, text) == encode(whole, text)


def test_neox_needs_its_eos_named(real_data):
  folder = str(real_data / "tokenizers" / "neox")
  with pytest.raises(ValueError, match=r"no EOS token .*data\.eos_token"):
    load_tokenizer(folder)
  tokenizer = load_tokenizer(folder, eos_token="<|endoftext|>")
  assert (tokenizer.eos_id, tokenizer.bos_id) == (0, None)
  assert tokenizer.vocab_size == 50277
  # Of the tokens that were added beyond the vocabulary.
  assert encode(tokenizer, " " * 24) == [50254]


@pytest.mark.parametrize(
  ("name", "content"),
  [
    ("special_tokens_map", {"eos_token": EOS}),
    ("special_tokens_map", {"eos_token": {"content": EOS, "lstrip": False}}),
    ("config", {"eos_token_id": 1}),
    ("generation_config", {"eos_token_id": [1, 2]}),
  ],
)
@pytest.mark.parametrize("has_config", [True, False])
def test_eos_is_found_wherever_a_folder_names_it(
  tmp_path, name, content, has_config
):
  folder = write_folder(tmp_path, eos_token=None, chat_template=None)
  if not has_config:
    (tmp_path / "tokenizer_config.json").unlink()
  (tmp_path / f"{name}.json").write_text(json.dumps(content))
  assert HFTokenizer(folder).eos_id == 1
  # What the config says comes first, and the tokenizer's own before a model's.
  assert HFTokenizer(folder, eos_token="<|user|>").eos_id == 2
  write_folder(tmp_path, eos_token="<|system|>")
  assert HFTokenizer(folder).eos_id == 4


def test_an_eos_that_is_named_must_be_a_token(tmp_path):
  folder = write_folder(tmp_path)
  with pytest.raises(ValueError, match=r"no EOS token \('<end>'\)"):
    HFTokenizer(folder, eos_token="<end>")


def test_stop_ids_are_the_eos_and_what_else_a_model_stops_at(tmp_path):
  folder = write_folder(tmp_path)
  assert HFTokenizer(folder).stop_ids == (1,)
  path = tmp_path / "generation_config.json"
  # One of them is not in this vocabulary.
  path.write_text(json.dumps({"eos_token_id": [2, 1, 4, 9999]}))
  assert HFTokenizer(folder).stop_ids == (1, 2, 4)
  assert ByteTokenizer().stop_ids == (ByteTokenizer.eos_id,)


@pytest.mark.fault(5)
@pytest.mark.parametrize("end", ["<|system|>", "<|system|>\n", "", " the end"])
def test_a_turn_has_one_end_and_it_is_the_template_s(tmp_path, end):
  """As Gemma's, whose end of a turn is not its EOS."""
  template = CHAT_TEMPLATE.replace("eos_token + '\n'", repr(end))
  tokenizer = HFTokenizer(write_folder(tmp_path, chat_template=template))
  record = {"prompt": [USER], "chosen": [YES], "rejected": [NO]}
  [group] = groups_of([record], tokenizer, tmp_path)
  is_special = end.startswith("<")
  assert tokenizer.stop_ids == ((1, 4) if is_special else (1,))
  for response, text in zip(group[1:], ("the cat", "the dog ran"), strict=True):
    if is_special:
      assert response == [*encode(tokenizer, text), 4]
    else:
      assert response == [*encode(tokenizer, text + end), 1]


def test_plain_text_ends_with_the_eos(tmp_path):
  template = CHAT_TEMPLATE.replace("eos_token + '\n'", "'<|system|>'")
  folder = write_folder(tmp_path / "tokenizer", chat_template=template)
  [group] = groups_of([PAIR], HFTokenizer(folder), tmp_path)
  assert_one_bos_and_one_eos(group, 0, 1)


def test_tokens_that_only_the_config_adds_are_tokens(tmp_path):
  trained = folders.train_bytes()
  size = trained.get_vocab_size()
  added = {
    str(size + 1): {"content": "<two>", "special": True},
    str(size): {"content": "<one>", "special": True},
    "1": {"content": EOS, "special": True},
  }
  folder = write_folder(tmp_path, trained, added_tokens_decoder=added)
  tokenizer = HFTokenizer(folder)
  assert tokenizer.vocab_size == size + 2
  ids = encode(tokenizer, "<two><one>", is_rendered=True)
  assert ids == [size + 1, size]
  added[str(size + 5)] = {"content": "<far>", "special": True}
  write_folder(tmp_path, trained, added_tokens_decoder=added)
  with pytest.raises(ValueError, match=f"'<far>' has the id {size + 5}"):
    HFTokenizer(folder)


def test_invalid_date_is_refused(tmp_path):
  folder = write_folder(tmp_path)
  with pytest.raises(ValueError, match=r"template_date='today' must be a day"):
    HFTokenizer(folder, template_date="today")
  digests = {
    HFTokenizer(folder, template_date=date).digest
    for date in ("2024-07-26", "2024-07-27")
  }
  assert len(digests) == 2


def stories_run(real_data, tmp_path, tokenizer):
  config = default_config()
  config.policy.init = f"hf:{real_data / 'stories260k'}"
  config.data.tokenizer = tokenizer
  config.data.source = "synthetic:review_pairs:20"
  config.batch_size = config.eval.batch_size = 8
  return build_run(config, Workdir.at(tmp_path / "run"))


def test_a_vocabulary_that_the_embedding_pads_works(real_data, tmp_path):
  """Fewer ids than rows, as checkpoints round their embeddings up."""
  run = stories_run(real_data, tmp_path, write_folder(tmp_path / "tokenizer"))
  vocab_size = run.program.policy.config.vocab_size
  assert run.data.tokenizer.vocab_size < 340 < vocab_size == 512
  assert run.data.train.batch(0).tokens.max() < 340


def test_ids_beyond_the_embedding_are_refused(real_data, tmp_path):
  folder = str(real_data / "tokenizers" / "chatml_6400")
  with pytest.raises(ValueError, match="vocabulary has 512: the tokenizer is"):
    stories_run(real_data, tmp_path, folder)


@pytest.mark.parametrize(
  ("spec", "key"),
  [
    ("bytes", "chat_template"),
    ("bytes", "eos_token"),
    ("letters:3", "chat_template"),
  ],
)
def test_ids_without_a_vocabulary_refuse_its_settings(spec, key):
  with pytest.raises(ValueError, match=rf"data\.{key}='x' .*'{spec}' has none"):
    load_tokenizer(spec, **{key: "x"})


def test_the_probe_of_a_template_has_the_limit_of_the_records(tmp_path):
  """It renders twice before the first record, each up to its own cap."""
  endless = (
    "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}"
    "{% endfor %}"
  )
  folders.write_folder(tmp_path, chat_template=endless)
  request = Request([{"role": "user", "content": "a"}], False, {})
  start = time.monotonic()
  with pytest.raises(TimeoutError, match=r"data\.template_timeout_s=1\."):
    list(HFTokenizer(str(tmp_path)).render_batch([request], timeout_s=1.0))
  assert time.monotonic() - start < 8
