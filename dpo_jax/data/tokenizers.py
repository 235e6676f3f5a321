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
    self._with_specials = tokenizers.Tokenizer.from_str(text)
    self._plain = tokenizers.Tokenizer.from_str(text)
    self._plain.encode_special_tokens = True
    for one in (self._with_specials, self._plain):
      one.no_truncation()
      one.no_padding()
    self.vocab_size = self._plain.get_vocab_size(with_added_tokens=True)
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
      json.dumps([text, self.eos_id, self.bos_id, self.chat_template]).encode()
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

  @functools.cached_property
  def _marks_beginnings(self) -> bool:
    """Whether a text's first word gets a space that is not in the text."""
    tokens = self._plain.encode("a", add_special_tokens=False).tokens
    return bool(tokens) and tokens[0].startswith("\u2581")

  def encode(
    self, texts: Sequence[str], *, is_rendered: bool, is_continuation: bool
  ) -> list[list[int]]:
    tokenizer = self._with_specials if is_rendered else self._plain
    prefix, skip = "", 0
    if is_continuation and self._marks_beginnings:
      # Encode behind an anchor and drop the anchor's ids: what is left is the
      # text as it stands in the middle of a sequence.
      prefix = "\n"
      skip = len(tokenizer.encode(prefix, add_special_tokens=False).ids)
    encodings = tokenizer.encode_batch(
      [prefix + text for text in texts], add_special_tokens=False
    )
    return [encoding.ids[skip:] for encoding in encodings]

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
    except (TemplateError, TypeError, KeyError) as error:
      roles = [m.get("role") for m in messages]
      raise RecordError(
        f"the chat template fails on messages with the roles {roles}:"
        f" {type(error).__name__}: {error}"
      ) from error
    return "".join(pieces)


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
  """'bytes', or the folder of a Hugging Face tokenizer."""
  if spec == "bytes":
    return ByteTokenizer()
  return HFTokenizer(spec, chat_template=chat_template)
