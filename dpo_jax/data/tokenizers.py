"""Text to token ids: byte-level, or any Hugging Face tokenizer.json.

Prompt and response are encoded apart and their ids joined, so that no token
straddles the border and the split is exact by construction.
"""

from collections.abc import Mapping, Sequence
import functools
import hashlib
import json
from typing import Any, Protocol

from etils import epath
from jinja2 import TemplateError
from jinja2.sandbox import ImmutableSandboxedEnvironment
import tokenizers

from dpo_jax.data.examples import Message, RecordError

MAX_RENDERED_CHARS = 2_000_000


class Tokenizer(Protocol):
  """What the data pipeline asks of a tokenizer.

  Attributes:
    vocab_size: ids are below it.
    bos_id: put before every prompt, or None.
    eos_id: put after every response.
    digest: of everything that decides the ids.
    has_chat_template: whether `render` works.
  """

  vocab_size: int
  bos_id: int | None
  eos_id: int
  digest: str
  has_chat_template: bool

  def encode(
    self, texts: Sequence[str], *, is_rendered: bool, is_continuation: bool
  ) -> list[list[int]]:
    """Ids of each text, without BOS or EOS of the tokenizer's own.

    Args:
      texts: what to encode.
      is_rendered: whether special tokens spelled in the text are meant. In
        plain text they are letters: a user cannot write an EOS.
      is_continuation: whether the text follows a prompt, so that a tokenizer
        that marks the beginning of a text must not mark it.
    """

  def decode(self, ids: Sequence[int]) -> str:
    """Text of ids, special tokens left out."""

  def render(self, messages: Sequence[Message], header: bool) -> str:
    """Messages as text, by the chat template."""


class ByteTokenizer:
  """UTF-8 bytes are ids 0 to 255; 256 is BOS, 257 EOS."""

  vocab_size = 258
  bos_id = 256
  eos_id = 257
  digest = "bytes-1"
  has_chat_template = False

  def encode(
    self, texts: Sequence[str], *, is_rendered: bool, is_continuation: bool
  ) -> list[list[int]]:
    del is_rendered, is_continuation
    return [list(text.encode("utf-8")) for text in texts]

  def decode(self, ids: Sequence[int]) -> str:
    return bytes(i for i in ids if i < 256).decode("utf-8", "replace")

  def render(self, messages: Sequence[Message], header: bool) -> str:
    raise RecordError("the byte tokenizer has no chat template")


class LetterTokenizer:
  """The first letters of the alphabet, for tasks that can be enumerated.

  All texts of such a task have one length, so that no response needs an end:
  EOS is an id that the model's vocabulary does not have, and data.max_tokens
  cuts it off. So probabilities of all texts of that length sum to 1.
  """

  bos_id = None
  has_chat_template = False

  def __init__(self, num_letters: int):
    """Letters "a", "b", ... are ids 0, 1, ...

    Args:
      num_letters: of them, up to 26.

    Raises:
      ValueError: more letters than there are.
    """
    if not 1 < num_letters <= 26:
      raise ValueError(f"letters:{num_letters} must have 2 to 26 letters")
    self.vocab_size = self.eos_id = num_letters
    self.digest = f"letters-{num_letters}"

  def encode(
    self, texts: Sequence[str], *, is_rendered: bool, is_continuation: bool
  ) -> list[list[int]]:
    del is_rendered, is_continuation
    ids = [[ord(letter) - ord("a") for letter in text] for text in texts]
    for text, found in zip(texts, ids, strict=True):
      if not all(0 <= i < self.vocab_size for i in found):
        raise RecordError(
          f"{text!r} holds more than the first {self.vocab_size} letters"
        )
    return ids

  def decode(self, ids: Sequence[int]) -> str:
    return "".join(chr(i + ord("a")) for i in ids if i < self.vocab_size)

  def render(self, messages: Sequence[Message], header: bool) -> str:
    raise RecordError("the letters have no chat template")


class HFTokenizer:
  """A folder with tokenizer.json and, usually, tokenizer_config.json."""

  def __init__(self, folder: str, *, chat_template: str = ""):
    """Reads the tokenizer.

    Args:
      folder: holds tokenizer.json.
      chat_template: path of a jinja file to use instead of the folder's own.

    Raises:
      FileNotFoundError: no tokenizer.json.
      ValueError: no EOS token is named, or it is not in the vocabulary.
    """
    root = epath.Path(folder)
    path = root / "tokenizer.json"
    if not path.exists():
      raise FileNotFoundError(
        f"{path} does not exist; a tokenizer is a folder with tokenizer.json,"
        " or 'bytes'"
      )
    text = path.read_text()
    self._with_specials, self._plain = _read_tokenizers(text)
    continuing = _without_beginnings(text)
    self._continuing = (
      (self._with_specials, self._plain)
      if continuing is None
      else _read_tokenizers(continuing)
    )
    # Not the number of tokens: a vocabulary may have holes.
    self.vocab_size = 1 + max(self._plain.get_vocab().values())
    config_path = root / "tokenizer_config.json"
    config = {}
    if config_path.exists():
      config = json.loads(config_path.read_text())
    self._special = {
      key: _token_text(config[key])
      for key in ("bos_token", "eos_token", "unk_token", "pad_token")
      if config.get(key)
    }
    self.eos_id = self._find_eos(folder)
    self.bos_id = self._find_bos(config)
    self.chat_template = _find_template(root, config, chat_template)
    self.has_chat_template = self.chat_template is not None
    self.digest = hashlib.sha256(
      json.dumps(
        [text, self._special, self.bos_id, self.chat_template], sort_keys=True
      ).encode()
    ).hexdigest()

  def _find_eos(self, folder: str) -> int:
    name = self._special.get("eos_token")
    eos_id = self._plain.token_to_id(name) if name else None
    if eos_id is None:
      raise ValueError(
        f"{folder}: no EOS token ({name!r}). Responses must end with one: name"
        " it as eos_token in tokenizer_config.json"
      )
    return eos_id

  def _find_bos(self, config: Mapping[str, Any]) -> int | None:
    """The BOS that the tokenizer puts before a text, if it does so."""
    name = self._special.get("bos_token")
    bos_id = self._plain.token_to_id(name) if name else None
    if bos_id is None:
      return None
    ids = self._plain.encode("a", add_special_tokens=True).ids
    is_added = bool(ids) and ids[0] == bos_id
    return bos_id if is_added or config.get("add_bos_token") else None

  def encode(
    self, texts: Sequence[str], *, is_rendered: bool, is_continuation: bool
  ) -> list[list[int]]:
    with_specials, plain = (
      self._continuing
      if is_continuation
      else (self._with_specials, self._plain)
    )
    encodings = (with_specials if is_rendered else plain).encode_batch(
      list(texts), add_special_tokens=False
    )
    return [encoding.ids for encoding in encodings]

  def decode(self, ids: Sequence[int]) -> str:
    return self._plain.decode(list(ids), skip_special_tokens=True)

  def render(self, messages: Sequence[Message], header: bool) -> str:
    """Renders messages in a sandbox.

    Raises:
      RecordError: the template refuses these messages, or writes more than
        `MAX_RENDERED_CHARS`.
    """
    pieces, length = [], 0
    try:
      stream = _compile(self.chat_template).generate(
        messages=list(messages), add_generation_prompt=header, **self._special
      )
      for piece in stream:
        pieces.append(piece)
        length += len(piece)
        if length > MAX_RENDERED_CHARS:
          raise RecordError(
            f"the chat template wrote more than {MAX_RENDERED_CHARS} characters"
          )
    except RecordError:
      raise
    except Exception as error:  # a template is a program: it may raise any
      roles = [m.get("role") for m in messages]
      raise RecordError(
        f"the chat template fails on messages with the roles {roles}:"
        f" {type(error).__name__}: {error}"
      ) from error
    return "".join(pieces)


def _read_tokenizers(
  text: str,
) -> tuple[tokenizers.Tokenizer, tokenizers.Tokenizer]:
  """Two of a tokenizer.json: special tokens are meant, or are letters."""
  pair = (
    tokenizers.Tokenizer.from_str(text),
    tokenizers.Tokenizer.from_str(text),
  )
  pair[1].encode_special_tokens = True
  for one in pair:
    one.no_truncation()
    one.no_padding()
  return pair


def _without_beginnings(text: str) -> str | None:
  """The tokenizer.json for a text in the middle of a sequence.

  Sentencepiece's kind, and GPT-2's where it is told to, put a space before a
  text's first word that is not in the text.

  Args:
    text: a tokenizer.json.

  Returns:
    The same without that step, or None if it has none.
  """

  def strip(node: Any) -> Any:
    if isinstance(node, list):
      return [strip(n) for n in node if n.get("type") != "Prepend"]
    if not isinstance(node, Mapping) or node.get("type") == "Prepend":
      return None
    node = dict(node)
    if node["type"] == "Metaspace":
      node.pop("add_prefix_space", None)  # what older files have instead
      node["prepend_scheme"] = "never"
    elif node["type"] == "ByteLevel":
      node["add_prefix_space"] = False
    elif node["type"] == "Sequence":
      key = "normalizers" if "normalizers" in node else "pretokenizers"
      node[key] = strip(node[key])
    return node

  whole = json.loads(text)
  steps = {key: whole.get(key) for key in ("normalizer", "pre_tokenizer")}
  stripped = {key: strip(step) for key, step in steps.items()}
  return json.dumps(whole | stripped) if stripped != steps else None


def _token_text(value: Any) -> str:
  return value["content"] if isinstance(value, Mapping) else value


def _find_template(
  root: epath.Path, config: Mapping[str, Any], override: str
) -> str | None:
  if override:
    return epath.Path(override).read_text()
  if (root / "chat_template.jinja").exists():
    return (root / "chat_template.jinja").read_text()
  template = config.get("chat_template")
  if isinstance(template, list):  # several, by name
    by_name = {entry["name"]: entry["template"] for entry in template}
    return by_name.get("default")
  return template


@functools.lru_cache(maxsize=8)
def _compile(template: str) -> Any:
  """Compiles a template; it may read its arguments and nothing else."""

  def raise_exception(message: str) -> None:
    raise TemplateError(message)

  def tojson(value: Any, indent: int | None = None) -> str:
    return json.dumps(value, ensure_ascii=False, indent=indent)

  environment = ImmutableSandboxedEnvironment(
    trim_blocks=True,
    lstrip_blocks=True,
    extensions=["jinja2.ext.loopcontrols"],
  )
  environment.filters["tojson"] = tojson
  environment.globals["raise_exception"] = raise_exception
  return environment.from_string(template)


def load_tokenizer(spec: str, *, chat_template: str = "") -> Tokenizer:
  """'bytes', 'letters:N', or the folder of a Hugging Face tokenizer."""
  if spec == "bytes":
    return ByteTokenizer()
  kind, _, count = spec.partition(":")
  if kind == "letters" and count.isdecimal():
    return LetterTokenizer(int(count))
  return HFTokenizer(spec, chat_template=chat_template)
