"""Encodes text as token ids: bytes, or any Hugging Face tokenizer.json.

Prompt and response are encoded separately and their ids joined. So no token
straddles their border.
"""

from collections.abc import Iterator, Mapping, Sequence
import functools
import hashlib
import json
import logging
import math
from typing import Any, Protocol

from etils import epath

from dpo_jax.data import tokenizer_json
from dpo_jax.data.alphabets import ByteTokenizer, LetterTokenizer
from dpo_jax.data.dialogues import Request
from dpo_jax.data.messages import Message, RecordError
from dpo_jax.data.spellings import Spellings
from dpo_jax.data.templates import ChatTemplate, parse_date
from dpo_jax.system.inputs import is_there

_LOG = logging.getLogger(__name__)

# Special tokens that a template may read.
_SPECIAL_TOKENS = tuple(
  f"{name}_token" for name in ("bos", "eos", "unk", "sep", "pad", "cls", "mask")
)
# Default date of strftime_now.
DEFAULT_DATE = "2024-07-26"
# Tokenizers in formats that are not read here.
_UNREAD_FILES = ("tokenizer.model", "spiece.model", "vocab.txt", "*.tiktoken")


class Tokenizer(Protocol):
  """Interface of a tokenizer.

  Attributes:
    vocab_size: upper bound of the ids, exclusive.
    bos_id: id put before every prompt, or None.
    eos_id: id put after every response that has no end of its own.
    pad_id: padding id that the tokenizer's files name, or None.
    stop_ids: ids that end a response when it is sampled, `eos_id` first.
    digest: digest of everything that decides the ids.
    parts: digests of its parts by name: `vocabulary`, `chat_template`.
    has_chat_template: whether `render` works.
    spellings: special tokens.
  """

  @property
  def vocab_size(self) -> int: ...
  @property
  def bos_id(self) -> int | None: ...
  @property
  def eos_id(self) -> int: ...
  @property
  def pad_id(self) -> int | None: ...
  @property
  def stop_ids(self) -> tuple[int, ...]: ...
  @property
  def digest(self) -> str: ...
  @property
  def parts(self) -> Mapping[str, str]: ...
  @property
  def has_chat_template(self) -> bool: ...
  @property
  def spellings(self) -> Spellings: ...

  def encode(
    self, texts: Sequence[str], *, is_rendered: bool, is_continuation: bool
  ) -> list[list[int]]:
    """Encodes texts, without adding BOS or EOS.

    Args:
      texts: texts.
      is_rendered: whether special tokens that the text spells become tokens,
        except those that `spellings` hid. In plain text they are letters, so
        that a user cannot write an EOS.
      is_continuation: whether the text follows a prompt. A tokenizer that marks
        the beginning of a text must not mark it then.
    """

  def decode(self, ids: Sequence[int]) -> str:
    """Decodes ids, without special tokens."""

  def special_token(self, token_id: int) -> str:
    """Returns the spelling of a special token, and "" for any other."""

  def render(
    self,
    messages: Sequence[Message],
    header: bool,
    extras: Mapping[str, Any] | None = None,
  ) -> str:
    """Renders messages, see `Request`, or raises RecordError."""

  def render_batch(
    self, requests: Sequence[Request], *, timeout_s: float = math.inf
  ) -> Iterator[str | RecordError]:
    """Renders conversations; see `templates.ChatTemplate.render`."""


class HFTokenizer:
  """Tokenizer of tokenizer.json, or of GPT-2's vocab.json and merges.txt.

  Other files of the folder are read as `transformers` reads them:
  tokenizer_config.json, special_tokens_map.json, and a model's config.json and
  generation_config.json for the ids of BOS and EOS.
  `json` is the text of tokenizer.json, `chat_template` the template's or None.
  """

  def __init__(
    self,
    folder: str,
    *,
    chat_template: str = "",
    eos_token: str = "",
    template_date: str = DEFAULT_DATE,
  ):
    """Reads the tokenizer.

    Args:
      folder: folder of the tokenizer.
      chat_template: path of a jinja file to use instead of the folder's.
      eos_token: spelling of the EOS, instead of the folder's.
      template_date: YYYY-MM-DD, date of a template's `strftime_now`.

    Raises:
      FileNotFoundError: a folder without a tokenizer.
      ValueError: no EOS token, or one that is not in the vocabulary; or an
        invalid date.
    """
    root = epath.Path(folder)
    config, names, model, generation = (
      tokenizer_json.JsonFile.read(root / f"{name}.json")
      for name in (
        "tokenizer_config",
        "special_tokens_map",
        "config",
        "generation_config",
      )
    )
    self.json = text = tokenizer_json.read_tokenizer(root, config)
    self._path = root / "tokenizer.json"
    self._encoder = tokenizer_json.Encoder(text, self._path)
    self._plain = self._encoder.plain
    # Not the number of tokens: a vocabulary may have holes.
    self.vocab_size = 1 + max(self._plain.get_vocab().values(), default=0)
    found = {k: config.token(k) or names.token(k) for k in _SPECIAL_TOKENS}
    self._special = {key: token for key, token in found.items() if token}
    self._fill_special("bos", model, generation)
    self._fill_special("eos", model, generation)
    if eos_token:
      self._special["eos_token"] = eos_token
    elif "eos_token" not in self._special and is_there(root / "merges.txt"):
      # GPT-2's files do not name it; its class in transformers does.
      self._special["eos_token"] = "<|endoftext|>"
    self.eos_id = self._find_eos(folder)
    self._encoder.name_special(self._special.values())
    self._continuing = self._make_continuing()
    self.spellings = self._encoder.spellings
    pad = self._special.get("pad_token")
    self.pad_id = self._plain.token_to_id(pad) if pad else None
    self._generation_stops = generation.ids("eos_token_id")
    self.bos_id = self._find_bos(folder, config)
    self.chat_template = tokenizer_json.find_template(
      root, config, chat_template
    )
    self.has_chat_template = self.chat_template is not None
    self._needs_parts: bool | None = None  # not known yet
    self._template = ChatTemplate(
      self.chat_template or "", self._special, date=parse_date(template_date)
    )
    vocabulary = [text, self._special, self.bos_id]
    decisive: list[Any] = [*vocabulary, self.chat_template]
    if self.has_chat_template:
      decisive += [self._generation_stops, template_date]
    self.digest = _digest(decisive)
    self.parts = {"vocabulary": _digest(vocabulary)}
    if self.has_chat_template:
      self.parts["chat_template"] = _digest(decisive[3:])

  def _make_continuing(self) -> tokenizer_json.Encoder:
    """Returns an encoder that does not mark a text's beginning."""
    text = tokenizer_json.without_beginnings(self.json)
    if not text:
      return self._encoder
    encoder = tokenizer_json.Encoder(text, self._path)
    encoder.name_special(self._special.values())
    return encoder

  @property
  def vocab(self) -> dict[str, int]:
    """Ids by token, added tokens included."""
    return self._plain.get_vocab()

  @property
  def special_tokens(self) -> dict[str, str]:
    """Spellings of special tokens by key, such as `bos_token`."""
    return dict(self._special)

  def _fill_special(self, name: str, *configs: tokenizer_json.JsonFile) -> None:
    """Adds the token `name`, bos or eos, that only a model's config names."""
    if f"{name}_token" in self._special:
      return
    for config in configs:
      for i in config.ids(f"{name}_token_id")[:1]:
        token = self._plain.id_to_token(i)
        if token is not None:
          self._special[f"{name}_token"] = token
          return

  def _find_eos(self, folder: str) -> int:
    name = self._special.get("eos_token")
    eos_id = self._plain.token_to_id(name) if name else None
    if eos_id is None:
      raise ValueError(
        f"{folder}: no EOS token ({name!r}). Responses must end with one: name"
        " it as data.eos_token, or as eos_token in tokenizer_config.json"
      )
    return eos_id

  def _find_bos(
    self, folder: str, config: tokenizer_json.JsonFile
  ) -> int | None:
    """Returns the id of the BOS that tokenizer.json puts before texts, or None.

    `add_bos_token` has no effect with a tokenizer.json, as in transformers 5.
    """
    name = self._special.get("bos_token")
    bos_id = self._plain.token_to_id(name) if name else None
    if bos_id is None:
      return None
    ids = self._plain.encode("a", add_special_tokens=True).ids
    if ids and ids[0] == bos_id:
      return bos_id
    if config.get("add_bos_token"):
      _LOG.warning(
        "%s: tokenizer_config.json says add_bos_token, and no step of"
        " tokenizer.json puts a BOS before a text: none is put, as in"
        " transformers",
        folder,
      )
    return None

  @functools.cached_property
  def stop_ids(self) -> tuple[int, ...]:
    """Ids that end a response: EOS, the model's others, the template's own.

    A checkpoint may name several (generation_config.json), and a template may
    end a turn with a token that none of its files calls an EOS.
    """
    known = (i for i in self._generation_stops if i < self.vocab_size)
    return tuple(dict.fromkeys([self.eos_id, *known, *self._find_turn_end()]))

  def _find_turn_end(self) -> list[int]:
    """Returns the id that ends an answer in the template, in a list, or []."""
    if not self.has_chat_template:
      return []
    asked = {"role": "user", "content": "a"}
    answer = {"role": "assistant", "content": "b"}
    try:
      text = self.render([asked, answer], False)
    except RecordError:
      return []  # errors are reported for real records
    ids = self.encode([text], is_rendered=True, is_continuation=False)[0]
    added = self._plain.get_added_tokens_decoder()
    for i in reversed(ids):
      if i in added and added[i].special:
        return [i]
      if self._plain.decode([i]).strip():
        return []
    return []

  def encode(
    self, texts: Sequence[str], *, is_rendered: bool, is_continuation: bool
  ) -> list[list[int]]:
    encoder = self._continuing if is_continuation else self._encoder
    return encoder.encode(texts, is_rendered=is_rendered)

  def decode(self, ids: Sequence[int]) -> str:
    return self._plain.decode(list(ids), skip_special_tokens=True)

  def special_token(self, token_id: int) -> str:
    token = self._plain.id_to_token(token_id)
    return token if token in self.spellings.tokens else ""

  def render(
    self,
    messages: Sequence[Message],
    header: bool,
    extras: Mapping[str, Any] | None = None,
  ) -> str:
    """Renders messages in a sandbox of its own process.

    Raises:
      RecordError: the template refuses these messages, or takes more than
        `templates.Caps`.
    """
    [text] = self.render_batch([Request(messages, header, extras or {})])
    if isinstance(text, RecordError):
      raise text
    return text

  def render_batch(
    self, requests: Sequence[Request], *, timeout_s: float = math.inf
  ) -> Iterator[str | RecordError]:
    if self._needs_parts is None:
      self._needs_parts = self._find_needs_parts(timeout_s)
    if self._needs_parts:
      requests = [
        request._replace(messages=[_in_parts(m) for m in request.messages])
        for request in requests
      ]
    return self._template.render(requests, timeout_s=timeout_s)

  def _find_needs_parts(self, timeout_s: float) -> bool:
    """Returns whether the template writes content only if it is a list."""
    message = {"role": "user", "content": "probe"}
    for one in (message, _in_parts(message)):
      asked = [Request([one], False, {})]
      [reply] = self._template.render(asked, timeout_s=timeout_s)
      if isinstance(reply, str) and "probe" in reply:
        return one is not message
    return False


def _in_parts(message: Message) -> Message:
  """Converts text content to a list of one part."""
  content = message.get("content")
  if not isinstance(content, str):
    return message
  return {**message, "content": [{"type": "text", "text": content}]}


def _digest(value: Any) -> str:
  return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def has_tokenizer(folder: epath.PathLike) -> bool:
  """Returns whether a folder has files that `HFTokenizer` reads."""
  root = epath.Path(folder)
  pair = is_there(root / "vocab.json") and is_there(root / "merges.txt")
  return pair or is_there(root / "tokenizer.json")


def unread_file(folder: epath.PathLike) -> str:
  """Returns the name of a tokenizer file in an unsupported format, or ''."""
  root = epath.Path(folder)
  if not root.exists():
    return ""
  found = [path.name for name in _UNREAD_FILES for path in root.glob(name)]
  return found[0] if found else ""


def load_tokenizer(
  spec: str,
  *,
  chat_template: str = "",
  eos_token: str = "",
  template_date: str = DEFAULT_DATE,
) -> Tokenizer:
  """Loads a tokenizer.

  Args:
    spec: 'bytes', 'letters:N', or the folder of a Hugging Face tokenizer.
    chat_template: path of a jinja file; "" for the folder's own.
    eos_token: spelling of the EOS; "" for the folder's own. That of letters is
      their last one, or "" where all texts have one length.
    template_date: YYYY-MM-DD, date of a template's `strftime_now`.

  Raises:
    ValueError: a template for bytes or letters, or an EOS that they cannot
      have; or a tokenizer that cannot be read.
    FileNotFoundError: no such folder or template.
  """
  kind, _, count = spec.partition(":")
  is_letters = kind == "letters" and count.isdecimal()
  if spec == "bytes" or is_letters:
    refused = {"data.chat_template": chat_template}
    if not is_letters:
      refused["data.eos_token"] = eos_token
    for key, value in refused.items():
      if value:
        raise ValueError(
          f"{key}={value!r} is for tokenizers with a vocabulary, and"
          f" data.tokenizer={spec!r} has none: leave {key} empty, or set"
          " data.tokenizer to a tokenizer's folder"
        )
    return (
      LetterTokenizer(int(count), eos_token) if is_letters else ByteTokenizer()
    )
  return HFTokenizer(
    spec,
    chat_template=chat_template,
    eos_token=eos_token,
    template_date=template_date,
  )
