"""Writes a tokenizer as files that transformers opens."""

import json

from etils import epath
import tokenizers as hf_tokenizers

from dpo_jax.data.tokenizers import ByteTokenizer, HFTokenizer, Tokenizer


def save_tokenizer(tokenizer: Tokenizer, folder: epath.PathLike) -> None:
  """Writes tokenizer.json, tokenizer_config.json and any chat template.

  The template is written to chat_template.jinja.

  Args:
    tokenizer: `ByteTokenizer` or `HFTokenizer`.
    folder: existing folder to write to.

  Raises:
    ValueError: another tokenizer, which transformers could not hold.
  """
  folder = epath.Path(folder)
  config = {
    "tokenizer_class": "PreTrainedTokenizerFast",
    "clean_up_tokenization_spaces": False,
  }
  if isinstance(tokenizer, ByteTokenizer):
    text = _bytes_json()
    config |= {"bos_token": "<bos>", "eos_token": "<eos>"}
  elif isinstance(tokenizer, HFTokenizer):
    text = tokenizer.json
    config |= tokenizer.special_tokens
    if tokenizer.has_chat_template:
      (folder / "chat_template.jinja").write_text(tokenizer.chat_template)
  else:
    raise ValueError(
      f"{type(tokenizer).__name__} has no form in transformers: export runs"
      " with a tokenizer.json, or 'bytes'"
    )
  (folder / "tokenizer.json").write_text(text)
  (folder / "tokenizer_config.json").write_text(
    json.dumps(config, indent=2) + "\n"
  )


def _bytes_json() -> str:
  """Returns the text of a tokenizer.json that encodes like `ByteTokenizer`.

  Ids 0 to 255 are the bytes, 256 is <bos>, 257 <eos>. With special tokens
  added, a text starts with <bos>.
  """
  letters = _letters_of_bytes()
  vocab = {letters[byte]: byte for byte in range(256)}
  model = hf_tokenizers.models.BPE(vocab=vocab, merges=[])
  whole = hf_tokenizers.Tokenizer(model)
  whole.pre_tokenizer = hf_tokenizers.pre_tokenizers.ByteLevel(
    add_prefix_space=False, use_regex=False
  )
  whole.decoder = hf_tokenizers.decoders.ByteLevel()
  whole.add_special_tokens(["<bos>", "<eos>"])
  whole.post_processor = hf_tokenizers.processors.TemplateProcessing(
    single="<bos> $A", special_tokens=[("<bos>", ByteTokenizer.bos_id)]
  )
  return whole.to_str()


def _letters_of_bytes() -> list[str]:
  """Returns 256 characters: GPT-2's letter for each byte, by its value.

  A printable byte is its own letter. The other bytes take the characters from
  256 on, in ascending order.
  """
  printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
  others = [byte for byte in range(256) if byte not in printable]
  letters = {byte: chr(byte) for byte in printable}
  letters |= {byte: chr(256 + i) for i, byte in enumerate(others)}
  return [letters[byte] for byte in range(256)]
