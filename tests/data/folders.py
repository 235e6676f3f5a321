"""Tokenizer folders that tests train on a few sentences."""

import json
import pathlib

import tokenizers
from tokenizers import (
  decoders,
  models,
  normalizers,
  pre_tokenizers,
  processors,
  trainers,
)

BOS, EOS = "<s>", "</s>"
SPECIALS = (BOS, EOS, "<|user|>", "<|assistant|>", "<|system|>")
SENTENCES = (
  "the answer is that the cat sat on the mat",
  "the answer is no\n\nand the dog ran away",
  "what is the answer\n\nwhat does the cat say",
) * 8
# Writes BOS, EOS and a line break after EOS itself, as many templates do.
CHAT_TEMPLATE = (
  "{{ bos_token }}"
  "{% for m in messages %}"
  "{{ '<|' + m['role'] + '|>' + m['content'] }}"
  "{% if m['role'] == 'assistant' %}{{ eos_token + '\n' }}{% endif %}"
  "{% endfor %}"
  "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)


def train_bytes(*, add_prefix_space: bool = False) -> tokenizers.Tokenizer:
  """Byte-level BPE of GPT-2's kind; BOS is id 0, EOS id 1."""
  tokenizer = tokenizers.Tokenizer(models.BPE())
  tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(
    add_prefix_space=add_prefix_space
  )
  tokenizer.decoder = decoders.ByteLevel()
  trainer = trainers.BpeTrainer(
    vocab_size=330,
    special_tokens=list(SPECIALS),
    initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    show_progress=False,
  )
  tokenizer.train_from_iterator(SENTENCES, trainer)
  return tokenizer


def train_pieces(kind: str) -> tokenizers.Tokenizer:
  """BPE of sentencepiece's kind, as older ("prepend") or newer files say it."""
  tokenizer = tokenizers.Tokenizer(models.BPE(unk_token="<unk>"))
  if kind == "prepend":
    tokenizer.normalizer = normalizers.Sequence(
      [normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")]
    )
  else:
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(
      prepend_scheme="always", split=False
    )
  trainer = trainers.BpeTrainer(
    vocab_size=120,
    special_tokens=[*SPECIALS, "<unk>"],
    show_progress=False,
  )
  tokenizer.train_from_iterator(SENTENCES, trainer)
  return tokenizer


def write_folder(
  folder: pathlib.Path,
  tokenizer: tokenizers.Tokenizer | None = None,
  *,
  puts_bos: bool = True,
  **config,
) -> str:
  """Writes a tokenizer's folder.

  Args:
    folder: folder to make.
    tokenizer: tokenizer; None: a byte-level one.
    puts_bos: whether the tokenizer puts a BOS before a text.
    **config: other values of tokenizer_config.json; None leaves a key out.

  Returns:
    The folder, for HFTokenizer.
  """
  folder.mkdir(parents=True, exist_ok=True)
  tokenizer = tokenizer or train_bytes()
  config = {
    "bos_token": BOS,
    "eos_token": EOS,
    "chat_template": CHAT_TEMPLATE,
  } | config
  if puts_bos:
    bos = config["bos_token"]
    tokenizer.post_processor = processors.TemplateProcessing(
      single=f"{bos} $A", special_tokens=[(bos, tokenizer.token_to_id(bos))]
    )
  tokenizer.save(str(folder / "tokenizer.json"))
  (folder / "tokenizer_config.json").write_text(
    json.dumps({k: v for k, v in config.items() if v is not None})
  )
  return str(folder)


# ChatML, as Qwen and others write it; EOS is what ends a turn.
CHATML = (
  "{% for m in messages %}"
  "{{ '<|' + m.role + '|>' + (m.content or '') }}"
  "{% for call in m.tool_calls or [] %}{{ '@' + call.name }}{% endfor %}"
  "{{ eos_token + '\n' }}"
  "{% endfor %}"
  "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)
