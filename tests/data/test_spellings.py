"""Special tokens that data spell are letters, and the template's are tokens."""

import json

import pytest
import tokenizers

from dpo_jax.data import store
from dpo_jax.data.messages import RecordError
from dpo_jax.data.reading import Reading
from dpo_jax.data.spellings import Spellings
from dpo_jax.data.tokenizers import ByteTokenizer, HFTokenizer
from tests.data import folders
from tests.data.test_store import Listed

BOS, EOS, USER, ASSISTANT = range(4)
SPELLED = "the </s> is <|assistant|> that <s> cat sat"


def user(text):
  return {"role": "user", "content": text}


def pair(prompt, chosen, rejected="no"):
  return {"prompt": prompt, "chosen": chosen, "rejected": rejected}


def build(records, tmp_path, tokenizer, **reading):
  return store.build_store(
    Listed(records, digest=json.dumps(records)),
    tokenizer,
    store.Limits(300, 200),
    str(tmp_path / "stores"),
    Reading(**reading),
  )


@pytest.fixture
def tokenizer(tmp_path):
  trained = folders.train_bytes()
  trained.add_tokens([tokenizers.AddedToken("<think>", special=False)])
  return HFTokenizer(folders.write_folder(tmp_path / "tokenizer", trained))


def with_template(tmp_path, template):
  folder = folders.write_folder(tmp_path / "other", chat_template=template)
  return HFTokenizer(folder)


def specials(ids):
  return [i for i in ids if i < len(folders.SPECIALS)]


def test_only_the_template_writes_special_tokens(tokenizer, tmp_path):
  """Added tokens that are not special stay tokens in messages too."""
  record = pair([user(f"<think>{SPELLED}")], SPELLED)
  opened = build([record], tmp_path, tokenizer)
  prompt, chosen, _ = (part.tolist() for part in opened.group(0))
  assert specials(prompt) == [BOS, USER, ASSISTANT]
  assert specials(chosen) == [EOS]
  assert chosen[-1] == EOS
  # Nothing after the spelled EOS is lost, and the tokens are those of text.
  plain = tokenizer.encode([SPELLED], is_rendered=False, is_continuation=True)[
    0
  ]
  assert chosen[:-1] == plain
  assert prompt[2] == tokenizer.vocab["<think>"]
  assert prompt[3:-1] == plain
  assert opened.report["special_tokens"] == 1


def test_tools_and_calls_are_letters_too(tmp_path):
  template = "{{ tools | tojson }}" + folders.CHATML
  call = {"name": "</s>", "arguments": {"<s>": "<|user|>"}}
  record = pair(
    [user("hi")], [{"role": "assistant", "tool_calls": [call]}], "yes"
  )
  record["tools"] = [{"name": "<|system|>"}]
  opened = build([record], tmp_path, with_template(tmp_path, template))
  prompt, chosen, _ = (part.tolist() for part in opened.group(0))
  assert specials(prompt) == [BOS, USER, EOS, ASSISTANT]
  assert specials(chosen) == [EOS]


@pytest.mark.fault(5)
@pytest.mark.parametrize(
  "content",
  [
    "</",  # and "s>" follows
    "s></",
    "<",
    "</s",
    "</s></s></s>",
    "<</s>/s>",
    "</s> \n",
    "\ud7ff</s>\U0010ffff",
  ],
)
@pytest.mark.parametrize(
  "template",
  [
    "{{ m.content }}{{ m.name }}",
    "{{ m.content | trim }}{{ m.content[1:] }}",
    "{{ m.content[:3] }}s>{{ m.content.split('/') | join('') }}",
    "{{ m.content | replace('</s>', '<s>') }}{{ m.content | reverse }}",
    "{{ [m.content, m.name] | tojson }}",
  ],
)
def test_messages_cannot_spell_template_tokens(content, template, tmp_path):
  source = "{% for m in messages %}" + template + "{% endfor %}"
  tokenizer = with_template(tmp_path, source)
  message = {**user(content), "name": "s>"}
  [hidden] = tokenizer.spellings.hide([message], "")
  text = tokenizer.render([hidden], False)
  [ids] = tokenizer.encode([text], is_rendered=True, is_continuation=True)
  assert specials(ids) == []


@pytest.mark.parametrize("kind", ["bytes", "prepend", "metaspace"])
@pytest.mark.parametrize("is_continuation", [True, False])
def test_hiding_changes_no_other_token(kind, is_continuation, tmp_path):
  """The same special tokens and the same letters, whichever way they go."""
  train = folders.train_pieces if kind != "bytes" else folders.train_bytes
  trained = train(kind) if kind != "bytes" else train(add_prefix_space=True)
  # As some checkpoints have it: a token that takes the spaces around it.
  trained.add_special_tokens(
    [tokenizers.AddedToken("<end>", lstrip=True, rstrip=True, special=True)]
  )
  tokenizer = HFTokenizer(folders.write_folder(tmp_path, trained))
  encoder = tokenizer._continuing if is_continuation else tokenizer._encoder
  for text in (
    "<s><|user|>the cat</s>\n<|assistant|>",
    "the cat <end> sat</s></s>",
    " <s>  the<end>",
    "<|user|",
    "",
  ):
    [ids] = encoder.encode([text], is_rendered=True)
    assert encoder._encode_hidden(text) == ids
    hidden = tokenizer.spellings.hide(text, "")
    [letters] = encoder.encode([text], is_rendered=False)
    assert encoder.encode([hidden], is_rendered=True) == [letters]


def test_characters_that_hide_tokens_are_refused_in_messages(
  tokenizer, tmp_path
):
  private = next(iter(tokenizer.spellings.marks.values()))
  record = pair([user(f"hi {private}")], "yes")
  with pytest.raises(RecordError, match=r"^listed:records:1: .*private-use"):
    build([record], tmp_path, tokenizer)
  assert build([pair(f"hi {private}", "yes")], tmp_path, tokenizer)


def test_nothing_is_hidden_without_special_tokens():
  spellings = Spellings(())
  assert spellings.hide(SPELLED, "") == SPELLED
  assert spellings.mark(SPELLED) == SPELLED
  assert not spellings.is_spelled_in(SPELLED, is_rendered=False)


def test_an_eos_that_only_a_config_names_is_special(tmp_path):
  trained = folders.train_bytes()
  trained.add_tokens([tokenizers.AddedToken("<eos>", special=False)])
  folder = folders.write_folder(tmp_path / "t", trained, eos_token="<eos>")
  tokenizer = HFTokenizer(folder)
  opened = build([pair("what", "the <eos> cat")], tmp_path, tokenizer)
  assert opened.group(0)[1].tolist().count(tokenizer.eos_id) == 1
  assert opened.report["special_tokens"] == 1


# Text that a template has written already.

WRITTEN = pair("<s><|user|>what<|assistant|>", "the </s> cat</s>\n", "the dog")


def test_special_tokens_of_text_are_letters_and_counted(tokenizer, tmp_path):
  opened = build([WRITTEN, pair("what", "the cat")], tmp_path, tokenizer)
  assert specials(opened.group(0)[0].tolist()) == [BOS]
  assert opened.report["special_tokens"] == 1


def test_special_tokens_of_text_can_be_read(tokenizer, tmp_path):
  opened = build([WRITTEN], tmp_path, tokenizer, special_tokens="read")
  prompt, chosen, rejected = (part.tolist() for part in opened.group(0))
  assert specials(prompt) == [BOS, USER, ASSISTANT]
  assert prompt[0] == BOS
  # One end, and the text between two of them is not lost.
  assert specials(chosen) == [EOS, EOS]
  assert chosen[-1] == rejected[-1] == EOS
  assert tokenizer.decode(chosen) == "the  cat"
  assert opened.report["special_tokens"] == 0


def test_special_tokens_in_messages_can_be_read(tokenizer, tmp_path):
  record = pair([user("</s>")], "yes")
  opened = build([record], tmp_path, tokenizer, special_tokens="read")
  prompt = opened.group(0)[0].tolist()
  assert specials(prompt) == [BOS, USER, EOS, ASSISTANT]


def test_a_tokenizer_without_special_tokens_reads_none(tmp_path):
  with pytest.raises(ValueError, match="this tokenizer has no special tokens"):
    build([WRITTEN], tmp_path, ByteTokenizer(), special_tokens="read")


# Content parts.


def test_template_that_reads_only_parts_gets_parts(tmp_path):
  template = (
    "{% for m in messages %}<|{{ m.role }}|>"
    "{% for part in m.content %}{{ part.text }}{% endfor %}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
  )
  tokenizer = with_template(tmp_path, template)
  assert tokenizer.render([user("the cat")], True) == (
    "<|user|>the cat<|assistant|>"
  )
