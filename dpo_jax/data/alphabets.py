"""Tokenizers without a vocabulary of their own: bytes, and a few letters."""

from collections.abc import Iterator, Mapping, Sequence
import math
from typing import Any

from dpo_jax.data.dialogues import Request
from dpo_jax.data.messages import Message, RecordError
from dpo_jax.data.spellings import Spellings


class _WithoutTemplate:
  """Tokenizer without a chat template: refuses messages."""

  digest: str
  has_chat_template = False
  spellings = Spellings(())

  @property
  def parts(self) -> dict[str, str]:
    """Returns {"vocabulary": digest}, see `Tokenizer.parts`."""
    return {"vocabulary": self.digest}

  def render(
    self,
    messages: Sequence[Message],
    header: bool,
    extras: Mapping[str, Any] | None = None,
  ) -> str:
    raise self._refusal()

  def render_batch(
    self, requests: Sequence[Request], *, timeout_s: float = math.inf
  ) -> Iterator[str | RecordError]:
    del timeout_s
    return iter([self._refusal()] * len(requests))

  def _refusal(self) -> RecordError:
    return RecordError(f"the tokenizer {self.digest!r} has no chat template")


class ByteTokenizer(_WithoutTemplate):
  """UTF-8 bytes are ids 0 to 255; 256 is BOS, 257 EOS."""

  vocab_size = 258
  bos_id = 256
  eos_id = 257
  pad_id = None
  stop_ids = (257,)
  digest = "bytes-1"

  def encode(
    self, texts: Sequence[str], *, is_rendered: bool, is_continuation: bool
  ) -> list[list[int]]:
    del is_rendered, is_continuation
    return [list(text.encode("utf-8")) for text in texts]

  def decode(self, ids: Sequence[int]) -> str:
    return bytes(i for i in ids if i < 256).decode("utf-8", "replace")

  def special_token(self, token_id: int) -> str:
    return {self.bos_id: "<bos>", self.eos_id: "<eos>"}.get(token_id, "")


class LetterTokenizer(_WithoutTemplate):
  """Tokenizer of the first letters of the alphabet, for enumerable tasks.

  Without an EOS all texts of such a task have one length. EOS is then an id
  outside the model's vocabulary, and data.max_tokens cuts it off. The
  probabilities of all texts of that length therefore sum to 1.
  """

  bos_id = None
  pad_id = None

  def __init__(self, num_letters: int, eos_token: str = ""):
    """Assigns ids 0, 1, ... to the letters "a", "b", ...

    Args:
      num_letters: number of letters, 2 to 26.
      eos_token: the last letter, if it ends a response and is in no text.

    Raises:
      ValueError: another number of letters, or another EOS.
    """
    if not 1 < num_letters <= 26:
      raise ValueError(f"letters:{num_letters} must have 2 to 26 letters")
    last = chr(ord("a") + num_letters - 1)
    if eos_token not in ("", last):
      raise ValueError(
        f"data.eos_token={eos_token!r}: the EOS of letters:{num_letters} is its"
        f" last letter, {last!r}, or '' for texts of one length"
      )
    self.vocab_size = num_letters
    self.eos_id = num_letters - len(eos_token)
    self.stop_ids = (self.eos_id,)
    self.digest = f"letters-{num_letters}" + ("-eos" if eos_token else "")

  def encode(
    self, texts: Sequence[str], *, is_rendered: bool, is_continuation: bool
  ) -> list[list[int]]:
    del is_rendered, is_continuation
    ids = [[ord(letter) - ord("a") for letter in text] for text in texts]
    for text, found in zip(texts, ids, strict=True):
      if not all(0 <= i < self.eos_id for i in found):
        raise RecordError(
          f"{text!r} holds more than the first {self.eos_id} letters"
        )
    return ids

  def decode(self, ids: Sequence[int]) -> str:
    return "".join(chr(i + ord("a")) for i in ids if i < self.eos_id)

  def special_token(self, token_id: int) -> str:
    return "<eos>" if token_id == self.eos_id else ""
